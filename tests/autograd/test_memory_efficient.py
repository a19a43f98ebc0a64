"""Gradients of a layer that keeps its output in place of its input, for parameters of any size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.memory import ACTIVATIONS, error, error_by_channel, gradients, kept, layers
from support.oracle import local_batch, shard
from support.ranks import WORLD, together

WIDE = [torch.float32, torch.float64]


def in_float64(layer, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's part of the whole batch's gradients of x, weight and bias in float64.

    Collective.
    """
    parts = WORLD.allgather((x.double().contiguous(), dy.double().contiguous()))
    x, dy = (torch.cat(each) for each in zip(*parts, strict=True))
    x.requires_grad_()
    owner = torch.arange(WORLD.size).repeat_interleave(torch.tensor([len(part[0]) for part in parts]))
    rows = [p.detach().double().repeat(WORLD.size, 1).requires_grad_() for p in (layer.weight, layer.bias)]
    weight, bias = (row[owner].reshape(*row[owner].shape, *(1,) * (x.ndim - 2)) for row in rows)
    z = F.batch_norm(x, None, None, None, None, True, 0.0, layer.eps) * weight + bias
    y = F.leaky_relu(z, layer_slope(layer))
    y.backward(dy)
    return x.grad[owner == WORLD.rank], rows[0].grad[WORLD.rank], rows[1].grad[WORLD.rank]


def layer_slope(layer) -> float:
    return {None: 1.0, "leaky_relu": 0.01, "leaky_relu(3.0)": 3.0}[layer.activation]


def near_kink(layer, x: Tensor) -> Tensor:
    """Return a mask: where rounding may change the sign of the activation's input. Collective."""
    with torch.no_grad():
        z = copy.deepcopy(layer).double()
        z.memory_efficient, z.activation = False, None
        scale = (layer.weight.abs() + layer.bias.abs()).double().reshape(1, -1, *(1,) * (x.ndim - 2))
        return z(x.double()).abs() < 1e-5 * scale


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_gradients_over_weights_from_1e_minus_6_to_10(dtype, activation, last):
    """Biases are 0, in proportion to the weights, or independent of the weights."""
    channels, worst = 24, []
    for seed in range(3):
        common = torch.Generator().manual_seed(seed)
        weight = 10 ** (torch.rand(channels, generator=common, dtype=torch.float64) * 7 - 6)
        bias = torch.randn(channels, generator=common, dtype=torch.float64)
        bias[:8] = 0
        bias[8:16] *= 5 * weight[8:16]
        weight[::2] *= -1
        efficient, plain = layers(channels, dtype, activation, weight, bias)
        x = shard((local_batch(), channels, 9, 7), seed + 10, 3.0, dtype)
        dy = shard(x.shape, seed + 20, 0.0, dtype) + x * 0.5
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        if activation:
            dy = dy.masked_fill(near_kink(efficient, x), 0)  # either side is right
        y, dx, dweight, dbias = gradients(efficient, x, dy)
        expected_y, *expected = gradients(plain, x, dy)
        exact = in_float64(plain, x, dy)
        chosen = kept(efficient(x.requires_grad_()))
        worst.append(not torch.equal(y, expected_y))
        for dx_there, dweight_there, dbias_there in (expected, exact):
            worst += [error_by_channel(dx, dx_there)]
            worst += [error(dweight, dweight_there), error(dbias, dbias_there)]
    with together():
        assert max(worst) < (1e-5 if dtype == torch.float32 else 1e-13)
        assert chosen is not None
        assert chosen
        assert all(c >= 8 for c in chosen)  # at these weights, channels without a bias keep no input


