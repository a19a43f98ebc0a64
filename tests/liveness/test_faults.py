"""An MPI job ends soon, and names the cause, when a rank fails: 70 faults, each at 4 ranks.

A job must end within seconds of its fault, with a status that is not 0, and stderr must name the
cause and the rank. In 8 cases all ranks end well, in a way that may look like a fault: the status
must be 0. No process of the job may be left. scripts/faults prints a table of the faults.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveness.faults.case import Case, cases, missing, waits
from liveness.faults.job import SIZE
from liveness.faults.outcome import Outcome, judge
from support import jobs, libraries, tables
from support.jobs import End
from support.ranks import starts_mpiexec

pytestmark = starts_mpiexec
CASES = {case.name: case for case in cases()}
QUICK = [
    "absences.skips_a_layer",
    "mismatches.other_direction",
    "exceptions.between_layers",
    "endings.exit_0",
    "endings.raise_exit_7_under_mpi4py",
    "signals.sigkill",
    "setups.timeout",
    "completions.object_sends",
    "completions.handler_steps",
]
full = pytest.mark.full("some of each kind are enough before a commit")


def parameters(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=[] if case.name in QUICK else full)


@pytest.mark.parametrize("case", [parameters(case) for case in cases()])
def test_a_fault(
    case: Case, mpi_library: libraries.Library, run_job: Callable[..., End], record_property: Any
) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # other tests use the cores at the same time
        case = case._replace(limit=60.0)
    program = [*case.under, "-m", "liveness.faults.worker", case.name]
    how = {"library": mpi_library, "variables": case.variables, "limit": case.limit, "start": 120.0}
    found = judge(case, mpi_library, run_job(*program, ranks=SIZE, **how))
    record_property("row", found._asdict())
    assert found.ok, tables.line(found)


# The judgement.


def program(job: Any) -> None:
    """fails"""


def a_case(**changes: Any) -> Case:
    case = Case(program, (2,), ("the cause",), None, 5.0, (3, 4), {}, {}, (), {})
    return case._replace(**changes)


GOOD = End(seconds=0.5, status=3, left=0, stdout="", stderr="x\nwhy: the cause is this\ny\n")


def judged(case: Case | None = None, name: str = "openmpi", **changes: Any) -> Outcome:
    library = libraries.Library(name, "An MPI 1.0", "mpiexec", {}, libraries._KINDS[name].words)
    return judge(case or a_case(), library, GOOD._replace(**changes))


def test_a_good_end() -> None:
    found = judged()
    assert found.ok
    assert (found.fault, found.outcome) == ("rank 2 fails", "why: the cause is this")
    assert (found.library, found.seconds, found.status) == ("An MPI 1.0", 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": 0}, "status 0"),
        ({"status": 1}, "status 1"),
        ({"status": None}, "HUNG: no end within 5 s"),
        ({"seconds": None, "status": None}, "there was no fault"),
        ({"seconds": None}, "there was no fault"),
        ({"left": 2}, "2 processes left behind"),
        ({"stderr": "another cause"}, "not said: the cause"),
        ({"stdout": "the cause", "stderr": ""}, "not said: the cause"),
        ({"status": 1, "stderr": ""}, "status 1; not said: the cause"),
    ],
)
def test_bad_ends(changes: dict[str, Any], said: str) -> None:
    found = judged(**changes)
    assert not found.ok
    assert found.outcome == said


# The output of each library's mpiexec when rank 2 gets signal 9, and when it calls exit(5).
SAID = {
    "openmpi": (
        "prterun noticed that process rank 2 with PID 77 on node host exited on\nsignal 9 (Killed).\n",
        "   Process name: [prterun-host-70@1,2]\n   Exit code:    5\n",
    ),
    "mpich": (
        "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n",
        "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n",
    ),
    "impi": (
        "=   RANK 2 PID 77 RUNNING AT host\n=   KILLED BY SIGNAL: 9 (Killed)\n",
        "=   RANK 0 PID 75 RUNNING AT host\n=   KILLED BY SIGNAL: 9 (Killed)\n",
    ),
}


@pytest.mark.parametrize("name", libraries.NAMES)
def test_the_words_of_mpiexec_about_a_silent_rank(name: str) -> None:
    killed, exited = SAID[name]
    for how, text in ((("signal", 9), killed), (("exit", 5), exited)):
        case = a_case(says=(), silent=how)
        assert judged(case, name, stdout=text, stderr="").ok
        assert judged(case, name, stdout="", stderr=text).ok
        assert judged(case, name, stdout="", stderr="").ok == ((name, how[0]) == ("mpich", "exit"))
        assert not judged(case, name, stdout="other words", stderr="").ok
    case = a_case(says=(), silent=("signal", 9))
    assert not judged(case, name, stdout=killed.replace("9", "15")).ok
    assert judged(case._replace(at_fault=(1,)), name, stdout=killed).ok == (name == "mpich")  # names no rank
    case = a_case(says=(), silent=("exit", 5))
    assert judged(case._replace(at_fault=(0,)), name, stdout=exited).ok == (name == "mpich")


def test_a_library_that_ends_the_job_itself() -> None:
    case = a_case(instead={"mpich": "Fatal error"})
    ended = {"status": 14, "stderr": "Fatal error in it"}
    assert judged(case, "mpich", **ended).ok
    assert not judged(case, "mpich", **{**ended, "status": 0}).ok
    assert not judged(case, "openmpi", **ended).ok
    assert judged(case, "mpich").ok
    assert not judged(case, "mpich", status=14).ok


ABORTED = {
    "openmpi": "MPI_ABORT was invoked on rank 2 in communicator MPI_COMM_WORLD\n  Errorcode: 4\n",
    "impi": "application called MPI_Abort(MPI_COMM_WORLD, 4) - process 2\n",
}


@pytest.mark.parametrize(("name", "status"), [("openmpi", 139), ("impi", 141)])
def test_an_mpiexec_that_breaks(name: str, status: int) -> None:
    """If a signal kills mpiexec itself, its output gives the status of the rank that aborted."""
    said = f"the cause\n{ABORTED[name]}"
    assert judged(name=name, status=status, stderr=said).ok
    assert not judged(name="mpich", status=status, stderr=said).ok
    assert not judged(name=name, status=status - 1, stderr=said).ok
    assert not judged(name=name, status=status, stderr=said.replace("4", "5")).ok
    rank = "process rank 1 with PID 9 on node vm exited on signal 11 (Segmentation fault)."
    if name == "openmpi":
        assert not judged(name=name, status=status, stderr=f"{said}\n{rank}").ok


REPORT = """\
mpisyncbn: rank {} of 4 on host has waited 3.0 s (the limit is 3 s, MPISYNCBN_TIMEOUT) for other ranks \
of its group in exchange number 7, forward of bn1 (3 channels, float32)
Python stack of MainThread, innermost call last:
  File "train.py", line 3, in train
    layer(x)
