"""Jobs over TCP on several hosts, which are namespaces of this machine.

Some networks are slow, some cables are cut, and some hosts crash.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from support import jobs, libraries
from support.hosts import Hosts, why_not
from support.jobs import ROOT
from support.ranks import WORLD, starts_mpiexec

PROGRAMS = ROOT / "tests" / "cluster" / "programs"
WHY_NOT = "" if WORLD.size > 1 else why_not()
pytestmark = [
    starts_mpiexec,
    pytest.mark.full("hosts take their time"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]

DEADLINE = 3
# Seconds until all waiting ranks must have ended: the time limit, 3 to ask the other ranks, 2 to
# report and call MPI_Abort, and 5 more for a busy machine.
ENDED = DEADLINE + 10


@pytest.fixture
def own() -> libraries.Library:
    """The MPI library of the environment, for tests in which the library makes no difference."""
    try:
        return libraries.find(libraries.own())
    except ValueError as error:
        pytest.skip(str(error))


class Job(NamedTuple):
    """A job with ranks on all hosts, which write files to a folder."""

    hosts: Hosts
    ranks: int
    folder: Path
    program: list[str]
    process: Any

    def of_ranks(self, name: str) -> list[str]:
        """Return the text of each rank's file ``RANK.name``; "" for a rank that has none."""
        files = [self.folder / f"{rank}.{name}" for rank in range(self.ranks)]
        return [file.read_text() if file.exists() else "" for file in files]

    def steps(self) -> int:
        """Return the number of steps that the slowest rank has made."""
        return min(int(each or 0) for each in self.of_ranks("steps"))

    def said(self) -> str:
        output = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        return "\n".join([*output, *self.of_ranks("said")])

    def wait(self, seconds: float) -> int:
        until(lambda: self.process.poll() is not None, seconds, self.said)
        return self.process.returncode

    def alive(self, host: str) -> int:
        """Return the number of ranks that run on a host."""
        return self.hosts.count(host, *self.program)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``start(hosts, library, ranks, program, *arguments, **variables)`` starts a job."""
    with ExitStack() as started:

        def job(
            hosts: Hosts,
            library: libraries.Library,
            ranks: int,
            program: str,
            *arguments: str,
            **variables: str,
        ) -> Job:
            command = [sys.executable, str(PROGRAMS / f"{program}.py"), str(tmp_path), *arguments]
            mpiexec, environment = hosts.mpiexec(library, ranks, *command, **variables)
            process = started.enter_context(jobs.started(mpiexec, tmp_path, environment))
            return Job(hosts, ranks, tmp_path, command, process)

        yield job


def until(condition: Callable[[], bool], seconds: float, said: Callable[[], str] = str) -> float:
    """Wait until ``condition()`` is true, and return how many seconds that took.

    After ``seconds`` the test fails, with the text of ``said()``.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, f"not within {seconds:g} s\n{said()}"
        time.sleep(0.05)
    return time.monotonic() - begin


def test_nothing_outlives_the_tests(run_job: Callable[..., jobs.End]) -> None:
    """If SIGKILL ends the process that made the hosts, their processes and folder disappear too."""
    code = """
import os, subprocess
from support.hosts import Hosts
with Hosts(2) as hosts:
    subprocess.Popen(hosts.command("h2", "sleep", "1000"))
    while not hosts.count("h2", "sleep 1000"):
        pass
    print(hosts.folder, flush=True)
    os.kill(os.getpid(), 9)
"""
    end = run_job("-c", code)
    folder = Path(end.stdout.strip())
    assert folder.name.startswith("mpisyncbn-hosts-")
    assert (end.status, end.left) == (137, 0)
    assert not folder.exists()


def test_hosts_take_programs_that_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.hosts._path", lambda: "/nowhere")
    assert "no unshare and no mount and no ip and no tc" in why_not()


# The suite.

