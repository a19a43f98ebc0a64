"""A name that pickles of models have: ``mpisyncbn.mixed_class.rebuild``."""

from .convert.mixed_class import rebuild

__all__ = ["rebuild"]
