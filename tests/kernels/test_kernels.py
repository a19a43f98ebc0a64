"""Every kernel module against the same formulas in float64, on this rank alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mpisyncbn
from mpisyncbn.errors import MPISyncBNError
from mpisyncbn.kernels import Gate, aten, aten_cuda, generic, kernels_for, native
from support.device import GPU, OnDevice, needs_triton, there
from support.device import cuda as triton_kernels
from support.oracle import distance, shard
from support.ranks import no_exchange, together

pytestmark = no_exchange
cpu: Any = native()
needs_native = pytest.mark.skipif(cpu is None, reason="the native kernels were not built")
cuda: Any = triton_kernels and OnDevice(triton_kernels)
# Everything that must hold for one holds for the others.
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
LEVELS = range(4)  # of instruction sets, see cpu.cpp; beyond what the processor has, its best is taken
EPS = 1e-5
# What one rounding to the dtype costs, with room for the sums.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in every way that they may lie in memory."""
    found = {"contiguous": x.contiguous()}
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found["channels last"] = last
    padded = x.new_zeros(*x.shape[:-1], x.shape[-1] * 2)
    padded[..., ::2] = x
    found["strided"] = padded[..., ::2]
    if x.ndim >= 4:
        found["permuted"] = x.transpose(2, 3).contiguous().transpose(2, 3)
        sliced = torch.cat([last, last], 1).movedim(1, -1).contiguous().movedim(-1, 1)
        found["sliced channels last"] = sliced[:, : x.shape[1]]
        found["sliced"] = torch.cat([x, x], 1)[:, : x.shape[1]]
        found["offset"] = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # not at a cache line
    return found


@contextmanager
def native_settings(level=3, threads=1, stream_from=4 << 20):
    """Instruction set, threads, and from how many bytes on stores pass the cache."""
    if cpu is None:
        yield
        return
    before = torch.get_num_threads()
    cpu._cpu.limit(level)
    cpu._cpu.stream_from(stream_from)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        cpu._cpu.limit(3)
        cpu._cpu.stream_from(4 << 20)
        torch.set_num_threads(before)


def as_tensor(array) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def reference(x, dy, weight, bias):
    x, dy = x.double(), dy.double()
    dims, view = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    count = x.numel() // x.shape[1]
    mean = x.mean(dims)
    xmu = x - mean.view(view)
    m2 = xmu.square().sum(dims)
    invstd = (m2 / count + EPS).rsqrt()
    w = torch.ones_like(mean) if weight is None else weight.double()
    b = torch.zeros_like(mean) if bias is None else bias.double()
    y = xmu * (invstd * w).view(view) + b.view(view)
    sum_dy, sum_dy_xmu = dy.sum(dims), (dy * xmu).sum(dims)
    slope = invstd.square() * sum_dy_xmu / count
    dx = (dy - (sum_dy / count).view(view) - xmu * slope.view(view)) * (invstd * w).view(view)
    scales = (dy.abs() * xmu.abs()).sum(dims), dy * (invstd * w).view(view)
    return count, mean, m2, invstd, y, sum_dy, sum_dy_xmu, dx, *scales


def vectors_for(kernels, x) -> Callable[[torch.Tensor], Any]:
    """Float64 vectors as a module takes them with ``x``."""
    tensors = kernels is generic and isinstance(x, torch.Tensor)
    return (lambda v: v) if tensors else (lambda v: v.numpy())


