"""The list of cases. A case is a small program of 4 ranks, and the way in which its job must end.

Each module has the cases of one topic: a rank does not come to an exchange (``absences``), ranks do
different things (``mismatches``), a rank ends (``exceptions``, ``endings``, ``signals``, and with
torch ``training``), something is wrong from the start (``setups``), or all ranks end well
(``completions``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from .job import SIZE, Job

TOPICS = "absences", "mismatches", "exceptions", "endings", "signals", "training", "setups", "completions"
NOT_ZERO = range(1, 256)


class Case(NamedTuple):
    """A fault or good end. The job must end within ``limit`` seconds, with one of ``statuses``."""

    program: Callable[[Job], object]
    at_fault: tuple[int, ...]  # ranks
    says: tuple[str, ...]  # patterns that stderr must match
    silent: tuple[str, int] | None  # ("exit" or "signal", number) that mpiexec must name: no rank can
    limit: float
    statuses: Iterable[int]
    variables: Mapping[str, str]
    own_variables: Mapping[str, str]  # set on the ranks at fault alone
    under: tuple[str, ...]  # arguments of Python ahead of the program
    instead: Mapping[str, str]  # {library: pattern of stderr if it ends the job itself, with a status > 0}

    @property
    def name(self) -> str:
        return f"{self.program.__module__.rpartition('.')[2]}.{self.program.__name__}"

    @property
    def title(self) -> str:
        return str(self.program.__doc__)

    @property
    def fault(self) -> str:
        """The ranks at fault and the title, for example "rank 1 gets SIGTERM"."""
        if len(self.at_fault) == SIZE:
            return f"every rank {self.title}"
        return f"rank{'s' * (len(self.at_fault) > 1)} {' and '.join(map(str, self.at_fault))} {self.title}"


_cases: list[Case] = []


def traceback(function: str) -> str:
    """A pattern of a Python stack that goes through ``function``."""
    return rf'File ".*", line \d+,? in {function}\b'


def ends_job(rank: int, status: int = 1) -> str:
    return rf"mpisyncbn: rank {rank} of 4 on \S+ ends the job with status {status}\b"


def has_left(rank: int) -> str:
    """A pattern of a report: a rank waits in vain, because ``rank`` has ended in good order."""
    waiting = r"mpisyncbn: rank \d of 4 on \S+ waits in exchange .* in vain"
    return rf"{waiting}: rank {rank} on \S+ has left the program"


def waits(*ranks: int) -> list[str]:
    """Patterns of reports, with Python stacks, of ``ranks`` that wait too long in an exchange.

    At least one of them reports that it has waited too long. The others do so, or report that
    another rank asked them before their own time was over.
    """
    begin = r"mpisyncbn: rank {} of 4 on \S+ "
    waited = r"has waited [\d.]+ s \(the limit is \S+ s, MPISYNCBN_TIMEOUT\) for other ranks of its group in"
    asked = r"was asked by rank \d, which has waited too long: it (?:is missing: .* and )?waits in"
    where = rf"exchange number \d+, \w+ of .+ \(\d+ channels, \w+\).*\n{_STACK}"
    return [
        begin.format(rf"[{''.join(map(str, ranks))}]") + rf"{waited} {where}",
        *(begin.format(rank) + rf"(?:{waited}|{asked}) {where}" for rank in ranks),
    ]


def missing(rank: int, function: str) -> list[str]:
    """Patterns of the reports about ``rank``, which is alive, but is not where the others wait.

    Another rank lists what all ranks were doing, with ``rank`` as missing. ``rank`` itself reports
    a Python stack that goes through ``function``.
    """
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
    """A decorator that adds a case: the function is its program, its docstring names the fault."""
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
