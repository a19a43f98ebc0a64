"""Kernel modules, the layouts of their arguments, and the checks that hold for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpisyncbn.activations import activation_of
from mpisyncbn.kernels import ActivationContext, Array, aten, aten_cuda, generic, native
from support.activations import MORE, TORCHS, far_from_kinks
from support.device import GPU, OnDevice, needs_triton
from support.device import cuda as triton_kernels
from support.oracle import distance, oracle

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

cpu: Any = native()
needs_native = pytest.mark.skipif(cpu is None, reason="the native kernels were not built")
cuda: Any = triton_kernels and OnDevice(triton_kernels)
# The same checks must hold for each of these modules of kernels.
HOST = [
    pytest.param(cpu, id="cpu", marks=needs_native),
    pytest.param(aten, id="aten"),
    pytest.param(cuda, id="cuda", marks=[needs_triton, pytest.mark.untraced]),  # minutes, in an interpreter
]
EVERY = [
    *HOST,
    pytest.param(OnDevice(aten_cuda), id="aten_cuda"),
    pytest.param(generic, id="generic"),
]
LEVELS = range(4)  # instruction sets; for one that the processor lacks, its best is taken
# The error of one rounding to the dtype, with some room for the errors of sums.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Smaller shapes for Triton's interpreter. It takes a thousand times as long for a tile of any size.
FOR_THE_INTERPRETER = {
    (64, 300): (64, 70),
    (1, 16, 70, 70): (1, 2, 70, 70),
    (2, 130, 7, 7): (2, 9, 7, 7),
    (40, 2000, 4): (40, 9, 4),
    (1, 2, 200000): (1, 2, 40000),
    (20000, 3): (5000, 3),
    (16, 40, 30, 30): (16, 4, 30, 30),
    (40000, 3): (5000, 3),
}


@contextmanager
def native_settings(level=3, threads=1, stream_from=4 << 20) -> Iterator[None]:
    """A context with these settings of the native kernels.

    ``level`` is the highest instruction set. Outputs of at least ``stream_from`` bytes are written
    past the cache.
    """
    if cpu is None:
        yield
        return
    before = torch.get_num_threads()
    cpu._cpu.set_highest_level(level)
    cpu._cpu.stream_from(stream_from)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        cpu._cpu.set_highest_level(3)
        cpu._cpu.stream_from(4 << 20)
        torch.set_num_threads(before)


def interpreted(kernels) -> bool:
    return kernels is cuda and not GPU


def in_full(kernels: ParameterSet) -> ParameterSet:
    """The parameter for a module of kernels, marked ``full`` if it is Triton's: it is slow."""
    marks = (
        [*kernels.marks, pytest.mark.full("Triton's interpreter")] if kernels.id == "cuda" else kernels.marks
    )
    return pytest.param(*kernels.values, id=kernels.id, marks=marks)


def as_tensor(array) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))


class Reference(NamedTuple):
    """The results of the four kernels in float64, and the scales of their errors."""

    count: int
    mean: Tensor
    m2: Tensor
    invstd: Tensor
    y: Tensor
    sum_dy: Tensor
    sum_dy_xmu: Tensor
    dx: Tensor
    sums_scale: Tensor
    dx_scale: Tensor


def reference(x, dy, weight, bias, eps=1e-5) -> Reference:
    x, dy = x.double(), dy.double()
    found, view = oracle(x, dy, weight, bias, eps, MPI.COMM_SELF), (1, -1) + (1,) * (x.ndim - 2)
    invstd = (found.var + eps).rsqrt()
    sums_scale = (dy.abs() * (x - found.mean.view(view)).abs()).sum((0, *range(2, x.ndim)))
    dx_scale = dy * (invstd if weight is None else invstd * weight.double()).view(view)
    sums = found.dbias, found.dweight / invstd
    m2 = found.var * found.count
    return Reference(found.count, found.mean, m2, invstd, found.y, *sums, found.dx, sums_scale, dx_scale)


def vectors_for(kernels, x) -> Callable[[torch.Tensor], Array]:
    """Return a function that converts float64 vectors to a module's type for ``x``."""
    tensors = kernels is generic and isinstance(x, torch.Tensor)
    return (lambda v: v) if tensors else (lambda v: v.numpy())


