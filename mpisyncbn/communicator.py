"""A name that pickles of models have: ``mpisyncbn.communicator.resolve`` of None is the world."""

from .comm.communicator import _unpickled_world as resolve

__all__ = ["resolve"]
