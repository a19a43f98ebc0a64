"""A wrong setting, or a use that cannot work, raises at once, and no rank is left waiting."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from .case import case, ends_job
from .job import Job


@case(
    2,
    says=[r"ValueError: MPISYNCBN_TIMEOUT must be .*got 'soon'"],
    status=1,
    own_variables={"MPISYNCBN_TIMEOUT": "soon"},
)
def timeout(job: Job) -> None:
    """has MPISYNCBN_TIMEOUT=soon"""
    job.fault()
    job.train()


@case(
    1,
    says=[r"TransportError: .*MPISYNCBN_TRANSPORT"],
    status=1,
    own_variables={"MPISYNCBN_TRANSPORT": "device"},
)
def transport(job: Job) -> None:
    """has MPISYNCBN_TRANSPORT=device, without a device"""
    job.fault()
    job.train()


@case(0, says=[r"MPISyncBNError: .*\bfork", "the child ended with status 1", ends_job(0)], status=1)
def forked(job: Job) -> None:
    """uses a layer in a forked child"""
    job.after_steps(lambda: _wait_for(multiprocessing.get_context("fork").Process(target=job.step)))


@case(
    3,
    says=[
        r"MPISyncBNError: this is a worker process of a rank",
        "the child ended with status 1",
        ends_job(3),
    ],
    status=1,
)
def spawned(job: Job) -> None:
    """uses a layer in a spawned worker process"""
    job.steps()
    if job.is_at_fault:
        _wait_for(multiprocessing.get_context("spawn").Process(target=_step))
    job.train()


def _step() -> None:
    import numpy as np

    from mpisyncbn import functional

    Path(f"fault-{os.getpid()}").touch()
    functional.batch_norm_forward(np.ones((2, 3), np.float32))


def _wait_for(child: Any) -> None:
    child.start()
    child.join()
    sys.exit(f"the child ended with status {child.exitcode}")


@case(0, 1, 2, 3, says=[r"MPISyncBNError: this Communicator was freed"], status=1)
def freed(job: Job) -> None:
    """uses a Communicator that was freed"""
    import mpisyncbn

    group = mpisyncbn.Communicator()
    job.step(group)
    group.free()
    job.fault()
    job.step(group)


@case(0, 1, 2, 3, says=[r"ValueError: expected a communicator .* it was freed"], status=1)
def freed_by_mpi(job: Job) -> None:
    """uses a communicator of mpi4py that was freed"""
    group = job.world.Dup()
    job.step(group)
    group.Free()
    job.fault()
    job.step(group)


@case(0, 1, 2, 3, says=[r"MPISyncBNError: MPI is already finalized"], status=1)
def finalized(job: Job) -> None:
    """uses a layer after MPI.Finalize()"""
    from mpi4py import MPI

    job.steps()
    MPI.Finalize()
    job.fault()
    job.step()
