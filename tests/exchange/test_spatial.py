"""Samples that are split unevenly over a grid of ranks give the same results as whole samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mpisyncbn
from support.ranks import WORLD, together
from support.whole_batch import distance

CUTS = [0, 2, 7]  # where a height of 7 is cut
PARTS = 2 if WORLD.size % 2 == 0 else 1
SAMPLES = WORLD.size // PARTS


@pytest.mark.parametrize("over", ["parts and samples", "parts"])
def test_parts_of_samples_are_normalized_as_whole_samples(over):
    grid = WORLD.Create_cart([SAMPLES, PARTS])
    sample, part = grid.coords
    torch.manual_seed(0)
    sizes = [1 + each % 2 for each in range(SAMPLES)]
    volumes = torch.randn(sum(sizes), 3, 7, 5, dtype=torch.float64)
    target = torch.randn_like(volumes)
    start = sum(sizes[:sample])
    here = slice(start, start + sizes[sample])
    rows = slice(CUTS[part], CUTS[part + 1]) if PARTS == 2 else slice(None)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    plain = copy.deepcopy(net)
    group = mpisyncbn.Communicator(grid.Sub([over == "parts and samples", True]))
    mpisyncbn.convert_sync_batchnorm(net, group)
    wholes = volumes if over == "parts and samples" else volumes[here]
    targets = target if over == "parts and samples" else target[here]

    x = volumes[here][:, :, rows].clone().requires_grad_()
    total = WORLD.allreduce(x.numel()) if over == "parts and samples" else volumes[here].numel()
    y = net(x)
    ((y - target[here][:, :, rows]).square().sum() / total).backward()
    expected_x = wholes.clone().requires_grad_()
    expected = plain(expected_x)
    (expected - targets).square().mean().backward()
    gradients = [group.comm.allreduce(p.grad.numpy()) for p in net.parameters()]

    mine = (here if over == "parts and samples" else slice(None), slice(None), rows)
    with together():
        assert distance(y, expected[mine]) < 1e-12
        assert distance(x.grad, expected_x.grad[mine], expected_x.grad) < 1e-12
        for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
            assert distance(torch.from_numpy(gradient), parameter.grad, 1.0) < 1e-12
        assert distance(net[1].running_var, plain[1].running_var) < 1e-12
        net.eval(), plain.eval()
        assert distance(net(x), plain(x)) < 1e-12
