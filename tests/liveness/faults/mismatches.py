"""Ranks meet in one exchange and do different things."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import case
from .job import Job

_DEBUG = {"MPISYNCBN_DEBUG": "1"}
_MISMATCH = r"CollectiveMismatchError: expected all 4 ranks of the group to make the same call"
_FORWARD = "forward of ModuleDict: "


def _does(rank: int, what: str) -> str:
    return rf"rank {rank} on \S+: {what}"


def _call(direction: str, channels: int = 3, dtype: str = "float32") -> str:
    return rf"{direction} of functional\.batch_norm \({channels} channels, {dtype}\)"


@case(2, says=[_MISMATCH, _does(2, f"{_FORWARD}second"), _does(0, f"{_FORWARD}first")], status=1)
def other_layer(job: Job) -> None:
    """runs another layer than the others"""
    import torch

    import mpisyncbn

    layers = {"first": torch.nn.BatchNorm1d(3), "second": torch.nn.BatchNorm1d(3)}
    net = torch.nn.ModuleDict(layers)
    mpisyncbn.convert_sync_batchnorm(net)
    x = torch.randn(2 + job.rank, 3)
    net["first"](x)
    job.fault()
    net["second" if job.is_at_fault else "first"](x)
    job.train()


@case(1, says=[_MISMATCH, _does(1, _call("backward")), _does(3, _call("forward"))], status=1)
def other_direction(job: Job) -> None:
    """runs backward where the others run forward"""
    from mpisyncbn import functional

    job.steps()
    x = np.ones((2 + job.rank, 3, 5), np.float32)
    y, stats = functional.batch_norm_forward(x)
    job.fault()
    if job.is_at_fault:
        functional.batch_norm_backward(y, x, stats)
    job.train()


@case(
    0,
    says=[_MISMATCH, _does(0, _call("forward", 4)), _does(2, _call("forward"))],
    status=1,
    variables=_DEBUG,
)
def other_channels(job: Job) -> None:
    """has other channels, with MPISYNCBN_DEBUG=1"""
    _different(job, channels=4)


@case(
    3,
    says=[_MISMATCH, _does(3, _call("forward", 3, "float64")), _does(1, _call("forward"))],
    status=1,
    variables=_DEBUG,
)
def other_dtype(job: Job) -> None:
    """has a layer of another dtype, with MPISYNCBN_DEBUG=1"""
    _different(job, dtype="float64")


_SOON = {"MPISYNCBN_TIMEOUT": "3"}  # an error of MPI, a mismatch or this timeout ends the job
_UNSEEN = r"(CollectiveMismatchError|MPISyncBNError): |mpisyncbn: rank \d of 4 on \S+ has waited"


@case(
    1,
    says=[_UNSEEN],
    status=(1, 124),
    variables=_SOON,
    # MPICH 5.0 aborts when a message is truncated, even if the communicator has MPI_ERRORS_RETURN.
    instead={
        "mpich": r"Fatal error in internal_Allreduce\w*: Message truncated(.*\n)*?.* from rank 1 .* truncated"
    },
)
def other_channels_unseen(job: Job) -> None:
    """has other channels"""
    _different(job, channels=4)


@case(2, says=[_UNSEEN], status=(1, 124), variables=_SOON)
def other_dtype_unseen(job: Job) -> None:
    """has a layer of another dtype"""
    _different(job, dtype="float64")


def _different(job: Job, **how: Any) -> None:
    job.steps()
    job.fault()
    job.step(**(how if job.is_at_fault else {}))
    job.train()
