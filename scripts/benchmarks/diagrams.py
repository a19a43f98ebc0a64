"""Draw the pictures of how the package works: a forward pass on a GPU, and the package's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SKETCH = {"facecolor": "#EFEFEF", "linestyle": "--", "edgecolor": "#7A7A7A"}
_WAIT = {"facecolor": "white", "hatch": "////", "edgecolor": style.TORCH_SYNC}


def timeline_data(folder: Path) -> dict[str, float] | None:
    """The median times in us of one forward pass at one rank, from the result files of a GPU.

    The input is (2, 64, 8, 8) in float32. None if there are no such files.
    """
    host, latency = (sorted(folder.glob(f"gpu-*[0-9]-{name}.json")) for name in ("host-time", "points-5-6"))
    if not host or not latency:
        return None
    layer = json.loads(host[-1].read_text())["forward, float32"]
    report = json.loads(latency[-1].read_text())
    exchanges = {
        run["name"]: run["figures"]["C = 64, us, median (minimum)"]
        for point in report["points"]
        for run in point["runs"]
        if point["point"] == 5
    }
    alone = exchanges["exchange, 1 rank"]
    return {
        "host": layer["ours, host"]["median"],
        "stream": layer["ours, stream"]["median"],
        "exchange": _median(alone["ours, pinned"]),
        "mpi": _median(alone["MPI alone, host memory"]),
    }


def _median(text: str) -> float:
    return float(text.split(" ")[0])


def timeline(us: dict[str, float]) -> Figure:
    """Draw who waits in the forward pass of two layers, with the transports host and stream."""
    figure = style.figure(4.1)
    host, stream = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    _host_transport(host, us)
    _stream_transport(stream, us)
    for axes, rows in ((host, ["host", "GPU"]), (stream, ["host", "GPU", "worker"])):
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    stream.set(xlabel="us", xlim=(0, 2.03 * us["host"]))
    _legend(figure)
    return figure


def _host_transport(axes: Axes, us: dict[str, float]) -> None:
    axes.set_title("MPISYNCBN_TRANSPORT=host: the host waits in each layer")
    before = (us["host"] - us["exchange"]) / 2  # a sketch: how the other time is divided was not measured
    for number in range(2):
        start = number * us["host"]
        exchange = start + before
        _measured(axes, 0, start, before, f"layer {number + 1}")
        _block(axes, 0, exchange, us["exchange"], **_WAIT)
        _block(axes, 0, exchange + (us["exchange"] - us["mpi"]) / 2, us["mpi"], facecolor=style.MPI)
        _measured(axes, 0, exchange + us["exchange"], before, "")
        _block(axes, 1, start + before / 2, before / 2, "moments", **_SKETCH)
        _block(axes, 1, exchange + us["exchange"] + before / 2, before / 2, "normalize", **_SKETCH)


def _stream_transport(axes: Axes, us: dict[str, float]) -> None:
    axes.set_title("MPISYNCBN_TRANSPORT=stream: the host goes on, the GPU waits")
    kernel = us["host"] / 4 - us["exchange"] / 4  # as long as in the picture of the host transport
    start = us["stream"] / 2
    for number in range(2):
        _measured(axes, 0, number * us["stream"], us["stream"], f"layer {number + 1}")
        _block(axes, 1, start, kernel, "moments", **_SKETCH)
        wait = start + kernel
        _block(axes, 1, wait, us["exchange"], **_WAIT)
        _block(axes, 2, wait + (us["exchange"] - us["mpi"]) / 2, us["mpi"], facecolor=style.MPI)
        _block(axes, 1, wait + us["exchange"], kernel, "normalize", **_SKETCH)
        start = wait + us["exchange"] + kernel
    axes.text(2 * us["stream"] + 8, 0, "free for what comes next", va="center", color=style.GREY)


def _measured(axes: Axes, row: int, start: float, length: float, text: str) -> None:
    _block(axes, row, start, length, text, facecolor=style.OURS, color="white")


def _block(
    axes: Axes, row: int, start: float, length: float, text: str = "", color: str = "black", **how: Any
) -> None:
    axes.barh(row, length, 0.62, left=start, **{"edgecolor": "white", "linewidth": 0.8, **how})
    if text:
        axes.text(start + length / 2, row, text, ha="center", va="center", color=color)


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    kinds = {
        "host at work: measured": {"facecolor": style.OURS},
        "waits for an exchange: measured with host": _WAIT,
        "MPI_Allreduce: measured": {"facecolor": style.MPI},
        "GPU at work: a sketch": _SKETCH,
    }
    patches = [Patch(label=label, **{"linewidth": 0.8, **how}) for label, how in kinds.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)


# Each part: its name, its description, left, bottom, width. From the top to the bottom.
PARTS = (
    ("SyncBatchNorm", "a module of torch; convert_sync_batchnorm puts it in", 0, 4, 10),
    ("autograd", "fused, composite (all derivatives), compiled, enqueued (stream)", 0, 3, 10),
    ("functional", "the algorithm, forward and backward, on torch, NumPy and CuPy", 0, 2, 10),
    ("kernels", "sums and normalization\nwhere the tensor lives", 0, 1, 3.6),
    ("exchange", "pack, one all-reduce, check, merge:\n2C + 3 values each way", 3.8, 1, 6.2),
    ("C++ · Triton · torch", "CPU, GPU, any device", 0, 0, 3.6),
    ("MPI", "any library that mpi4py runs on", 3.8, 0, 4),
    ("liveness", "who is missing", 8, 0, 2),
)


def architecture(parts: tuple[tuple[str, str, float, float, float], ...]) -> Figure:
    """Draw the parts of the package as boxes, from the torch module at the top to MPI."""
    figure = style.figure(3.7)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.05, 10.05), ylim=(-0.1, 4.9))
    for name, text, left, bottom, width in parts:
        color = {"MPI": style.MPI, "liveness": style.GREY}.get(name, style.OURS)
        axes.add_patch(_box(left, bottom, width, color))
        axes.text(left + 0.15, bottom + 0.63, name, weight="bold", va="center", color=color, fontsize=10)
        axes.text(left + 0.15, bottom + 0.27, text, va="center", linespacing=1.1)
    for x, bottom in ((5, 4), (5, 3), (1.8, 2), (6.9, 2), (1.8, 1), (5.8, 1)):
        axes.annotate("", (x, bottom - 0.22), (x, bottom + 0.02), arrowprops={"arrowstyle": "<->"})
    return figure


def _box(left: float, bottom: float, width: float, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((left, bottom), width, 0.78, shape, facecolor="white", edgecolor=color, lw=1.3)
