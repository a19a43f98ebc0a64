"""Running statistics of a whole data set, which its ranks hold parts of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from . import exchange, uneven
from .arguments import check_module
from .batch_stats import BatchStats
from .comm import transport
from .comm.communicator import Communicator
from .comm.groups import AnyGroup, resolve
from .convert import Synchronized
from .fingerprint import LayerCall, compare_calls
from .kernels import kernels_for
from .merging import merge_two
from .running_stats import record_batch

__all__ = ["update_bn"]

Batch: TypeAlias = "Tensor | Sequence[Tensor]"
Device: TypeAlias = "torch.device | str | int | None"


def update_bn(
    loader: Iterable[Batch],
    model: nn.Module,
    device: Device = None,
    *,
    process_group: AnyGroup = None,
) -> None:
    """Set the running statistics of a model to those of all data of all ranks, exactly.

    ``torch.optim.swa_utils.update_bn`` over ranks, for weights that were averaged (SWA, EMA) or that
    should be evaluated with precise statistics (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm").
    The mean and the unbiased variance are those of all values that reach a layer, whatever batches and
    ranks they come in: torch averages the statistics of batches, with one weight for all. The model runs
    in training mode, so that a synchronized layer normalizes each batch with the statistics of all ranks.

    Args:
        loader: batches of this rank: tensors, or tuples and lists whose first item is the input of the
            model. Ranks may have batches of different sizes, and different numbers of batches, also 0.
        model: with batch norms of any kind, synchronized or local. If DistributedDataParallel or
            torch.compile wraps it, the model inside runs. ``num_batches_tracked`` becomes the largest
            number of batches that a rank had.
        device: where the input is moved to; None: it stays where it is.
        process_group: the ranks that hold the data of local layers: an mpi4py communicator, a
            Communicator, or None for the world. Synchronized layers have groups of their own.

    If anything raises, no statistics are changed. A layer that no value reached keeps its own. If tqdm
    is installed and stderr is a terminal, rank 0 shows a bar.

    Raises:
        TypeError: ``model`` is no module, or a layer's arguments are refused.
        CollectiveMismatchError: on every rank, if the ranks have layers of other sizes.
        MPISyncBNError: the layers have several groups, and MPI is without MPI_THREAD_MULTIPLE.

    Collective: every rank of the groups must call.
    """
    check_module(model)
    model = _unwrapped(model)
    layers = {
        name: _LayerMoments(layer, process_group)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        return
    groups = dict.fromkeys(layer.group for layer in layers.values())
    for group in groups:
        _compare_models(group, layers)
    batches = _run(_with_bar(loader, resolve(process_group)), model, device, list(layers.values()))
    most = {group: _allreduce_max(group, batches) for group in groups}
    for name, layer in layers.items():
        layer.merge(name)
    for layer in layers.values():
        layer.store(most[layer.group])


def _compare_models(group: Communicator, layers: dict[str, _LayerMoments]) -> None:
    """Raise CollectiveMismatchError on every rank if the ranks have layers of other sizes."""
    sizes = [len(layer.mean) for layer in layers.values() if layer.group is group]
    name = f"update_bn for layers of {', '.join(map(str, sizes))} channels"
    with group.lock:
        group.ready()
        compare_calls(group, LayerCall(name, "statistics", sum(sizes), "float64"))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's wrappers: hooks are not for compiled graphs, and DDP adds collectives."""
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:
        model = cast(nn.Module, model._orig_mod if "_orig_mod" in model._modules else model.module)
    return model


class _LayerMoments:
    """The moments of all values that a layer has seen."""

    def __init__(self, layer: _BatchNorm, process_group: AnyGroup) -> None:
        self.layer = layer
        self.group = resolve(layer.communicator if isinstance(layer, Synchronized) else process_group)
        self.count = 0
        self.mean, self.var = np.zeros((2, layer.num_features))

    def add_batch(
        self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: object
    ) -> None:
        """Add the values of a batch. This is a hook: the layer has accepted its input by now."""
        x = (inputs[0] if inputs else named["input"]).detach()
        count, mean, m2 = kernels_for(x).local_moments(x)
        if count == 0:
            return
        *means, m2 = transport.to_host(*mean, m2) if mean.ndim == 2 else transport.to_host(mean, m2)
        batch = count, np.sum(means, axis=0), m2 / count
        self.count, self.mean, self.var = merge_two((self.count, self.mean, self.var), batch)

    def merge(self, name: str) -> None:
        """Merge the moments of all ranks. Collective: every rank of the layer's group must call."""
        call = LayerCall(f"update_bn, {name}", "statistics", len(self.mean), "float64")
        moments = self.count, np.stack([self.mean, np.zeros_like(self.mean)]), self.var * self.count
        self.count, self.mean, self.var = exchange.merge_moments(self.group, call, *moments)

    def store(self, batches: int) -> None:
        """Set the running statistics, if any value has reached the layer."""
        if self.count:
            stats = BatchStats(self.mean, self.var, self.var, self.count)
            running = self.layer.running_mean, self.layer.running_var, None
            if record_batch(*running, stats, 1.0) and self.layer.num_batches_tracked is not None:
                self.layer.num_batches_tracked.fill_(batches)


def _run(loader: Iterable[Batch], model: nn.Module, device: Device, layers: Sequence[_LayerMoments]) -> int:
    """Let the layers see all batches. Returns the number of batches of this rank."""
    batches, groups = 0, uneven.groups_of(model)
    if len(groups) > 1:
        uneven.check_threads("update_bn")
    with _training(model, layers), uneven.joining(groups), torch.no_grad():
        for batch in loader:
            x = cast(Tensor, batch[0] if isinstance(batch, (list, tuple)) else batch)
            model(x if device is None else x.to(device))
            batches += 1
    uneven.serve(groups)
    return batches


@contextmanager
def _training(model: nn.Module, layers: Sequence[_LayerMoments]) -> Iterator[None]:
    """Set training mode, without updates of running statistics. Restore all modes at the end."""
    modes = {module: module.training for module in model.modules()}
    tracking = {each.layer: each.layer.track_running_stats for each in layers}
    handles = [each.layer.register_forward_hook(each.add_batch, with_kwargs=True) for each in layers]
    try:
        model.train()
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for layer, tracked in tracking.items():
            layer.track_running_stats = tracked


def _allreduce_max(group: Communicator, number: int) -> int:
    """The largest of the numbers of all ranks. Collective: every rank of the group must call."""
    with group.collective("counting the batches of update_bn"):
        return group.comm.allreduce(number, group.largest)


def _with_bar(loader: Iterable[Batch], group: Communicator) -> Iterable[Batch]:
    """The loader, with a progress bar on rank 0 if tqdm is installed and stderr is a terminal."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    return tqdm(loader, desc="update_bn", unit="batch", leave=False, disable=group.rank > 0 or None)