@np.errstate(all="ignore")  # as in the callers of kernels
def check(kernels, x, dy, weight, bias, eps=1e-5) -> None:
    """Compare the results of a module's four kernels with those in float64."""
    near = vectors_for(kernels, x)
    tensor = as_tensor
    tx, tdy = tensor(x), tensor(dy)
    tw, tb = (None if v is None else tensor(v) for v in (weight, bias))
    expected = reference(tx, tdy, tw, tb, eps)
    count, mean, m2, invstd, y, sum_dy, sum_dy_xmu, dx, sums_scale, dx_scale = expected
    tolerance = TOLERANCE[tx.dtype]
    std = (m2 / count).sqrt()

    got_count, got_mean, got_m2 = kernels.local_moments(x)
    if tx.dtype == torch.float64:
        assert got_mean.shape == (2, x.shape[1])
        got_mean = got_mean.sum(0)
    assert got_count == count
    # relative to std: a mean that is right to float32 only is not right enough
    assert ((tensor(got_mean) - mean).abs() / (std + 1e-300)).max() < max(tolerance, 1e-7) * 4
    assert ((tensor(got_m2) - m2).abs() / (m2 + 1e-300)).max() < (
        1e-11 if tx.dtype == torch.float64 else 1e-6
    )

    got = kernels.normalize(x, near(mean), near(invstd), weight, bias)
    assert isinstance(got, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
    assert got.dtype == x.dtype
    assert distance(tensor(got), y) < tolerance * 4

    got_dy, got_dy_xmu, dz = kernels.backward_reduce(dy, x, near(mean), near(invstd))
    assert dz.shape == dy.shape
    assert ((tensor(got_dy) - sum_dy).abs() / tdy.double().abs().sum()).max() < 1e-6
    assert ((tensor(got_dy_xmu) - sum_dy_xmu).abs() / sums_scale).max() < 1e-6

    got = kernels.backward_elementwise(
        dz, x, near(mean), near(invstd), weight, near(sum_dy / count), near(sum_dy_xmu / count)
    )
    assert got.dtype == x.dtype
    # dx may cancel to nothing: its scale is that of its terms
    assert distance(tensor(got), dx, dx_scale) < tolerance * 4


@np.errstate(all="ignore")
def check_fused(kernels, x, dy, weight, bias, residual, eps=1e-5, activation="relu") -> None:
    """Compare kernels that include an activation and a residual with separate steps in float64."""
    near = vectors_for(kernels, x)
    count, mean, _, invstd, y, *_ = reference(*(as_tensor(v) for v in (x, dy, weight, bias)), eps)
    tolerance = TOLERANCE[as_tensor(x).dtype]
    z = y if residual is None else y + as_tensor(residual).double()
    vectors = near(mean), near(invstd)
    function = activation_of(activation)
    expected, derivative = value_and_derivative(z, activation)
    got = kernels.normalize(x, *vectors, weight, bias, residual, function)
    assert isinstance(got, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
    assert distance(as_tensor(got), expected, z) < tolerance * 4
    if residual is not None:
        got_sum = kernels.normalize(x, *vectors, weight, bias, residual)
        assert distance(as_tensor(got_sum), z) < tolerance * 4

    saved = (got, None) if function.sign_decides else (None, residual)
    context = ActivationContext(function, weight, bias, *((None, None) if residual is None else saved))
    # Within rounding of a kink either derivative is right, so dy is 0 there.
    sure = far_from_kinks(z, activation, 1e-5 + tolerance * 4 * z.abs().max())
    tdy = as_tensor(dy) * sure
    dy = tdy if isinstance(dy, torch.Tensor) else tdy.numpy()
    dz = tdy.double() * derivative
    _, _, _, _, _, sum_dz, sum_dz_xmu, dx, sums_scale, dx_scale = reference(
        as_tensor(x), dz, as_tensor(weight), as_tensor(bias), eps
    )
    # A module may round the gradient that it stores. That of ReLU is dy or 0, so it is exact.
    sums = 1e-6 if activation == "relu" else max(1e-6, tolerance)
    got_dz, got_dz_xmu, stored = kernels.backward_reduce(dy, x, *vectors, context)
    assert ((as_tensor(got_dz) - sum_dz).abs() / (dz.abs().sum() + 1e-300)).max() < sums
    assert ((as_tensor(got_dz_xmu) - sum_dz_xmu).abs() / (sums_scale + 1e-300)).max() < sums
    if residual is not None:
        assert (
            distance(as_tensor(stored), dz, tdy) < (0.0 if activation == "relu" else tolerance * 4) + 1e-300
        )
    got = kernels.backward_elementwise(
        stored, x, *vectors, weight, near(sum_dz / count), near(sum_dz_xmu / count), context
    )
    assert distance(as_tensor(got), dx, dx_scale) < tolerance * 4


def value_and_derivative(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The value and the derivative of an activation at ``z``, by torch's module."""
    leaf = z.detach().clone().requires_grad_()
    y = (TORCHS | MORE)[activation](leaf)
    y.sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad
