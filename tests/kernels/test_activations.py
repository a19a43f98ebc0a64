"""Activations of the native kernels, compared with exact values, at every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpisyncbn.activations import activation_of
from mpisyncbn.kernels import Activation, ActivationContext, Kind, extremes
from support.activations import ACTIVATIONS, MORE
from support.kernels import (
    LEVELS,
    TOLERANCE,
    check_fused,
    cpu,
    native_settings,
    needs_native,
    value_and_derivative,
)
from support.oracle import shard
from support.ranks import no_exchange

EVERY = [*ACTIVATIONS, *MORE]
pytestmark = [no_exchange, needs_native]
DENSE = torch.cat([torch.linspace(-110, 110, 5003), torch.linspace(-6, 6, 4001), torch.logspace(-30, 0, 301)])
GATES = {Kind.SILU, Kind.GELU, Kind.GELU_TANH}


def fused(z: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation of ``z``, and its derivative in each of the two backward kernels."""
    ones, zeros, dy = np.ones(1), np.zeros(1), torch.ones_like(z)
    y = cpu.normalize(z, zeros, ones, None, None, None, activation)
    # with z as the residual, backward_reduce stores dz
    by_sign = activation.sign_decides
    context = ActivationContext(activation, None, None, z if by_sign else None, None if by_sign else z)
    dz = cpu.backward_reduce(dy, torch.zeros_like(z), zeros, ones, context)[2]
    context = ActivationContext(activation, None, None)
    stored = cpu.backward_reduce(dy, z, zeros, ones, context)[2]
    dx = cpu.backward_elementwise(stored, z, zeros, ones, None, zeros, zeros, context)
    return y, dz, dx


