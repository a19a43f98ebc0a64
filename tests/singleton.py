"""Processes that are no part of this MPI job: Python alone, and what starts jobs of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from parallel import WORLD

# What launchers tell a rank about its job.
_LAUNCHERS = ("HYDRA", "I_MPI_", "MPICH_", "MPI_", "OMPI_", "PMI", "PRTE_", "SLURM_")
# For root, and for more ranks than cores. Not the leave to have more ranks than slots: in a job of Slurm's,
# Open MPI's mpiexec would put all of them on the first node.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def unlaunched() -> dict[str, str]:
    """The environment, as if no launcher had started this process."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}


def for_jobs() -> dict[str, str]:
    """The same, for what starts MPI jobs itself."""
    return unlaunched() | _OPEN_MPI


def run_alone(code: str) -> str:
    """What ``code`` prints when rank 0 runs it; every rank gets it. Raises if the process fails.

    Collective: every rank must call.
    """
    status, output = 0, ""
    if WORLD.rank == 0:
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command,
            env=unlaunched(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        status, output = done.returncode, done.stdout
    status, output = WORLD.bcast((status, output))
    assert status == 0, output
    return output
