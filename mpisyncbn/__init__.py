"""Synchronized batch normalization over MPI communicators.

Importing this package imports neither torch nor CuPy and does not initialize MPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import config
from .comm import ancestors
from .errors import CollectiveMismatchError, CollectiveTimeoutError, MPISyncBNError, TransportError
from .liveness import exits

if TYPE_CHECKING:
    from . import functional
    from . import lightning as lightning
    from .autograd import sync_batch_norm
    from .batchnorm import SyncBatchNorm
    from .comm.communicator import Communicator
    from .comm.groups import new_group, new_subgroups
    from .comm.nodes import local_rank
    from .convert import revert_sync_batchnorm, set_process_group
    from .convert.registry import register_conversion
    from .distributed import init_process_group
    from .precise_bn import update_bn

    convert_sync_batchnorm = SyncBatchNorm.convert_sync_batchnorm

__version__ = "0.2.0"

__all__ = [
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Communicator",
    "MPISyncBNError",
    "SyncBatchNorm",
    "TransportError",
    "convert_sync_batchnorm",
    "functional",
    "init_process_group",
    "local_rank",
    "new_group",
    "new_subgroups",
    "register_conversion",
    "revert_sync_batchnorm",
    "set_process_group",
    "sync_batch_norm",
    "update_bn",
]

if config.launched():
    exits.install()
ancestors.guard()

# The module of each name, imported when the name is first used.
_HOME = {
    "Communicator": "comm.communicator",
    "SyncBatchNorm": "batchnorm",
    "convert_sync_batchnorm": "batchnorm:SyncBatchNorm",
    "distributed": "",
    "functional": "",
    "init_process_group": "distributed",
    "lightning": "",
    "local_rank": "comm.nodes",
    "new_group": "comm.groups",
    "new_subgroups": "comm.groups",
    "register_conversion": "convert.registry",
    "revert_sync_batchnorm": "convert",
    "set_process_group": "convert",
    "sync_batch_norm": "autograd",
    "update_bn": "precise_bn",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, owner = _HOME[name].partition(":")
    value: object
    try:
        value = import_module(f".{module or name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"mpisyncbn.{name} needs torch: pip install torch") from error
    if module:
        value = getattr(getattr(value, owner) if owner else value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
