"""Names that pickled models refer to: ``FusedActivation``, and ``FusedReLU``, its older name."""

from .convert.fusing import FusedActivation, FusedReLU

__all__ = ["FusedActivation", "FusedReLU"]
