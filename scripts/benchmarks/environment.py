"""The facts about the machine and the software in a result file, without host names and paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

import mpisyncbn

# The settings that a result file has. Yielding while a rank waits and binding to cores matter more
# than most algorithms.
_SETTINGS = (
    "OMPI_MCA_mpi_yield_when_idle",
    "PRTE_MCA_hwloc_default_binding_policy",
    "OMPI_MCA_hwloc_base_binding_policy",
    "OMP_NUM_THREADS",
    "MPISYNCBN_DEBUG",
    "MPISYNCBN_TRANSPORT",
)


def facts(allocator: str) -> dict[str, Any]:
    """Return the facts about this run. Collective: every rank must call."""
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = world.allreduce(int(node.rank == 0))
    node.Free()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "torch", "mpi4py")},
        "mpisyncbn": mpisyncbn.__version__,
        # The rest of the library's text says where and by whom it was built.
        "mpi": MPI.Get_library_version().strip("\0\n ").splitlines()[0].split(",")[0],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores of rank 0": len(os.sched_getaffinity(0)),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
        "nodes": nodes,
        "ranks": world.size,
        "allocator": allocator,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        from mpisyncbn.kernels import kernels_for
        from mpisyncbn.report import report

        found["threads"] = torch.get_num_threads()
        found["kernels"] = kernels_for(torch.zeros(1, 1)).__name__
        found["kernels say"] = report()["kernels"].get("torch, cpu", "nothing")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return model[1] if model else platform.machine()
