"""Jobs under the stream transport fail, end and fork as under the host transport."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support.device import GPU
from support.jobs import End
from support.ranks import starts_mpiexec
from support.stream_device import library, needs_standin

pytestmark = [
    needs_standin,
    starts_mpiexec,
    pytest.mark.skipif(GPU, reason="scripts/gpu_check has its own"),
]
full = pytest.mark.full("one job is enough before a commit")
BEGINNING = """
import atexit, os, sys, time
found = []
@atexit.register
def check():  # after the package's own handler, which came later
    if found and all(each.tolist() == total for each in found):
        os.write(1, f"right:{rank}\\n".encode())
import numpy as np, pytest, torch
from mpi4py import MPI
from mpisyncbn import exchange
from mpisyncbn.fingerprint import LayerCall
from support.stream_device import pretend_stream, stream_group
from pathlib import Path
device = pretend_stream(pytest.MonkeyPatch(), path=Path(sys.argv[1]))
group, rank = stream_group(), MPI.COMM_WORLD.rank
def enqueue(name="layer 'bn1'", put=device.put):
    call = LayerCall(name, "backward", 3, "float32")
    return exchange.reduce_sums(group, call, put([1.0 + rank] * 3))[0]
first = enqueue()
device.synchronize()
total = [3.0 if MPI.COMM_WORLD.size == 2 else 1.0] * 3
assert first.tolist() == total
"""


@pytest.fixture
def run(run_job: Callable[..., End]) -> Callable[..., End]:
    """A function that runs BEGINNING and then a program in a job, by default of two ranks."""

    def run(program: str, timeout: float = 30, order: str = "early", ranks: int = 2) -> End:
        variables = {"MPISYNCBN_TIMEOUT": str(timeout), "MPISYNCBN_STANDIN_ORDER": order}
        return run_job("-c", BEGINNING + program, str(library()), ranks=ranks, variables=variables)

    return run


def test_a_missing_rank(run: Callable[..., End]) -> None:
    """The watchdog sees that the worker thread waits in MPI, while the host runs other code."""
    end = run(
        """
if rank == 0:
    enqueue("layer 'bn2'")
time.sleep(1000)  # elsewhere
""",
        timeout=2,
    )
    assert end.status not in (0, None)
    assert end.left == 0
    assert re.search(
        r"rank 0 of 2 .* has waited 2\.\d s \(the limit is 2 s, MPISYNCBN_TIMEOUT\) for other ranks of its "
        r"group in exchange number 2, backward of layer 'bn2' \(3 channels, float32\)",
        end.stderr,
    ), end.stderr
    assert re.search(r"rank 1 .* is missing: it has done 1 exchanges of this group", end.stderr), end.stderr


@full
def test_a_rank_that_has_departed(run: Callable[..., End]) -> None:
    end = run(
        """
if rank == 0:
    enqueue("layer 'bn2'")
    device.synchronize()
"""
    )
    assert end.status not in (0, None)
    assert end.left == 0
    assert (
        "in exchange number 2, backward of layer 'bn2' (3 channels, float32), in vain: rank 1" in end.stderr
    )


@full
@pytest.mark.parametrize("moment", ["idle", "in an exchange"])
def test_a_rank_that_raises(moment: str, run: Callable[..., End]) -> None:
    """A rank that raises ends the job, even if its worker thread waits in MPI for another rank."""
    end = run(
        f"""
if rank == 0:
    if {moment == "in an exchange"}:
        enqueue("layer 'bn2'")
        time.sleep(0.5)
    raise RuntimeError("the cause")
time.sleep(1000)
"""
    )
    assert end.status not in (0, None)
    assert end.left == 0
    assert "RuntimeError: the cause" in end.stderr


@full
@pytest.mark.parametrize(("order", "ranks"), [("early", 2), ("late", 2), ("late", 1)])
def test_an_end_with_work_in_flight(order: str, ranks: int, run: Callable[..., End]) -> None:
    """Work in flight is finished at exit, before a handler of the program reads the results."""
    end = run("found += [enqueue() for _ in range(50)]", order=order, ranks=ranks)
    assert (end.status, end.left) == (0, 0), end.stderr
    assert sorted(end.stdout.split()) == ["right:0", "right:1"][:ranks]


@full
def test_a_fork_in_the_middle(run: Callable[..., End]) -> None:
    """A forked child ends, although it has no worker thread, and the parent goes on."""
    end = run(
        """
found += [enqueue() for _ in range(5)]
child = os.fork()
if not child:
    import gc
    assert group.stream is None
    gc.collect()
    os._exit(7)  # MPI may hang at another end, as without this package
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
found += [enqueue() for _ in range(5)]
group.synchronize()
device.synchronize()
assert [each.tolist() for each in found] == [total] * 10
"""
    )
    assert (end.status, end.left) == (0, 0), end.stderr


@full
def test_other_channels(run: Callable[..., End]) -> None:
    """Messages of two lengths end the job. It reports different calls, or a rank that waited."""
    end = run(
        "exchange.reduce_sums(group, LayerCall('layer', 'backward', 3 + rank, 'float32'), "
        "device.put([1.0] * (3 + rank)))\ngroup.synchronize()\n",
        timeout=5,
    )
    assert end.status not in (0, None)
    assert end.left == 0
    assert re.search("made different ones|has waited", end.stderr), end.stderr


@full
@pytest.mark.parametrize("then", ["", "group = None\ngc.collect()\ngroup = stream_group()\n"])
def test_a_mismatch_in_the_last_exchange(then: str, run: Callable[..., End]) -> None:
    """A mismatch in the last exchange of a group ends the job: no later call can raise it."""
    end = run(f"import gc\nenqueue(f'layer {{rank}}')\n{then}", order="late")
    assert end.status not in (0, None)
    assert end.left == 0
    words = r"exchange number 2 of rank \d of 2, backward of layer \d .*, has failed"
    assert re.search(words, end.stderr), end.stderr


@full
def test_a_dropped_group_with_work_in_flight(run: Callable[..., End]) -> None:
    """The communicator of a dropped group is not freed before its worker has done its work."""
    end = run(
        """
import gc
found += [enqueue() for _ in range(5)]
stream = device.stream
group = None
gc.collect()
for _ in range(3):
    group = stream_group()
    device.stream = device.driver.stream()
    found.append(enqueue())
    group.synchronize()
device.driver.cuStreamSynchronize(stream)
""",
        order="late",
    )
    assert (end.status, end.left) == (0, 0), end.stderr
    assert sorted(end.stdout.split()) == ["right:0", "right:1"]
