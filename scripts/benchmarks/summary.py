"""Compare the figures that the project answers for with their aims, and format rows as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .cases import (
    BARE,
    FLOOR,
    GATHERS,
    LARGE_VALUES,
    LARGE_VERB_BYTES,
    MESSAGE,
    SEPARATE,
    STATISTICS,
    UNMASKED,
    WHOLE,
    WITHOUT,
    Figures,
    ratio,
)

Row = dict[str, Any]
SHORT_CHANNELS = 128  # exchanges of up to so many channels are judged by microseconds, others by ratio


class Line(NamedTuple):
    what: str
    value: Figures  # "median" and "minimum"; empty where nothing was measured
    bar: float
    at_most: bool = True  # the aim is at most ``bar``, else at least
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the aim; None if nothing was measured."""
        if not self.value:
            return None
        return self.value["median"] <= self.bar if self.at_most else self.value["median"] >= self.bar

    def __str__(self) -> str:
        if not self.value:
            return f"{self.what:<96} not measured: {self.note}"
        verdict = "met" if self.met else "MISSED"
        value = f"{_digits(self.value['median']):>7} ({_digits(self.value['minimum'])}) {self.unit}"
        bar = f"bar: at {'most' if self.at_most else 'least'} {self.bar:g}"
        return f"{self.what:<96} {value:<20} {bar:<20} {verdict}"


def summarize(sections: dict[str, list[Row]]) -> list[Line]:
    """The lines of the summary for the sections that were run."""
    judges = {
        "layer": _layer,
        "threads": _threads,
        "kernels": _kernels,
        "exchange": _exchange,
        "watchdog": _watchdog,
        "tiny": _tiny,
        "peers": _peers,
        "masks": _masks,
        "resnet": _resnet,
        "compiled": _compiled,
        "relu": _relu,
        "memory": _memory,
        "activations": _activations,
        "reductions": _reductions,
        "scaling": _scaling,
    }
    return [line for name, judge in judges.items() if sections.get(name) for line in judge(sections[name])]


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def over(combine: Callable[[list[float]], float], figures: Iterable[Figures]) -> Figures:
    """Apply ``combine`` to the medians and to the minima. Return {} if there are no figures."""
    every = list(figures)
    return {label: combine([one[label] for one in every]) for label in STATISTICS} if every else {}


def _layer(rows: list[Row], name: str = "layer over local") -> list[Line]:
    def ratios(dtype: str, formats: tuple[str, ...], size: str = "values") -> list[Figures]:
        least = LARGE_VALUES if size == "values" else 4 * LARGE_VALUES
        chosen = (
            row for row in rows if row[size] >= least and row["dtype"] == dtype and row["format"] in formats
        )
        return [row["ours to"]["local"] for row in chosen]

    both = ("contiguous", "channels_last")
    name, lines = f"{name}, 6 MB and more", []
    for which, bar in zip(both, (0.65, 0.90), strict=True):
        what = f"{name}, float32, {which}, geometric mean"
        lines.append(Line(what, over(geometric_mean, ratios("float32", (which,))), bar))
    lines.append(Line(f"{name}, float32, worst", over(max, ratios("float32", both)), 1.0))
    # For bfloat16: the shapes that have 6 MB in bfloat16, then those that have 6 MB in float32.
    for size, label in (("bytes", "bfloat16"), ("values", "bfloat16, half as many bytes")):
        half = ratios("bfloat16", both, size)
        lines.append(Line(f"{name}, {label}, geometric mean", over(geometric_mean, half), 0.9))
        lines.append(Line(f"{name}, {label}, worst", over(max, half), 0.9))
    return lines


def _threads(rows: list[Row]) -> list[Line]:
    ranks, threads = rows[0]["ranks"], rows[0]["threads"]
    return _layer(rows, f"{ranks} rank{'s' * (ranks > 1)} with {threads} threads, layer over local")


