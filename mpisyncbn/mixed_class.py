"""A name that pickled models refer to: ``mpisyncbn.mixed_class.rebuild``."""

from .convert.mixed_class import rebuild

__all__ = ["rebuild"]
