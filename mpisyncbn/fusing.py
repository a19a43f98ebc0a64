"""Names that pickles of models have: ``FusedActivation``, and before that ``FusedReLU``."""

from .convert.fusing import FusedActivation, FusedReLU

__all__ = ["FusedActivation", "FusedReLU"]
