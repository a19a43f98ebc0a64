"""Measure exchanges at 2 to 64 ranks, their time and the bytes that a rank sends: section scaling.

If it was started without mpiexec, benchmark.py starts itself under mpiexec twice for each number of
ranks: once for the times, and once with Open MPI's monitoring component for the bytes. It does not
import torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from open_mpi import OVERSUBSCRIBED, SETTINGS

SIZES = (2, 4, 8, 16, 32, 64)
QUICK_SIZES = (2, 8, 64)
CHANNELS = 512
LIMIT = 240  # seconds for one run of mpiexec

# The monitoring component counts point-to-point messages, also those inside collectives.
# Collectives over shared memory send none, and the component han does something else within a node.
# Without these components, coll/tuned chooses algorithms as it does on a cluster.
_COUNTED = {
    "OMPI_MCA_pml_monitoring_enable": "1",
    "OMPI_MCA_coll": "^sm,han,adapt,xhc",
}


def launch(arguments: list[str], quick: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield a row of results and the environment of the ranks, for each number of ranks.

    Args:
        arguments: Python's arguments that run ``measure`` in each rank, without ``--json``.
    """
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("benchmark: --scaling needs mpiexec on PATH")
    for size in QUICK_SIZES if quick else SIZES:
        row: dict[str, Any] = {"ranks": size, "channels": CHANNELS, "left out": {}}
        facts: dict[str, Any] = {}
        for what, settings in (("us", {}), ("bytes sent", _COUNTED)):
            with TemporaryDirectory() as folder:
                path = Path(folder) / "report.json"
                command = [mpiexec, "-n", str(size), sys.executable, *arguments, "--json", str(path)]
                problem = _run(command, environment() | settings)
                if problem:
                    row["left out"][what] = problem
                    continue
                report = json.loads(path.read_text())
            (found,) = report["sections"]["scaling"]
            row[what] = found[what]
            row["left out"] |= {
                name: why
                for name, why in found["left out"].items()
                if (name == "bytes sent") == (what == "bytes sent")
            }
            facts = facts or report["environment"]
        yield row, facts


def environment() -> dict[str, str]:
    """The environment variables for mpiexec. Variables that are already set keep their values."""
    return SETTINGS | OVERSUBSCRIBED | os.environ


def _run(command: list[str], variables: dict[str, str]) -> str:
    """Run a command with a time limit. Return the reason why it failed, or "".

    At the limit, timeout(1) signals mpiexec, which then ends its ranks.
    """
    limited = ["timeout", "--foreground", "--kill-after=20", str(LIMIT), *command]
    done = subprocess.run(
        limited, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if not done.returncode:
        return ""
    if done.returncode in (124, 137):  # ended, or killed, by timeout
        return f"took more than {LIMIT} s"
    # Report the exception of a rank if one ended the job. mpiexec prints much after it.
    lines = done.stderr.strip().splitlines()
    telling = [line for line in lines if "Error: " in line] or lines or ["no message"]
    return f"mpiexec fails: {telling[0]}"


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure the time and bytes of the exchanges among the ranks of this job.

    Collective: every rank must call.
    """
    import numpy as np
    from mpi4py import MPI

    import mpisyncbn

    from . import exchanges, native

    world = MPI.COMM_WORLD
    group = mpisyncbn.Communicator().ready()
    x = np.random.default_rng(world.rank).normal(size=(4, CHANNELS, 2)).astype(np.float32)
    # At 64 ranks on two cores, as many calls in a row as at 2 ranks would take seconds.
    calls = max(4, 200 // world.size)
    row = exchanges.measure(group, x, seconds=1.0 if quick else 4.0, calls=calls)
    counter, reason = native.sent_counter()
    row |= {"ranks": world.size, "bytes sent": {}}
    if counter is None:
        row["left out"]["bytes sent"] = reason
    else:
        for name, once in exchanges.exchanges(group, x).items():
            before = counter()
            once()
            sent = counter() - before
            row["bytes sent"][name] = {
                "mean": round(world.allreduce(sent) / world.size),
                "largest": world.allreduce(sent, op=MPI.MAX),
            }
    group.free()
    yield row
