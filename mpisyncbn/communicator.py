"""A name that pickled models refer to: ``mpisyncbn.communicator.resolve(None)`` is the world."""

from .comm.communicator import _unpickled_world as resolve

__all__ = ["resolve"]
