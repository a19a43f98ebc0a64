"""Start parts of points, each as a job with a time limit, and merge the records of its ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support import jobs

from . import records
from .points import Run

_TAIL = 6000  # characters kept of a failed run's output


def probe(device: str) -> dict[str, Any]:
    """Return the facts of the machine, from another process: this one does not use the GPU."""
    command = [sys.executable, "-c", f"from checks import worker; worker.probe({device!r})"]
    with TemporaryDirectory(prefix="gpu-check-") as folder:
        end = jobs.run(command, Path(folder), limit=120, variables=_variables())
    try:
        return json.loads(end.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (end.stderr.splitlines() or ["no answer"])[-1]
        return {"devices": [], "why": f"torch cannot say: {said}"}


def ended(run: Run, device: str, quick: bool) -> dict[str, Any]:
    """Run a part as a job, and return its result."""
    result: dict[str, Any] = {"name": run.name, "ranks": run.ranks}
    mpiexec = jobs.find_mpiexec()
    reason = run.skip or ("it needs a GPU" if run.gpu and device == "cpu" else "")
    if run.ranks > 1 and mpiexec is None:
        reason = "no mpiexec on PATH, beside Python, or in MPI_HOME/bin"
    if reason:
        return {**result, "verdict": "skipped", "reason": reason, "seconds": 0.0}
    start = [mpiexec, "-n", str(run.ranks)] if run.ranks > 1 else []
    worker = [sys.executable, "-m", "checks.worker", json.dumps([run._asdict(), device, quick])]
    begin = time.monotonic()
    with TemporaryDirectory(prefix="gpu-check-") as folder:
        command = [*start, *run.under, *worker]
        end = jobs.run(command, Path(folder), limit=run.limit, variables=_variables() | run.variables)
        found = records.merged(Path(folder), max(run.ranks, 1))
    problem = f"over its {run.limit} s" if end.status is None else f"exit status {end.status}"
    verdict, reason = records.verdict(found, problem if end.status != 0 else "")
    printed = end.stdout + end.stderr
    if verdict == "failed" and run.refused and run.refused in printed and not found["checks"]:
        verdict, reason = "skipped", f"it says: {run.refused}"
    result |= {"verdict": verdict, "reason": reason, "seconds": round(time.monotonic() - begin, 1), **found}
    if verdict == "failed":
        result["printed"] = _without_paths(printed)[-_TAIL:]
    return result


def _variables() -> dict[str, str]:
    """Return the environment of a job, in which MPI may start more ranks than cores, and as root.

    Variables that are set already keep their values, also those of MPI; PYTHONPATH is extended. An
    installed package is used before the one of this repository, because it has native kernels.
    """
    elsewhere = [path for path in sys.path if Path(path).resolve() != jobs.ROOT]
    here = [str(jobs.ROOT)] if PathFinder.find_spec("mpisyncbn", elsewhere) is None else []
    folders = [f"{jobs.ROOT}/{name}" for name in ("tests/gpu", "tests", "scripts")]
    paths = [*folders, *here, os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1"}
    return {"OMP_NUM_THREADS": "1", **jobs.for_jobs(), **os.environ, **own}


def _without_paths(text: str) -> str:
    for path, name in ((str(jobs.ROOT), "."), (sys.prefix, "PREFIX"), (str(Path.home()), "~")):
        if len(path) > 1:
            text = text.replace(path, name)
    return text
