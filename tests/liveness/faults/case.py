"""What a case is, and the list of them: each a small program of 4 ranks, and how its job must end.

By what happens: a rank does not come (``absences``), ranks do different things (``mismatches``),
one rank ends (``exceptions``, ``endings``, ``signals``, and with torch ``training``), something was
wrong from the start (``setups``). And ranks end well: ``completions``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from .job import SIZE, Job

TOPICS = "absences", "mismatches", "exceptions", "endings", "signals", "training", "setups", "completions"
NOT_ZERO = range(1, 256)


class Case(NamedTuple):
    """One fault, or good end. Its job must end within ``limit`` seconds of it, with one of ``statuses``."""

    program: Callable[[Job], object]
    at_fault: tuple[int, ...]  # ranks
    says: tuple[str, ...]  # patterns that stderr must match
    silent: tuple[str, int] | None  # "exit" or "signal", and which, where no rank can say it: mpiexec must
    limit: float
    statuses: Iterable[int]
    variables: Mapping[str, str]
    own_variables: Mapping[str, str]  # of the ranks at fault alone
    under: tuple[str, ...]  # arguments of Python ahead of the program
    instead: Mapping[str, str]  # what an MPI library says itself, as it ends the job with a status of its own

    @property
    def name(self) -> str:
        return f"{self.program.__module__.rpartition('.')[2]}.{self.program.__name__}"

    @property
    def title(self) -> str:
        return str(self.program.__doc__)

    @property
    def fault(self) -> str:
        """The title, with the ranks."""
        if len(self.at_fault) == SIZE:
            return f"every rank {self.title}"
        return f"rank{'s' * (len(self.at_fault) > 1)} {' and '.join(map(str, self.at_fault))} {self.title}"


_cases: list[Case] = []


def traceback(function: str) -> str:
    """Of a Python stack that goes through the function."""
    return rf'File ".*", line \d+,? in {function}\b'


def ends_job(rank: int, status: int = 1) -> str:
    return rf"mpisyncbn: rank {rank} of 4 on \S+ ends the job with status {status}\b"


def has_left(rank: int) -> str:
    """Of a rank that ended in good order; others say it."""
    waiting = r"mpisyncbn: rank \d of 4 on \S+ waits in exchange .* in vain"
    return rf"{waiting}: rank {rank} on \S+ has left the program"


def waits(*ranks: int) -> list[str]:
    """Reports of the ranks that wait too long, with stacks; some are asked before their time is over."""
    begin = r"mpisyncbn: rank {} of 4 on \S+ "
    waited = r"has waited [\d.]+ s \(the limit is \S+ s, MPISYNCBN_TIMEOUT\) for other ranks of its group in"
    asked = r"was asked by rank \d, which has waited too long: it (?:is missing: .* and )?waits in"
    where = rf"exchange number \d+, \w+ of .+ \(\d+ channels, \w+\).*\n{_STACK}"
    return [
        begin.format(rf"[{''.join(map(str, ranks))}]") + rf"{waited} {where}",
        *(begin.format(rank) + rf"(?:{waited}|{asked}) {where}" for rank in ranks),
    ]


def missing(rank: int, function: str) -> list[str]:
    """The listing, in which a rank is missing, and what this rank says itself: it is in the function."""
    asked = rf"mpisyncbn: rank {rank} of 4 on \S+ was asked by rank \d, .*\n{_STACK}"
    return [
        "mpisyncbn: what the ranks of the group were doing:$",
        rf"^  rank {rank} on \S+ is missing: .* is at .*, line \d+, in \w+$",
        rf'{asked}(?:  .*\n|Python .*\n)*?  File ".*", line \d+, in {function}$',
    ]


_STACK = r"Python stack of .+, innermost call last:\n"


def case(
    *at_fault: int,
    says: Iterable[str] = (),
    silent: tuple[str, int] | None = None,
    status: int | Iterable[int],
    limit: float = 8,
    variables: Mapping[str, str] | None = None,
    own_variables: Mapping[str, str] | None = None,
    under: tuple[str, ...] = (),
    instead: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """The decorated function is the program, and its docstring the fault."""
    statuses = (status,) if isinstance(status, int) else status

    def add(program: Callable[[Job], object]) -> Callable[[Job], object]:
        rest = limit, statuses, variables or {}, own_variables or {}, under, instead or {}
        _cases.append(Case(program, at_fault, tuple(says), silent, *rest))
        return program

    return add


def cases() -> list[Case]:
    for topic in TOPICS:
        import_module(f"liveness.faults.{topic}")
    return _cases
