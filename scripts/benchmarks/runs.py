"""Merge the result files of several runs: median, lowest and highest run of each figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .summary import Line, summarize

Row = dict[str, Any]


class Run(NamedTuple):
    environment: dict[str, Any]
    rows: list[Row]


Sections = dict[str, list[Run]]  # the runs of each section, in the order of the files' names


def load(folder: Path) -> Sections:
    """The sections of all files ``cpu-*.json`` of scripts/benchmark.py in a folder."""
    found: Sections = {}
    for path in sorted(folder.glob("cpu-*.json")):
        results = json.loads(path.read_text())
        for name, rows in results["sections"].items():
            found.setdefault(name, []).append(Run(results["environment"], rows))
    return found


def rows(sections: Sections, name: str) -> list[Row]:
    """The rows of a section, with each figure merged over the runs; none if it was not measured."""
    runs = [run.rows for run in sections.get(name, ())]
    return [merged(each) for each in zip(*runs, strict=True)]


def lines(sections: Sections, name: str) -> list[Line]:
    """The summary of a section, with each figure merged over the runs.

    Lines without a figure are left out.
    """
    runs = [summarize({name: run.rows}) for run in sections.get(name, ())]
    return [
        each[0]._replace(value=merged([line.value for line in each]))
        for each in zip(*runs, strict=True)
        if each[0].value
    ]


def merged(values: Sequence[Any]) -> Any:
    """Merge the values of several runs at one place.

    A figure becomes the median of the runs' medians, and the lowest and the highest of them. Other
    values must be equal, but "left out" is dropped.

    Raises:
        ValueError: the runs did not measure the same cases.
    """
    first = values[0]
    if not isinstance(first, dict):
        if any(value != first for value in values):
            raise ValueError(f"expected runs of the same cases, got {values}")
        return first
    if "median" not in first:
        return {key: merged([value[key] for value in values]) for key in first if key != "left out"}
    medians = [value["median"] for value in values]
    return {
        "median": statistics.median(medians),
        "lowest": min(medians),
        "highest": max(medians),
    }
