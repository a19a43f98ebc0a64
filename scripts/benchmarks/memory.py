"""Measure the memory that Conv-BN-LeakyReLU keeps for backward, and its time: section memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mpisyncbn

from .cases import MEMORY, Case, cases
from .layers import data, measured

SLOPE = 0.01


def memory(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure the bytes that each kind of layer keeps, and its time, forward and backward.

    The time is that of normalization and activation alone.
    """
    for case in cases(MEMORY, quick, ("float32",)):
        layers = norms(case.shape[1])
        row = measured(case, layers, seconds=0.5 if quick else 3.0)
        row["kept"] = {name: bytes_kept(layer, case) for name, layer in layers.items()}
        yield row


def norms(channels: int) -> dict[str, nn.Module]:
    """Four kinds of batch norm with leaky ReLU.

    They are torch's, torch's with the activation in place, ours ("plain"), and ours with
    ``memory_efficient=True`` ("ours").
    """
    return {
        "torch": nn.Sequential(nn.BatchNorm3d(channels), nn.LeakyReLU(SLOPE)),
        "torch, in-place": nn.Sequential(nn.BatchNorm3d(channels), nn.LeakyReLU(SLOPE, inplace=True)),
        "plain": mpisyncbn.SyncBatchNorm(channels, activation="leaky_relu"),
        "ours": mpisyncbn.SyncBatchNorm(channels, activation="leaky_relu", memory_efficient=True),
    }


def bytes_kept(norm: nn.Module, case: Case) -> int:
    """The bytes that autograd keeps for a convolution, ``norm`` and another convolution.

    Parameters do not count, nor does the input, which the layer before it has kept. A storage that
    two operations keep counts once.
    """
    channels = case.shape[1]
    convolution, following = (nn.Conv3d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
    x = data(case)[0]
    tensors: list[Tensor] = []  # kept alive until they are counted: freed memory may be used again

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach())
        return tensor.detach()  # keeping an output itself would make a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        following(norm(convolution(x)))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    for known in (x, *norm.parameters(), *convolution.parameters(), *following.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values())
