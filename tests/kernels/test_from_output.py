"""Backward kernels that read the output in place of the input, for host memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mpisyncbn.kernels import NO_ACTIVATION, Activation, ActivationContext, Kind, aten, generic
from mpisyncbn.kernels.from_output import FromOutput, channels_to_keep
from support.kernels import LEVELS, cpu, native_settings, needs_native, vectors_for
from support.oracle import distance, layouts
from support.ranks import no_exchange

pytestmark = no_exchange
SHAPE = (4, 11, 5, 9)


def there(value: object) -> object:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def here(value: object) -> object:
    return value.numpy() if isinstance(value, Tensor) and value.ndim == 1 else value


# The generic module with NumPy vectors, which FromOutput passes and expects.
by_vectors = SimpleNamespace(
    backward_reduce=lambda *given: tuple(map(here, generic.backward_reduce(*map(there, given)))),
    backward_elementwise=lambda *given: generic.backward_elementwise(*map(there, given)),
)
MODULES = [
    pytest.param(cpu, id="cpu", marks=needs_native),
    pytest.param(aten, id="aten"),
    pytest.param(by_vectors, id="generic"),
]


def check(kernels, x, dy, weight, bias, activation, chosen) -> None:
    """Check that sums and dx from the output are those from the input in float64."""
    wide, wide_dy = x.double(), dy.double()
    over = (0, 2, 3)
    mean, invstd = wide.mean(over), (wide.var(over, correction=0) + 1e-5).rsqrt()
    y = generic.normalize(x, mean, invstd, weight, bias, None, activation)
    context = ActivationContext(activation, weight, bias) if activation != NO_ACTIVATION else None
    wide_parameters = [None if v is None else v.double() for v in (weight, bias)]
    wide_context = context and ActivationContext(activation, *wide_parameters)
    sum_dz, products, dz = generic.backward_reduce(wide_dy, wide, mean, invstd, wide_context)
    means = sum_dz / x[:, 0].numel(), products / x[:, 0].numel()
    dx = generic.backward_elementwise(dz, wide, mean, invstd, wide_parameters[0], *means, wide_context)

    vector = vectors_for(None, x)
    kept = x[:, torch.from_numpy(chosen)] if len(chosen) else None
    subject = FromOutput(kernels, weight, bias, chosen, kept)
    found_dz, found_products, dz = subject.backward_reduce(dy, y, vector(mean), vector(invstd), context)
    found = subject.backward_elementwise(
        dz, y, vector(mean), vector(invstd), weight, *map(vector, means), context
    )
    scale = wide_dy.abs().sum(over)
    tolerance = 1e-12 if x.dtype == torch.float64 else 2e-6
    assert ((torch.from_numpy(found_dz) - sum_dz).abs() / scale).max() < tolerance
    assert ((torch.from_numpy(found_products) - products).abs() * invstd / scale).max() < tolerance
    assert found.dtype == x.dtype
    assert distance(found, dx) < tolerance


def arguments(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, *SHAPE, generator=generator, dtype=dtype)
    weight, bias = torch.randn(2, SHAPE[1], generator=generator, dtype=dtype)
    weight = torch.where(weight < 0, -1.0, 1.0).to(dtype) + 0.3 * weight
    return x + 2, dy + 0.3 * x, weight, bias


@pytest.mark.parametrize("kernels", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [NO_ACTIVATION, Activation(Kind.LEAKY_RELU, 0.2)], ids=["none", "leaky"])
def test_from_the_output(kernels, dtype, kind):
    x, dy, weight, bias = arguments(dtype)
    for laid in layouts(x).values():
        for chosen in (np.array([], int), np.array([1, 4])):
            check(kernels, laid, dy, weight, bias, kind, chosen)
    check(kernels, x, dy, None, None, kind, np.array([2]))
    check(kernels, x, dy, weight, None, kind, np.array([2]))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set(level, threads):
    x, dy, weight, bias = arguments(torch.float32)
    with native_settings(level, threads, stream_from=0):
        for laid in layouts(x).values():
            check(cpu, laid, dy, weight, bias, Activation(Kind.LEAKY_RELU, 0.2), np.array([3]))


def test_channels_to_keep():
    """A channel keeps its input if its bias is above 8 standard deviations, for example.

    A small slope makes small outputs smaller, so that more channels keep their input.
    """
    ones = np.ones(4)
    weight, bias = torch.tensor([1.0, 1.0, -1.0, 1e-30]), torch.tensor([7.9, 8.1, -8.1, 0.0])
    leaky = Activation(Kind.LEAKY_RELU, 0.01)
    for dtype, activation, expected in (
        ("float32", NO_ACTIVATION, [1, 2]),
        ("float32", leaky, [1, 2, 3]),
        ("float64", leaky, [1, 2]),
    ):
        found = channels_to_keep(dtype, ones, ones, 10, weight, bias, activation)
        assert found.tolist() == expected
    assert not len(channels_to_keep("float32", ones, ones, 10, None, None, leaky))
    not_finite = np.array([np.nan, np.inf, 0.0, 1.0])
    assert channels_to_keep("float32", not_finite, ones, 9, None, None, leaky).tolist() == [0, 1, 2]
    assert channels_to_keep("float32", ones, not_finite, 9, None, None, leaky).tolist() == [0, 1, 2]
    far = np.array([1e-70, 1e-50, 1e50, 1e70])  # products of sums and invstd stay within float64
    assert channels_to_keep("float64", far**-2, far, 9, None, None, leaky).tolist() == [0, 3]
    large = torch.tensor([1e100, 1e119, 1e121, 1e200], dtype=torch.float64)
    assert channels_to_keep("float64", ones, ones, 9, large, None, leaky).tolist() == [2, 3]
    # a value may be sqrt(count) standard deviations from the mean. A slope above 1 enlarges it
    near = torch.tensor([1e119], dtype=torch.float64)
    for count, slope, kept in ((9, 1.0, 0), (10**6, 1.0, 1), (9, 30.0, 1)):
        steep = Activation(Kind.LEAKY_RELU, slope)
        assert len(channels_to_keep("float64", ones[:1], ones[:1], count, near, None, steep)) == kept
    for slope, kept in ((1e-39, 1), (1e-37, 0), (1e37, 0), (1e39, 1)):  # 1 / 1e-39 is infinite in float32
        weight, spread = torch.tensor([1e15 if slope < 1 else 1e-20]), np.ones(1)
        extreme = Activation(Kind.LEAKY_RELU, slope)
        assert len(channels_to_keep("float32", spread, spread, 9, weight, None, extreme)) == kept
