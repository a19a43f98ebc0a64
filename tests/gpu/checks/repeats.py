"""Point 4 of scripts/gpu_check: the same bits each time and on every rank, and torch's results."""

from __future__ import annotations

import torch

import mpisyncbn
from support.whole_batch import distance

from .context import Context
from .records import summary
from .reference import channels_last, digest, random

_TIMES = 20
_SHAPE = (8, 96, 24, 24)


def bits(context: Context, kernels: str) -> None:
    """Check that a repeated step gives the same bits, and that all ranks agree. Collective."""
    try:
        serving = context.served_by(kernels)
    except ImportError as error:
        context.records.skip(kernels, str(error))
        return
    with serving:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in ("contiguous", "channels_last"):
                name = f"{str(dtype).rpartition('.')[2]}, {layout}"
                with context.records.trying(name):
                    _bits(context, name, dtype, layout)


def _bits(context: Context, name: str, dtype: torch.dtype, layout: str) -> None:
    records, times = context.records, 5 if context.quick else _TIMES
    for same in (False, True):
        seed = 0 if same else context.rank
        x, dy = (random(_SHAPE, 10 * seed + number, mean=2.0).to(dtype) for number in (1, 2))
        if layout == "channels_last":
            x, dy = channels_last(x), channels_last(dy)
        there, dy = context.there(x), context.there(dy)
        found, running = [], []
        for _ in range(times):
            layer = mpisyncbn.SyncBatchNorm(_SHAPE[1], device=context.device, dtype=dtype)
            leaf = there.clone(memory_format=torch.preserve_format).requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            found.append(digest(y, leaf.grad, layer.weight.grad, layer.bias.grad))
            running.append(digest(layer.running_mean, layer.running_var))
        everywhere = context.world.allgather((found[0], running[0]))
        records.holds(f"{name}: {times} times, {'one shard' if same else 'shards'}", len(set(found)) == 1)
        if same:
            records.holds(f"{name}: y and gradients on all ranks", len({each for each, _ in everywhere}) == 1)
        records.holds(
            f"{name}: running statistics on all ranks, {'one shard' if same else 'shards'}",
            len(set(running)) == 1 and len({each for _, each in everywhere}) == 1,
        )


def peer(context: Context) -> None:
    """Compare with torch.nn.SyncBatchNorm over gloo, which refuses CPU tensors. Collective."""
    from benchmarks.peers import gloo

    if not torch.distributed.is_gloo_available():
        context.records.skip("torch.nn.SyncBatchNorm over gloo", "this torch has no gloo")
        return
    with gloo():
        for layout in ("contiguous", "channels_last"):
            for dtype in (torch.float32, torch.bfloat16):
                _compare(context, f"{str(dtype).rpartition('.')[2]}, {layout}", dtype, layout)


def _compare(context: Context, name: str, dtype: torch.dtype, layout: str) -> None:
    shape = (_SHAPE[0] + context.rank, *_SHAPE[1:])
    x, dy = (random(shape, 10 * context.rank + number, mean=1.0).to(dtype) for number in (3, 4))
    if layout == "channels_last":
        x, dy = channels_last(x), channels_last(dy)

    def step(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        leaf = context.there(x).requires_grad_()
        y = layer(leaf)
        y.backward(context.there(dy))
        gradients = leaf.grad, layer.weight.grad, layer.bias.grad
        return y, *gradients, layer.running_mean, layer.running_var

    mine = step(mpisyncbn.SyncBatchNorm(_SHAPE[1], device=context.device))
    try:
        torchs = step(torch.nn.SyncBatchNorm(_SHAPE[1], device=context.device))
    except Exception as error:  # any error: torch over gloo may not support this
        context.records.skip(f"{name}: torch.nn.SyncBatchNorm over gloo", summary(error))
        return
    bar = 1e-5 if dtype == torch.float32 else 8e-3
    # torch rounds sums over planes to the input's dtype; point 3 checks that ours are not
    of_sums = bar if layout == "contiguous" else 1e-5
    labels = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
    for label, theirs, ours in zip(labels, torchs, mine, strict=True):
        # Large terms cancel in these sums, so their scale is that of the terms.
        scale = dy.double().abs().sum().item() / _SHAPE[1] if label in ("dweight", "dbias") else None
        most = bar if label in ("y", "dx") else of_sums if label in ("dweight", "dbias") else 1e-5
        context.records.at_most(f"{name}: {label}", distance(ours, theirs, scale), most)