def check(kernels, x, dy, weight, bias) -> None:
    """All four verbs, with vectors of the kind that the module takes."""
    near = vectors_for(kernels, x)
    tensor = as_tensor
    tx, tdy = tensor(x), tensor(dy)
    tw, tb = (None if v is None else tensor(v) for v in (weight, bias))
    count, mean, m2, invstd, y, sum_dy, sum_dy_xmu, dx, sums_scale, dx_scale = reference(tx, tdy, tw, tb)
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
    assert distance(tensor(got), y) < tolerance * 8

    got_dy, got_dy_xmu, dz = kernels.backward_reduce(dy, x, near(mean), near(invstd))
    assert dz.shape == dy.shape
    assert ((tensor(got_dy) - sum_dy).abs() / tdy.double().abs().sum()).max() < 1e-6
    assert ((tensor(got_dy_xmu) - sum_dy_xmu).abs() / sums_scale).max() < 1e-6

    got = kernels.backward_elementwise(
        dz, x, near(mean), near(invstd), weight, near(sum_dy / count), near(sum_dy_xmu / count)
    )
    assert got.dtype == x.dtype
    # dx may cancel to nothing: its scale is that of its terms
    assert distance(tensor(got), dx, dx_scale) < tolerance * 8


def check_fused(kernels, x, dy, weight, bias, residual) -> None:
    """ReLU and residual in the same passes: what the parts give one after the other."""
    near = vectors_for(kernels, x)
    count, mean, _, invstd, y, *_ = reference(*(as_tensor(v) for v in (x, dy, weight, bias)))
    tolerance = TOLERANCE[as_tensor(x).dtype]
    z = y if residual is None else y + as_tensor(residual).double()
    vectors = near(mean), near(invstd)
    got = kernels.normalize(x, *vectors, weight, bias, residual, True)
    assert isinstance(got, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
    assert distance(as_tensor(got), z.relu(), z) < tolerance * 8
    if residual is not None:
        got_sum = kernels.normalize(x, *vectors, weight, bias, residual)
        assert distance(as_tensor(got_sum), z) < tolerance * 8

    gate = Gate(weight, bias, None if residual is None else got)
    # Within rounding of the kink either answer is right: there the gradient of the reference is taken away.
    sure = z.abs() > 1e-5 + tolerance * 8 * z.abs().max()
    tdy = as_tensor(dy) * sure
    dy = tdy if isinstance(dy, torch.Tensor) else tdy.numpy()
    gated = tdy.double() * (z > 0)
    _, _, _, _, _, sum_dy, sum_dy_xmu, dx, sums_scale, dx_scale = reference(
        as_tensor(x), gated, as_tensor(weight), as_tensor(bias)
    )
    got_dy, got_dy_xmu, dz = kernels.backward_reduce(dy, x, *vectors, gate)
    assert ((as_tensor(got_dy) - sum_dy).abs() / (gated.abs().sum() + 1e-300)).max() < 1e-6
    assert ((as_tensor(got_dy_xmu) - sum_dy_xmu).abs() / (sums_scale + 1e-300)).max() < 1e-6
    if residual is not None:
        assert torch.equal(as_tensor(dz).double(), gated)
    got = kernels.backward_elementwise(
        dz, x, *vectors, weight, near(sum_dy / count), near(sum_dy_xmu / count), gate
    )
    assert distance(as_tensor(got), dx, dx_scale) < tolerance * 8


SHAPES = [
    (5, 3),
    (64, 300),
    (4, 3, 7),
    (6, 5, 4, 9),
    (1, 16, 70, 70),
    (3, 2, 3, 4, 5),
    (2, 3, 2, 3, 2, 2),
    (9, 33, 1, 1),
    (700, 7, 1),
    (2, 130, 7, 7),
    (3, 5, 33, 1),
    (40, 1),
]

# Triton's interpreter takes a thousand times as long, whatever is in a tile.
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


def interpreted(kernels) -> bool:
    return kernels is cuda and not GPU


def in_full(kernels: Any) -> Any:
    """The same module of kernels, for the full tier alone where it is interpreted."""
    marks = (
        [*kernels.marks, pytest.mark.full("Triton's interpreter")] if kernels.id == "cuda" else kernels.marks
    )
    return pytest.param(*kernels.values, id=kernels.id, marks=marks)


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        pytest.param(*each.values, dtype, id=f"{each.id}-{dtype}", marks=each.marks)
        for dtype in TOLERANCE
        for each in (EVERY if dtype == torch.float32 else map(in_full, EVERY))
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels, shape, dtype):
    shape = FOR_THE_INTERPRETER.get(shape, shape) if interpreted(kernels) else shape
    x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
    parameters = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    weight, bias = shard(shape[1:2], 3, dtype=parameters), shard(shape[1:2], 4, dtype=parameters)
    for name, laid in layouts(x).items():
        if interpreted(kernels) and name not in ("contiguous", "channels last", "sliced"):
            continue
        dys = layouts(dy)
        check(kernels, laid, dys[name], weight, bias)
        check(kernels, laid, dys["contiguous"], weight, None)
        check(kernels, laid, dys["channels last"], None, None)
        check_fused(kernels, laid, dys[name], weight, bias, None)
        check_fused(kernels, laid, dys["contiguous"], weight, bias, dys["contiguous"])


