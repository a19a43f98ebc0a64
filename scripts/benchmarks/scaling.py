"""Exchanges at 2 to 64 ranks: time, and bytes that a rank sends. Section scaling.

Started without mpiexec, the script starts mpiexec and itself for each size, twice: for the times,
and with Open MPI's monitoring component for the bytes. It imports no torch.
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
LIMIT = 240  # seconds for one size

# Monitoring counts point-to-point messages, also those inside collectives. Collectives over shared
# memory send none, and han differs within a node; without both, coll/tuned chooses as in a cluster.
_COUNTED = {
    "OMPI_MCA_pml_monitoring_enable": "1",
    "OMPI_MCA_coll": "^sm,han,adapt,xhc",
}


def launch(arguments: list[str], quick: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row of results, and the environment of the ranks, for each size.

    Args:
        arguments: the command line that runs ``measure`` in each rank, without its report's path.
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
    """The environment of mpiexec. A variable that is set already stays."""
    return SETTINGS | OVERSUBSCRIBED | os.environ


def _run(command: list[str], variables: dict[str, str]) -> str:
    """Why the command failed, or "". timeout(1) signals mpiexec, which ends its ranks then."""
    limited = ["timeout", "--foreground", "--kill-after=20", str(LIMIT), *command]
    done = subprocess.run(
        limited, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if not done.returncode:
        return ""
    if done.returncode in (124, 137):  # ended, or killed, by timeout
        return f"took more than {LIMIT} s"
    # The exception of a rank, if that is what ended the job; mpiexec has much to say after it.
    lines = done.stderr.strip().splitlines()
    telling = [line for line in lines if "Error: " in line] or lines or ["no message"]
    return f"mpiexec fails: {telling[0]}"


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """Time and bytes of the exchanges at the size of this job. Collective: every rank must call."""
    import numpy as np
    from mpi4py import MPI

    import mpisyncbn

    from . import exchanges, native

    world = MPI.COMM_WORLD
    group = mpisyncbn.Communicator().ready()
    x = np.random.default_rng(world.rank).normal(size=(4, CHANNELS, 2)).astype(np.float32)
    # A batch that is long at 2 ranks would take seconds at 64 on two cores.
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
