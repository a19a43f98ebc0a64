"""Jobs on several hosts, which are namespaces of this one: TCP, slow networks, cut cables, dead hosts."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hosts import Hosts, libraries, why_not
from parallel import WORLD

ROOT = Path(__file__).parents[1]
WHY_NOT = "it starts mpiexec itself: once is enough" if WORLD.size > 1 else why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(150)]

DEADLINE = 3
# Seconds until all ranks that wait have ended: the limit, the questions (3), the words and MPI_Abort (2), and
# as many again for a busy machine.
ENDED = DEADLINE + 10


@pytest.fixture(params=["", "mpich", "impi"], ids=["own", "mpich", "impi"])
def library(request: pytest.FixtureRequest) -> libraries.Library:
    """The library of the environment, and others that are installed beside it."""
    try:
        found = libraries.find(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    if request.param and found == libraries.find(""):
        pytest.skip("that of the environment, which is tried already")
    return found


@pytest.fixture
def own() -> libraries.Library:
    try:
        return libraries.find("")
    except ValueError as error:
        pytest.skip(str(error))


class Job:
    """Ranks on all hosts, and what they leave in a folder."""

    def __init__(
        self,
        hosts: Hosts,
        library: libraries.Library,
        folder: Path,
        ranks: int,
        *command: str,
        **variables: str,
    ) -> None:
        self.hosts, self.folder, self.ranks = hosts, folder, ranks
        self.program = [sys.executable, *command]
        start, environment = hosts.mpiexec(library, ranks, *self.program, **variables)
        with (folder / "job").open("w") as log:
            self.process = subprocess.Popen(
                start, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def of_ranks(self, name: str) -> list[str]:
        """The files of this name of all ranks; empty where there is none."""
        files = [self.folder / f"{rank}.{name}" for rank in range(self.ranks)]
        return [file.read_text() if file.exists() else "" for file in files]

    def steps(self) -> int:
        """How many all ranks have made."""
        return min(int(each or 0) for each in self.of_ranks("steps"))

    def said(self) -> str:
        return (self.folder / "job").read_text()

    def wait(self, seconds: float) -> int:
        until(lambda: self.process.poll() is not None, seconds, self.said)
        return self.process.returncode

    def alive(self, host: str) -> int:
        """How many ranks run on a host."""
        return self.hosts.count(host, *self.program)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Jobs that end with the hosts they run on."""
    jobs = []

    def job(*arguments: object, **variables: str) -> Job:
        hosts, library, *rest = arguments
        jobs.append(Job(hosts, library, tmp_path, *rest, **variables))
        return jobs[-1]

    yield job
    for each in jobs:
        each.process.wait(20)


def until(condition: Callable[[], bool], seconds: float, said: Callable[[], str] = str) -> float:
    """How long it takes."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, f"not within {seconds:g} s\n{said()}"
        time.sleep(0.05)
    return time.monotonic() - begin


def test_nothing_outlives_the_tests() -> None:
    """Not even where they are killed."""
    code = """
import os, subprocess, sys
sys.path.insert(0, {tests!r})
from hosts import Hosts
with Hosts(2) as hosts:
    subprocess.Popen(hosts.command("h2", "sleep", "1000"))
    while not hosts.count("h2", "sleep 1000"):
        pass
    print(hosts.folder, flush=True)
    os.kill(os.getpid(), 9)
"""
    killed = [sys.executable, "-c", code.format(tests=str(ROOT / "tests"))]
    folder = Path(subprocess.run(killed, stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip())
    assert folder.name.startswith("mpisyncbn-hosts-")
    until(lambda: not folder.exists(), 10)
    until(lambda: not any(str(folder) in line for line in command_lines()), 10)


def command_lines() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield file.read_text(errors="replace")


def test_hosts_take_programs_that_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosts._path", lambda: "/nowhere")
    assert "no unshare and no mount and no ip and no tc" in why_not()


# The suite.

SUITE = """
import socket, sys
from pathlib import Path
import pytest
from mpi4py import MPI