CORE = [
    "exchange/test_exchange.py",
    "exchange/test_functional.py",
    "exchange/test_diagnostics.py",
    "distributed/test_store.py",
    "autograd/test_batchnorm.py::test_like_torch_on_the_whole_batch",
    "autograd/test_batchnorm.py::test_running_statistics_are_the_same_bits_everywhere_after_100_uneven_steps",
    "autograd/test_batchnorm.py::test_any_split_shape_dtype_and_layout",
]


@pytest.mark.parametrize(
    ("count", "ranks", "tests"), [(2, 4, CORE), (4, 8, CORE[:1])], ids=["2 hosts", "4 hosts"]
)
def test_the_core_of_the_suite(
    count: int,
    ranks: int,
    tests: list[str],
    own: libraries.Library,
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--junitxml={report}"]
    paths = [str(ROOT / "tests" / test) for test in tests]
    with Hosts(count) as hosts:
        job = start(hosts, own, ranks, "suite", *options, *paths, MPISYNCBN_TEST_EXAMPLES="4", NO_COLOR="1")
        status = job.wait(200)
        received = [hosts.received(name) for name in hosts.names]
    assert status == 0, job.said()
    assert job.of_ranks("node") == [f"{name} 2" for name in hosts.names for _ in range(2)]
    assert min(received) > 100_000
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) >= 20
    assert not [case.get("name") for case in cases if case.find("failure") is not None]


# Training.


@pytest.fixture
def train(start: Callable[..., Job]) -> Callable[..., Job]:
    """``train(hosts, library, *arguments, **variables)`` starts programs/train.py on 4 ranks.

    It returns when all ranks have made some steps. Without arguments, there are 3 channels.
    """

    def begin(hosts: Hosts, library: libraries.Library, *arguments: str, **variables: str) -> Job:
        job = start(hosts, library, 4, "train", *(arguments or ("3",)), **variables)
        until(lambda: job.steps() > 3, 60, job.said)
        return job

    return begin


def finish(job: Job) -> None:
    """Let the job end, and check that its status is 0 and that no rank wrote to stderr."""
    (job.folder / "last").touch()
    assert job.wait(30) == 0, job.said()
    assert job.of_ranks("said") == [""] * 4


def test_groups_per_node(mpi_library: libraries.Library, train: Callable[..., Job]) -> None:
    with Hosts(2) as hosts:
        job = train(hosts, mpi_library, "3", "per node")
        finish(job)
    assert job.of_ranks("right") == ["h1 [0, 1]", "h1 [0, 1]", "h2 [2, 3]", "h2 [2, 3]"]


@pytest.mark.parametrize("slow", ["1 ms", "20 Mbit/s"])
def test_a_slow_network(slow: str, own: libraries.Library, train: Callable[..., Job]) -> None:
    """A slow network makes training slow, but no rank exceeds the time limit."""
    with Hosts(2) as hosts:
        try:
            hosts.delay(0.001) if slow == "1 ms" else hosts.limit("20mbit")
        except RuntimeError as error:  # some kernels cannot do it
            pytest.skip(str(error))
        job = train(hosts, own, "1000", MPISYNCBN_TIMEOUT="3")
        steps, begin = job.steps(), time.monotonic()
        time.sleep(3)
        seconds = (time.monotonic() - begin) / (job.steps() - steps)
        finish(job)
    assert "h2 [0, 1, 2, 3]" in job.of_ranks("right")
    # A step makes at least one round trip. Forward and backward each send 16 kB or more.
    assert seconds > (0.002 if slow == "1 ms" else 2 * 16e3 / (20e6 / 8))


def test_a_cable_that_is_out_for_a_while(own: libraries.Library, train: Callable[..., Job]) -> None:
    with Hosts(2) as hosts:
        job = train(hosts, own, MPISYNCBN_TIMEOUT="30")
        hosts.cut("h2")
        time.sleep(0.5)
        steps = job.steps()
        time.sleep(1.5)
        still = job.steps() - steps
        hosts.heal("h2")
        until(lambda: job.steps() > steps + 10, 25, job.said)
        finish(job)
    assert still <= 1


