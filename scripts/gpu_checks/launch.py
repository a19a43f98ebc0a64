"""Runs the processes of a point, each under its time limit, and puts together what they wrote down."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import scaling

from . import records
from .points import Point, Run

ROOT = Path(__file__).resolve().parents[2]
_MARK = (
    "MPISYNCBN_GPU_CHECK"  # a variable of every process of a run, by which those are found that outlive it
)
_RANKS_AT_A_TIME = max(4, (os.cpu_count() or 1) - 2)
_TAIL = 6000  # characters of what a failed run printed


def probe(device: str) -> dict[str, Any]:
    """The facts of the machine, found by a process of its own: this one stays off the GPU."""
    command = [sys.executable, "-m", "gpu_checks.worker", "--probe", device]
    try:
        done = subprocess.run(command, env=_variables(), capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"devices": [], "why": f"torch cannot say: {type(error).__name__}"}


def run_point(point: Point, device: str, quick: bool) -> dict[str, Any]:
    begin = time.monotonic()
    most = max(1, _RANKS_AT_A_TIME // 4) if point.side_by_side else 1
    with ThreadPoolExecutor(most) as pool:
        runs = list(pool.map(lambda run: _run(run, device, quick), point.runs))
    verdicts = {run["verdict"] for run in runs}
    verdict = next((each for each in ("failed", "passed") if each in verdicts), "skipped")
    return {
        "point": point.number,
        "title": point.title,
        "verdict": verdict,
        "seconds": round(time.monotonic() - begin, 1),
        "runs": runs,
    }


def _run(run: Run, device: str, quick: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"name": run.name, "ranks": run.ranks}
    mpiexec = find_mpiexec()
    reason = run.skip or ("it needs a GPU" if run.gpu and device == "cpu" else "")
    if run.ranks > 1 and mpiexec is None:
        reason = "no mpiexec on PATH, beside Python, or in MPI_HOME/bin"
    if reason:
        return {**result, "verdict": "skipped", "reason": reason, "seconds": 0.0}
    begin = time.monotonic()
    with TemporaryDirectory(prefix="gpu-check-") as folder:
        start = [mpiexec, "-n", str(run.ranks)] if run.ranks > 1 else []
        worker = [sys.executable, "-m", "gpu_checks.worker", run.function, "--device", device]
        worker += ["--folder", folder, "--arguments", json.dumps(run.arguments)]
        worker += ["--limit", str(run.limit)]
        worker += [*(["--quick"] if quick else []), *([] if run.ranks else ["--alone"])]
        problem, printed = _finish([*start, *run.under, *worker], run, Path(folder))
        found = records.merged(Path(folder), max(run.ranks, 1))
    verdict, reason = records.verdict(found, problem)
    if verdict == "failed" and run.refused and run.refused in printed and not found["checks"]:
        verdict, reason = "skipped", f"it says: {run.refused}"
    result |= {"verdict": verdict, "reason": reason, "seconds": round(time.monotonic() - begin, 1), **found}
    if verdict == "failed":
        result["printed"] = _without_paths(printed)[-_TAIL:]
    return result


def _finish(command: list[str], run: Run, folder: Path) -> tuple[str, str]:
    """What was wrong with the process as such, or "", and what it printed."""
    mark = uuid.uuid4().hex
    variables = _variables() | run.variables | {_MARK: mark}
    printed = folder / "printed.txt"
    problem = ""
    with (
        printed.open("w") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(run.limit)
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"over its {run.limit} s"
            process.send_signal(signal.SIGTERM)  # mpiexec ends its ranks
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            _end_all(mark)
    return problem, printed.read_text(errors="replace")


def _end_all(mark: str) -> None:
    """Kill what is left of a run: a rank that hangs would share the GPU with all that follow."""
    wanted = f"{_MARK}={mark}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def find_mpiexec() -> str | None:
    folders = [str(Path(sys.executable).parent), f"{sys.prefix}/bin", f"{os.environ.get('MPI_HOME', '')}/bin"]
    return shutil.which("mpiexec") or shutil.which("mpiexec", path=os.pathsep.join(folders))


def _variables() -> dict[str, str]:
    """For every process: more ranks than cores, as root or not, and this package on its path."""
    variables = scaling.environment()
    paths = [str(ROOT / "scripts")]
    if importlib.util.find_spec("mpisyncbn") is None:
        paths.append(str(ROOT))
    if variables.get("PYTHONPATH"):
        paths.append(variables["PYTHONPATH"])
    return variables | {"PYTHONPATH": os.pathsep.join(paths), "NO_COLOR": "1"}


def _without_paths(text: str) -> str:
    for path, name in ((str(ROOT), "."), (sys.prefix, "PREFIX"), (str(Path.home()), "~")):
        if len(path) > 1:
            text = text.replace(path, name)
    return text