"""
ASKED = """\
mpisyncbn: rank 2 of 4 on host was asked by rank 0, which has waited too long: it is missing: it has done 6 \
exchanges of this group, and is at train.py, line 9, in {place}
Python stack of MainThread, innermost call last:
  File "train.py", line 9, in {place}
    sleep()
mpisyncbn: what the ranks of the group were doing:
  rank 0 on host waits in exchange number 7, forward of bn1 (3 channels, float32), for 3 s so far
  rank 2 on host is missing: it has done 6 exchanges of this group, and is at train.py, line 9, in {place}
"""


def says_all(patterns: list[str], text: str) -> bool:
    return all(re.search(pattern, text, re.MULTILINE) for pattern in patterns)


def test_patterns_of_a_deadline() -> None:
    text = REPORT.format(0) + REPORT.format(1)
    assert says_all(waits(0, 1), text)
    assert not says_all(waits(0, 1, 3), text)
    asked = "was asked by rank 0, which has waited too long: it waits in exchange number 7, forward of"
    assert says_all(waits(0, 1), REPORT.format(0) + re.sub("has waited .* of", asked, REPORT.format(1)))
    assert not says_all(waits(0, 1), REPORT.format(0) + REPORT.format(1).replace("has waited", "had"))
    assert not says_all(waits(0), text.replace("forward of bn1", ""))
    assert not says_all(waits(0), re.sub("Python stack.*", "", text))
    assert says_all(missing(2, "load"), ASKED.format(place="load"))
    assert not says_all(missing(1, "load"), ASKED.format(place="load"))
    assert not says_all(missing(2, "load"), ASKED.format(place="train"))
    assert not says_all(missing(2, "train"), REPORT.format(2))


def test_the_cases() -> None:
    assert len(CASES) == len(cases()) >= 40
    for name, case in CASES.items():
        assert case.says or case.silent, f"{name}: nothing is said"
        assert case.statuses, name
        assert (0 in case.statuses) == name.startswith("completions."), name
        assert case.at_fault, name
        assert set(case.at_fault) <= {0, 1, 2, 3}, name
        assert case.silent is None or len(case.at_fault) == 1, name
        assert case.title == " ".join(case.title.split()) != "None", name
        assert 0 < case.limit <= 10, name
        for pattern in (*case.says, *case.instead.values()):
            re.compile(pattern)
    alone = [case.at_fault[0] for case in CASES.values() if len(case.at_fault) == 1]
    assert all(alone.count(rank) >= 8 for rank in range(4))


# The job.

FAULT = "from pathlib import Path; import os, subprocess, sys, time; Path('fault-1').touch(); "
SLEEPS = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "


def test_an_end_is_measured_from_the_fault(run_job: Callable[..., End]) -> None:
    end = run_job("-c", f"{FAULT} print('out'); print('err', file=sys.stderr); sys.exit(3)", start=60.0)
    assert end.seconds is not None
    assert end.seconds >= 0
    assert end == (3, end.seconds, 0, "out\n", "err\n")


def test_a_signal_is_a_status(run_job: Callable[..., End]) -> None:
    assert run_job("-c", f"{FAULT} os.kill(os.getpid(), 9)").status == 137


def test_without_a_fault(run_job: Callable[..., End]) -> None:
    assert run_job("-c", "", start=60.0)[:3] == (0, None, 0)
    assert run_job("-c", "import time; time.sleep(60)", start=0.5)[:3] == (None, None, 0)


@pytest.mark.parametrize("stays", [True, False])
def test_nothing_is_left_behind(
    tmp_path: Path, run_job: Callable[..., End], monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """No process is left, whether the program hangs, or ends and leaves a child."""
    monkeypatch.setattr(jobs, "LEAVE", 0.5)
    end = run_job(
        "-c", FAULT + SLEEPS + ("time.sleep(60)" if stays else "sys.exit(1)"), start=60.0, limit=2.0
    )
    assert (end.status, end.left) == ((None, 0) if stays else (1, 1))
    assert not list(jobs.processes(tmp_path))


# The tables of scripts/faults.


def test_tables() -> None:
    good, hung, silent = judged(), judged(status=None), judged(status=0)
    other = good._replace(library="Another MPI", status=4)
    assert tables.verdict([good, hung, silent]) == "1 of 3 as they should be, 1 hung, 1 with status 0"
    assert tables.line(good).split()[:5] == ["ok", good.name, "0.5", "s", "3"]
    assert len(tables.line(good).splitlines()) == 1
    assert tables.line(hung).split()[0] == "FAIL"
    assert "      | why: the cause is this" in tables.line(hung)
    lines = tables.table([good, hung, other]).splitlines()
    assert "Another MPI, 4 ranks" in lines
    assert [line.split()[-1] for line in lines if line.startswith("rank 2 fails")] == ["ok", "FAIL", "ok"]
    assert tables.markdown([good, other]).splitlines() == [
        "| fault | An MPI 1.0 | Another MPI |",
        "| --- | --- | --- |",
        "| rank 2 fails | 0.5 s, 3 | 0.5 s, 4 |",
    ]
    assert "| HUNG: no end within 5 s |" in tables.markdown([hung])
    assert "| 0.5 s, 0 (FAIL) |" in tables.markdown([silent])


@pytest.mark.full("each run starts pytest anew")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--list", 0, "signals.sigterm                    gets SIGTERM"),
        ("--only setups.timeout", 0, "1 of 1 as they should be, 0 hung, 0 with status 0"),
        ("--only no.such.case", 1, "0 of 0 as they should be, 0 hung, 0 with status 0"),
        ("--mpi mpich=/nowhere", 4, "--mpi: expected MPICH in /nowhere, got nothing"),
    ],
)
def test_the_command_scripts_faults(
    arguments: str, status: int, said: str, tmp_path: Path, run_job: Callable[..., End]
) -> None:
    report, plugins = tmp_path / "found.json", ["-p", "support.tables", "-p", "no:cacheprovider"]
    end = run_job("-m", "pytest", *plugins, __file__, "--json", str(report), *arguments.split())
    assert end.status == status, end
    assert said in end.stdout + end.stderr
    if "timeout" in arguments:
        assert [found["ok"] for found in json.loads(report.read_text())] == [True]
    if arguments == "--list":
        assert [line.split()[0] for line in end.stdout.splitlines()] == list(CASES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lam", "expected some of openmpi, mpich, impi, debian-openmpi, debian-mpich, got 'lam'"),
        ("mpich=/nowhere", "expected MPICH in /nowhere, got nothing"),
    ],
)
def test_libraries_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        libraries.find(name)