def exact(z: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """Return output and derivative in float64, with all digits even if close to 0."""
    kind, alpha = activation_of(text)
    if kind == Kind.ELU:
        low = z.clamp(max=0)
        return torch.where(z > 0, z, alpha * low.expm1()), torch.where(z > 0, 1.0, alpha * low.exp())
    if kind not in GATES:
        return value_and_derivative(z, text)
    if kind == Kind.GELU:
        gate = each(lambda v: math.erfc(-v * math.sqrt(0.5)) / 2, z)
        slope = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    else:
        t, t_slope = z, torch.ones_like(z)
        if kind == Kind.GELU_TANH:
            scale = math.sqrt(8 / math.pi)
            t, t_slope = scale * (z + 0.044715 * z**3), scale * (1 + 0.134145 * z * z)
        gate = t.sigmoid()
        slope = gate * (-t).sigmoid() * t_slope
    return z * gate, gate + z * slope


def each(function: Callable[[float], float], z: Tensor) -> Tensor:
    return torch.tensor([function(v) for v in z.flatten().tolist()], dtype=torch.float64).view(z.shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", EVERY)
def test_within_roundings_of_exact(text: str, dtype: torch.dtype) -> None:
    """Errors are a few roundings, relative to the value, on both sides of 0."""
    z = DENSE.to(dtype)[:, None]
    wide = z.double()
    activation = activation_of(text)
    output, derivative = exact(wide, text)
    # many roundings come from the exponential's argument, in our GELU_TANH and the exact GELU
    argument = torch.zeros_like(wide)
    if activation.kind == Kind.GELU_TANH and dtype.itemsize > 2:
        argument = 3.2 * wide.abs() * (1 + 0.045 * wide.square())
    if activation.kind == Kind.GELU and dtype == torch.float64:
        argument = wide.square()
    bar = torch.finfo(dtype).eps * (3 + argument.clamp(max=1500))
    # near a zero of the derivative its terms cancel
    has_zero = (wide > -6) & (activation.kind in {*GATES, Kind.HARDSWISH})
    scale = torch.where(has_zero, derivative.abs().clamp(min=0.3), derivative.abs())
    for level in LEVELS:
        with native_settings(level):
            y, *derivatives = fused(z, activation)
        assert ((y.double() - output).abs() <= bar * output.abs() + tail(dtype)).all()
        for found in derivatives:
            assert ((found.double() - derivative).abs() <= bar * scale + tail(dtype)).all()


def tail(dtype: torch.dtype) -> float:
    """Return the error that is allowed near 0: the smallest float16, or what vector_math.h says."""
    return {torch.float64: 1e-302, torch.float16: 2.0**-24}.get(dtype, 1e-35)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", EVERY)
def test_special_values(text: str, dtype: torch.dtype) -> None:
    """Finite results are torch's. NaN gives NaN, for SiLU and GELU in the derivative too."""
    info = torch.finfo(dtype)
    special = [0.0, math.inf, -math.inf, math.nan, 3.0, -3.0, info.max, info.min, info.tiny, -info.tiny]
    z = torch.tensor([*special, info.tiny / 8, -info.tiny / 8], dtype=dtype)[:, None]
    activation = activation_of(text)
    output, derivative = value_and_derivative(z.double(), text)
    for level in LEVELS:
        with native_settings(level):
            y, dz, _ = fused(z, activation)
        for found, expected in ((y, output), (dz, derivative)):
            close = torch.isclose(found.double(), expected, rtol=max(4 * info.eps, 1e-13), atol=tail(dtype))
            assert close[expected.isfinite() & ~z.isnan()].all()
        assert y[0] == 0
        assert y[1] == math.inf
        assert y[z.isnan()].isnan().all()
        if activation.kind in GATES:
            assert dz[1] == 1
            assert abs(y[2]) <= tail(dtype)
            assert dz.isnan().equal(z.isnan())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu(tanh)"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lengths_that_leave_a_part_of_a_vector(activation: str, dtype: torch.dtype) -> None:
    for level in LEVELS:
        with native_settings(level):
            for shape in [(2, 3, 1), (2, 3, 15), (2, 3, 17), (3, 2, 131), (5, 1), (7, 19), (33, 70)]:
                x, dy = shard(shape, 1, dtype=dtype), shard(shape, 2, dtype=dtype)
                ones = torch.ones(shape[1])
                check_fused(cpu, x, dy, ones, ones, None, activation=activation)
                check_fused(cpu, x, dy, ones, ones, dy, activation=activation)


@pytest.mark.parametrize("level", LEVELS)
def test_no_channel_is_repeated_for_an_activation_that_is_almost_flat(level: int, monkeypatch: Any) -> None:
    """No activation sets the processor's underflow flag, which would repeat a channel in float64.

    ``dy`` is 0, and so are the sums.
    """
    monkeypatch.setattr(extremes, "backward_reduce", lambda *arguments: pytest.fail("repeated in float64"))
    z = torch.tensor(
        [-1e30, -200.0, -95.0, -87.3, -87.0, -20.0, -13.0, -12.8, -10.0, -1e-20, -1e-30, 1e-30, 1e-20]
    )
    x = torch.cat([z, -z])[:, None].expand(52 // 2, 4).contiguous()
    ones, zeros = np.ones(4), np.zeros(4)
    for activation in map(activation_of, EVERY):
        for residual in (None, x):
            context = ActivationContext(activation, None, None)
            if residual is not None:
                context = context._replace(**{"y" if activation.sign_decides else "residual": residual})
            with native_settings(level):
                *sums, _ = cpu.backward_reduce(torch.zeros_like(x), x, zeros, ones, context)
            assert not np.any(sums)


def test_a_stored_gradient_of_a_channel_beyond_float32() -> None:
    """If a channel is repeated in float64, its stored gradient comes from there, as its sums do."""
    x, dy = shard((64, 3), 1), shard((64, 3), 2)
    invstd = np.array([1.0, 1e20, 1.0])
    x[:, 1] *= 1e-20
    weight = torch.tensor([1.0, 1e25, 1.0])
    bias = torch.zeros(3)
    for text in ("silu", "gelu", "gelu(tanh)"):
        context = ActivationContext(activation_of(text), weight, bias)
        sum_dz, _, dz = cpu.backward_reduce(dy, x, np.zeros(3), invstd, context)
        _, derivative = exact(x.double() * torch.from_numpy(invstd) * weight, text)
        assert torch.allclose(dz.double(), dy * derivative.double(), rtol=1e-5, atol=1e-6)
        assert np.allclose(sum_dz, (dy * derivative).sum(0), rtol=1e-5, atol=1e-4)
