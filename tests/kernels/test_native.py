"""Native kernels: instruction sets, threads, rounding, and stores that bypass the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpisyncbn.errors import MPISyncBNError
from mpisyncbn.kernels import Activation, Kind
from support.kernels import LEVELS, TOLERANCE, check, check_fused, cpu, native_settings, needs_native
from support.oracle import layouts, shard
from support.ranks import no_exchange

pytestmark = [no_exchange, needs_native]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("threads", "stream_from"), [(1, 0), (3, 4 << 20)], ids=["streamed", "3 threads"])
def test_every_instruction_set(level, threads, stream_from, dtype):
    for shape in [(2, 7, 61, 61), (3, 33, 9, 9), (300, 70), (2, 200, 5, 3), (1, 2, 70001), (300, 3)]:
        x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
        weight, bias = shard(shape[1:2], 3, dtype=dtype), shard(shape[1:2], 4, dtype=dtype)
        with native_settings(level, threads, stream_from):
            for name, laid in layouts(x).items():
                check(cpu, laid, layouts(dy)[name], weight, bias)
                check_fused(cpu, laid, layouts(dy)[name], weight, bias, layouts(x)[name])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 33, 60, 60), (3, 2, 300, 200), (30000, 3), (2, 500, 30, 30)], ids=str)
def test_the_same_bits_at_any_number_of_threads(shape, dtype):
    x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
    ones = np.ones(shape[1])
    for laid, dlaid in zip(layouts(x).values(), layouts(dy).values(), strict=True):
        found = []
        for threads in (1, 1, 2, 3, 4):
            with native_settings(threads=threads):
                _, mean, m2 = cpu.local_moments(laid)
                *sums, _ = cpu.backward_reduce(dlaid, laid, ones, ones)
                y = cpu.normalize(laid, ones, ones, None, None)
                dx = cpu.backward_elementwise(dlaid, laid, ones, ones, None, ones, ones)
            found.append(
                [v.tobytes() for v in (mean, m2, *sums)] + [v.float().numpy().tobytes() for v in (y, dx)]
            )
        assert all(each == found[0] for each in found)


@pytest.mark.parametrize("shape", [(8, 32, 64, 64), (2, 3, 300, 301), (4, 64, 80, 80), (400, 1024)], ids=str)
def test_every_thread_stores_past_the_cache(shape):
    """Stores that bypass the cache give the same values, only faster, so the test counts them."""
    x, ones = shard(shape, 1), np.ones(shape[1])
    for laid in (x.contiguous(), layouts(x)["channels last"]):
        kernels = (
            lambda x=laid: cpu.normalize(x, ones, ones, None, None),
            lambda x=laid: cpu.backward_elementwise(x, x, ones, ones, None, ones, ones),
        )
        for kernel in kernels:
            streamed = set()
            for threads in (1, 2, 3):
                with native_settings(threads=threads, stream_from=0):
                    cpu._cpu.streamed_values()
                    out = kernel()
                    assert out.data_ptr() % 64 == 0
                    streamed.add(cpu._cpu.streamed_values())
            assert len(streamed) == 1
            assert streamed.pop() > 0.9 * laid.numel()


def test_one_channel_done_again_leaves_the_others_alone():
    """Repeating one channel changes no bit of the others, whichever of them are in its tile."""
    x = shard((600, 2048), 1)
    x[:: 600 // 8, 0] += 1000  # the rows from which the origin is computed
    found = []
    for threads in (1, 3, 4, 8):
        with native_settings(threads=threads):
            found.append([v.tobytes() for v in cpu.local_moments(x)[1:]])
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_precision_number_survives(level):
    """All 65,536 bit patterns survive load and store, except subnormal bfloat16."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        finite = x[x.isfinite()]
        normal = finite[(finite == 0) | (finite.abs() >= torch.finfo(dtype).tiny)]
        for values in (finite if dtype == torch.float16 else normal, normal):
            with native_settings(level):
                y = cpu.normalize(values[:, None].contiguous(), np.zeros(1), np.ones(1), None, None)[:, 0]
            assert torch.equal(y, values)
        odd = x[~x.isfinite()][:, None]
        with native_settings(level):
            y = cpu.normalize(odd, np.zeros(1), np.ones(1), None, None)
        assert torch.equal(y.isnan(), odd.isnan())
        assert torch.equal(y[~y.isnan()], odd[~odd.isnan()])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(level, dtype):
    """Values are rounded to nearest, ties to even, and to infinity beyond the largest number."""
    x = shard((1, 1, 4096), 1, 0, torch.float32).to(dtype)
    scale = torch.logspace(-12, 38, 200, base=2, dtype=torch.float64)
    for factor in [*scale.tolist(), 1 + 2**-9, 1 + 2**-12]:
        factor = float(np.float32(factor))
        with native_settings(level):
            y = cpu.normalize(x, np.zeros(1), np.array([factor]), None, None)
        expected = (x.float() * np.float32(factor)).to(dtype)
        far = expected.abs() >= torch.finfo(dtype).tiny  # bfloat16 instructions know no subnormal numbers
        assert torch.equal(y[far], expected[far])


def test_not_a_number_stays_in_its_channel():
    """NaN does not reach other channels in the same SIMD vector, and a ReLU keeps it."""
    for shape in [(2, 5, 7, 7), (3, 5, 20), (20, 5)]:
        for value in (np.nan, np.inf):
            x = shard(shape, 1)
            x[:, 2] = value
            for laid in layouts(x).values():
                m2 = cpu.local_moments(laid)[2]
                assert np.isfinite(m2[[0, 1, 3, 4]]).all()
                assert not np.isfinite(m2[2])
                y = cpu.normalize(laid, np.zeros(5), np.ones(5), None, None, None, Activation(Kind.RELU))
                assert torch.equal(y.isnan(), x.isnan())
                sum_dy_xmu = cpu.backward_reduce(laid, laid, np.zeros(5), np.ones(5))[1]
                assert np.isfinite(sum_dy_xmu[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("bad", [torch.ones(3, device="meta"), torch.ones(3, dtype=torch.int32)], ids=str)
def test_arrays_that_cannot_be_read_are_refused(bad):
    ones = np.ones(3)
    with pytest.raises(MPISyncBNError, match="expected arrays in host memory"):
        cpu.normalize(torch.ones(2, 3), ones, ones, bad, None)


def test_more_values_than_an_int_can_count():
    """Indices go beyond 2**31. The tensor is one row, expanded, so it needs little memory."""
    x = torch.ones(1, 1, 2**12).expand(2**19 + 1, 1, 2**12)
    assert x.numel() > 2**31
    count, mean, m2 = cpu.local_moments(x)
    assert (count, mean.tolist(), m2.tolist()) == (x.numel(), [1.0], [0.0])
    sum_dy, sum_dy_xmu, _ = cpu.backward_reduce(x, x, np.zeros(1), np.ones(1))
    assert sum_dy.tolist() == sum_dy_xmu.tolist() == [x.numel()]
