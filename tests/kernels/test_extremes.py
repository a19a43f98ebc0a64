"""Every kernel module on tiny and huge values, whose squares float32 cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpisyncbn
from mpisyncbn.kernels import extremes, generic, masked
from support.kernels import (
    EVERY,
    LEVELS,
    as_tensor,
    check,
    check_fused,
    cpu,
    interpreted,
    native_settings,
    needs_native,
)
from support.oracle import distance, layouts, oracle, shard
from support.ranks import no_exchange, together

# (The CUDA operations of torch itself keep their moments in float32.)
EVERY = [each for each in EVERY if each.id != "aten_cuda"]
SCALES = (1e-37, 1e-30, 1e-23, 1e-19, 1e-12, 1e9, 1e19, 1e23, 1e30, 1e37)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kernels", EVERY)
@no_exchange
def test_against_float64(kernels: Any, scale: float) -> None:
    shape = (3, 4, 12, 11)
    weight, bias = shard(shape[1:2], 3).abs() + 0.5, shard(shape[1:2], 4)
    slow = interpreted(kernels)
    if slow and scale not in (1e-37, 1e-23, 1e19, 1e37):
        pytest.skip("an interpreter takes its time")
    # Triton's interpreter takes subnormal bfloat16 for 0.
    for dtype in (torch.float32, torch.bfloat16)[: 1 if slow else 2]:
        for mean in (0.0, 2.5)[slow:]:
            x, dy = shard(shape, 1, mean, torch.float64), shard(shape, 2, 0.3).to(dtype)
            x[:, 1:] *= scale  # channel 0 stays ordinary
            for name, laid in layouts(x.to(dtype)).items():
                if name in ("contiguous", "channels last", "sliced")[: 2 if slow else 3]:
                    for eps in (0.0, 1e-5):
                        check(kernels, laid, layouts(dy)[name], weight, bias, eps)
                        check_fused(kernels, laid, layouts(dy)[name], weight, bias, None, eps)
                        check_fused(kernels, laid, layouts(dy)[name], weight, bias, laid * 0 + 1, eps)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e100, 1e150])
@pytest.mark.parametrize("kernels", EVERY)
@no_exchange
def test_float64(kernels: Any, scale: float) -> None:
    """Results are right as far as float64 can hold the squares that ranks send."""
    x, dy = (shard((3, 4, 12, 11), seed, 0.3, torch.float64) for seed in (1, 2))
    weight, bias = (shard((4,), seed, 1.0, torch.float64) for seed in (3, 4))
    check(kernels, x * scale, dy, weight, bias, 0.0)


@pytest.mark.parametrize("kernels", EVERY)
@no_exchange
def test_alternating_and_late_values(kernels: Any) -> None:
    """Moments are right if values cancel in their sum, and if the first values are not typical."""
    for scale in (1e-23, 1e-37):
        x = torch.full((2, 3, 80, 70), scale)
        x[..., ::2] *= -1
        x[:, 1, :40] = 0
        x[:, 2] = scale  # constant
        for laid in (x, layouts(x)["channels last"]):
            _, mean, m2 = kernels.local_moments(laid)
            expected = laid.double().var((0, 2, 3), correction=0)
            assert distance(as_tensor(m2) / (x.numel() // 3), expected) < 1e-5
            assert abs(mean[2] / scale - 1) < 1e-6


def done_again(x: Any, monkeypatch: Any) -> list[int]:
    """Return the channels that native code repeats in float64. Check all moments."""
    chosen: list[int] = []
    with monkeypatch.context() as patch:
        wide = extremes._float64_channels
        patch.setattr(
            extremes, "_float64_channels", lambda x, some: chosen.extend(some.tolist()) or wide(x, some)
        )
        _, mean, m2 = cpu.local_moments(x)
    values = torch.as_tensor(x).double()
    dims, count = (0, *range(2, x.ndim)), values[:, 0].numel()
    expected = values.var(dims, correction=0) * count
    assert np.allclose(m2, expected, rtol=1e-5, atol=0)
    assert np.allclose(mean, values.mean(dims), rtol=1e-6, atol=1e-6 * expected.max().sqrt())
    return chosen


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 3, 3), (3, 6), (2, 6, 100, 120)], ids=str)
@no_exchange
def test_native_code_tells_constant_channels_from_tiny_ones(shape: Any, dtype: Any, monkeypatch: Any) -> None:
    dead = shard(shape, 1, 1.0).to(dtype)
    for channel, value in enumerate((0.0, 1000.1, 1e-30, -1e-42, 1e37), 1):
        dead[:, channel] = value
    signs = torch.zeros(shape, dtype=dtype)
    signs[0] *= -1
    tiny = dead.clone()
    tiny[:, 1], tiny[:, 3] = 1.0, 1e-30
    tiny[-1, 1].view(-1)[-1] = 1 + 2**-7
    tiny[-1, 3].view(-1)[-1] = 1.1e-30
    # squares that underflow to 0 beside one that does not
    mixed = dead.clone()
    mixed[:, 0] = shard(shape, 2).to(dtype)[:, 0] * 1e-25
    mixed[-1, 0].view(-1)[-1] = 1.0
    # each sample is constant, with a value of its own
    steps = dead.clone()
    steps[:, 2] = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 2))
    steps[:, 3] = steps[:, 2] * 1e-30
    for level in LEVELS:
        with native_settings(level, threads=1 + level):
            for x, those in ((dead, []), (signs, []), (tiny, [3]), (mixed, []), (steps, [3])):
                for laid in layouts(x).values():
                    assert done_again(laid, monkeypatch) == those
                if dtype == torch.float32:
                    assert done_again(x.numpy(), monkeypatch) == those


@needs_native
@no_exchange
def test_large_tensors_and_numpy() -> None:
    for threads in (1, 3):
        with native_settings(threads=threads):
            x = (shard((4, 8, 120, 120), 1, 1.0, torch.float64) * 1e-25).float()
            dy, ones = shard(x.shape, 2), torch.ones(8)
            check(cpu, x, dy, ones, ones, 0.0)
            check(cpu, layouts(x)["channels last"], dy, ones, ones, 0.0)
    _, mean, m2 = cpu.local_moments(x.numpy())
    again = cpu.local_moments(x)
    assert np.array_equal(mean, again[1])
    assert np.array_equal(m2, again[2])
    y = cpu.normalize(x.numpy(), mean, np.full(8, 1e25), None, None)
    assert np.array_equal(y, cpu.normalize(x, mean, np.full(8, 1e25), None, None).numpy())


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("scale", [1e-23, 1e-37, 1e23, 1e37])
def test_layer(scale: float, eps: float) -> None:
    x = (shard((3, 4, 5, 6), 1, 0.5, torch.float64) * scale).float().requires_grad_()
    dy = shard((3, 4, 5, 6), 2)
    layer = mpisyncbn.SyncBatchNorm(4, eps=eps, track_running_stats=False)
    y = layer(x)
    y.backward(dy)
    expected = oracle(x, dy, eps=eps)
    with together():
        assert distance(y, expected.y) < 1e-5
        assert distance(x.grad, expected.dx) < 1e-5


def test_a_variance_that_float64_cannot_hold_counts_as_none() -> None:
    x = shard((3, 4, 5), 1, dtype=torch.float64) * 1e-160
    y, stats = mpisyncbn.functional.batch_norm_forward(x, eps=0.0)
    with together():
        assert not y.any()
        assert not stats.invstd.any()


@needs_native
@pytest.mark.parametrize("laid_out", ["contiguous", "channels last"])
@no_exchange
def test_sums_of_many_values_that_float32_cannot_hold(laid_out: str) -> None:
    """Sums of one sign are infinite in float32, and two of them may add up to NaN."""
    half = torch.full((2, 2, 100, 150), 1.4e37)
    x = layouts(torch.cat((half, -half)))[laid_out]
    for kernels in (cpu, generic):
        count, mean, m2 = kernels.local_moments(x)
        assert np.allclose(np.asarray(m2) / count, float(x[0, 0, 0, 0]) ** 2, rtol=1e-6)
        assert np.abs(np.asarray(mean)).max() < 1e30


@pytest.mark.parametrize("kernels", [cpu, generic, masked])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e5 / 7])
@no_exchange
def test_a_constant_channel_of_float64_has_no_variance(kernels: Any, value: float) -> None:
    x = torch.full((7, 2), value, dtype=torch.float64)
    mask = torch.ones(7, 1, dtype=torch.bool)
    m2 = kernels.local_moments(x, **({"mask": mask} if kernels is masked else {}))[2]
    assert np.asarray(m2).tolist() == [0.0, 0.0]


@no_exchange
def test_an_activation_whose_input_float32_cannot_hold() -> None:
    x, dy = shard((200, 2), 1, 0.0, torch.float64) * 1e-20, shard((200, 2), 2, 0.5)
    found, expected = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, expected)):
        weight, bias = (torch.full((2,), 1e19, dtype=dtype, requires_grad=True) for _ in range(2))
        y = mpisyncbn.sync_batch_norm(
            x.float().to(dtype),
            None,
            None,
            weight,
            bias,
            eps=0.0,
            activation="relu",
            process_group=MPI.COMM_SELF,
        )
        y.backward(dy.to(dtype))
        results += [weight.grad, bias.grad]
    for ours, reference in zip(found, expected, strict=True):
        assert distance(ours, reference) < 1e-5


@no_exchange
def test_gradients_beyond_float32_give_no_warning() -> None:
    layer = mpisyncbn.SyncBatchNorm(1, process_group=MPI.COMM_SELF)
    layer(torch.linspace(-1, 1, 64)[:, None]).backward(torch.full((64, 1), 1e37))
    assert layer.bias.grad.isinf().all()
