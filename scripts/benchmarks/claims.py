"""The project's claims about its speed, with figures, spread of the runs and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import runs
from .summary import Line, geometric_mean
from .tables import table

_BENCHMARK = "python scripts/benchmark.py"
_LARGE = "layer over local, 6 MB and more"
_LOCAL = "Layer over torch's local batch norm, tensors of 6 MB and more"
_THREADS = "The same with one rank and two threads, 6 MB and more"
HEAD = ("claim", "figure", "spread", "command")


class Claim(NamedTuple):
    text: str
    section: str
    figure: str  # the beginning of a line of summary.py
    command: str


CLAIMS = (
    *(
        Claim(f"{_LOCAL}, {text}", "layer", f"{_LARGE}, {figure}", f"mpiexec -n 2 {_BENCHMARK} --only layer")
        for text, figure in (
            ("float32, contiguous, mean", "float32, contiguous, geometric mean"),
            ("float32, channels_last, mean", "float32, channels_last, geometric mean"),
            ("bfloat16, mean", "bfloat16, geometric mean"),
            ("float32, slowest shape", "float32, worst"),
        )
    ),
    *(
        Claim(f"{_THREADS}, {text}", "threads", figure, f"OMP_NUM_THREADS=2 {_BENCHMARK} --threads 2")
        for text, figure in (
            ("float32, contiguous, mean", f"1 rank with 2 threads, {_LARGE}, float32, contiguous, geometric"),
            ("float32, channels_last, mean", f"1 rank with 2 threads, {_LARGE}, float32, channels_last, geo"),
            ("bfloat16, mean", f"1 rank with 2 threads, {_LARGE}, bfloat16, geometric mean"),
        )
    ),
    Claim(
        "Tiny layer, (2, 64, 8, 8), over local",
        "tiny",
        "tiny layer over local, (2, 64, 8, 8) contiguous",
        f"mpiexec -n 2 {_BENCHMARK} --only tiny",
    ),
    *(
        Claim(
            f"ResNet-50 training step over local, {memory_format}",
            "resnet",
            f"ResNet-50 training step over local, {memory_format}",
            f"mpiexec -n 2 {_BENCHMARK} --only resnet",
        )
        for memory_format in ("contiguous", "channels_last")
    ),
    Claim(
        "Layer with its ReLU inside over layer, then `torch.relu`, mean",
        "relu",
        "fused ReLU over ours, then torch.relu, geometric mean",
        f"mpiexec -n 2 {_BENCHMARK} --only relu",
    ),
    Claim(
        "SyncBatchNorm made of torch.distributed's gloo operations, over ours, 6 MB and more, mean",
        "peers",
        "naive SyncBatchNorm over gloo over ours, 6 MB and more, geometric mean",
        f"mpiexec -n 2 {_BENCHMARK} --only peers",
    ),
    Claim(
        "Exchange of up to 128 channels, minus `MPI_Allreduce` called from C, slowest size",
        "exchange",
        "merge_moments minus the C loop",
        f"mpiexec --bind-to core -n 2 {_BENCHMARK} --only exchange",
    ),
    Claim(
        "Exchange in the way of `torch.nn.SyncBatchNorm` over ours, 64 ranks on 2 cores",
        "scaling",
        "gather-and-merge, float32, over ours",
        f"{_BENCHMARK} --scaling",
    ),
)


def markdown(sections: runs.Sections, folder: Path) -> str:
    """The Markdown table of claims in docs/explanation/performance.md."""
    return table(HEAD, [*_measured(sections), *_gpu(folder)])


def _measured(sections: runs.Sections) -> Iterator[tuple[str, str, str, str]]:
    for claim in CLAIMS:
        for line in runs.lines(sections, claim.section):
            if line.what.startswith(claim.figure):
                figure = f"{line.value['median']:.2f} {line.unit}".rstrip()
                days = {run.environment["date"][:10] for run in sections[claim.section]}
                number = len(sections[claim.section])
                yield claim.text, figure, _spread(line, number, days), f"`{claim.command}`"


def _spread(line: Line, number: int, days: set[str]) -> str:
    found = f"{number} runs: {line.value['lowest']:.2f} to {line.value['highest']:.2f}"
    return f"{found if number > 1 else '1 run'}, {' and '.join(sorted(days))}"


def _gpu(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield the claims about GPUs, from the last file of each kind in the order of their names."""
    for path in sorted(folder.glob("gpu-*[0-9]-host-time.json"))[-1:]:
        for what, peers in json.loads(path.read_text()).items():
            if what.endswith("float32"):
                ratio = peers["ours, stream"]["median"] / peers["torch.nn.SyncBatchNorm"]["median"]
                text = f"GPU: host time of a small layer with `stream` over `torch.nn.SyncBatchNorm`, {what}"
                yield text, f"{ratio:.2f}", f"1 run, {_day(path)}", "`python3 scripts/host_time.py`"
    for path in sorted(folder.glob("gpu-*[0-9]-points-5-6.json"))[-1:]:
        ratios = list(_kernel_ratios(json.loads(path.read_text())))
        command = "`scripts/gpu_check --quick --only 6`"
        day = f"1 run, {_day(path)}"
        yield "GPU: kernels over torch's own, mean", f"{geometric_mean(ratios):.2f}", day, command
        yield "GPU: kernels over torch's own, slowest", f"{max(ratios):.2f}", day, command


def _day(path: Path) -> str:
    return "".join(re.findall(r"\d{4}-\d\d-\d\d", path.name))


def _kernel_ratios(found: Any) -> Iterator[float]:
    """Yield the time of each kernel over torch's operations, at any depth of a GPU report."""
    if isinstance(found, dict) and "of torch" in found:
        yield found["of torch"]
    elif isinstance(found, (dict, list)):
        for each in found.values() if isinstance(found, dict) else found:
            yield from _kernel_ratios(each)
