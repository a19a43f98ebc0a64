"""Time the exchange of one message, beside MPI called from C: section exchange.

The module itself does not import torch: the 64 ranks of --scaling would need minutes and gigabytes
for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

import mpisyncbn
from mpisyncbn import exchange as ours
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import Array, kernels_for

from . import native
from .cases import BARE, CHANNELS, FLOOR, GATHERS, MESSAGE, QUICK_CHANNELS, WHOLE, ratio
from .timing import interleave, often


def exchange(quick: bool) -> Iterator[dict[str, Any]]:
    import torch

    group = mpisyncbn.Communicator().ready()
    for channels in QUICK_CHANNELS if quick else CHANNELS:
        x = torch.randn(4, channels, 2)
        yield measure(group, x, seconds=0.5 if quick else 3.0, calls=100)
    group.free()


def measure(group: mpisyncbn.Communicator, x: Array, seconds: float, calls: int) -> dict[str, Any]:
    """Time each kind of exchange of the moments of ``x`` in microseconds. Return a row.

    Collective: every rank must call.
    """
    channels = x.shape[1]
    length = 2 * channels + 3
    peers = {name: often(once, calls) for name, once in exchanges(group, x).items()}
    left_out = {}
    if native.library()[0] is None:
        left_out[FLOOR] = native.library()[1]
    else:
        peers[FLOOR] = native.allreduce_loop(group.comm, length, calls)
    figures = interleave(peers, seconds, calls=calls)
    ours_to = {name: ratio(figures["merge_moments"], figures[name]) for name in figures if name not in WHOLE}
    return {
        "channels": channels,
        "bytes": 8 * length,
        "us": figures,
        "ours to": ours_to,
        "left out": left_out,
    }


def exchanges(group: mpisyncbn.Communicator, x: Array) -> dict[str, Callable[[], object]]:
    """Return functions that make one exchange of each kind, with the moments of ``x``.

    They are not lambdas: calling one takes a tenth of the time of the shortest exchange.
    """
    channels = x.shape[1]
    count, mean, m2 = kernels_for(x).local_moments(x)
    forward, backward = (
        LayerCall("benchmark", direction, channels, "float32") for direction in ("forward", "backward")
    )
    message, comm = np.zeros(2 * channels + 3), group.comm
    link, totals = group.link, np.empty((2, channels))
    one_call = {} if link is None else {MESSAGE: partial(link.sum_vectors, 1, mean, m2, totals)}
    merges = {name: partial(gather_and_merge, comm, count, mean, m2, wire) for name, wire in GATHERS.items()}
    return {
        "merge_moments": partial(ours.merge_moments, group, forward, count, mean, m2),
        "reduce_sums": partial(ours.reduce_sums, group, backward, mean, m2),
        **one_call,
        BARE: partial(comm.Allreduce, MPI.IN_PLACE, message),
        **merges,
    }


def gather_and_merge(
    comm: MPI.Intracomm, count: int, mean: np.ndarray, m2: np.ndarray, wire: str = "float64"
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return count, mean and variance over all ranks, computed as torch.nn.SyncBatchNorm does it.

    It gathers 2C + 1 values of each rank in dtype ``wire`` (torch uses the dtype of the input), and
    merges all at once (Chan, Golub and LeVeque 1979, eq. 2.1). Collective: every rank must call.
    """
    channels = len(mean)
    message = np.empty(2 * channels + 1, wire)
    message[0], message[1 : channels + 1], message[channels + 1 :] = count, mean, m2
    gathered = np.empty((comm.size, len(message)), wire)
    comm.Allgather(message, gathered)
    counts, means, m2s = gathered[:, :1], gathered[:, 1 : channels + 1], gathered[:, channels + 1 :]
    total = counts.sum()
    merged = (counts * means).sum(axis=0) / total
    return int(total), merged, (m2s + counts * (means - merged) ** 2).sum(axis=0) / total
