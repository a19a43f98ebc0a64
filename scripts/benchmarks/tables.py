"""Results as Markdown, as docs/explanation/performance.md has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .cases import AS_TORCH, BARE, FLOOR, MESSAGE, SEPARATE, WHOLE, Figures
from .summary import Line, summarize

Row = dict[str, Any]


def markdown(sections: dict[str, list[Row]]) -> str:
    """A table for the summary, and one for each section there is."""
    tables = [("In short", _summary(sections))]
    tables += [
        (title, make([row for name in names for row in sections.get(name, ())]))
        for title, make, names in _TABLES
        if any(sections.get(name) for name in names)
    ]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in tables) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(sections: dict[str, list[Row]]) -> str:
    def cells(line: Line) -> list[str]:
        aim = f"at {'most' if line.at_most else 'least'} {line.bar:g}"
        unit = f" {line.unit}" if line.unit else ""
        return [line.what, _plain(line.value) + unit, aim, "" if line.met else "missed"]

    lines = [cells(line) for line in summarize(sections) if line.value]
    return _table(("figure", "measured", "aim", ""), lines)


def _layer(rows: list[Row]) -> str:
    head = "shape per rank", "dtype, format", "local", "ours", "ours / local", "of the copy limit"
    return _table(
        head,
        (
            [
                *_case(row),
                _time(row["us"]["local"]),
                _time(row["us"]["ours"]),
                _plain(row["ours to"]["local"]),
                _plain(row.get("of the copy limit", {}).get("ours")),
            ]
            for row in rows
        ),
    )


def _kernels(rows: list[Row]) -> str:
    kernels = list(rows[0]["of the copy limit"])
    lines = ([*_case(row), *(_plain(row["of the copy limit"][kernel]) for kernel in kernels)] for row in rows)
    return _table(("shape per rank", "dtype, format", *kernels), lines)


def _exchange(rows: list[Row]) -> str:
    peers = [name for name in (FLOOR, BARE, MESSAGE, *reversed(WHOLE), AS_TORCH) if name in rows[0]["us"]]
    lines = ([str(row["channels"]), *(_time(row["us"][name]) for name in peers)] for row in rows)
    return _table(("C", *peers), lines)


def _peers(rows: list[Row]) -> str:
    lines = (
        [f"{row['family']}: {peer}", *_case(row), _plain(figures)]
        for row in rows
        for peer, figures in row.get("ours to", {}).items()
    )
    return _table(("peer", "shape per rank", "dtype, format", "ours / peer"), lines)


def _memory(rows: list[Row]) -> str:
    peers = list(rows[0]["kept"])
    lines = (
        [
            *_case(row),
            *(f"{row['kept'][peer] / 1e6:,.2f} MB" for peer in peers),
            *(_plain(row["ours to"][peer]) for peer in peers if peer != "ours"),
        ]
        for row in rows
    )
    times = (f"time: ours / {peer}" for peer in peers if peer != "ours")
    return _table(("shape per rank", "dtype, format", *peers, *times), lines)


def _activations(rows: list[Row]) -> str:
    lines = (
        [
            row["family"],
            *_case(row),
            *(_time(row["us"][name]) for name in ("ours", SEPARATE)),
            _plain(row["ours to"][SEPARATE]),
        ]
        for row in rows
    )
    return _table(("activation", "shape per rank", "dtype, format", "fused", SEPARATE, "ratio"), lines)


def _reductions(rows: list[Row]) -> str:
    names = list(rows[0]["us"])[:2]
    lines = (
        [
            row["family"],
            f"{row['bytes']:,}",
            *(_time(row["us"][name]) for name in names),
            _plain(row["ours to"]["gloo"]),
        ]
        for row in rows
    )
    return _table(("what", "bytes", *names, f"{names[0]} / {names[1]}"), lines)


# Title, how to make it, and the sections it takes.
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


def _plain(figures: Figures | None) -> str:
    return f"{figures['median']:.2f} ({figures['minimum']:.2f})" if figures else ""


def _time(figures: Figures) -> str:
    return f"{_microseconds(figures['median'])} ({_microseconds(figures['minimum'])})"


def _microseconds(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.1f} ms"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