@needs_native
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


@needs_native
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


@needs_native
@pytest.mark.parametrize("shape", [(8, 32, 64, 64), (2, 3, 300, 301), (4, 64, 80, 80), (400, 1024)], ids=str)
def test_every_thread_stores_past_the_cache(shape):
    """The values are the same, and only the time is not: so they are counted."""
    x, ones = shard(shape, 1), np.ones(shape[1])
    for laid in (x.contiguous(), layouts(x)["channels last"]):
        verbs = (
            lambda x=laid: cpu.normalize(x, ones, ones, None, None),
            lambda x=laid: cpu.backward_elementwise(x, x, ones, ones, None, ones, ones),
        )
        for verb in verbs:
            streamed = set()
            for threads in (1, 2, 3):
                with native_settings(threads=threads, stream_from=0):
                    cpu._cpu.streamed_values()
                    out = verb()
                    assert out.data_ptr() % 64 == 0
                    streamed.add(cpu._cpu.streamed_values())
            assert len(streamed) == 1
            assert streamed.pop() > 0.9 * laid.numel()


@needs_native
def test_one_channel_done_again_leaves_the_others_alone():
    """Whichever channels share a tile with it: with more threads, others do."""
    x = shard((600, 2048), 1)
    x[:: 600 // 8, 0] += 1000  # where the shift is taken from
    found = []
    for threads in (1, 3, 4, 8):
        with native_settings(threads=threads):
            found.append([v.tobytes() for v in cpu.local_moments(x)[1:]])
    assert all(each == found[0] for each in found)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_half_precision_number_survives(level):
    """Each of the 65,536 bit patterns, through load and store."""
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


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(level, dtype):
    """To nearest, ties to even, and to infinity beyond the largest."""
    x = shard((1, 1, 4096), 1, 0, torch.float32).to(dtype)
    scale = torch.logspace(-12, 38, 200, base=2, dtype=torch.float64)
    for factor in [*scale.tolist(), 1 + 2**-9, 1 + 2**-12]:
        factor = float(np.float32(factor))
        with native_settings(level):
            y = cpu.normalize(x, np.zeros(1), np.array([factor]), None, None)
        expected = (x.float() * np.float32(factor)).to(dtype)
        far = expected.abs() >= torch.finfo(dtype).tiny  # bfloat16 instructions know no subnormal numbers
        assert torch.equal(y[far], expected[far])


@needs_native
def test_not_a_number_stays_in_its_channel():
    """Where a vector spans two channels, and in the gate of a ReLU."""
    for shape in [(2, 5, 7, 7), (3, 5, 20), (20, 5)]:
        for value in (np.nan, np.inf):
            x = shard(shape, 1)
            x[:, 2] = value
            for laid in layouts(x).values():
                m2 = cpu.local_moments(laid)[2]
                assert np.isfinite(m2[[0, 1, 3, 4]]).all()
                assert not np.isfinite(m2[2])
                y = cpu.normalize(laid, np.zeros(5), np.ones(5), None, None, None, True)
                assert torch.equal(y.isnan(), x.isnan())
                sum_dy_xmu = cpu.backward_reduce(laid, laid, np.zeros(5), np.ones(5))[1]
                assert np.isfinite(sum_dy_xmu[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("kernels", EVERY)
def test_a_negated_view_and_odd_parameters(kernels):
    """What has another sign than its memory, and parameters with strides."""
    z = torch.complex(shard((4, 3, 5), 1), shard((4, 3, 5), 2))
    x = z.conj().imag
    assert x.is_neg()
    weight, bias = shard((3,), 3).repeat_interleave(2)[::2], torch.ones(1).expand(3)
    check(kernels, x, x, weight, bias)
    check(kernels, x, z.real.sum().expand(4, 3, 5), weight, bias)
    check_fused(kernels, x, x, weight, bias, None)


@needs_native
@pytest.mark.parametrize("bad", [torch.ones(3, device="meta"), torch.ones(3, dtype=torch.int32)], ids=str)
def test_what_cannot_be_read_is_refused(bad):
    ones = np.ones(3)
    with pytest.raises(MPISyncBNError, match="expected arrays in host memory"):
        cpu.normalize(torch.ones(2, 3), ones, ones, bad, None)


@needs_native
def test_more_values_than_an_int_can_count():
    """Indices beyond 2**31, of a tensor whose memory is one row said many times."""
    x = torch.ones(1, 1, 2**12).expand(2**19 + 1, 1, 2**12)
    assert x.numel() > 2**31
    count, mean, m2 = cpu.local_moments(x)
    assert (count, mean.tolist(), m2.tolist()) == (x.numel(), [1.0], [0.0])
    sum_dy, sum_dy_xmu, _ = cpu.backward_reduce(x, x, np.zeros(1), np.ones(1))
    assert sum_dy.tolist() == sum_dy_xmu.tolist() == [x.numel()]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays(dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, (6, 5, 4, 3)).astype(dtype) for _ in range(2))
    weight, bias = (rng.normal(size=5).astype("float32" if dtype == "float16" else dtype) for _ in range(2))
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)  # not at its alignment
    odd[...] = x
    for kernels in (generic, cpu) if cpu else (generic,):
        for a, b in (
            (x, dy),
            (x.view(np.memmap), dy),
            (np.asfortranarray(x), dy),
            (x[::2, ::-1], dy[::2, ::-1]),
            (odd, dy),
        ):
            check(kernels, a, b, weight, bias)
            check_fused(kernels, a, b, weight, bias, b)
            check_fused(kernels, a, b, weight, bias, None)


@pytest.mark.parametrize(
    "shape", [(8, 16, 20, 20), (4, 8, 2, 30, 20), (40, 2000, 4), (1, 2, 200000), (20000, 3)], ids=str
)
@pytest.mark.parametrize("ratio", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("kernels", map(in_full, HOST))
def test_large_mean(kernels, shape, ratio):
    """float32 keeps its digits where mean / std is large, in every layout and at every number of threads."""
    shape = FOR_THE_INTERPRETER.get(shape, shape) if interpreted(kernels) else shape
    x, dy = shard(shape, 5, ratio), shard(shape, 6)
    for threads in (1, 2, 3, 4) if kernels is cpu else (1,):
        with native_settings(threads=threads):
            for laid in (x, layouts(x)["channels last"]):
                check(kernels, laid, dy, None, None)


@pytest.mark.parametrize("kernels", HOST)
def test_moments_where_the_first_block_is_not_typical(kernels):
    for shape in ((64, 4, 20, 20), (5000, 4)) if interpreted(kernels) else ((64, 4, 60, 60), (200000, 4)):
        x = shard(shape, 7, 1000.0)
        x[0] = 0.0  # one blank sample in front
        for laid in layouts(x).values():
            _, mean, m2 = kernels.local_moments(laid)
            expected = laid.double()
            dims = (0, *range(2, x.ndim))
            assert np.allclose(mean, expected.mean(dims), rtol=1e-6)
            assert np.allclose(m2, expected.var(dims, correction=0) * (x.numel() // 4), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e7])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (16, 40, 30, 30), (40000, 3)], ids=str)
@pytest.mark.parametrize("kernels", HOST)
def test_constant_channels_have_no_variance(kernels, shape, value):
    shape = FOR_THE_INTERPRETER.get(shape, shape) if interpreted(kernels) else shape
    x = torch.full(shape, value)
    for laid in (x, layouts(x)["channels last"]):
        _, mean, m2 = kernels.local_moments(laid)
        assert set(mean.tolist()) == {x.flatten()[0].item()}
        assert not m2.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(400, 1), (20, 3, 5), (2, 70, 4, 4)], ids=str)
@pytest.mark.parametrize("kernels", [*HOST, pytest.param(generic, id="generic")])
def test_a_spread_of_single_roundings(kernels, shape, dtype):
    """The least that there is: one value, and some, are the next number of the dtype."""
    one = torch.full(shape, 1e6 if dtype == torch.float32 else 1.9).to(dtype)
    step = torch.finfo(dtype).eps * (2**19 if dtype == torch.float32 else 1)
    for values in (1, shape[0] // 2):
        x = one.clone()
        x.view(*shape[:2], -1)[:values, :, 0] += step
        for laid in (x, layouts(x)["channels last"]):
            _, mean, m2 = kernels.local_moments(laid)
            dims, center = (0, *range(2, x.ndim)), one.flatten()[0].double()
            far = laid.double() - center
            assert np.allclose(mean, center + far.mean(dims), rtol=1e-14)
            assert np.allclose(m2, far.var(dims, correction=0) * (x.numel() // x.shape[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (0, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("kernels", EVERY)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty(kernels, shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    count, mean, m2 = kernels.local_moments(x)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert count == 0
    assert not torch.as_tensor(mean).any()
    assert torch.equal(torch.as_tensor(m2), zeros)
    near = vectors_for(kernels, x)(zeros)
    for got in (
        kernels.normalize(x, near, near + 1, None, None),
        kernels.backward_elementwise(x, x, near, near + 1, None, near, near),
    ):
        assert got.shape == x.shape
        assert got.dtype == dtype
    for total in kernels.backward_reduce(x, x, near, near + 1)[:2]:
        assert torch.equal(torch.as_tensor(total), zeros)


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape(shape, dtype, last, seed):
    x, dy = (
        shard((shape[0] + 1, *shape[1:]), seed, 1.0, dtype),
        shard((shape[0] + 1, *shape[1:]), seed + 9, 0, dtype),
    )
    with together():
        x = layouts(x)["channels last"] if last else x
        for kernels in (aten, cpu) if cpu else (aten,):
            check(kernels, x, dy, None, None)


@pytest.mark.parametrize("kernels", HOST)
def test_memory_format_is_kept(kernels):
    for shape, memory_format in (
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ):
        x = torch.randn(shape).contiguous(memory_format=memory_format)
        ones = np.ones(3)
        for dtype in TOLERANCE:
            z = x.to(dtype)
            assert kernels.normalize(z, ones, ones, None, None).is_contiguous(memory_format=memory_format)
            dx = kernels.backward_elementwise(z.contiguous(), z, ones * 99, ones, None, ones, ones)
            assert dx.is_contiguous(memory_format=memory_format)


def test_the_right_module_for_each_array():
    assert kernels_for(np.zeros((1, 1))) is (cpu or generic)
    assert kernels_for(np.zeros((1, 1), ">f4")) is generic
    assert kernels_for(np.zeros((1, 1), int)) is generic
    assert kernels_for(np.ma.zeros((1, 1))) is generic
    assert kernels_for(np.zeros((1, 1)).view(np.memmap)) is (cpu or generic)
    assert kernels_for(torch.zeros([1, 1] + [1] * 63)) is aten
    assert kernels_for(torch.zeros(1, 1)) is (cpu or aten)
    assert kernels_for(torch.nn.Parameter(torch.zeros(1, 1))) is (cpu or aten)
    assert kernels_for(torch.zeros(1, 1, device="meta")) is generic


def test_all_modules_have_the_four_verbs():
    verbs = {"backward_elementwise", "backward_reduce", "local_moments", "normalize"}
    for module in (aten, aten_cuda, generic, cpu, cuda and cuda.module):
        assert module is None or verbs <= set(module.__all__)


@pytest.mark.parametrize("shape", [(2**24 + 5000, 1), (1, 2, 2**23 + 5000)], ids=str)
@pytest.mark.parametrize("kernels", map(in_full, HOST))
def test_sums_of_more_values_than_float32_can_count(kernels, shape):
    if interpreted(kernels) and shape[1] == 1:
        pytest.skip("the interpreter takes its time, and the other shape shows as much")
    ones = torch.ones(shape)
    for x in (ones, ones.movedim(1, -1).contiguous().movedim(-1, 1)):
        near = np.zeros(shape[1])
        sum_dy, sum_dy_xmu, _ = kernels.backward_reduce(x, x, near, near + 1)
        assert sum_dy.tolist() == sum_dy_xmu.tolist() == [x.numel() / shape[1]] * shape[1]


@pytest.mark.parametrize("kernels", HOST)
def test_gradients_with_a_large_mean(kernels):
    """What is subtracted from dy must be as exact as dy is large."""
    shape = (4, 1, 128, 128) if interpreted(kernels) else (4, 4, 256, 256)
    for name, x in layouts(shard(shape, 8)).items():
        dy = layouts(shard(shape, 9, 30.0))[name]
        expected = reference(x, dy, None, None)
        count, mean, invstd, dx = (expected[i] for i in (0, 1, 3, 7))
        near = mean.numpy(), invstd.numpy()
        *sums, _ = kernels.backward_reduce(dy, x, *near)
        got = kernels.backward_elementwise(dy, x, *near, None, *(total / count for total in sums))
        assert distance(got, dx) < 1e-5, name


@pytest.mark.parametrize("kernels", HOST)
def test_a_channel_that_is_not_finite_leaves_the_others_alone(kernels):
    x = shard((8, 3, 16, 16), 10, 1000.0)
    expected = reference(x, x, None, None)
    mean, invstd, y = (expected[i].numpy().copy() for i in (1, 3, 4))
    mean[0] = invstd[0] = np.nan
    with np.errstate(all="ignore"):
        got = kernels.normalize(x, mean, invstd, None, None)
    assert got[:, 0].isnan().all()
    assert distance(got[:, 1:], torch.from_numpy(y[:, 1:])) < 1e-6


class LikeCuPy(np.ndarray):
    """In host memory, with a device all the same."""

    device: Any = nullcontext()
    device.id = 0


@needs_triton
@pytest.mark.skipif(GPU, reason="with a GPU, scripts/gpu_check does this with CuPy")
@pytest.mark.parametrize("pointer", [0, 77])
def test_arrays_by_way_of_dlpack(pointer, monkeypatch):
    """The verbs of dlpack.py are those of cuda.py, on the stream that is current."""
    streams = []
    current = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=pointer))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=np.from_dlpack, cuda=current))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda given: given)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    monkeypatch.delitem(sys.modules, "mpisyncbn.kernels.dlpack", raising=False)
    dlpack = importlib.import_module("mpisyncbn.kernels.dlpack")
    monkeypatch.setattr(dlpack, "on_cuda", lambda device: (cuda.module, "Triton"))
    try:
        for dtype in ("float32", "float64", "float16"):
            shape = (4, 3, 5)
            x, dy, residual = (
                shard(shape, seed, 1.0).numpy().astype(dtype).view(LikeCuPy) for seed in (1, 2, 3)
            )
            weight, bias = (shard((3,), seed).numpy().astype(dtype) for seed in (4, 5))
            check(dlpack, x, dy, weight, bias)
            check(dlpack, x, dy, None, None)
            check_fused(dlpack, x, dy, weight, bias, residual)
            check_fused(dlpack, x, dy, weight, bias, None)
    finally:
        del sys.modules["mpisyncbn.kernels.dlpack"]  # what it imported was not CuPy
    assert set(streams) == {pointer}


