"""Runs a case under mpiexec, waits for its end, and judges it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks import scaling

from .case import NOT_ZERO, Case
from .job import SIZE
from .libraries import Library

ROOT = Path(__file__).resolve().parents[2]
# A variable of every process of a job, by which those are found that outlive it.
MARK = "MPISYNCBN_FAULTS"
_BROKEN_PIPE = 128 + signal.SIGPIPE
_START = 120.0  # seconds until the fault at most
_LEAVE = 7.0  # seconds in which what outlives mpiexec must end: a DataLoader's workers look about every 5


class End(NamedTuple):
    """How a job ended."""

    seconds: float | None  # from the fault; None where there was none
    status: int | None  # of mpiexec; None where it had to be killed
    left: int  # processes that outlived mpiexec
    stdout: str
    stderr: str


class Outcome(NamedTuple):
    library: str
    name: str
    fault: str
    ok: bool
    outcome: str  # what the job said first of what it had to, or what is wrong
    seconds: float | None
    status: int | None
    left: int
    stdout: str
    stderr: str


def run(case: Case, library: Library) -> Outcome:
    with TemporaryDirectory(prefix="faults-") as folder:
        program = [*case.under, "-m", "fault_cases.worker", case.name, folder]
        command = [library.mpiexec, "-n", str(SIZE), sys.executable, *program]
        variables = {**_variables(), **library.variables, **case.variables}
        end = execute(command, variables, Path(folder), case.limit)
    return judge(case, library, end)


def execute(command: list[str], variables: dict[str, str], folder: Path, limit: float) -> End:
    """Let it run until ``limit`` seconds after the fault, and leave nothing of it behind."""
    mark = uuid.uuid4().hex
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        job = subprocess.Popen(
            command,
            cwd=folder,
            env={**variables, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            deadline = time.time() + _START
            while job.poll() is None and time.time() < deadline:
                time.sleep(0.01)
                fault = _time_of_fault(folder)
                deadline = deadline if fault is None else fault + limit
            end, status = time.time(), job.poll()
            left = 0 if status is None else _left(mark)
        finally:
            job.terminate()  # mpiexec ends its ranks
            with suppress(subprocess.TimeoutExpired):
                job.wait(3)
            _end_all(mark)
            job.wait()
    fault = _time_of_fault(folder)
    status = 128 - status if status is not None and status < 0 else status  # as a shell has it
    seconds = None if fault is None else round(end - fault, 1)
    said = [(folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return End(seconds, status, left, *said)


def judge(case: Case, library: Library, end: End) -> Outcome:
    said, statuses = case.says, case.statuses
    if library.name in case.instead and re.search(case.instead[library.name], end.stderr):
        said, statuses = (case.instead[library.name],), NOT_ZERO
    patterns = [(pattern, end.stderr) for pattern in said]
    if case.silent is not None:
        how, number = case.silent
        (rank,) = case.at_fault
        patterns.append((library.words[how].format(rank=rank, number=number), end.stdout + end.stderr))
    missing = [pattern for pattern, text in patterns if not re.search(pattern, text, re.MULTILINE)]
    problems = []
    if end.seconds is None:
        problems.append("there was no fault")
    elif end.status is None:
        problems.append(f"HUNG: no end within {case.limit:g} s")
    else:
        right = end.status in statuses or _is_lost(end, library, statuses)
        problems += [] if right else [f"status {end.status}"]
        problems += [f"{end.left} processes left behind"] if end.left else []
        problems += [f"not said: {pattern}" for pattern in missing]
    fault = f"{_ranks(case)} {case.title}"
    outcome = "; ".join(problems) or _said(*patterns[0])
    return Outcome(library.title, case.name, fault, not problems, outcome, *end)


def _is_lost(end: End, library: Library, statuses: Iterable[int]) -> bool:
    """Whether mpiexec broke while it ended the job for a rank, which says the status itself."""
    words = library.words.get("abort")
    if end.status != _BROKEN_PIPE or words is None:
        return False
    return any(re.search(words.format(number=status), end.stderr) for status in statuses)


def _said(pattern: str, text: str) -> str:
    """The whole line, or lines, of a match."""
    match = re.search(rf".*(?:{pattern}).*", text, re.MULTILINE)
    return " ".join(match[0].split()) if match and match[0].strip() else "nothing was said"


def _ranks(case: Case) -> str:
    if len(case.at_fault) == SIZE:
        return "every rank"
    return f"rank{'s' * (len(case.at_fault) > 1)} {' and '.join(map(str, case.at_fault))}"


def _time_of_fault(folder: Path) -> float | None:
    return min((file.stat().st_mtime for file in folder.glob("fault-*")), default=None)


def _left(mark: str) -> int:
    """How many processes go on after the end of mpiexec."""
    limit = time.monotonic() + _LEAVE
    while (count := len(list(_processes(mark)))) and time.monotonic() < limit:
        time.sleep(0.1)
    return count


def _end_all(mark: str) -> None:
    """Kill what is left, and see it gone: the next job shall have the machine for itself."""
    limit = time.monotonic() + _LEAVE
    while (left := list(_processes(mark))) and time.monotonic() < limit:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in file.read_bytes().split(b"\0"):
                yield int(file.parent.name)


def _variables() -> dict[str, str]:
    paths = [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**scaling.environment(), "PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1"}