node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
Path(sys.argv[1], f"{MPI.COMM_WORLD.rank}.node").write_text(f"{socket.gethostname()} {node.size}")
sys.exit(pytest.main(sys.argv[2:]))
"""
CORE = "test_exchange test_functional test_diagnostics test_batchnorm"


@pytest.mark.parametrize(("count", "ranks", "files"), [(2, 4, CORE), (4, 8, "test_exchange test_functional")])
def test_the_core_of_the_suite(
    count: int, ranks: int, files: str, own: libraries.Library, tmp_path: Path, start: Callable[..., Job]
) -> None:
    program = tmp_path / "suite.py"
    program.write_text(SUITE)
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--junitxml={report}"]
    tests = [str(ROOT / "tests" / f"{file}.py") for file in files.split()]
    with Hosts(count) as hosts:
        job = start(
            hosts, own, ranks, program, tmp_path, *options, *tests, MPISYNCBN_TEST_EXAMPLES="5", NO_COLOR="1"
        )
        status = job.wait(140)
        received = [hosts.received(name) for name in hosts.names]
    assert status == 0, job.said()
    assert job.of_ranks("node") == [f"{name} 2" for name in hosts.names for _ in range(2)]
    assert min(received) > 100_000
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) > 50
    assert not [case.get("name") for case in cases if case.find("failure") is not None]


# Training.

TRAIN = """
import json, os, socket, sys
from pathlib import Path
import numpy as np
from mpi4py import MPI
from mpisyncbn import functional, new_subgroups

folder, channels = Path(sys.argv[1]), int(sys.argv[2])
per_node = sys.argv[3:] == ["per node"]
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
# The launcher hands on nothing from behind a cable that is out.
os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)

