"""Pictures of a result file: ratios.png, the heat map; growth.png, the curves."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
_SHORT = {"float32": "f32", "bfloat16": "bf16", "contiguous": "contiguous", "channels_last": "channels last"}


def draw(sections: dict[str, list[Row]], folder: Path) -> list[Path]:
    """Draw what the sections have data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if table := ratio_table(sections):
        written.append(_heat_map(table, folder / "ratios.png"))
    if any(name in sections for name in ("exchange", "scaling", "model")):
        written.append(_growth(sections, folder / "growth.png"))
    return written


def ratio_table(sections: dict[str, list[Row]]) -> dict[tuple[str, str], float]:
    """Median time of ours over a peer's, by (row, column) of the heat map."""
    table = {}
    for section in ("layer", "tiny", "peers", "resnet", "relu"):
        for row in sections.get(section, ()):
            for peer, figures in row.get("ours to", {}).items():
                if (section, peer) == ("peers", "local"):
                    continue  # section layer has it
                shape = " ".join((row["family"], "x".join(map(str, row["shape"]))))
                column = f"{peer}\n{_SHORT[row['dtype']]} {_SHORT[row['format']]}"
                if section == "relu":
                    shape += ", ReLU"
                table[shape, column] = figures["median"]
    return table


def _heat_map(table: dict[tuple[str, str], float], path: Path) -> Path:
    import numpy as np
    from matplotlib.figure import Figure  # without pyplot: needs no display

    rows = list(dict.fromkeys(row for row, _ in table))
    columns = sorted({column for _, column in table})
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in table.items():
        grid[rows.index(row), columns.index(column)] = log2(value)
    figure = Figure(figsize=(3 + 0.9 * len(columns), 2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.clip(grid, -3, 3), cmap="RdYlGn_r", vmin=-3, vmax=3, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(j, i, f"{2**value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    bar = figure.colorbar(image, ticks=range(-3, 4))
    bar.ax.set_yticklabels([f"{2.0**power:g}" for power in range(-3, 4)])
    axes.set_title("Time of mpisyncbn over the peer's, forward and backward: below 1 is faster")
    figure.savefig(path, dpi=150)
    return path


def _growth(sections: dict[str, list[Row]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    channels, ranks, sent, steps = figure.subplots(2, 2).flat
    exchange, scaling = sections.get("exchange", []), sections.get("scaling", [])
    _curves(channels, exchange, "channels", lambda row: row["us"], "median")
    channels.set(title="An exchange", xlabel="channels C", ylabel="us")
    _curves(ranks, [row for row in scaling if "us" in row], "ranks", lambda row: row["us"], "median")
    ranks.set(title=f"An exchange{_of(scaling)}, ranks share the machine", xlabel="ranks P", ylabel="us")
    counted = [row for row in scaling if row.get("bytes sent")]
    _curves(sent, counted, "ranks", lambda row: row["bytes sent"], "mean")
    sent.set(title=f"Bytes that a rank sends{_of(scaling)}", xlabel="ranks P", ylabel="bytes")
    for row in sections.get("model", [])[:1]:
        for network in (name for name in row if name != "ranks"):
            for kind, style in (("ours", "-"), ("all-gather", "--")):
                points = [(row["ranks"], row[network][kind]) for row in sections["model"]]
                steps.plot(*zip(*points, strict=True), style, label=f"{network}, {kind}")
    steps.set(title="Model: exchanges of a ResNet-50 step", xlabel="ranks P", ylabel="ms")
    for axes in (channels, ranks, sent, steps):
        if axes.lines:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=150)
    return path


def _curves(
    axes: Axes, rows: list[Row], x: str, of: Callable[[Row], dict[str, dict[str, float]]], figure: str
) -> None:
    for name in of(rows[0]) if rows else ():
        points = [(row[x], of(row)[name][figure]) for row in rows if name in of(row)]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)


def _of(rows: list[Row]) -> str:
    return f", C={rows[0]['channels']}" if rows and "channels" in rows[0] else ""
