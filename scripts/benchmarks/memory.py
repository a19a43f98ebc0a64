"""What a Conv-BN-LeakyReLU layer keeps for the backward pass, and what that costs: section memory."""

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
    """Bytes by layer, and the time of normalization and activation alone, forward and backward."""
    for case in cases(MEMORY, quick, ("float32",)):
        layers = norms(case.shape[1])
        row = measured(case, layers, seconds=0.5 if quick else 3.0)
        row["kept"] = {name: bytes_kept(layer, case) for name, layer in layers.items()}
        yield row


def norms(channels: int) -> dict[str, nn.Module]:
    """Normalization and leaky ReLU: torch's two ways, ours, and ours memory-efficient, as "ours"."""
    return {
        "torch": nn.Sequential(nn.BatchNorm3d(channels), nn.LeakyReLU(SLOPE)),
        "torch, in-place": nn.Sequential(nn.BatchNorm3d(channels), nn.LeakyReLU(SLOPE, inplace=True)),
        "plain": mpisyncbn.SyncBatchNorm(channels, activation="leaky_relu"),
        "ours": mpisyncbn.SyncBatchNorm(channels, activation="leaky_relu", memory_efficient=True),
    }


def bytes_kept(norm: nn.Module, case: Case) -> int:
    """What autograd keeps from a convolution on, up to the next convolution's input.

    Neither parameters count nor the input, which the layer before has kept. A storage that two
    operations keep counts once.
    """
    channels = case.shape[1]
    convolution, following = (nn.Conv3d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
    x = data(case)[0]
    tensors: list[Tensor] = []  # alive until they are counted, so that no address has two owners

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach())
        return tensor.detach()  # of an output, the tensor itself would be a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        following(norm(convolution(x)))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    for known in (x, *norm.parameters(), *convolution.parameters(), *following.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values())
