"""Judge whether a job ended as its case says."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from typing import NamedTuple

from support.jobs import End
from support.libraries import Library

from .case import NOT_ZERO, Case

_BREAKS = {"openmpi": signal.SIGSEGV, "impi": signal.SIGPIPE}  # signals that may kill mpiexec itself


class Outcome(NamedTuple):
    library: str
    name: str
    fault: str
    ok: bool
    outcome: str  # the text that matches the first pattern, or the problems
    seconds: float | None
    status: int | None
    left: int
    stdout: str
    stderr: str


def judge(case: Case, library: Library, end: End) -> Outcome:
    said, statuses = case.says, case.statuses
    if library.name in case.instead and re.search(case.instead[library.name], end.stderr):
        said, statuses = (case.instead[library.name],), NOT_ZERO
    patterns = [(pattern, end.stderr) for pattern in said]
    if case.silent is not None:
        how, number = case.silent
        (rank,) = case.at_fault
        patterns.append((library.words[how].format(rank=rank, number=number), end.stdout + end.stderr))
    problems = []
    if end.seconds is None:
        problems.append("there was no fault")
    elif end.status is None:
        problems.append(f"HUNG: no end within {case.limit:g} s")
    else:
        right = end.status in statuses or _broke(end, library, statuses)
        problems += [] if right else [f"status {end.status}"]
        problems += [f"{end.left} processes left behind"] if end.left else []
        missing = (pattern for pattern, text in patterns if not re.search(pattern, text, re.MULTILINE))
        problems += [f"not said: {pattern}" for pattern in missing]
    outcome = "; ".join(problems) or _said(*patterns[0])
    return Outcome(library.title, case.name, case.fault, not problems, outcome, **end._asdict())


def _broke(end: End, library: Library, statuses: Iterable[int]) -> bool:
    """Whether a signal killed mpiexec itself after a rank had aborted with one of ``statuses``."""
    number = _BREAKS.get(library.name)
    if number is None or end.status != 128 + number:
        return False
    if re.search(library.words["signal"].format(rank=r"\d+", number=int(number)), end.stdout + end.stderr):
        return False  # the signal killed a rank
    return any(re.search(library.words["abort"].format(number=status), end.stderr) for status in statuses)


def _said(pattern: str, text: str) -> str:
    """The whole line or lines of the first match, as one line."""
    match = re.search(rf".*(?:{pattern}).*", text, re.MULTILINE)
    return " ".join(match[0].split()) if match and match[0].strip() else "nothing was said"
