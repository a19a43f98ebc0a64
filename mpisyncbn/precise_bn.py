"""Running statistics of a whole data set, which its ranks hold parts of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from . import exchange, uneven
from .activations import AnyActivation
from .arguments import check_module
from .batch_stats import BatchStats
from .comm import transport
from .comm.communicator import Communicator
from .comm.groups import AnyGroup, resolve
from .convert import Synchronized
from .errors import on_rank
from .fingerprint import LayerCall, compare_calls
from .kernels import kernels_for
from .merging import merge_two
from .running_stats import are_finite, record_batch

__all__ = ["update_bn"]

Batch: TypeAlias = Any  # an input of the model, or a tuple or list whose first item is one
Device: TypeAlias = "torch.device | str | int | None"


def update_bn(
    loader: Iterable[Batch],
    model: nn.Module,
    device: Device = None,
    *,
    process_group: AnyGroup = None,
) -> None:
    """Set the running statistics of a model to those of all data of all ranks, exactly.

    It is ``torch.optim.swa_utils.update_bn`` over ranks. It is for averaged weights (SWA, EMA), and
    for precise statistics (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm"). The mean and
    the unbiased variance are those of all values that a layer normalizes, on all ranks. (torch
    averages the statistics of batches, all with one weight.) The model runs in training mode, so
    that a synchronized layer normalizes each batch with the statistics of all ranks.

    Args:
        loader: batches of this rank: inputs of the model, or tuples and lists whose first item is
            one. Ranks may have batches of other sizes, and more or fewer of them, also 0.
        model: with batch norms of any kind, synchronized or local. It runs eagerly if it is
            compiled, and without DistributedDataParallel's broadcasts. ``num_batches_tracked``
            becomes the largest number of batches that a rank had.
        device: where the input is moved to; None: it stays where it is.
        process_group: the ranks that hold the data of local layers: an mpi4py communicator, a
            Communicator, a process group of torch.distributed, or None for the world. Synchronized
            layers have groups of their own.

    If anything raises, no statistics are changed. A layer keeps its own if no value reached it, if
    ``model.train()`` leaves it in evaluation, or if a value is not finite; then a RuntimeWarning
    names the layer. If tqdm is installed and stderr is a terminal, rank 0 shows a bar. A rank
    without more batches waits for the others, at most MPISYNCBN_TIMEOUT seconds. Calls of
    ``sync_batch_norm`` in the model need as many batches on each rank, unless a layer has their
    group.

    Raises:
        TypeError: ``model`` is no module or has a layer of torch.nn.SyncBatchNorm, an input cannot
            be moved to the device, or a layer refuses its arguments.
        CollectiveMismatchError: on every rank, if the ranks have layers of other sizes.
        MPISyncBNError: the layers have several groups, and MPI is without MPI_THREAD_MULTIPLE.

    Collective: every rank of the groups must call.
    """
    check_module(model)
    layers = {
        name: _LayerMoments(layer, process_group)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        return
    groups = list(dict.fromkeys(layer.group for layer in layers.values()))
    if len(groups) > 1:
        uneven.check_threads("update_bn")
    for group in groups:
        _compare_models(group, layers)
    with _training(model, layers.values()), uneven.announcing(groups), torch.no_grad():
        batches = _run(_with_bar(loader, resolve(process_group)), model, device)
    uneven.serve(groups)
    for group in groups:
        group.forget_names()  # a rank without batches has not named the same layers
    most = {group: _allreduce_max(group, batches) for group in groups}
    for name, layer in layers.items():
        layer.merge(name)
    for name, layer in layers.items():
        layer.store(most[layer.group], name)


def _compare_models(group: Communicator, layers: dict[str, _LayerMoments]) -> None:
    """Raise CollectiveMismatchError on every rank if the ranks have layers of other sizes."""
    sizes = [len(layer.mean) for layer in layers.values() if layer.group is group]
    name = f"update_bn for layers of {', '.join(map(str, sizes))} channels"
    with group.lock:
        group.ready()
        compare_calls(group, LayerCall(name, "statistics", sum(sizes), "float64"))


class _LayerMoments:
    """The moments of all values that a layer normalizes."""

    def __init__(self, layer: _BatchNorm, process_group: AnyGroup) -> None:
        if isinstance(layer, nn.SyncBatchNorm):
            raise TypeError(
                f"expected no layer of torch.nn.SyncBatchNorm{on_rank()}: convert the model first"
            )
        self.layer = layer
        self.group = resolve(layer.communicator if isinstance(layer, Synchronized) else process_group)
        self.count = 0
        self.mean, self.var = np.zeros((2, layer.num_features))

    def add_batch(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the values of a batch that the layer has accepted, those where the mask is true."""
        x = x.detach()
        count, mean, m2 = kernels_for(x, mask).local_moments(x)
        if count == 0:
            return
        *means, m2 = transport.to_host(*mean, m2) if mean.ndim == 2 else transport.to_host(mean, m2)
        batch = count, np.sum(means, axis=0), m2 / count
        self.count, self.mean, self.var = merge_two((self.count, self.mean, self.var), batch)

    def batch_norm(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: AnyActivation = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize as the layer does, and add its batch. This replaces ``_batch_norm``."""
        layer = cast(Synchronized, self.layer)
        y = type(layer)._batch_norm(layer, x, residual, activation, mask)
        if self.layer.training:
            self.add_batch(x, mask)
        return y

    def merge(self, name: str) -> None:
        """Merge the moments of all ranks. Collective: every rank of the layer's group must call."""
        call = LayerCall(f"update_bn, {name}", "statistics", len(self.mean), "float64")
        moments = self.count, np.stack([self.mean, np.zeros_like(self.mean)]), self.var * self.count
        self.count, self.mean, self.var = exchange.merge_moments(self.group, call, *moments)

    def store(self, batches: int, name: str) -> None:
        """Set the running statistics, if any value has reached the layer, and all are finite."""
        if not self.count:
            return
        stats = BatchStats(self.mean, self.var, self.var, self.count)
        running_mean, running_var = self.layer.running_mean, self.layer.running_var
        if not are_finite(stats, running_var):
            warnings.warn(
                f"update_bn did not change layer {name!r}: the mean or variance of its input is not finite "
                f"in the dtype of its running statistics{on_rank()}",
                RuntimeWarning,
                stacklevel=3,  # the caller of update_bn
            )
            return
        record_batch(running_mean, running_var, None, stats, 1.0)
        if self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.fill_(batches)


class _LocalLayers(TorchFunctionMode):
    """A mode that measures local layers in ``F.batch_norm``, which their forward calls."""

    def __init__(self, layers: Iterable[_LayerMoments]) -> None:
        super().__init__()
        self._layers = {id(each.layer.running_mean): each for each in layers}

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Tensor | None, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is not cast(object, F.batch_norm):
            return func(*args, **kwargs)
        # batch_norm itself passes its arguments to this mode in this way, however it was called.
        x, running_mean, _ = args
        layer = self._layers.get(id(running_mean))
        if layer is None or x is None or not kwargs["training"]:
            return func(*args, **kwargs)
        y = func(x, None, None, **kwargs)
        layer.add_batch(x)
        return y


def _run(loader: Iterable[Batch], model: nn.Module, device: Device) -> int:
    """Run the model on all batches of this rank. Returns their number."""
    batches = 0
    for batch in loader:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        if device is not None:
            if not hasattr(x, "to"):
                raise TypeError(
                    f"expected a batch with a method to(), to move it to {device}, got {type(x).__name__}"
                    f"{on_rank()}: move it yourself, or pass (batch['x'] for batch in loader)"
                )
            x = x.to(device)
        model(x)
        batches += 1
    return batches


@contextmanager
def _training(model: nn.Module, layers: Collection[_LayerMoments]) -> Iterator[None]:
    """Measure the layers in training mode, eagerly, without updates. Then undo it."""
    modes = {module: module.training for module in model.modules()}
    synchronized = [each for each in layers if isinstance(each.layer, Synchronized)]
    flags: list[tuple[nn.Module, str]] = [(each.layer, "track_running_stats") for each in synchronized]
    # DistributedDataParallel would broadcast buffers in its first forward.
    wrappers = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
    flags += [(wrapper, "require_forward_param_sync") for wrapper in wrappers]
    before = [(module, name, getattr(module, name)) for module, name in flags]
    counts = [each.layer.num_batches_tracked for each in layers]
    counted = [None if count is None else count.clone() for count in counts]
    try:
        model.train()
        for module, name in flags:
            setattr(module, name, False)
        for each in synchronized:
            vars(each.layer)["_batch_norm"] = each.batch_norm
        with torch.compiler.set_stance("force_eager"), _LocalLayers(layers):
            yield
    finally:
        for each in synchronized:
            vars(each.layer).pop("_batch_norm", None)
        for module, name, value in before:
            setattr(module, name, value)
        for count, number in zip(counts, counted, strict=True):
            if count is not None and number is not None:
                count.copy_(number)
        model.train(modes[model])  # a model's own train() may do more than set modes
        for module, mode in modes.items():
            module.training = mode


def _allreduce_max(group: Communicator, number: int) -> int:
    """The largest of the numbers of all ranks. Collective: every rank of the group must call."""
    value = np.array([number], float)
    with group.collective("counting the batches of update_bn"):
        group.comm.Allreduce(group.in_place, value, op=group.max_op)
    return int(value[0])


def _with_bar(loader: Iterable[Batch], group: Communicator) -> Iterable[Batch]:
    """The loader, with a progress bar on rank 0 if tqdm is installed and stderr is a terminal."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    return tqdm(loader, desc="update_bn", unit="batch", leave=False, disable=group.rank > 0 or None)
