"""Compute the time and bytes of an exchange at any number of ranks by the Hockney model.

A message of n bytes takes ``alpha + n * beta``. The steps and bytes of the algorithms are those of
Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH",
for P ranks, a power of two. Arithmetic and congestion are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, log2
from typing import Any, NamedTuple

from .cases import AS_TORCH

# Channels of the 53 batch norms of ResNet-50: one, 3 in each block, 1 in each projection.
RESNET50 = [64] + [
    channels
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
    for channels in [width, width, 4 * width] * blocks + [4 * width]
]
RANKS = [2**power for power in range(1, 17)]


class Network(NamedTuple):
    alpha: float  # us per message
    beta: float  # us per byte


def fit(ranks: int, small: float, large: float, size: int = 8192, least: int = 8) -> Network:
    """Compute alpha and beta from the latencies of two all-reduces over ``ranks`` ranks.

    Both are taken to use recursive doubling: log2(ranks) messages of full length.

    Args:
        small: us of an all-reduce of ``least`` bytes.
        large: us of an all-reduce of ``size`` bytes.
    """
    steps = ceil(log2(ranks))
    beta = (large - small) / (steps * (size - least))
    return Network(small / steps - least * beta, beta)


# Published latencies of all-reduces of 8 B and 8 KB (us): HDR100 InfiniBand, 4 nodes of 128 ranks
# (openucx/ucc issue 981); Slingshot, 2 nodes of 288 (user guide of Cirrus, "Containers").
NETWORKS = {
    "HDR100": fit(4 * 128, 7.7, 29.0),
    "Slingshot": fit(2 * 288, 11.0, 76.0),
}


def allreduce_costs(ranks: int, size: float) -> list[tuple[int, float]]:
    """Messages and bytes that a rank sends, by recursive doubling and by Rabenseifner."""
    steps = ceil(log2(ranks))
    return [(steps, steps * size), (2 * steps, 2 * (ranks - 1) / ranks * size)]


def allgather_costs(ranks: int, size: float) -> list[tuple[int, float]]:
    """Messages and bytes that a rank sends in an all-gather, by Bruck and by a ring."""
    return [(ceil(log2(ranks)), (ranks - 1) * size), (ranks - 1, (ranks - 1) * size)]


def fastest(costs: Iterable[tuple[int, float]], network: Network) -> float:
    """The time in us of the fastest algorithm: MPI libraries choose one by the size."""
    return min(messages * network.alpha + sent * network.beta for messages, sent in costs)


def step_ms(ranks: int, network: Network, channels: list[int] = RESNET50) -> dict[str, float]:
    """The time in ms of all exchanges of one training step, forward and backward.

    Each of our layers makes two all-reduces of 2C + 3 float64. torch.nn.SyncBatchNorm makes an
    all-gather of 2C + 1 float32 and, backward, an all-reduce of 2C float32. The time to merge is
    left out.
    """
    ours = sum(2 * fastest(allreduce_costs(ranks, 8 * (2 * c + 3)), network) for c in channels)
    gather = sum(
        fastest(allgather_costs(ranks, 4 * (2 * c + 1)), network)
        + fastest(allreduce_costs(ranks, 8 * c), network)
        for c in channels
    )
    return {"ours": ours / 1000, "all-gather": gather / 1000}


def table() -> list[dict[str, Any]]:
    return [
        {"ranks": ranks, **{name: step_ms(ranks, network) for name, network in NETWORKS.items()}}
        for ranks in RANKS
    ]


def text(scaling: list[dict[str, Any]], model: list[dict[str, Any]]) -> str:
    """A table of measured times and counted bytes beside the model's, up to 65,536 ranks."""
    found = {row["ranks"]: row for row in scaling}
    channels = next((row["channels"] for row in scaling if "channels" in row), 0)
    kinds = "merge_moments", AS_TORCH
    head = ["ranks", "us", "gather", "bytes", "model", "gather", "model"]
    head += [f"{network} {kind}" for network in NETWORKS for kind in ("ours", "gather")]
    lines = [
        f"merge_moments beside {AS_TORCH}, C={channels}: us of one, where the ranks share this machine;",
        "bytes that a rank sends in one, counted and by the model (ours: the two algorithms); counted are",
        "point-to-point messages, those inside collectives too, with collectives over shared memory off;",
        "then, by the model alone, ms for the exchanges of a ResNet-50 training step.",
        "",
        _columns(head),
    ]
    for row in model:
        ranks = row["ranks"]
        here = found.get(ranks, {})
        us = [f"{here['us'][kind]['median']:,.0f}" if "us" in here else "" for kind in kinds]
        sent = [here.get("bytes sent", {}).get(kind, {}).get("mean") for kind in kinds]
        counted = ["" if mean is None else f"{mean:,.0f}" for mean in sent]
        ends = sorted(total for _, total in allreduce_costs(ranks, 8 * (2 * channels + 3)))
        ours = " to ".join(f"{total:,.0f}" for total in dict.fromkeys(ends))
        gathered = f"{allgather_costs(ranks, 4 * (2 * channels + 1))[0][1]:,}"
        steps = [f"{row[network][kind]:,.2f}" for network in NETWORKS for kind in ("ours", "all-gather")]
        lines.append(_columns([f"{ranks:,}", *us, counted[0], ours, counted[1], gathered, *steps]))
    return "\n".join(lines)


def _columns(cells: list[str]) -> str:
    widths = (6, 7, 7, 8, 17, 10, 12) + (16,) * 2 * len(NETWORKS)
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