def _kernels(rows: list[Row]) -> list[Line]:
    lines = []
    for dtype in ("float32", "bfloat16"):
        large = [row for row in rows if row["bytes"] >= LARGE_VERB_BYTES and row["dtype"] == dtype]
        for kernel in large[0]["of the copy limit"] if large else ():
            fractions = [row["of the copy limit"][kernel] for row in large]
            for label, combine in (("geometric mean", geometric_mean), ("worst", min)):
                what = f"{kernel} of the copy limit, 25 MB and more, {dtype}, {label}"
                lines.append(Line(what, over(combine, fractions), 0.85, at_most=False))
    return lines


def _exchange(rows: list[Row]) -> list[Line]:
    measured = [row for row in rows if FLOOR in row["us"]]
    if not measured:
        return [Line("exchange over the C loop", {}, 0.5, note=rows[0]["left out"].get(FLOOR, ""))]
    lines = []
    for name in (*WHOLE, MESSAGE, BARE):
        if name not in measured[0]["us"]:
            continue
        pairs = [(row["channels"], row["us"][name], row["us"][FLOOR]) for row in measured]
        short = [
            {label: ours[label] - floor[label] for label in STATISTICS}
            for channels, ours, floor in pairs
            if channels <= SHORT_CHANNELS
        ]
        long = [ratio(ours, floor) for channels, ours, floor in pairs if channels > SHORT_CHANNELS]
        lines += [
            Line(f"{name} minus the C loop, C to {SHORT_CHANNELS}, worst", over(max, short), 0.5, unit="us"),
            Line(f"{name} over the C loop, C above {SHORT_CHANNELS}, worst", over(max, long), 1.2),
        ]
    return lines


def _watchdog(rows: list[Row]) -> list[Line]:
    ratios = [row["ours to"][WITHOUT] for row in rows]
    return [
        Line("exchange over one without the watchdog, geometric mean", over(geometric_mean, ratios), 1.03)
    ]


def _tiny(rows: list[Row]) -> list[Line]:
    return [
        Line(f"tiny layer over local, {tuple(row['shape'])} {row['format']}", row["ours to"]["local"], 2.5)
        for row in rows
        if tuple(row["shape"]) == (2, 64, 8, 8) and row["dtype"] == "float32"
    ]


def _peers(rows: list[Row]) -> list[Line]:
    """How many times slower the naive layer is than ours: the mean and the smallest."""
    name, lines = "naive over gloo", []
    for label, bar, is_tiny in (("6 MB and more", 5.0, False), ("tiny", 10.0, True)):
        slower = [
            {figure: 1 / value for figure, value in row["ours to"][name].items()}
            for row in rows
            if (row["family"] == "tiny") == is_tiny
        ]
        for statistic, combine in (("geometric mean", geometric_mean), ("worst", min)):
            what = f"naive SyncBatchNorm over gloo over ours, {label}, {statistic}"
            lines.append(Line(what, over(combine, slower), bar, at_most=False))
    return lines


def _masks(rows: list[Row]) -> list[Line]:
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for label, peer in (("step", UNMASKED), ("forward pass", f"forward {UNMASKED}")):
            ratios = [row["ours to"][peer] for row in rows if row["dtype"] == dtype]
            what = f"masked at half density over {UNMASKED}, {label}, {dtype}, worst"
            lines.append(Line(what, over(max, ratios), 1.3))
    return lines


def _resnet(rows: list[Row]) -> list[Line]:
    whats = {
        ("ours to", "local"): "ResNet-50 training step over local",
        ("fused to", "local"): "ResNet-50 training step, ReLU fused, over local",
        ("ours to", "local, waiting"): "ResNet-50 training step over local with bare all-reduces",
    }
    return [
        Line(f"{what}, {row['format']}", row[key][peer], 1.0)
        for row in rows
        for (key, peer), what in whats.items()
    ]


def _compiled(rows: list[Row]) -> list[Line]:
    what = "compiled ResNet-50 training step over compiled local"
    return [Line(what, row["ours to"]["local"], 1.05) for row in rows]


