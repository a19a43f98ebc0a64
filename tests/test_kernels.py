"""Every kernel module against the same formulas in float64, on this rank alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel import distance, shard, together

from mpisyncbn.kernels import cpu, generic, kernels_for

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
    return found


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


def check(kernels, x, dy, weight, bias) -> None:
    """All four verbs, with vectors of the kind that the module takes."""
    on_host = kernels is cpu or isinstance(x, np.ndarray)
    near = (lambda v: v.numpy()) if on_host else (lambda v: v)
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
    assert type(got) is type(x)
    assert got.dtype == x.dtype
    assert distance(tensor(got), y) < tolerance * 8

    got_dy, got_dy_xmu = kernels.backward_reduce(dy, x, near(mean), near(invstd))
    assert ((tensor(got_dy) - sum_dy).abs() / tdy.double().abs().sum()).max() < 1e-6
    assert ((tensor(got_dy_xmu) - sum_dy_xmu).abs() / sums_scale).max() < 1e-6

    got = kernels.backward_elementwise(
        dy, x, near(mean), near(invstd), weight, near(sum_dy / count), near(sum_dy_xmu / count)
    )
    assert got.dtype == x.dtype
    # dx may cancel to nothing: its scale is that of its terms
    assert distance(tensor(got), dx, dx_scale) < tolerance * 8


SHAPES = [
    (5, 3),
    (64, 300),
    (4, 3, 7),
    (6, 5, 4, 9),
    (1, 16, 70, 70),
    (3, 2, 3, 4, 5),
    (2, 3, 2, 3, 2, 2),
    (9, 33, 1, 1),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernels", [cpu, generic], ids=["cpu", "generic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels, shape, dtype):
    x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
    parameters = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    weight, bias = shard(shape[1:2], 3, dtype=parameters), shard(shape[1:2], 4, dtype=parameters)
    for name, laid in layouts(x).items():
        dys = layouts(dy)
        check(kernels, laid, dys[name], weight, bias)
        check(kernels, laid, dys["contiguous"], weight, None)
        check(kernels, laid, dys["channels last"], None, None)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays(dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, (6, 5, 4, 3)).astype(dtype) for _ in range(2))
    weight, bias = (rng.normal(size=5).astype("float32" if dtype == "float16" else dtype) for _ in range(2))
    for a, b in ((x, dy), (np.asfortranarray(x), dy), (x[::2, ::-1], dy[::2, ::-1])):
        check(generic, a.copy(order="K"), b, weight, bias)


@pytest.mark.parametrize(
    "shape", [(8, 16, 20, 20), (4, 8, 2, 30, 20), (40, 2000, 4), (1, 2, 200000), (20000, 3)], ids=str
)
@pytest.mark.parametrize("ratio", [0.0, 30.0, 1e3])
def test_large_mean(shape, ratio):
    """float32 keeps its digits where mean / std is large, in every layout."""
    x, dy = shard(shape, 5, ratio), shard(shape, 6)
    for laid in (x, layouts(x)["channels last"]):
        check(cpu, laid, dy, None, None)


def test_moments_where_the_first_block_is_not_typical():
    for shape in ((64, 4, 60, 60), (200000, 4)):
        x = shard(shape, 7, 1000.0)
        x[0] = 0.0  # one blank sample in front
        for laid in layouts(x).values():
            _, mean, m2 = cpu.local_moments(laid)
            expected = laid.double()
            dims = (0, *range(2, x.ndim))
            assert np.allclose(mean, expected.mean(dims), rtol=1e-6)
            assert np.allclose(m2, expected.var(dims, correction=0) * (x.numel() // 4), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e7])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (16, 40, 30, 30), (40000, 3)], ids=str)
def test_constant_channels_have_no_variance(shape, value):
    x = torch.full(shape, value)
    for laid in (x, layouts(x)["channels last"]):
        _, mean, m2 = cpu.local_moments(laid)
        assert np.allclose(mean, x.flatten()[0].item(), rtol=1e-12)
        assert m2.max() / (x.numel() // x.shape[1]) <= 1e-14 * value * value


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (0, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("kernels", [cpu, generic], ids=["cpu", "generic"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty(kernels, shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    count, mean, m2 = kernels.local_moments(x)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert count == 0
    assert not torch.as_tensor(mean).any()
    assert torch.equal(torch.as_tensor(m2), zeros)
    near = zeros.numpy() if kernels is cpu else zeros
    for got in (
        kernels.normalize(x, near, near + 1, None, None),
        kernels.backward_elementwise(x, x, near, near + 1, None, near, near),
    ):
        assert got.shape == x.shape
        assert got.dtype == dtype
    for total in kernels.backward_reduce(x, x, near, near + 1):
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
        check(cpu, x, dy, None, None)


def test_memory_format_is_kept():
    for shape, memory_format in (
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ):
        x = torch.randn(shape).contiguous(memory_format=memory_format)
        ones = np.ones(3)
        for dtype in TOLERANCE:
            z = x.to(dtype)
            assert cpu.normalize(z, ones, ones, None, None).is_contiguous(memory_format=memory_format)
            dx = cpu.backward_elementwise(z.contiguous(), z, ones * 99, ones, None, ones, ones)
            assert dx.is_contiguous(memory_format=memory_format)


def test_the_right_module_for_each_array():
    assert kernels_for(np.zeros((1, 1))) is generic
    assert kernels_for(torch.zeros(1, 1)) is cpu
    assert kernels_for(torch.nn.Parameter(torch.zeros(1, 1))) is cpu
    assert kernels_for(torch.zeros(1, 1, device="meta")) is generic


def test_both_modules_have_the_four_verbs():
    verbs = {"backward_elementwise", "backward_reduce", "local_moments", "normalize"}
    assert set(cpu.__all__) == set(generic.__all__) == verbs


@pytest.mark.parametrize("shape", [(2**24 + 5000, 1), (1, 2, 2**23 + 5000)], ids=str)
def test_sums_of_more_values_than_float32_can_count(shape):
    ones = torch.ones(shape)
    for x in (ones, ones.movedim(1, -1).contiguous().movedim(-1, 1)):
        near = np.zeros(shape[1])
        sum_dy, sum_dy_xmu = cpu.backward_reduce(x, x, near, near + 1)
        assert sum_dy.tolist() == sum_dy_xmu.tolist() == [x.numel() / shape[1]] * shape[1]


def test_gradients_with_a_large_mean():
    """What is subtracted from dy must be as exact as dy is large."""
    for name, x in layouts(shard((4, 4, 256, 256), 8)).items():
        dy = layouts(shard((4, 4, 256, 256), 9, 30.0))[name]
        expected = reference(x, dy, None, None)
        count, mean, invstd, dx = (expected[i] for i in (0, 1, 3, 7))
        near = mean.numpy(), invstd.numpy()
        sums = cpu.backward_reduce(dy, x, *near)
        got = cpu.backward_elementwise(dy, x, *near, None, *(total / count for total in sums))
        assert distance(got, dx) < 1e-5, name


def test_a_channel_that_is_not_finite_leaves_the_others_alone():
    x = shard((8, 3, 16, 16), 10, 1000.0)
    expected = reference(x, x, None, None)
    mean, invstd, y = (expected[i].numpy().copy() for i in (1, 3, 4))
    mean[0] = invstd[0] = np.nan
    with np.errstate(all="ignore"):
        got = cpu.normalize(x, mean, invstd, None, None)
    assert got[:, 0].isnan().all()
    assert distance(got[:, 1:], torch.from_numpy(y[:, 1:])) < 1e-6
