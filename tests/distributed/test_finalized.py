"""A program with process groups must not fail at its end. Later use of them is an error."""

from __future__ import annotations

import pytest

from support.jobs import run_alone
from support.ranks import no_exchange
from support.versions import newer_than_2_6

pytestmark = no_exchange
BEGIN = """
import gc, torch, torch.distributed as dist, mpisyncbn
from mpi4py import MPI
mpisyncbn.init_process_group()
world, group, x = dist.group.WORLD, dist.new_group(), torch.ones(2)
dist.all_reduce(x, group=group, async_op=True).wait()  # its thread is there from now on
layer = mpisyncbn.SyncBatchNorm(2, process_group=group)
layer(torch.randn(3, 2))
world.send([torch.ones(1)], 0, 5)
world.recv([torch.zeros(1)], 0, 5)  # a message that nobody has waited for
MPI.Finalize()
"""


def test_destroyed() -> None:
    """After MPI_Finalize each use of a group raises an error that says so.

    Destroying one group, or all groups, is silent.
    """
    out = run_alone(
        BEGIN
        + """
for use in (
    dist.new_group, dist.barrier, lambda: world.send([x], 0), lambda: layer(torch.randn(3, 2)),
    lambda: dist.all_reduce(x, async_op=True).wait(), mpisyncbn.distributed.monitored_barrier,
):
    try:
        use()
    except mpisyncbn.MPISyncBNError as error:
        print("MPI is already finalized" in str(error))
dist.destroy_process_group(group)
dist.destroy_process_group()
"""
    )
    assert out.split() == ["True"] * 6


@newer_than_2_6("aborts groups of NCCL alone")
def test_aborted() -> None:
    """After MPI_Finalize, aborting all groups is silent.

    So are freeing a layer's communicator before that, and dropping all references.
    """
    out = run_alone(
        BEGIN
        + """
layer.communicator.free()
del group, layer
gc.collect()
dist.distributed_c10d._abort_process_group()
del world
gc.collect()
"""
    )
    assert out == ""


@pytest.mark.parametrize("end", ["", "sys.exit()"])
def test_the_end_waits_for_futures(end: str) -> None:
    """At exit, a thread in C++ code of torch would end the process with SIGABRT, now and then."""
    out = run_alone(
        f"""
import os, sys, time, torch, torch.distributed as dist, mpisyncbn
from mpisyncbn.distributed.work import Work
mpisyncbn.init_process_group()

def complete_late(work, future, complete=Work._complete_future):
    time.sleep(0.5)
    complete(work, future)
    print("completed", flush=True)

work = dist.all_reduce(torch.ones(2), async_op=True)
work.wait()
Work._complete_future = complete_late
work = dist.all_reduce(torch.ones(2), async_op=True)
future = work.get_future()
work.wait()
{end}
"""
    )
    assert out.split() == ["completed"]