def _relu(rows: list[Row]) -> list[Line]:
    fused = [row["ours to"]["ours, then relu"] for row in rows]
    what = "fused ReLU over ours, then torch.relu"
    return [
        Line(f"{what}, geometric mean", over(geometric_mean, fused), 0.75),
        Line(f"{what}, worst", over(max, fused), 0.75),
    ]


def _memory(rows: list[Row]) -> list[Line]:
    bars = {"torch": 0.34, "torch, in-place": 0.5, "plain": 0.5}
    lines = [
        Line(
            f"memory-efficient layer's bytes over those of {peer}, worst",
            over(max, (dict.fromkeys(STATISTICS, row["kept"]["ours"] / row["kept"][peer]) for row in rows)),
            bar,
        )
        for peer, bar in bars.items()
    ]
    times = over(geometric_mean, (row["ours to"]["plain"] for row in rows))
    return [*lines, Line("memory-efficient layer's time over the plain one's, geometric mean", times, 1.1)]


def _activations(rows: list[Row]) -> list[Line]:
    kinds = dict.fromkeys((row["family"], row["dtype"]) for row in rows)
    return [
        Line(
            f"fused {kind} over {SEPARATE}, {dtype}, worst",
            over(
                max,
                (row["ours to"][SEPARATE] for row in rows if (row["family"], row["dtype"]) == (kind, dtype)),
            ),
            0.75,
        )
        for kind, dtype in kinds
    ]


def _reductions(rows: list[Row]) -> list[Line]:
    """How many times slower gloo is than ours.

    The lines are for messages of up to 100 KB, and for a step with 100 MB of gradients.
    """
    lines = []
    for row in rows:
        slower = {figure: 1 / value for figure, value in row["ours to"]["gloo"].items()}
        step = row["family"] != "all_reduce"
        if step or row["bytes"] <= 100_000:
            what = f"gloo over ours, {row['family']}, {row['bytes']:,} bytes"
            lines.append(Line(what, slower, 1.0 if step else 10.0, at_most=False))
    return lines


def _scaling(rows: list[Row]) -> list[Line]:
    largest = max(rows, key=lambda row: row["ranks"])
    ranks = largest["ranks"]
    lines = []
    for name in GATHERS:
        what = f"{name}, over ours, {ranks} ranks"
        if name not in largest.get("us", ()):
            lines.append(Line(what, {}, 3.0, at_most=False, note=largest["left out"].get("us", "")))
            continue
        times = ratio(largest["us"][name], largest["us"]["merge_moments"])
        lines.append(Line(what, times, 3.0, at_most=False))
    return lines


def row_text(section: str, row: Row) -> str:
    """Format a row as text: medians, with minima in parentheses."""
    if "shape" in row:
        case = f"{row['family']} {tuple(row['shape'])} {row['dtype']} {row['format']}"
    else:
        case = f"C={row['channels']}" + (f", {row['ranks']} ranks" if "ranks" in row else "")
    parts = [f"{section} {case}:"]
    for name, figures in row.get("us", {}).items():
        text = f"{name} {_digits(figures['median'])} ({_digits(figures['minimum'])}) us"
        for key, label in (("ours to", "ours to it"), ("of the copy limit", "of the copy limit")):
            if name in row.get(key, {}):
                more = row[key][name]
                text += f", {label} {_digits(more['median'])} ({_digits(more['minimum'])})"
        parts.append(text)
    parts += [f"{name} keeps {kept:,} bytes" for name, kept in row.get("kept", {}).items()]
    for name, sent in row.get("bytes sent", {}).items():
        parts.append(f"{name} sent {sent['mean']:,.0f} bytes a rank, at most {sent['largest']:,}")
    parts += [f"{name} left out: {why}" for name, why in row.get("left out", {}).items()]
    return "\n    ".join(parts)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.2f}"