@needs_triton
@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (
            RuntimeError("Failed to find C compiler"),
            "Triton does not work here: RuntimeError: Failed to find C",
        ),
        (ImportError("no Triton"), "Triton is not installed: pip install triton"),
        (torch.OutOfMemoryError("none left"), None),
    ],
    ids=["no compiler", "not installed", "no memory"],
)
def test_where_triton_does_not_work(problem, why, monkeypatch):
    """There torch's own operations serve, and a warning says why; errors of another kind are raised."""
    on_cuda, device = mpisyncbn.kernels.on_cuda, torch.device("cuda", 0)

    def try_out(device):
        if problem is not None:
            raise problem

    monkeypatch.setattr(cuda.module, "try_out", try_out)
    on_cuda.cache_clear()
    try:
        if why is None:
            with pytest.raises(torch.OutOfMemoryError):
                on_cuda(device)
            problem = None
            assert on_cuda(device) == (cuda.module, "Triton")
        else:
            with pytest.warns(RuntimeWarning, match=f"cuda:0 are composed of torch's .* because {why}"):
                module, made_of = on_cuda(device)
            assert module is aten_cuda
            assert why in made_of
    finally:
        on_cuda.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", EVERY)
def test_half_precision_sums_with_a_large_mean(kernels, dtype):
    """What rounding the mean to float32 costs adds up over all values."""
    x = (shard((1 << 14, 2), 1, dtype=torch.float64) * 8 + 1000.3).to(dtype)
    dy = (shard((1 << 14, 2), 2) + 1).to(dtype)
    _, mean, _, invstd, _, sum_dy, sum_dy_xmu, *_ = reference(x, dy, None, None)
    near = vectors_for(kernels, x)
    *got, _ = kernels.backward_reduce(dy, x, near(mean), near(invstd))
    for found, wanted in zip(got, (sum_dy, sum_dy_xmu), strict=True):
        assert ((torch.as_tensor(found) - wanted) / wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kernels", [each for each in EVERY if each.id in ("cpu", "cuda", "generic")])
def test_large_values_have_moments(kernels):
    """Whose sum float32 cannot hold. (Those of torch's own operations have not.)"""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((2, 2, 4096), 1e35, dtype=dtype)
        _, mean, m2 = kernels.local_moments(x)
        assert np.allclose(np.asarray(mean), x[0, 0, 0].double(), rtol=1e-6)
        assert not np.asarray(m2).any()


@needs_triton
@given(
    st.integers(1, 1 << 33), st.integers(1, 5000), st.integers(1, 1 << 20), st.sampled_from(list(TOLERANCE))
)
def test_how_sums_are_shared_out(samples, channels, length, dtype):
    """Every tile to one program; no more than float32 can add up, and no more programs than CUDA counts."""
    plan = cuda.module.cuda_plans.sums(samples, channels, length, dtype, 132)
    rows, width, _, tiles, share, _ = plan.sizes
    height, columns = plan.options["ROWS"], plan.options["COLUMNS"]
    blocks, shares, _ = plan.grid
    planes = plan.options["PLANES"]
    across = -(-width // columns)
    with together():
        assert tiles == -(-rows // height) * (across if planes else 1)
        assert blocks == (channels if planes else across)
        assert (shares - 1) * share < tiles <= shares * share
        assert shares <= 65535
        assert share <= 64 or shares > 65535 // 2
        assert height * columns <= 1 << 14


@needs_triton
@given(
    st.integers(1, 1 << 33), st.integers(1, 5000), st.integers(1, 1 << 32), st.sampled_from(list(TOLERANCE))
)
def test_how_elements_are_shared_out(samples, channels, length, dtype):
    """Each to one program, and none to a program that is beyond the last."""
    plan = cuda.module.cuda_plans.elements(samples, channels, length, dtype, 132)
    rows, width, stride, _, across = plan.sizes
    planes, steps = plan.options["PLANES"], plan.options["STEPS"]
    high, columns = plan.options["ROWS"] * steps, plan.options["COLUMNS"]
    down = plan.grid[0] // across // (channels if planes else 1)
    with together():
        assert (rows, width) == (samples, length if planes else channels)
        assert stride == channels * length
        assert plan.grid == (down * across * (channels if planes else 1), 1, 1)
        assert (down - 1) * high < rows <= down * high
        assert (across - 1) * columns < width <= across * columns
        assert plan.options["ROWS"] * columns <= 1 << 12
        assert width < 1 << 30 or plan.options["INDEX"] == cuda.module.cuda_plans.tl.int64


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(50, 2, 7, 7), (6, 2, 63, 65), (1100, 33)], ids=str)
def test_many_tiles(shape, dtype, monkeypatch):
    """One tile, shares of tiles of planes and of rows, and several tiles for each program."""
    plans = cuda.module.cuda_plans
    monkeypatch.setattr(plans, "_ENOUGH", 1)
    monkeypatch.setattr(plans, "elements", plans.elements.__wrapped__)
    x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
    weight = shard(shape[1:2], 3)
    check(cuda, x, dy, weight, None)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 700])
