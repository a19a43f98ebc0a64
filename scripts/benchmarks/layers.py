"""Time whole layers: sections layer, threads, tiny, peers, relu, activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn

from . import peers as others
from .cases import LAYERS, PEERS, RELU, SEPARATE, TINY, Case, cases, ratio
from .timing import copy_fraction, interleave

WORLD = MPI.COMM_WORLD
LOCAL = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu(tanh)": nn.GELU("tanh"),
}
# Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
TENSORS = 8


def layer(quick: bool) -> Iterator[dict[str, Any]]:
    for case in cases(LAYERS, quick):
        yield measured(case, _local_and_ours(case), seconds=0.4 if quick else 2.5, with_copy=True)


def threads(quick: bool) -> Iterator[dict[str, Any]]:
    """Time our layer and torch's local layer with several threads in each rank."""
    for row in layer(quick):
        yield {**row, "ranks": WORLD.size, "threads": torch.get_num_threads()}


def tiny(quick: bool) -> Iterator[dict[str, Any]]:
    for case in cases(TINY, quick):
        yield measured(case, _local_and_ours(case), seconds=0.4 if quick else 2.5)


def peers(quick: bool) -> Iterator[dict[str, Any]]:
    """Time our layer, torch's local one, also compiled, and a naive SyncBatchNorm.

    --quick compiles only once.
    """
    with others.gloo():
        for number, case in enumerate(PEERS):
            if quick and number % 3 != 1 and case.family != "tiny":
                continue
            layers = _local_and_ours(case)
            layers["naive over gloo"] = others.NaiveSyncBatchNorm(case.shape[1])
            left_out = {"compiled": "left out of --quick"}
            if not quick or case.family != "tiny":
                x, dy = data(case)
                fast, reason = others.compiled(
                    LOCAL[len(case.shape)](case.shape[1]),
                    lambda layer, x=x, dy=dy: layer(x).backward(dy),
                )
                left_out = {"compiled": reason} if fast is None else {}
                if fast is not None:
                    layers["compiled"] = fast
            yield {**measured(case, layers, seconds=0.5 if quick else 2.0), "left out": left_out}


def relu(quick: bool) -> Iterator[dict[str, Any]]:
    """Time our layer with ReLU fused, beside our layer and torch's, each followed by nn.ReLU."""
    for case in cases(RELU, quick):
        channels = case.shape[1]
        layers = {
            "ours": mpisyncbn.SyncBatchNorm(channels, activation="relu"),
            "ours, then relu": nn.Sequential(mpisyncbn.SyncBatchNorm(channels), nn.ReLU()),
            "local, then relu": nn.Sequential(LOCAL[len(case.shape)](channels), nn.ReLU()),
        }
        yield measured(case, layers, seconds=0.4 if quick else 2.5)


def activations(quick: bool) -> Iterator[dict[str, Any]]:
    """Time our layer with each activation fused, beside our layer followed by torch's module."""
    for kind, module in ACTIVATIONS.items():
        for case in cases(RELU, quick):
            channels = case.shape[1]
            layers = {
                "ours": mpisyncbn.SyncBatchNorm(channels, activation=module),
                SEPARATE: nn.Sequential(mpisyncbn.SyncBatchNorm(channels), module),
            }
            yield measured(case._replace(family=kind), layers, seconds=0.3 if quick else 1.5)


def data(case: Case) -> tuple[Tensor, Tensor]:
    """This rank's ``x`` and ``dy``, in the case's dtype and memory format."""
    generator = torch.Generator().manual_seed(WORLD.rank)
    memory = torch.contiguous_format if case.format == "contiguous" else _MEMORY[len(case.shape)]
    x, dy = (
        torch.randn(case.shape, generator=generator)
        .to(getattr(torch, case.dtype))
        .contiguous(memory_format=memory)
        for _ in range(2)
    )
    return x.requires_grad_(), dy


def _local_and_ours(case: Case) -> dict[str, nn.Module]:
    """Torch's local layer and ours.

    Their parameters are float32 even if the input is bfloat16, as under autocast.
    """
    channels = case.shape[1]
    return {"local": LOCAL[len(case.shape)](channels), "ours": mpisyncbn.SyncBatchNorm(channels)}


def measured(
    case: Case, layers: dict[str, nn.Module], seconds: float, with_copy: bool = False
) -> dict[str, Any]:
    x, dy = data(case)

    def reset() -> None:
        x.grad = None

    calls = {name: lambda layer=layer: layer(x).backward(dy) for name, layer in layers.items()}
    if with_copy:
        calls |= others.copies(x)
    figures = interleave(calls, seconds, reset=reset)
    row = {**case._asdict(), "bytes": case.bytes, "values": case.values, "us": figures}
    row["ours to"] = {name: ratio(figures["ours"], figures[name]) for name in layers if name != "ours"}
    if with_copy:
        row["of the copy limit"] = {name: copy_fraction(figures, name, TENSORS) for name in layers}
    return row