def test_a_rank_of_another_host_is_asked(own: libraries.Library, train: Callable[..., Job]) -> None:
    with Hosts(2) as hosts:
        job = train(hosts, own, MPISYNCBN_TIMEOUT=str(DEADLINE))
        (job.folder / "3").touch()  # from now on rank 3 sleeps
        until(lambda: not any(map(job.alive, hosts.names)), ENDED, job.said)
    said = job.of_ranks("said")
    for rank, host in enumerate(("h1", "h1", "h2")):
        assert re.match(waits(rank, host), said[rank]), said[rank]
    assert re.match(r"mpisyncbn: rank 3 of 4 on h2 was asked by rank \d, which has waited too long", said[3])
    missing = (
        r"^  rank 3 on h2 is missing: it has done \d+ exchanges of this group, and is at .*train\.py, line"
    )
    assert re.search(missing, "\n".join(said[:3]), re.MULTILINE)


@pytest.mark.parametrize("fault", ["cut", "crash"])
def test_a_host_that_is_gone(fault: str, mpi_library: libraries.Library, train: Callable[..., Job]) -> None:
    """Each rank that still runs ends at the limit and reports why. mpiexec may wait for ever."""
    with Hosts(2) as hosts:
        job = train(hosts, mpi_library, MPISYNCBN_TIMEOUT=str(DEADLINE))
        getattr(hosts, fault)("h2")
        living = ["h1", "h2"] if fault == "cut" else ["h1"]
        ranks = {host: job.alive(host) for host in living}
        seconds = until(lambda: not any(map(job.alive, living)), ENDED, job.said)
    assert ranks == dict.fromkeys(living, 2)
    assert seconds > DEADLINE - 1
    for host in living:
        check_that_they_waited(job, host)


def waits(rank: int, host: str) -> str:
    """Return a pattern for the beginning of the report of a rank that waits.

    The rank reports at its own time limit, or earlier if another rank asks it.
    """
    waited = rf"has waited \d\.\d s \(the limit is {DEADLINE} s, .*"
    asked = r"was asked by rank \d, which has waited too long: it waits .*"
    start = rf"mpisyncbn: rank {rank} of 4 on {host} ({waited}|{asked})"
    return start + r"exchange number \d+, (for|back)ward of "


def check_that_they_waited(job: Job, host: str) -> None:
    """Check that both ranks of the host reported that they waited, and one for which ranks."""
    said = job.of_ranks("said")
    mine, others = {"h1": ((0, 1), (2, 3)), "h2": ((2, 3), (0, 1))}[host]
    for rank in mine:
        assert re.match(waits(rank, host), said[rank]), said[rank]
        assert "train.py" in said[rank]
    both = said[mine[0]] + said[mine[1]]
    other = "h2" if host == "h1" else "h1"
    for rank in others:
        assert f"\n  rank {rank} on {other} is missing: no answer\n" in both
    assert "mpisyncbn: this ends the job with status 124" in both


def test_a_missing_rank_is_known_on_its_host_only(own: libraries.Library, start: Callable[..., Job]) -> None:
    with Hosts(2) as hosts:
        job = start(hosts, own, 4, "late", MPISYNCBN_TIMEOUT=str(DEADLINE))
        until(lambda: all(job.of_ranks("pid")), 30, job.said)
        seconds = until(lambda: not any(map(job.alive, hosts.names)), ENDED, job.said)
    assert seconds > DEADLINE - 1
    said, process = job.of_ranks("said"), job.of_ranks("pid")[3]
    elsewhere = "may have come, on another host: no process of it is on this one"
    for rank in (0, 1, 2):
        assert f"rank {rank} of 4 on {'h2' if rank == 2 else 'h1'} has waited" in said[rank]
    known = {rank: re.findall(r"^  rank \d .*", said[rank], re.MULTILINE) for rank in (0, 1, 2)}
    assert known[0] == known[1] == [f"  rank {rank} {elsewhere}" for rank in (2, 3)]
    assert known[2] == [
        f"  rank 0 {elsewhere}",
        f"  rank 1 {elsewhere}",
        f"  rank 3 has not come: its process {process} is alive",
    ]
    assert said[3] == ""
