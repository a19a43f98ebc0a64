"""Write docs/results/benchmark.md: the figures of the result files, merged over the runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from . import runs
from .cases import AS_TORCH, BARE, FLOOR, MESSAGE, SEPARATE, WHOLE, Figures
from .summary import Line

Row = dict[str, Any]
_HEAD = """\
# Benchmark results

`scripts/pictures` writes this page from the files `cpu-*.json` in this folder, which
`scripts/benchmark.py` wrote. Times are those of the slowest rank: of each run the median, and of
the runs the one in the middle. Ratios and fractions have the lowest and the highest of the runs in
parentheses. [performance.md](../explanation/performance.md) says what the figures mean.
"""


def page(sections: runs.Sections) -> str:
    """The whole page: a table of the figures that have an aim, and one for each kind of section."""
    parts = [_HEAD, "## Figures and aims\n", summary(sections)]
    for title, make, names in _TABLES:
        found = [name for name in names if name in sections]
        if found:
            parts += [f"\n## {title}\n", *(_measured(sections[name], name) for name in found)]
            parts += ["", make([row for name in found for row in runs.rows(sections, name)])]
    return "\n".join(parts) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(sections: runs.Sections) -> str:
    def cells(line: Line) -> list[str]:
        aim = f"at {'most' if line.at_most else 'least'} {line.bar:g}"
        unit = f" {line.unit}" if line.unit else ""
        return [line.what, spread(line.value) + unit, aim, "" if line.met else "missed"]

    lines = [cells(line) for name in sections for line in runs.lines(sections, name)]
    return table(("figure", "measured", "aim", ""), lines)


def _measured(found: list[runs.Run], name: str) -> str:
    """A Markdown list item that says when and where a section was measured."""
    first = found[0].environment
    ranks = f"{first['ranks']} rank{'' if first['ranks'] == 1 else 's'}"
    threads = first.get("threads", 1)
    dates = ", ".join(run.environment["date"] for run in found)
    where = f"{first['cpu']}, {first['cores']} cores; {first['mpi']}, torch {first['torch']}"
    runs_of = f"{len(found)} run{'s' * (len(found) > 1)}"
    note = f"; {first['note']}" if "note" in first else ""
    each = f"{threads} thread{'s' * (threads > 1)} each"
    line = f"- `{name}`: {ranks}, {each}; {runs_of}, {dates}; {where}{note}"
    return textwrap.fill(line, 100, subsequent_indent="  ")


def _layer(rows: list[Row]) -> str:
    head = "shape per rank", "dtype, format", "local", "ours", "ours / local", "of the copy limit"
    return table(
        head,
        (
            [
                *_case(row),
                _time(row["us"]["local"]),
                _time(row["us"]["ours"]),
                spread(row["ours to"]["local"]),
                spread(row.get("of the copy limit", {}).get("ours")),
            ]
            for row in rows
        ),
    )


def _kernels(rows: list[Row]) -> str:
    kernels = list(rows[0]["of the copy limit"])
    lines = ([*_case(row), *(spread(row["of the copy limit"][kernel]) for kernel in kernels)] for row in rows)
    return table(("shape per rank", "dtype, format", *kernels), lines)


def _exchange(rows: list[Row]) -> str:
    peers = [name for name in (FLOOR, BARE, MESSAGE, *reversed(WHOLE), AS_TORCH) if name in rows[0]["us"]]
    lines = ([str(row["channels"]), *(_time(row["us"][name]) for name in peers)] for row in rows)
    return table(("C", *peers), lines)


def _peers(rows: list[Row]) -> str:
    lines = (
        [f"{row['family']}: {peer}", *_case(row), spread(figures)]
        for row in rows
        for peer, figures in row.get("ours to", {}).items()
    )
    return table(("peer", "shape per rank", "dtype, format", "ours / peer"), lines)


def _memory(rows: list[Row]) -> str:
    peers = list(rows[0]["kept"])
    lines = (
        [
            *_case(row),
            *(f"{row['kept'][peer] / 1e6:,.2f} MB" for peer in peers),
            *(spread(row["ours to"][peer]) for peer in peers if peer != "ours"),
        ]
        for row in rows
    )
    times = (f"time: ours / {peer}" for peer in peers if peer != "ours")
    return table(("shape per rank", "dtype, format", *peers, *times), lines)


def _activations(rows: list[Row]) -> str:
    lines = (
        [
            row["family"],
            *_case(row),
            *(_time(row["us"][name]) for name in ("ours", SEPARATE)),
            spread(row["ours to"][SEPARATE]),
        ]
        for row in rows
    )
    return table(("activation", "shape per rank", "dtype, format", "fused", SEPARATE, "ratio"), lines)


def _reductions(rows: list[Row]) -> str:
    names = list(rows[0]["us"])[:2]
    lines = (
        [
            row["family"],
            f"{row['bytes']:,}",
            *(_time(row["us"][name]) for name in names),
            spread(row["ours to"]["gloo"]),
        ]
        for row in rows
    )
    return table(("what", "bytes", *names, f"{names[0]} / {names[1]}"), lines)


# The title of each table, the function that makes it, and the sections that it shows.
_TABLES: tuple[tuple[str, Callable[[list[Row]], str], tuple[str, ...]], ...] = (
    ("The layer", _layer, ("layer", "tiny")),
    ("The layer with several threads a rank", _layer, ("threads",)),
    ("The kernels", _kernels, ("kernels",)),
    ("The exchange", _exchange, ("exchange",)),
    ("Slow peers, the compiler, a whole step, and ReLU", _peers, ("peers", "resnet", "compiled", "relu")),
    ("Memory kept by Conv-BN-LeakyReLU", _memory, ("memory",)),
    ("Activations inside the layer", _activations, ("activations",)),
    ("With a mask, over without one", _peers, ("masks",)),
    ("Reductions beside gloo", _reductions, ("reductions",)),
)


def _case(row: Row) -> tuple[str, str]:
    return f"{tuple(row['shape'])}", f"{row['dtype']}, {row['format']}"


def spread(figures: Figures | None) -> str:
    """Format the median run, with the lowest and the highest in parentheses if these differ."""
    if not figures:
        return ""
    low, middle, high = (f"{figures[key]:.2f}" for key in ("lowest", "median", "highest"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _time(figures: Figures) -> str:
    value = figures["median"]
    if value >= 10_000:
        return f"{value / 1000:,.1f} ms"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} us"
