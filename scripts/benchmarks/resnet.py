"""Time a whole ResNet-50 training step: sections resnet and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn

from .cases import ratio
from .timing import interleave

WORLD = MPI.COMM_WORLD
BATCH, PIXELS = 4, 224
QUICK_BATCH, QUICK_PIXELS = 2, 96


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, with a skip connection around them.

    The skip connection is the identity, or a projection if the shape changes.
    """

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            *_convolution(inside, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, outside, 1),
        )
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*_convolution(inside, outside, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.skip(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He, Zhang, Ren and Sun 2015, table 1).

    The stride is in the 3x3 convolution, as is usual today.
    """
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, width, 2 if block == 0 and width > 64 else 1))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


class Waiting(nn.BatchNorm2d):
    """The local layer with a bare all-reduce in each forward and backward pass.

    The message is as long as that of our layer. The time includes the ranks' waiting for each
    other, which no synchronized layer can avoid.
    """

    def forward(self, input: Tensor) -> Tensor:
        message = np.zeros(2 * self.num_features + 3)
        WORLD.Allreduce(MPI.IN_PLACE, message)
        output = super().forward(input)
        output.register_hook(lambda gradient: WORLD.Allreduce(MPI.IN_PLACE, message))
        return output


def waiting(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = Waiting
    return module


def _convolution(inside: int, outside: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outside)


def resnet(quick: bool) -> Iterator[dict[str, Any]]:
    """Time the step with torch's local layers and with ours.

    Gradients are not averaged over ranks: that would take the same time in all models.
    """
    batch, pixels = (QUICK_BATCH, QUICK_PIXELS) if quick else (BATCH, PIXELS)
    for name, memory in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        torch.manual_seed(0)
        local = resnet50().to(memory_format=memory)
        models = {
            "local": local,
            "local, waiting": waiting(copy.deepcopy(local)),
            "ours": mpisyncbn.convert_sync_batchnorm(copy.deepcopy(local)),
            "ours, ReLU fused": mpisyncbn.convert_sync_batchnorm(copy.deepcopy(local), fuse_relu=True),
        }
        images = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=memory)
        row = {"family": "ResNet-50 step", **_measure(models, images, quick), "format": name}
        yield {**row, "fused to": {"local": ratio(row["us"]["ours, ReLU fused"], row["us"]["local"])}}


def compiled(quick: bool) -> Iterator[dict[str, Any]]:
    """Time the step compiled by torch.compile. Compiling takes minutes.

    The compiler turns everything to channels_last, so only one memory format is measured.
    """
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # a rank should not start a pool of processes
    batch, pixels = (QUICK_BATCH, QUICK_PIXELS) if quick else (BATCH, PIXELS)
    torch.manual_seed(0)
    local = resnet50()
    models = {"local": local, "ours": mpisyncbn.convert_sync_batchnorm(copy.deepcopy(local))}
    fast = {which: torch.compile(model, dynamic=False, fullgraph=True) for which, model in models.items()}
    row = _measure(fast, torch.randn(batch, 3, pixels, pixels), quick)
    yield {"family": "ResNet-50 step, compiled", **row, "format": "contiguous"}


def _measure(models: dict[str, nn.Module], images: Tensor, quick: bool) -> dict[str, Any]:
    labels = torch.randint(1000, (len(images),))
    figures = interleave(
        {which: training_step(model, images, labels) for which, model in models.items()},
        seconds=3 if quick else 60,
        warm=1 if quick else 2,
        fewest=3 if quick else 5,
    )
    return {
        "shape": tuple(images.shape),
        "dtype": "float32",
        "us": figures,
        "ours to": {
            peer: ratio(figures["ours"], figures[peer]) for peer in figures if peer.startswith("local")
        },
    }


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step
