"""Synchronized batch norm in Lightning's Trainer, by a plugin.

    Trainer(strategy="ddp", plugins=[mpisyncbn.lightning.LayerSync()])

It works with both packages, ``lightning`` and ``pytorch_lightning``, and imports neither.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from .batchnorm import SyncBatchNorm
from .comm.groups import AnyGroup
from .comm.runtime import mpi
from .convert import revert, synchronized_layers
from .distributed import init_process_group
from .errors import on_rank

__all__ = ["LayerSync"]

_PACKAGES = "lightning.pytorch", "pytorch_lightning"


class LayerSync:
    """A plugin by which Lightning's Trainer synchronizes batch norm over MPI while it fits a model.

    The Trainer converts the model in place before DistributedDataParallel wraps it, and reverts it
    to its exact classes after the fit. Layers that are synchronized already stay so. With this
    plugin ``Trainer(sync_batchnorm=True)`` is allowed and adds nothing: the layers are these, not
    torch's.

    In a job of several ranks the constructor calls ``mpisyncbn.init_process_group()``, so that
    ``strategy="ddp"`` takes backend ``mpi4py``. It leaves the backend to Lightning where torch has
    a GPU, since gradients on GPUs belong to NCCL. A group that the program has made itself stays.

    Args:
        process_group, name, fuse_relu, fuse_activation, memory_efficient: as
            ``mpisyncbn.convert_sync_batchnorm`` takes them.

    Raises:
        ImportError: neither of Lightning's packages has been imported.
        MPISyncBNError: as ``mpisyncbn.init_process_group`` raises it.

    Collective in a job of several ranks: every rank must make one.
    """

    def __init__(
        self,
        process_group: AnyGroup = None,
        *,
        name: str | None = None,
        fuse_relu: bool = False,
        fuse_activation: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        if not _register():
            raise ImportError(
                f"LayerSync is for Lightning's Trainer, and neither of {', '.join(_PACKAGES)} has been "
                f"imported{on_rank()}: import one of them first, pip install lightning"
            )
        self.process_group, self.name = process_group, name
        self.fuse_relu, self.fuse_activation = fuse_relu, fuse_activation
        self.memory_efficient = memory_efficient
        self._kept: set[nn.Module] = set()
        # The constructor does this, because the Trainer initializes torch.distributed before it
        # calls apply(), and uses a group that exists. A change of torch's table of default backends
        # would also work, but it is global, and Lightning would then need an address and a port.
        if mpi().COMM_WORLD.size > 1 and not dist.is_initialized() and not torch.cuda.is_available():
            init_process_group()

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers of ``model`` in place, and return it. Not collective."""
        self._kept = set(synchronized_layers(model))
        return SyncBatchNorm.convert_sync_batchnorm(
            model,
            self.process_group,
            name=self.name,
            fuse_relu=self.fuse_relu,
            fuse_activation=self.fuse_activation,
            memory_efficient=self.memory_efficient,
        )

    def revert(self, model: nn.Module) -> nn.Module:
        """Give the layers that ``apply`` converted their exact classes again. Not collective.

        Returns ``model``. Layers that were synchronized before stay so.
        """
        return revert(model, self._kept)


def _register() -> bool:
    """Make LayerSync a plugin for each imported package of Lightning. Return whether any is.

    The Trainer accepts instances of its package's own class LayerSync. That is an abstract base
    class, so this class can be registered as a virtual subclass. It is registered with
    TorchSyncBatchNorm, the only subclass that the Trainer accepts beside ``sync_batchnorm=True``.
    """
    modules = [sys.modules.get(f"{package}.plugins.layer_sync") for package in _PACKAGES]
    for module in filter(None, modules):
        module.TorchSyncBatchNorm.register(LayerSync)
    return any(modules)


_register()  # LightningCLI asks whether the class is a plugin before it makes one
