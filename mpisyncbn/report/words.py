"""Ranks and hosts in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .rank import RankFacts

__all__ = ["by_rank", "hosts", "plural", "ranks"]

_Item = TypeVar("_Item")


def ranks(found: Iterable[RankFacts], everyone: Sequence[RankFacts]) -> str:
    """Ranks, in words: "rank 3", "ranks 0-2, 5" or "all ranks"."""
    numbers = [each.rank for each in found]
    return "all ranks" if 1 < len(numbers) == len(everyone) else _numbers(numbers)


def _numbers(numbers: Sequence[int]) -> str:
    """Numbers of ranks, in words; runs of more than two are joined."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{plural(len(numbers))} {', '.join(words)}"


def by_rank(values: Sequence[object]) -> str:
    """The value that all ranks have, or each value with its ranks."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(map(str, values)):
        found.setdefault(value, []).append(rank)
    if len(found) == 1:
        return next(iter(found))
    shown = [f"{value} on {_numbers(numbers)}" for value, numbers in found.items()]
    return "; ".join(shown[:4]) + (f"; and {len(shown) - 4} other values" if len(shown) > 4 else "")


def hosts(items: Iterable[_Item], name: Callable[[_Item], str]) -> str:
    """Hosts by their names: at most four."""
    names = list(dict.fromkeys(map(name, items)))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def plural(count: int) -> str:
    """The ending of a noun after ``count``."""
    return "" if count == 1 else "s"