def test_a_batch_enters_in_one_kernel(channels, dtype):
    mean, var = (shard((channels,), seed, dtype=torch.float64) for seed in (1, 2))
    running = [shard((channels,), seed).to(dtype) for seed in (3, 4)]
    expected = [old.double().lerp(new, 0.1) for old, new in zip(running, (mean, var * 1.25), strict=True)]
    arguments = [there(each.clone()) for each in (*running, torch.tensor(7), mean, var)]
    versions = [each._version for each in arguments]
    entered = cuda.module.enter_batch(*arguments, 1.25, 0.1)
    bar = {torch.float64: 1e-15, torch.float32: 1e-7}.get(dtype, 1e-2)
    with together():
        assert entered
        assert arguments[2].item() == 8
        for found, wanted in zip(arguments, expected, strict=False):
            assert distance(found.cpu(), wanted) < bar
        changed = [each._version > before for each, before in zip(arguments, versions, strict=True)]
        assert changed == [True, True, True, False, False]


@needs_triton
def test_a_momentum_of_one_forgets_in_one_kernel():
    """Also what is so large that the batch is lost beside it."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        running = [there(torch.full((3,), 1e30, dtype=dtype)) for _ in range(2)]
        mean, var = (there(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        entered = cuda.module.enter_batch(*running, None, mean, var, 1.0, 1.0)
        with together():
            assert entered
            assert torch.equal(torch.stack(running).cpu(), torch.ones(2, 3, dtype=dtype))


@needs_triton
def test_what_a_kernel_must_not_write_to():
    mean, var = (there(shard((4,), seed, dtype=torch.float64)) for seed in (1, 2))
    plain, count = there(torch.ones(4)), there(torch.tensor(7))
    with torch.inference_mode():
        inferred = plain.clone()
    refused = (
        (there(torch.ones(8))[::2], plain, count),
        (plain, plain.clone().requires_grad_(), count),
        (plain, torch.nn.Parameter(plain.clone(), requires_grad=False), count),
        (plain, plain.clone(), torch.empty((), device="meta")),
        (inferred, plain, count),
    )
    entered = [cuda.module.enter_batch(*each, mean, var, 1.0, 0.1) for each in refused]
    with together():
        assert not any(entered)
        assert torch.equal(plain.cpu(), torch.ones(4))
        assert count.item() == 7


class NoFloat64(TorchDispatchMode):
    """A device that has no float64: nothing may be made of it there."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        found = operation(*arguments, **(options or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor) and each.device.type == "mps":
                assert each.dtype != torch.float64, operation
        return found


def test_a_device_without_float64():
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        x, weight = torch.randn(2, 3, 4, 4, device="mps"), torch.ones(3, device="mps")
        _, mean, m2 = generic.local_moments(x)
        y = generic.normalize(x, mean, m2, weight, weight, x, True)
        sum_dy, sum_dy_xmu, dz = generic.backward_reduce(y, x, mean, m2, Gate(weight, weight, None))
        dx = generic.backward_elementwise(dz, x, mean, m2, weight, sum_dy, sum_dy_xmu)
        layer = mpisyncbn.SyncBatchNorm(3, device="mps", track_running_stats=False)
        assert layer(x).device == y.device == dx.device == x.device
