"""The report as text, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .checks import ERROR, Problem
from .rank import Facts

__all__ = ["as_text", "problems_as_text"]

_WIDTH = 100
_BOLD, _RED, _YELLOW, _GREEN, _PLAIN = "\033[1m", "\033[1;31m", "\033[1;33m", "\033[32m", "\033[0m"
_HEADINGS = {
    "Versions": ("versions",),
    "MPI": ("mpi",),
    "Ranks": ("ranks",),
    "Kernels": ("kernels",),
    "GPU": ("gpu", "transport"),
    "Settings": ("environment",),
    "Time of one exchange": ("exchange",),
}
_RENAMED = {"in use": "transport"}  # in the report as JSON, the topic says it


def as_text(facts: Mapping[str, Facts], problems: Sequence[Problem], colour: bool) -> str:
    """The problems, and the facts below short headings."""
    lines = [_painted("Problems", _BOLD, colour)]
    lines += problems_as_text(problems, colour, "  ") or ["  " + _painted("none", _GREEN, colour)]
    width = max(len(name) for topic in facts.values() for name in topic)
    for heading, topics in _HEADINGS.items():
        lines += ["", _painted(heading, _BOLD, colour)]
        for name, value in (entry for topic in topics for entry in facts[topic].items()):
            start = f"  {_RENAMED.get(name, name):<{width}}  "
            lines += _wrapped(str(value), start, " " * len(start))
    return "\n".join(lines)


def problems_as_text(problems: Sequence[Problem], colour: bool, indent: str = "") -> list[str]:
    """The lines for the problems: each with its level, and its cure below."""
    lines = []
    for problem in problems:
        what, cure = (f"{text.rstrip('.')}." for text in (problem.what, problem.cure))
        found = _wrapped(what, f"{indent}{problem.level}: ", f"{indent}  ")
        shown = _painted(problem.level, _RED if problem.level == ERROR else _YELLOW, colour)
        lines += [found[0].replace(problem.level, shown, 1), *found[1:]]
        lines += _wrapped(cure, f"{indent}  cure: ", f"{indent}  ")
    return lines


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _painted(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_PLAIN}" if colour else text
