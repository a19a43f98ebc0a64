"""Every kernel module against the same formulas in float64, on this rank alone."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mpisyncbn
from mpisyncbn.activations import activation_of
from mpisyncbn.kernels import Activation, ActivationContext, Kind, aten, generic, kernels_for
from support.activations import ACTIVATIONS, MORE
from support.kernels import (
    EVERY,
    FOR_THE_INTERPRETER,
    HOST,
    TOLERANCE,
    as_tensor,
    check,
    check_fused,
    cpu,
    in_full,
    interpreted,
    native_settings,
    reference,
    vectors_for,
)
from support.oracle import distance, layouts, shard
from support.ranks import no_exchange

pytestmark = no_exchange


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernels", [*map(in_full, EVERY)])
def test_every_activation_against_float64(kernels, dtype):
    """Activations are right with and without a residual, in planes and rows and partial vectors."""
    shapes = [(2, 3, 5, 7)] if interpreted(kernels) else [(3, 5, 9, 11), (37, 6)]
    for activation, shape in product([*ACTIVATIONS, *MORE], shapes):
        x, dy, residual = (shard(shape, seed, dtype=dtype) * 2 for seed in (1, 2, 3))
        weight, bias = shard(shape[1:2], 4) + 1, shard(shape[1:2], 5)
        for name in ("contiguous", "channels last"):
            arguments = [layouts(each)[name] for each in (x, dy)]
            check_fused(kernels, *arguments, weight, bias, None, activation=activation)
            check_fused(kernels, *arguments, weight, bias, layouts(residual)[name], activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernels", EVERY)
@np.errstate(all="ignore")  # as in the callers of kernels
def test_equal_values_have_no_gradient(kernels, dtype):
    """Rounding changes ``dz`` and its sum alike; invstd would enlarge a difference."""
    shape = (6, 3, 4, 3)
    x, dy = torch.ones(shape) * torch.tensor([2.0, 1e-3, 300.0]).view(1, 3, 1, 1), torch.full(shape, 0.37)
    x, dy = x.to(dtype), dy.to(dtype)
    weight, bias = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.3, -0.7, 1.1])
    near, (count, mean, _, invstd, *_) = vectors_for(kernels, x), reference(x, dy, weight, bias)
    for activation, residual in product(ACTIVATIONS, (None, x * 0 + 0.2)):
        function, vectors = activation_of(activation), (near(mean), near(invstd))
        y = kernels.normalize(x, *vectors, weight, bias, residual, function)
        saved = (y, None) if function.sign_decides else (None, residual)
        context = ActivationContext(function, weight, bias, *((None, None) if residual is None else saved))
        *sums, dz = kernels.backward_reduce(dy, x, *vectors, context)
        means = [near(as_tensor(each) / count) for each in sums]
        dx = kernels.backward_elementwise(dz, x, *vectors, weight, *means, context)
        assert (dx.double().abs().amax((0, 2, 3)) < 1e-5 * invstd).all(), (activation, dx[0, :, 0, 0])


@pytest.mark.parametrize("kernels", EVERY)
def test_a_negated_view_and_odd_parameters(kernels):
    """An input may have its negative bit set, and parameters may have strides."""
    z = torch.complex(shard((4, 3, 5), 1), shard((4, 3, 5), 2))
    x = z.conj().imag
    assert x.is_neg()
    weight, bias = shard((3,), 3).repeat_interleave(2)[::2], torch.ones(1).expand(3)
    check(kernels, x, x, weight, bias)
    check(kernels, x, z.real.sum().expand(4, 3, 5), weight, bias)
    check_fused(kernels, x, x, weight, bias, None)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays(dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, (6, 5, 4, 3)).astype(dtype) for _ in range(2))
    weight, bias = (rng.normal(size=5).astype("float32" if dtype == "float16" else dtype) for _ in range(2))
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)  # unaligned
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
            if kernels is cpu:  # generic has activations for torch tensors only
                check_fused(kernels, a, b, weight, bias, b)
                check_fused(kernels, a, b, weight, bias, None)


@pytest.mark.parametrize(
    "shape", [(8, 16, 20, 20), (4, 8, 2, 30, 20), (40, 2000, 4), (1, 2, 200000), (20000, 3)], ids=str
)
@pytest.mark.parametrize("ratio", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("kernels", [*map(in_full, HOST)])
def test_large_mean(kernels, shape, ratio):
    """float32 keeps its digits if mean / std is large, in every layout, with any threads."""
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
    """The spread is the least possible: one value, or some, are the next number of the dtype."""
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


@pytest.mark.parametrize("shape", [(-1, 1), (1, 1, -1), (1, 2, -1)], ids=str)
@pytest.mark.parametrize(("n", "value"), [(17, 2**20 + 1), (16385, 1025), (2**24 + 5001, 1)])
@pytest.mark.parametrize("kernels", HOST)
def test_sums_that_float32_cannot_hold(kernels, n, value, shape):
    """Sums are odd and above 2**24: over a tile, several, and more than float32 can count."""
    if interpreted(kernels) and value == 1:
        pytest.skip("the interpreter takes a minute")
    ones = torch.ones(n * shape[1]).reshape(shape)
    for x in (ones, ones.movedim(1, -1).contiguous().movedim(-1, 1)):
        near = np.zeros(x.shape[1])
        sum_dy, sum_dy_xmu, _ = kernels.backward_reduce(x * value, x, near, near + 1)
        expected = [value * n] * x.shape[1]
        rounding = 2**-24 if kernels is aten else 0  # aten rounds them to float32
        assert np.allclose([sum_dy, sum_dy_xmu], expected, rounding, 0)


@pytest.mark.parametrize("kernels", HOST)
def test_gradients_with_a_large_mean(kernels):
    """A large mean of dy must be exact, because it is subtracted from dy."""
    shape = (4, 1, 128, 128) if interpreted(kernels) else (4, 4, 256, 256)
    for name, x in layouts(shard(shape, 8)).items():
        dy = layouts(shard(shape, 9, 30.0))[name]
        expected = reference(x, dy, None, None)
        near = expected.mean.numpy(), expected.invstd.numpy()
        *sums, _ = kernels.backward_reduce(dy, x, *near)
        got = kernels.backward_elementwise(dy, x, *near, None, *(total / expected.count for total in sums))
        assert distance(got, expected.dx) < 1e-5, name


@pytest.mark.parametrize("kernels", HOST)
def test_a_channel_that_is_not_finite_leaves_the_others_alone(kernels):
    x = shard((8, 3, 16, 16), 10, 1000.0)
    expected = reference(x, x, None, None)
    mean, invstd = expected.mean.numpy().copy(), expected.invstd.numpy().copy()
    mean[0] = invstd[0] = np.nan
    with np.errstate(all="ignore"):
        got = kernels.normalize(x, mean, invstd, None, None)
    assert got[:, 0].isnan().all()
    assert distance(got[:, 1:], expected.y[:, 1:]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", EVERY)
def test_half_precision_sums_with_a_large_mean(kernels, dtype):
    """The mean must not be rounded to float32, because that error adds up over all values."""
    x = (shard((1 << 14, 2), 1, dtype=torch.float64) * 8 + 1000.3).to(dtype)
    dy = (shard((1 << 14, 2), 2) + 1).to(dtype)
    expected, near = reference(x, dy, None, None), vectors_for(kernels, x)
    *got, _ = kernels.backward_reduce(dy, x, near(expected.mean), near(expected.invstd))
    for found, wanted in zip(got, (expected.sum_dy, expected.sum_dy_xmu), strict=True):
        assert ((torch.as_tensor(found) - wanted) / wanted).abs().max() < 1e-4


class NoFloat64(TorchDispatchMode):
    """A mode in which no operation may make a float64 tensor on MPS, which has no float64."""

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
        y = generic.normalize(x, mean, m2, weight, weight, x, Activation(Kind.RELU))
        sum_dy, sum_dy_xmu, dz = generic.backward_reduce(
            y, x, mean, m2, ActivationContext(Activation(Kind.RELU), weight, weight, None)
        )
        dx = generic.backward_elementwise(dz, x, mean, m2, weight, sum_dy, sum_dy_xmu)
        layer = mpisyncbn.SyncBatchNorm(3, device="mps", track_running_stats=False)
        assert layer(x).device == y.device == dx.device == x.device