# For each case: x as a function of normal values, weight, bias, eps, and whether its input is kept.
CASES = {
    "ordinary": (lambda v: v, 1.0, 0.5, 1e-5, False),
    "negative weight": (lambda v: v, -2.0, 0.5, 1e-5, False),
    "weight 1e-28": (lambda v: v, 1e-28, 0.0, 1e-5, False),
    "weight 1e-30 and a bias": (lambda v: v, 1e-30, 1.0, 1e-5, True),
    "weight 1e-38": (lambda v: v, 1e-38, 0.0, 1e-5, True),
    "subnormal y": (lambda v: v, 1e-42, 0.0, 1e-5, True),
    "weight 0": (lambda v: v, 0.0, 0.5, 1e-5, True),
    "bias of 7 weights": (lambda v: v, 0.1, 0.7, 1e-5, False),
    "bias of 100 weights": (lambda v: v, 0.1, 10.0, 1e-5, True),
    "weight 1e30": (lambda v: v, 1e30, 0.0, 1e-5, False),
    "y overflows": (lambda v: v * 3, 3e38, 0.0, 1e-5, True),
    "large mean": (lambda v: v + 1e4, 1.0, 0.5, 1e-5, False),
    "variance below eps": (lambda v: v * 1e-5, 1.0, 0.0, 1e-5, False),
    "variance below eps and a bias": (lambda v: v * 1e-5, 1.0, 0.5, 1e-5, True),
    "tiny x without eps": (lambda v: v * 1e-25, 1.0, 0.5, 0.0, False),
    "huge x": (lambda v: v * 1e25, 1.0, 0.5, 1e-5, False),
    "weight * invstd 1e-39": (lambda v: v * 1e8, 1e-31, 0.0, 1e-5, True),
    "constant": (lambda v: v * 0 + 3, 1.0, 0.0, 1e-5, True),
    "constant without eps": (lambda v: v * 0 + 3, 1.0, 0.0, 0.0, True),
    "infinity": (lambda v: v.index_fill(-1, torch.tensor(1), math.inf), 1.0, 0.0, 1e-5, True),
    "NaN": (lambda v: v.index_fill(-1, torch.tensor(1), math.nan), 1.0, 0.0, 1e-5, True),
    "NaN weight": (lambda v: v, math.nan, 0.0, 1e-5, True),
    "infinite bias": (lambda v: v, 1.0, math.inf, 1e-5, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_a_channel_is_undone_or_kept(case, activation):
    """The channel of the case is among five ordinary ones, whose gradients it does not change."""
    make, weight, bias, eps, is_kept = CASES[case]
    efficient, plain = layers(6, activation=activation, eps=eps, track_running_stats=False)
    with torch.no_grad():
        efficient.weight[2], efficient.bias[2] = weight, bias
    plain.load_state_dict(efficient.state_dict())
    x = shard((local_batch(3), 6, 40), 1)
    x[:, 2] = make(x[:, 2])
    dy = shard(x.shape, 2) + 0.5 * shard(x.shape, 1)
    with torch.no_grad():
        y = plain(x)
    dy[y.abs() < 1e-5 * y.abs().amax((0, 2), keepdim=True)] = 0  # either side of the kink is right
    found, expected = gradients(efficient, x, dy), gradients(plain, x, dy)
    chosen = kept(efficient(x.requires_grad_()))
    with together():
        assert torch.equal(found[0], expected[0]) or case in ("infinity", "NaN", "NaN weight")
        assert chosen == ([2] if is_kept else [])
        others = [0, 1, 3, 4, 5]
        assert error_by_channel(found[1][:, others], expected[1][:, others]) < 1e-6
        for ours, theirs in zip(found[2:], expected[2:], strict=True):
            assert error(ours[others], theirs[others]) < 1e-6
        tolerance = 1e-6 if is_kept else 1e-5
        sums = dy[:, 2].norm()  # the scale of a sum over these values, whose terms may cancel
        for ours, theirs, scale in zip(found[1:], expected[1:], (0.0, sums, sums), strict=True):
            ours, theirs = (v[:, 2] if v.ndim > 1 else v[2:3] for v in (ours, theirs))
            close = (ours - theirs).abs() <= tolerance * theirs.abs().max().clamp_min(scale)
            assert (close | (ours.isnan() & theirs.isnan()) | (ours == theirs)).all()


def test_most_channels_kept_and_empty_ranks():
    """If most channels must keep their input, all do. A rank without values decides the same."""
    efficient, plain = layers(bias=[0.0, 9.0, 9.0, 9.0, 9.0, 0.0])
    batch = 0 if WORLD.rank else 3
    x, dy = shard((batch, 6, 50), 1), shard((batch, 6, 50), 2)
    found = []
    for bias in ([0.0, 9.0, 9.0, 9.0, 9.0, 0.0], [0.0, 9.0, 9.0, 0.0, 9.0, 0.0], [0.0] * 6):
        with torch.no_grad():
            efficient.bias.copy_(torch.tensor(bias))
            plain.bias.copy_(torch.tensor(bias))
        y = efficient(x.clone().requires_grad_())
        found.append((kept(y), gradients(efficient, x, dy), gradients(plain, x, dy)))
        del y
    with together():
        assert [each[0] for each in found] == [None, [1, 2, 4], []]
        for _, ours, theirs in found:
            assert ours[1].shape == x.shape
            assert batch == 0 or error_by_channel(ours[1], theirs[1]) < 1e-5
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[2:], theirs[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_input(dtype):
    efficient, plain = layers()
    x, dy = shard((local_batch(), 6, 20), 1, 0.0, dtype), shard((local_batch(), 6, 20), 2, 0.0, dtype)
    y = efficient(x.requires_grad_())
    found, expected = gradients(efficient, x.detach(), dy), gradients(plain, x.detach(), dy)
    with together():
        assert kept(y) is None
        assert all(map(torch.equal, found, expected))
