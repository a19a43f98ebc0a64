"""The points of scripts/gpu_check and their parts, as data."""

from __future__ import annotations

import os
import shutil
import sys
from glob import glob
from typing import Any, NamedTuple

NUMBERS, TUNE = list(range(1, 10)), 10
_HOST, _DEVICE, _STREAM = ({"MPISYNCBN_TRANSPORT": where} for where in ("host", "device", "stream"))
_TRITON, _FALLBACK = {"kernels": "cuda"}, {"kernels": "aten_cuda"}
_TO_TUNE = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 1024, 14, 14), (50, 2048, 7, 7)]


class Run(NamedTuple):
    """A part of a point: one process, or one job of mpiexec."""

    name: str
    function: str  # module.function of this package
    ranks: int  # 0: without MPI
    limit: int  # seconds
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    variables: dict[str, str] = {}  # noqa: RUF012
    under: tuple[str, ...] = ()  # a command to start Python with
    gpu: bool = False  # whether it needs a GPU
    skip: str = ""  # the reason to skip it, if there is one
    refused: str = ""  # a text that it prints if it cannot run on this machine


class Point(NamedTuple):
    number: int
    title: str
    side_by_side: bool
    runs: list[Run]


def _sanitized(run: Run, tool: str) -> Run:
    command = sanitizer()
    return run._replace(
        variables=run.variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor has its own bounds
        # do not report failed API calls, because torch makes some and recovers from them
        under=(command or "", "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"),
        gpu=True,
        skip="" if command else "compute-sanitizer is not here",
        refused="Device not supported",  # printed in some virtual machines
    )


def sanitizer() -> str | None:
    name = "compute-sanitizer"
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if variable in os.environ]
    homes += sorted([*glob("/usr/local/cuda*"), *glob("/opt/cuda*"), *glob("/opt/nvidia/cuda*")])
    folders = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer", "extras/" + name)]
    packages = f"{sys.prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/nvidia"
    folders += [*glob(f"{packages}/*/bin"), *glob(f"{packages}/*/{name}"), f"/opt/{name}", "/opt/bin"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


_PARTS = {  # by number, title, and whether they run side by side: not if some are timed
    (1, "versions and transports", True): [
        Run("python -m mpisyncbn", "versions.report", 2, 90),
        Run("auto", "versions.transport", 2, 90, {"asked": "auto"}),
        Run("host", "versions.transport", 2, 90, {"asked": "host"}, _HOST),
        Run("device", "versions.transport", 2, 90, {"asked": "device"}, _DEVICE),
    ],
    (2, "races", True): [
        Run("host", "race.race", 2, 120, {}, _HOST, gpu=True),
        Run("device", "race.race", 2, 120, {}, _DEVICE, gpu=True),
        Run("buffers", "race.buffers", 0, 90, gpu=True),
    ],
    (3, "correct", True): [
        Run("Triton, 2 ranks", "correctness.layers", 2, 240, _TRITON),
        Run("Triton, 4 ranks", "correctness.layers", 4, 240, _TRITON, gpu=True),
        Run("fallback, 2 ranks", "correctness.layers", 2, 120, _FALLBACK, gpu=True),
        Run("fallback, 4 ranks", "correctness.layers", 4, 120, _FALLBACK, gpu=True),
        Run("large", "large.tensors", 1, 240),
    ],
    (4, "same bits, and torch's", True): [
        Run("Triton", "repeats.bits", 4, 120, _TRITON),
        Run("fallback", "repeats.bits", 4, 120, _FALLBACK, gpu=True),
        Run("torch.nn.SyncBatchNorm", "repeats.peer", 2, 90),
    ],
    # Ranks that share a GPU take turns, so one rank shows the time of the transport itself.
    (5, "latency", False): [
        Run("exchange, 1 rank", "latency.latencies", 1, 90),
        Run("exchange, 2 ranks", "latency.latencies", 2, 90),
    ],
    (6, "bandwidth and speed", False): [
        Run("kernels", "bandwidth.kernels", 0, 240, gpu=True),
        Run("layer, 1 rank", "speed.layer", 1, 90),
        Run("layer, 2 ranks", "speed.layer", 2, 90),
        Run("layer, 4 ranks", "speed.layer", 4, 90),
        Run("tiny layer", "speed.tiny", 1, 60),
    ],
    (7, "features", True): [
        Run("features", "features.features", 2, 120),
        Run("torch.compile", "features.compiled", 2, 180),
        Run("streams", "streams.streams", 2, 90, gpu=True),
        Run("CuPy, with torch", "arrays.with_torch", 2, 120, gpu=True),
        Run("CuPy, without torch", "arrays.without_torch", 2, 120, gpu=True),
    ],
    (8, "sanitizer", True): [
        _sanitized(Run("memcheck", "sanitize.kernels", 0, 240, {"shapes": 4}), "memcheck"),
        _sanitized(Run("racecheck", "sanitize.kernels", 0, 240, {"shapes": 2}), "racecheck"),
        _sanitized(Run("memcheck, stream transport", "sanitize.layers", 1, 240, {}, _STREAM), "memcheck"),
    ],
    (9, "the stream transport", False): [
        Run("layers, 2 ranks", "correctness.layers", 2, 240, _TRITON, _STREAM, gpu=True),
        Run("layers, 4 ranks", "correctness.layers", 4, 240, _FALLBACK, _STREAM, gpu=True),
        Run("streams", "streams.streams", 2, 90, {}, _STREAM, gpu=True),
        Run("CuPy, with torch", "arrays.with_torch", 2, 120, {}, _STREAM, gpu=True),
        Run("CuPy, without torch", "arrays.without_torch", 2, 120, {}, _STREAM, gpu=True),
        Run("capture, 1 rank", "stream.capture", 1, 90, gpu=True),
        Run("capture, 2 ranks", "stream.capture", 2, 90, gpu=True),
        Run("torch.compile", "stream.compiled", 2, 180, {}, _STREAM, gpu=True),
        Run("failures", "stream.failures", 2, 90, gpu=True),
        Run("times, 1 rank", "stream.times", 1, 90, gpu=True),
        Run("times, 2 ranks", "stream.times", 2, 90, gpu=True),
        Run("times, 4 ranks", "stream.times", 4, 90, gpu=True),
        Run("ResNet-50, 1 rank", "stream.resnet", 1, 120, gpu=True),
        Run("ResNet-50, 2 ranks", "stream.resnet", 2, 120, gpu=True),
    ],
    (TUNE, "tiles", False): [
        Run(f"tiles for {shape}", "tiles.tiles", 0, 180, {"shape": shape}, gpu=True) for shape in _TO_TUNE
    ],
}
POINTS = [Point(*key, parts) for key, parts in _PARTS.items()]
