"""Point 8 of scripts/gpu_check: our kernels on small tensors, under compute-sanitizer."""

from __future__ import annotations

from typing import Any

import torch

import mpisyncbn
from mpisyncbn.comm.groups import resolve
from mpisyncbn.kernels import Activation, ActivationContext, Kind, kernels_for

from .context import Context
from .correctness import laid_out

_SHAPES = [(40, 6, 64, 48), (3, 5, 7, 9), (2, 130, 5, 5), (50, 33)]


def kernels(context: Context, shapes: int) -> None:
    """Run the kernels on shapes with edges everywhere, and on one whose sums are in parts."""
    module = kernels_for(torch.zeros(1, 1, device=context.device))
    context.records.holds("kernels of Triton", module.__name__.endswith(".cuda"), module.__name__)
    for shape in _SHAPES[: 2 if context.quick else shapes]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in ("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",):
                x = context.there(laid_out(torch.randn(shape).to(dtype), layout))
                context.records.holds(f"{shape} {dtype} {layout}", _all_verbs(module, x))


def layers(context: Context) -> None:
    """Run layers whose kernels native code starts: its arguments are made by hand. One rank."""
    prepared = resolve(None).prepared  # what native code has started: forward and backward of each kind
    for shape in _SHAPES[: 2 if context.quick else None]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for activation in (None, "relu"):
                vectors = torch.float64 if dtype == torch.float64 else torch.float32
                layer = mpisyncbn.SyncBatchNorm(
                    shape[1], activation=activation, device=context.device, dtype=vectors
                )
                x = context.there(torch.randn(shape).to(dtype)).requires_grad_()
                before = len(prepared)
                y = layer(x, x.detach() if activation else None)
                y.backward(torch.ones_like(y))
                found = y, x.grad, layer.weight.grad, layer.running_var
                finite = all(bool(tensor.isfinite().all()) for tensor in found)
                context.records.holds(f"{shape} {dtype} {activation}", finite and len(prepared) == before + 2)


def _all_verbs(module: Any, x: torch.Tensor) -> bool:
    """Run all four kernels. Return whether results are finite: the sanitizer finds the rest."""
    vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = bias = torch.ones(x.shape[1], dtype=vectors, device=x.device)
    count, mean, m2 = module.local_moments(x)
    mean = mean.sum(0) if mean.ndim == 2 else mean
    invstd = (m2 / count + 1e-5).rsqrt()
    found = [module.normalize(x, mean, invstd, weight, bias)]
    y = module.normalize(x, mean, invstd, weight, bias, x, Activation(Kind.RELU))
    fused = [ActivationContext(Activation(Kind.RELU), weight, bias, saved) for saved in (None, y)]
    for backward_context in (None, *fused):
        sum_dy, sum_dy_xmu, dz = module.backward_reduce(x, x, mean, invstd, backward_context)
        means = sum_dy / count, sum_dy_xmu / count
        found.append(module.backward_elementwise(dz, x, mean, invstd, weight, *means, backward_context))
    return all(bool(tensor.isfinite().all()) for tensor in (y, *found))
