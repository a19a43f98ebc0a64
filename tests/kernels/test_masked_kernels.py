"""Kernels with masks, compared with float64 results of the values where the mask is true."""

from __future__ import annotations

import ctypes
import mmap
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpisyncbn import MPISyncBNError
from mpisyncbn.kernels import Activation, ActivationContext, Kind, kernels_for, masked, native
from mpisyncbn.kernels.activation import activate, activation_gradient
from support.kernels import LEVELS, TOLERANCE, cpu, native_settings, needs_native
from support.oracle import distance, layouts, shard
from support.ranks import no_exchange

pytestmark = no_exchange
SHAPES = [(2, 3, 61, 61), (3, 33, 9, 9), (300, 70), (2, 40, 5, 3), (1, 2, 701), (300, 3), (40, 16, 8)]
# Planes of whole vectors, whose masks are read in place, and some rows read together.
SHAPES += [(3, 5, 64, 3), (1, 2, 70400), (33, 2), (48, 3), (49, 3), (6, 60)]
ACTIVATIONS = [Activation(Kind.NONE), Activation(Kind.RELU), Activation(Kind.SILU)]


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return masks for an input of a shape, by names of their density or memory layout."""
    full, generator = (shape[0], 1, *shape[2:]), torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    found = {"half": random(*full) < 0.5, "all": torch.ones(full, dtype=torch.bool)}
    found["few"] = random(*full) < 0.02
    found["few"].view(-1)[-2:] = True  # far from where the search for an origin begins
    per_sample = random(shape[0], 1, *[1] * (len(shape) - 2)) < 0.5
    per_sample[:1] = True
    found["expanded"] = per_sample.expand(full)
    of_all_samples = random(1, 1, *full[2:]) < 0.5
    of_all_samples.view(-1)[:1] = True
    found["of all samples"] = of_all_samples.expand(full)
    found["strided"] = (random(*full, 2) < 0.5)[..., 1]
    found["permuted"] = (random(*full[::-1]) < 0.5).permute(*reversed(range(len(full))))
    return found


def rows(x: Tensor, mask: Tensor) -> Tensor:
    """Return the values of ``x`` where the mask is true, as float64 rows of shape (n, C)."""
    return x.detach().double().movedim(1, -1)[mask.movedim(1, -1)[..., 0]]


@np.errstate(all="ignore")
def check(
    kernels: Any, x: Tensor, dy: Tensor, mask: Tensor, activation: Activation, with_residual: bool
) -> None:
    """Check the four kernels on values that are not finite where the mask is false."""
    channels, tolerance = x.shape[1], TOLERANCE[x.dtype] * 8
    weight, bias = (shard((channels,), seed, 1.0, x.dtype) for seed in (3, 4))
    residual = x if with_residual else None
    true, dtrue = rows(x, mask), rows(dy, mask)
    mean, var = true.mean(0), true.var(0, correction=0)
    invstd = (var + 1e-5).rsqrt()
    false = ~mask.expand(x.shape)

    count, found, m2 = kernels.local_moments(x)
    found = torch.as_tensor(found)
    assert count == len(true) == int(mask.sum())
    assert distance((found.sum(0) if found.ndim == 2 else found) - mean, 0 * mean, var.sqrt()) < tolerance
    assert distance(torch.as_tensor(m2), var * count) < max(1e-6, tolerance)

    vectors = mean.numpy(), invstd.numpy()
    y = kernels.normalize(x, *vectors, weight, bias, residual, activation)
    z = (true - mean) * invstd * weight.double() + bias.double() + (true if with_residual else 0)
    assert y.dtype == x.dtype
    assert (y[false] == 0).all()
    assert distance(rows(y, mask), activate(z, activation), z) < tolerance

    is_dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    assert not is_dense or y.stride() == x.stride()

    context = None
    if activation.kind:
        known = (y, None) if activation.sign_decides else (None, residual)
        context = ActivationContext(activation, weight, bias, *(known if with_residual else (None, None)))
    sure = (z.abs() > tolerance * z.abs().max()).to(dy.dtype)  # near a kink, both derivatives are right
    dy = dy.movedim(1, -1).clone().masked_scatter_(mask.movedim(1, -1), rows(dy, mask).to(dy.dtype) * sure)
    dy, dtrue = dy.movedim(-1, 1), dtrue * sure
    dz_true = activation_gradient(dtrue, z, activation)
    sum_dy, sum_dy_xmu, dz = kernels.backward_reduce(dy, x, *vectors, context)
    scale = dz_true.abs().sum().item()
    expected = dz_true.sum(0), (dz_true * (true - mean)).sum(0)
    assert distance(torch.as_tensor(sum_dy), expected[0], scale) < tolerance
    assert distance(torch.as_tensor(sum_dy_xmu), expected[1], scale * var.sqrt().max().item() * 4) < tolerance
    if context is not None and context.stores_dz:
        assert (dz[false] == 0).all()
        assert distance(rows(dz, mask), dz_true) < tolerance

    means = [each / count for each in expected]
    dx = kernels.backward_elementwise(dz, x, *vectors, weight, *(m.numpy() for m in means), context)
    factor = invstd * weight.double()
    expected_dx = (dz_true - means[0] - (true - mean) * invstd.square() * means[1]) * factor
    assert (dx[false] == 0).all()
    assert distance(rows(dx, mask), expected_dx, dtrue * factor) < tolerance * 4


def dirty(shape: tuple[int, ...], mask: Tensor, seed: int, mean: float, bad: float) -> Tensor:
    return shard(shape, seed, mean, torch.float64).masked_fill(~mask, bad)


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: int, dtype: torch.dtype) -> None:
    turn = 0
    for shape in SHAPES:
        for name, mask in masks(shape).items():
            if level < 3 and name not in ("half", "strided"):
                continue
            x = dirty(shape, mask, 1, 3.0, np.nan).to(dtype)
            dy = dirty(shape, mask, 2, 0.5, np.inf).to(dtype)
            for layout, laid in layouts(x).items():
                turn += 1
                activation, residual = ACTIVATIONS[turn % 3], turn % 4 > 1
                with native_settings(level, 1 + turn % 3, stream_from=0 if turn % 2 else 4 << 20):
                    bound = masked.with_mask(cpu, mask)
                    check(bound, laid, layouts(dy)[layout], mask, activation, residual)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_generic(dtype: torch.dtype, activation: Activation) -> None:
    for shape in SHAPES[2:5]:
        mask = masks(shape)["half"]
        x, dy = (
            dirty(shape, mask, seed, mean, bad).to(dtype)
            for seed, mean, bad in ((1, 3, np.nan), (2, 0.5, np.inf))
        )
        for residual in (False, True):
            check(masked.with_mask(masked, mask), x, dy, mask, activation, residual)


@pytest.mark.parametrize(
    "kernels", [pytest.param(cpu, id="cpu", marks=needs_native), pytest.param(masked, id="generic")]
)
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (300, 3), (0, 3, 5)], ids=str)
def test_nothing_counts(kernels: Any, shape: tuple[int, ...]) -> None:
    x, mask, ones = (
        torch.full(shape, np.nan),
        torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool),
        np.ones(3),
    )
    bound = masked.with_mask(kernels, mask)
    count, mean, m2 = bound.local_moments(x)
    assert count == 0
    assert not np.any(np.asarray(mean))
    assert not np.any(np.asarray(m2))
    y = bound.normalize(x, ones, ones, None, None)
    *sums, dz = bound.backward_reduce(x, x, ones, ones)
    dx = bound.backward_elementwise(dz, x, ones, ones, None, ones, ones)
    assert not any(np.any(np.asarray(each)) for each in (y, *sums, dx))


@pytest.mark.parametrize(
    "kernels", [pytest.param(cpu, id="cpu", marks=needs_native), pytest.param(masked, id="generic")]
)
def test_a_float64_mean_has_two_parts(kernels: Any) -> None:
    """A single float64 would round a mean of 1e9 by 1e-7."""
    mask = masks((40, 3, 30))["half"]
    x = dirty((40, 3, 30), mask, 1, 1e9, np.nan)
    _, (high, low), _ = masked.with_mask(kernels, mask).local_moments(x)
    rest = (rows(x, mask) - torch.as_tensor(high)).mean(0)
    assert distance(torch.as_tensor(low), rest, 1.0) < 1e-12


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-23, 1e23, 1e-30])
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (400, 3), (9, 80, 7)], ids=str)
def test_values_beyond_the_squares_of_float32(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype
) -> None:
    mask = masks(shape)["half"]
    x = (dirty(shape, mask, 1, 3.0, 0.0) * scale).masked_fill(~mask, np.nan).to(dtype)
    for laid in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        true = rows(laid, mask)
        bound = masked.with_mask(cpu, mask)
        count, mean, m2 = bound.local_moments(laid)
        var = true.var(0, correction=0)
        assert distance(torch.from_numpy(m2), var * count) < 1e-6
        invstd = var.rsqrt()
        y = bound.normalize(laid, mean, invstd.numpy(), None, None)
        assert distance(rows(y, mask), (true - true.mean(0)) * invstd) < TOLERANCE[dtype] * 8
        _, sum_dy_xmu, _ = bound.backward_reduce(laid, laid, mean, invstd.numpy())
        assert distance(torch.from_numpy(sum_dy_xmu), var * count) < 1e-5
        dx = bound.backward_elementwise(laid, laid, mean, invstd.numpy(), None, mean, m2 / count)
        assert dx.abs().max() < TOLERANCE[dtype] * 8  # the gradient is 0 if dy is x
        for result in (y, dx):
            assert (result[~mask.expand(shape)] == 0).all()


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (400, 3), (400, 70)], ids=str)
def test_a_constant_channel_has_no_variance_whatever_lies_between(shape: tuple[int, ...]) -> None:
    mask = masks(shape)["half"]
    for value in (0.1, 1e-39, 1e5 + 0.1):
        x = torch.full(shape, value).masked_fill(~mask, 7.0)
        for laid in layouts(x).values():
            _, mean, m2 = masked.with_mask(cpu, mask).local_moments(laid)
            assert (mean == np.float32(value)).all()
            assert (m2 == 0).all()


@needs_native
def test_a_part_without_true_values_leaves_nothing() -> None:
    """A part whose mask is all false has sums of 0, even if their memory held values."""
    x, mask = shard((2, 3, 256, 256), 1), torch.ones(2, 1, 256, 256, dtype=torch.bool)
    mask[0] = False
    cpu.local_moments(torch.full_like(x, np.nan))
    count, mean, m2 = masked.with_mask(cpu, mask).local_moments(x)
    assert count == 256 * 256
    assert distance(torch.from_numpy(mean), x[1].double().mean((1, 2)), 1.0) < 1e-6
    assert distance(torch.from_numpy(m2) / count, x[1].double().var((1, 2), correction=0)) < 1e-6


@needs_native
def test_the_same_bits_at_any_number_of_threads_and_for_any_layout_of_the_mask() -> None:
    """Neither the number of threads nor the memory layout of the mask changes a bit."""
    for shape in [(4, 33, 60, 60), (30000, 3), (2, 500, 30, 30)]:
        x, ones = shard(shape, 1, 3.0), np.ones(shape[1])
        for laid in (x, layouts(x)["channels last"]):
            results = []
            for threads in (1, 2, 3):
                for mask in (masks(shape)["strided"], masks(shape)["strided"].contiguous()):
                    bound = masked.with_mask(cpu, mask)
                    with native_settings(threads=threads):
                        _, mean, m2 = bound.local_moments(laid)
                        *sums, _ = bound.backward_reduce(laid, laid, ones, ones)
                        y = bound.normalize(laid, ones, ones, None, None)
                    results.append([v.tobytes() for v in (mean, m2, *sums, y.numpy())])
            assert all(each == results[0] for each in results)


def at_the_end_of_memory(mask: np.ndarray) -> np.ndarray:
    """Return a copy that ends where readable memory ends: reading on would end the process."""
    room = -(-mask.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), bool)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(memory.ctypes.data + room, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    copy = memory[room - mask.nbytes : room].reshape(mask.shape)
    copy[...] = mask
    return copy


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_read_beyond_a_mask(level: int) -> None:
    """Loops read whole vectors of mask bytes, none beyond the mask. Any byte but 0 is true."""
    for shape in [(33, 2), (49, 3), (80, 1), (300, 3), (5, 70), (2, 3, 5), (2, 3, 64), (1, 2, 701)]:
        x, ones = shard(shape, 1, 3.0), np.ones(shape[1])
        mask = masks(shape)["half"].numpy()
        ends = at_the_end_of_memory((mask * np.uint8(6)).view(bool))
        begins = at_the_end_of_memory(mask[::-1])[::-1]
        for laid in layouts(x).values():
            results = []
            for each in (mask, ends, begins):
                bound, array = masked.with_mask(cpu, each), laid.numpy()
                with native_settings(level):
                    count, mean, m2 = bound.local_moments(array)
                    *sums, dz = bound.backward_reduce(array, array, ones, ones)
                    y = bound.normalize(array, ones, ones, None, None)
                    dx = bound.backward_elementwise(dz, array, ones, ones, None, ones, ones)
                results.append((count, mean, m2, *sums, y, dx))
            for found in results[1:]:
                assert all(map(partial(np.allclose, rtol=1e-5, atol=1e-4), found, results[0]))


def test_numpy_arrays_and_which_kernels_serve() -> None:
    mask = masks((40, 16, 8))["half"]
    x = dirty((40, 16, 8), mask, 1, 3.0, np.nan)
    expected = masked.with_mask(masked, mask).local_moments(x)
    for array, of_array in ((x.numpy(), mask.numpy()), (x.numpy().astype(">f8"), mask.numpy())):
        bound = kernels_for(array, of_array)
        count, mean, m2 = bound.local_moments(array)
        assert count == expected[0]
        assert distance(torch.as_tensor(np.sum(mean, 0)), expected[1].sum(0)) < 1e-12
        assert distance(torch.as_tensor(np.asarray(m2, "f8")), expected[2]) < 1e-12
        y = bound.normalize(array, expected[1].sum(0).numpy(), np.ones(16), None, None)
        assert isinstance(y, np.ndarray)
        assert (y[~np.broadcast_to(of_array, y.shape)] == 0).all()
    host: Any = kernels_for(x, mask)
    assert host.local_moments.func is (native() or masked).local_moments
    meta: Any = kernels_for(x.to("meta"), mask.to("meta"))
    assert meta.local_moments.func is masked.local_moments


@no_exchange
def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is in host memory, and says that it is on a GPU."""

    class OnGPU(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    mask = torch.ones(2, 1, 5, dtype=torch.bool).as_subclass(OnGPU)
    with pytest.raises(MPISyncBNError, match="with a mask cannot be captured in a CUDA graph"):
        masked.local_moments(torch.ones(2, 3, 5), mask=mask)
