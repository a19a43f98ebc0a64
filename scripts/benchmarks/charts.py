"""Draw the pictures of the measurements: layers, threads and growth.

For each picture, one function takes the data from the result files, and another draws them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import model, runs, style
from .cases import AS_TORCH, DTYPES, FLOOR, FORMATS, LARGE_VALUES
from .summary import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = dict[str, float]
_TINTS = {"float32": style.OURS, "bfloat16": style.OURS_LIGHT}
_LOCAL = "torch's local batch norm"
_SETUPS = {"layer": "2 ranks, 1 thread each", "threads": "1 rank, 2 threads"}


def layers_data(sections: runs.Sections) -> dict[str, dict[str, dict[str, Figures]]] | None:
    """The time of our layer over torch's local batch norm, by shape, memory format and dtype.

    None without measurements.
    """
    found: dict[str, dict[str, dict[str, Figures]]] = {}
    for row in runs.rows(sections, "layer") + runs.rows(sections, "tiny"):
        shape = str(tuple(row["shape"]))
        found.setdefault(shape, {}).setdefault(row["format"], {})[row["dtype"]] = row["ours to"]["local"]
    return found or None


def layers(data: dict[str, dict[str, dict[str, Figures]]]) -> Figure:
    """Draw bars for each shape, in one subplot for each memory format."""
    figure = style.figure(1.5 + 0.3 * len(data))
    fields = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, memory_format in zip(fields, FORMATS, strict=True):
        for dtype, shift in zip(DTYPES, (-0.2, 0.2), strict=True):
            ratios = {
                place + shift: of_shape[memory_format][dtype]
                for place, of_shape in enumerate(data.values())
                if memory_format in of_shape
            }
            places = list(ratios)
            low, middle, high = (
                [ratio[key] for ratio in ratios.values()] for key in ("lowest", "median", "highest")
            )
            axes.barh(places, middle, 0.38, color=_TINTS[dtype], label=f"ours, {dtype}")
            axes.hlines(places, low, high, color=style.MPI, linewidth=1.2, label="lowest to highest run")
        for place, of_shape in enumerate(data.values()):
            if memory_format not in of_shape:
                axes.text(0.05, place, "no such layout", va="center", color=style.GREY, style="italic")
        axes.axvline(1, color=style.LOCAL, linewidth=2, zorder=3, label=_LOCAL)
        axes.set(title=memory_format, xlabel="time: ours / local", xlim=(0, None))
        axes.grid(axis="x")
    fields[0].set_ylim(len(data) - 0.4, -0.6)
    fields[0].set_yticks(range(len(data)), data)
    _legend_below(figure, fields[0], columns=4)
    return figure


def threads_data(sections: runs.Sections) -> dict[str, dict[str, Any]] | None:
    """The time of our layer over torch's local batch norm for each large shape, by setup and case.

    A case is a dtype and a memory format. None unless all setups were measured.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, setup in _SETUPS.items():
        rows = [row for row in runs.rows(sections, name) if row["values"] >= LARGE_VALUES]
        for dtype in DTYPES:
            for memory_format in FORMATS:
                chosen = [
                    row["ours to"]["local"]
                    for row in rows
                    if (row["dtype"], row["format"]) == (dtype, memory_format)
                ]
                if chosen:
                    case = f"{dtype}\n{memory_format}"
                    found.setdefault(setup, {})[case] = [each["median"] for each in chosen]
    return found if len(found) == len(_SETUPS) else None


def threads(data: dict[str, dict[str, list[float]]]) -> Figure:
    """Draw bars for each dtype and memory format, and a dot for each shape.

    A bar is the geometric mean over the shapes.
    """
    figure = style.figure(3.4)
    axes = figure.subplots()
    cases = list(next(iter(data.values())))
    for (setup, hatch), shift in zip(zip(data, ("", "////"), strict=True), (-0.2, 0.2), strict=True):
        for place, case in enumerate(cases):
            tint = _TINTS[case.split("\n")[0]]
            mean = geometric_mean(data[setup][case])
            axes.bar(place + shift, mean, 0.36, color=tint, hatch=hatch, edgecolor="white")
            axes.text(place + shift, 0.03, f"{mean:.2f}", ha="center", bbox=_WHITE)
            dots = data[setup][case]
            axes.plot([place + shift] * len(dots), dots, "o", color=style.MPI, markersize=2.5, alpha=0.7)
        axes.bar(0, 0, color=style.GREY, hatch=hatch, edgecolor="white", label=setup)
    axes.plot([], [], "o", color=style.MPI, markersize=2.5, label="one shape")
    axes.axhline(1, color=style.LOCAL, linewidth=2, label=_LOCAL)
    axes.set_xticks(range(len(cases)), cases)
    axes.set(ylabel="time: ours / local", ylim=(0, None))
    _legend_below(figure, axes, columns=4)
    return figure


def growth_data(sections: runs.Sections) -> dict[str, Any] | None:
    rows = runs.rows(sections, "scaling")
    return {"measured": rows, "model": model.table()} if rows else None


def growth(data: dict[str, Any]) -> Figure:
    """Draw time and bytes of an exchange, as measured, and the model's time for a step.

    The step is that of a ResNet-50, on two networks.
    """
    figure = style.figure(3.6)
    times, sent, steps = figure.subplots(1, 3)
    peers = (
        ("merge_moments", style.OURS, "o", "ours"),
        (AS_TORCH, style.TORCH_SYNC, "s", "as torch.nn.SyncBatchNorm: gather, merge"),
        (FLOOR, style.MPI, "^", "MPI_Allreduce in C"),
    )
    for name, color, marker, label in peers:
        for axes, key, statistic in ((times, "us", "median"), (sent, "bytes sent", "mean")):
            points = [
                (row["ranks"], row[key][name][statistic]) for row in data["measured"] if name in row[key]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, ls="-", color=color, ms=4, label=label)
    for network, line in zip(model.NETWORKS, ("-", "--"), strict=True):
        for kind, color in (("ours", style.OURS), ("all-gather", style.TORCH_SYNC)):
            points = [(row["ranks"], row[network][kind]) for row in data["model"]]
            steps.plot(*zip(*points, strict=True), line, color=color)
        steps.plot([], [], line, color=style.GREY, label=f"model of {network}")
    channels = data["measured"][0]["channels"]
    times.set(title="measured: time", ylabel=f"us, one exchange of {channels} channels")
    sent.set(title="measured: bytes", ylabel="bytes that a rank sends in it")
    steps.set(title="model: not measured", ylabel="ms, all exchanges of a ResNet-50 step")
    steps.set_facecolor(style.MODEL)
    for axes in (times, sent, steps):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        ticks = (2, 8, 32) if axes is not steps else (2, 256, 65536)
        axes.set_xticks(ticks, [f"{ranks:,}" for ranks in ticks])
        axes.grid()
    _legend_below(figure, times, steps, columns=2)
    return figure


_WHITE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}


def _legend_below(figure: Figure, *fields: Axes, columns: int) -> None:
    """Draw a legend below the figure, with one entry for each label in these subplots."""
    entries: dict[str, Any] = {}
    for axes in fields:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
