"""Point 7 of scripts/gpu_check: autocast, checkpoints, torch.compile, waits, captures."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import mpisyncbn
from mpisyncbn.errors import MPISyncBNError
from support.whole_batch import distance, whole_batch

from .context import Context
from .records import summary
from .reference import random

_CHANNELS = 24


def features(context: Context) -> None:
    """Check all features of this module except torch.compile. Collective."""
    for name, check in (
        ("autocast", _autocast),
        ("checkpoint", _checkpoint),
        ("momentum=None", _cumulative),
        ("no hidden wait", _no_hidden_wait),
        ("capture", _capture),  # last, because a failed capture may affect later checks
    ):
        with context.records.trying(name):
            check(context)


def _layer(context: Context, **options: Any) -> Any:
    return mpisyncbn.SyncBatchNorm(_CHANNELS, device=context.device, **options)


def _batch(context: Context, seed: int) -> torch.Tensor:
    return random((4 + context.rank, _CHANNELS, 8, 8), 10 * seed + context.rank, mean=0.5).float()


def _autocast(context: Context) -> None:
    dtype = torch.float16 if context.on_gpu else torch.bfloat16
    net = torch.nn.Sequential(torch.nn.Conv2d(_CHANNELS, _CHANNELS, 3), _layer(context)).to(context.device)
    seen: list[torch.Tensor] = []
    net[1].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    x = context.there(_batch(context, 1)).requires_grad_()
    with torch.autocast(context.device.type, dtype=dtype):
        y = net(x)
    y.float().square().mean().backward()
    context.synchronize()
    found = seen[0].cpu()
    ones = torch.ones(_CHANNELS)
    expected = whole_batch(context.world, found, torch.zeros_like(found), ones, 0 * ones, net[1].eps)
    context.records.holds("autocast: dtype", y.dtype == found.dtype == dtype, f"{found.dtype} {y.dtype}")
    context.records.at_most("autocast: y", distance(y, expected.y), 8e-3)
    context.records.holds("autocast: gradient", bool(x.grad.isfinite().all()) and bool(x.grad.any()))


def _checkpoint(context: Context) -> None:
    found = []
    for again in (False, True):
        layer = _layer(context, momentum=0.5)
        x = context.there(_batch(context, 2)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.backward(context.there(_batch(context, 3)))
        found.append((y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    context.synchronize()
    labels = ("y", "dx", "dweight", "running_mean", "running_var")
    for label, plain, checkpointed in zip(labels, *found, strict=True):
        context.records.at_most(f"checkpoint: {label}", distance(checkpointed, plain.detach()), 0.0)


def _cumulative(context: Context) -> None:
    layer = _layer(context, momentum=None)
    means = []
    for seed in (4, 5, 6):
        x = _batch(context, seed)
        layer(context.there(x))
        ones = torch.ones(_CHANNELS)
        means.append(whole_batch(context.world, x, torch.zeros_like(x), ones, ones, layer.eps).mean)
    expected = torch.stack(means).mean(0)
    context.records.at_most("momentum=None: running_mean", distance(layer.running_mean, expected), 1e-6)
    context.records.holds("momentum=None: count", int(layer.num_batches_tracked) == 3)


def _no_hidden_wait(context: Context) -> None:
    """Check that torch finds no wait for the device. It does not see waits for events."""
    if not context.on_gpu:
        context.records.skip("no hidden wait", "it needs a GPU")
        return
    for options in ({}, {"momentum": None}, {"activation": "relu"}):
        layer = _layer(context, **options)
        x, dy = (context.there(_batch(context, seed)) for seed in (7, 8))
        layer(x.clone().requires_grad_()).backward(dy)  # the first call compiles
        problem = ""
        try:
            torch.cuda.set_sync_debug_mode("error")
            layer(x.requires_grad_()).backward(dy)
        except RuntimeError as error:
            problem = summary(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        context.synchronize()
        context.records.holds(f"no hidden wait {options or ''}".strip(), not problem, problem)


def _capture(context: Context) -> None:
    if not context.on_gpu:
        context.records.skip("capture", "it needs a GPU")
        return
    layer = _layer(context)
    x = context.there(_batch(context, 9))
    layer(x)
    context.synchronize()
    said = "was captured"
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            layer(x)
    except MPISyncBNError as error:
        said = str(error)
    except Exception as error:
        said = summary(error)
    context.records.holds("capture: refused", "cannot be captured in a CUDA graph" in said, said)
    y = layer(x)
    context.synchronize()
    context.records.holds("capture: the layer works afterwards", bool(y.isfinite().all()))


def compiled(context: Context) -> None:
    """Compare torch.compile of a layer and its neighbours with eager mode. Collective."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # an MPI rank should not start a pool of processes
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    backend = "inductor" if has_compiler else "aot_eager"
    context.records.figure("back end", backend)
    layers = [_layer(context), _layer(context)]

    def block(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer(x * 2)) + 1

    fast = torch.compile(block, fullgraph=True, dynamic=False, backend=backend)
    found = []
    for run, layer in zip((block, fast), layers, strict=True):
        leaf = context.there(_batch(context, 10)).requires_grad_()
        for _ in range(2):
            leaf.grad = layer.weight.grad = None
            y = run(layer, leaf)
            y.backward(context.there(_batch(context, 11)))
        found.append((y, leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    context.synchronize()
    labels = ("y", "dx", "dweight", "running_mean", "running_var")
    for label, plain, other in zip(labels, *found, strict=True):
        context.records.at_most(f"compiled: {label}", distance(other, plain.detach()), 1e-5)