group, ranks = None, range(size)
if per_node:
    group, ranks = new_subgroups(), [rank // 2 * 2, rank // 2 * 2 + 1]
data = [np.random.default_rng(each).normal(each, 1 + each, (3 + each, channels)) for each in range(size)]
for step in range(1, 1_000_000):
    # All ranks learn of the last step by the count: a message beside the exchanges would wait unseen.
    last = (folder / "last").exists()
    mine = data[rank][: None if last else -1]
    y, stats = functional.batch_norm_forward(mine, process_group=group)
    dx, _, _ = functional.batch_norm_backward(y, mine, stats, process_group=group)
    new = folder / f"{rank}.new"
    new.write_text(str(step))
    new.rename(folder / f"{rank}.steps")
    if not last and stats.count == sum(len(data[each]) - 1 for each in ranks):
        whole = np.concatenate([data[each][:-1] for each in ranks])
        assert np.allclose([stats.mean, stats.var], [whole.mean(0), whole.var(0)], rtol=1e-9)
        assert np.abs(dx).max() < 1e-4  # y is what no step along it changes
    elif stats.count == sum(len(data[each]) for each in ranks):
        break
(folder / f"{rank}.right").write_text(f"{socket.gethostname()} {ranks}")
"""


@pytest.fixture
def train(tmp_path: Path, start: Callable[..., Job]) -> Callable[..., Job]:
    """Starts the training on 4 ranks, with so many channels, and waits for its first steps."""

    def begin(hosts: Hosts, library: libraries.Library, *arguments: str, **variables: str) -> Job:
        program = tmp_path / "train.py"
        program.write_text(TRAIN)
        job = start(hosts, library, 4, program, tmp_path, *(arguments or ("3",)), **variables)
        until(lambda: job.steps() > 3, 60, job.said)
        return job

    return begin


def finish(job: Job) -> None:
    """Let it end by itself, and see that all was right."""
    (job.folder / "last").touch()
    assert job.wait(30) == 0, job.said()
    assert job.of_ranks("said") == [""] * 4


def test_groups_per_node(library: libraries.Library, train: Callable[..., Job]) -> None:
    with Hosts(2) as hosts:
        job = train(hosts, library, "3", "per node")
        finish(job)
    assert job.of_ranks("right") == ["h1 [0, 1]", "h1 [0, 1]", "h2 [2, 3]", "h2 [2, 3]"]


@pytest.mark.parametrize("slow", ["1 ms", "20 Mbit/s"])
def test_a_slow_network(slow: str, own: libraries.Library, train: Callable[..., Job]) -> None:
    """Takes its time, and is no fault."""
    with Hosts(2) as hosts:
        try:
            hosts.delay(0.001) if slow == "1 ms" else hosts.limit("20mbit")
        except RuntimeError as error:  # not in every kernel
            pytest.skip(str(error))
        job = train(hosts, own, "1000", MPISYNCBN_TIMEOUT="3")
        steps, begin = job.steps(), time.monotonic()
        time.sleep(3)
        seconds = (time.monotonic() - begin) / (job.steps() - steps)
        finish(job)
    assert "h2 range(0, 4)" in job.of_ranks("right")
    # There and back at least; forward and backward are 16 kB each in one direction at least.
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


@pytest.mark.parametrize("fault", ["cut", "crash"])
def test_a_host_that_is_gone(fault: str, library: libraries.Library, train: Callable[..., Job]) -> None:
    """Each rank that lives ends at the deadline, and says why; mpiexec may wait for ever."""
    with Hosts(2) as hosts:
        job = train(hosts, library, MPISYNCBN_TIMEOUT=str(DEADLINE))
        getattr(hosts, fault)("h2")
        living = ["h1", "h2"] if fault == "cut" else ["h1"]
        ranks = {host: job.alive(host) for host in living}
        seconds = until(lambda: not any(map(job.alive, living)), ENDED, job.said)
    assert ranks == dict.fromkeys(living, 2)
    assert seconds > DEADLINE - 1
    for host in living:
        check_that_they_waited(job, host)


def check_that_they_waited(job: Job, host: str) -> None:
    """Both ranks of the host have said so, and one of them for whom."""
    said = job.of_ranks("said")
    mine, others = {"h1": ((0, 1), (2, 3)), "h2": ((2, 3), (0, 1))}[host]
    for rank in mine:
        waited = rf"has waited \d\.\d s \(the limit is {DEADLINE} s, .*"
        asked = r"was asked by rank \d, which has waited too long: it waits .*"
        pattern = (
            rf"mpisyncbn: rank {rank} of 4 on {host} ({waited}|{asked})exchange number \d+, (for|back)ward"
        )
        assert re.match(pattern, said[rank]), said[rank]
        assert "train.py" in said[rank]
    both = said[mine[0]] + said[mine[1]]
    other = "h2" if host == "h1" else "h1"
    for rank in others:
        assert f"\n  rank {rank} on {other} is missing: no answer\n" in both
    assert "mpisyncbn: this ends the job with status 124" in both


LATE = """
import os, sys, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
from mpisyncbn import functional, presence

presence._FORWARDING = 1.0  # else the first to end the job may end a rank that has more to say
folder, rank = Path(sys.argv[1]), MPI.COMM_WORLD.rank
os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)
MPI.COMM_WORLD.Barrier()
(folder / f"{rank}.pid").write_text(str(os.getpid()))
if rank == 3:
    time.sleep(1000)
functional.batch_norm_forward(np.ones((2, 3)))
"""


def test_who_has_not_come_is_known_on_its_host_only(
    own: libraries.Library, start: Callable[..., Job], tmp_path: Path
) -> None:
    program = tmp_path / "late.py"
    program.write_text(LATE)
    with Hosts(2) as hosts:
        job = start(hosts, own, 4, program, tmp_path, MPISYNCBN_TIMEOUT=str(DEADLINE))
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
