"""Time the four kernels beside a copy of memory: section kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mpisyncbn
from mpisyncbn import exchange
from mpisyncbn.batch_stats import invstd_of
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import kernels_for

from .cases import verb_cases
from .layers import data
from .peers import copies
from .timing import copy_fraction, interleave

# The least number of tensors that each kernel has to read and write.
TENSORS = {"local_moments": 1, "normalize": 2, "backward_reduce": 2, "backward_elementwise": 3}


def kernels(quick: bool) -> Iterator[dict[str, Any]]:
    for case in verb_cases(quick):
        x, dy = data(case)
        x = x.detach()
        with torch.no_grad():
            figures = interleave({**calls(x, dy), **copies(x)}, seconds=0.4 if quick else 2.5)
        yield {
            **case._asdict(),
            "bytes": case.bytes,
            "us": figures,
            "of the copy limit": {
                kernel: copy_fraction(figures, kernel, tensors) for kernel, tensors in TENSORS.items()
            },
        }


def calls(x: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    """Return functions that call each kernel with the arguments of a training step.

    Collective: every rank must call.
    """
    kernels = kernels_for(x)
    channels = x.shape[1]
    weight, bias = torch.ones(channels), torch.zeros(channels)
    group = mpisyncbn.Communicator()
    call = LayerCall("benchmark", "forward", channels, "float32")
    count, mean, var = exchange.merge_moments(group, call, *kernels.local_moments(x))
    invstd = invstd_of(var, 1e-5)
    sum_dy, sum_dy_xmu, _ = kernels.backward_reduce(dy, x, mean, invstd)
    group.free()
    arguments = mean, invstd
    means = sum_dy / count, sum_dy_xmu / count
    return {
        "local_moments": lambda: kernels.local_moments(x),
        "normalize": lambda: kernels.normalize(x, *arguments, weight, bias),
        "backward_reduce": lambda: kernels.backward_reduce(dy, x, *arguments),
        "backward_elementwise": lambda: kernels.backward_elementwise(dy, x, *arguments, weight, *means),
    }
