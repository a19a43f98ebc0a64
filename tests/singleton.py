"""Python in a process of its own, which is no part of this MPI job."""

from __future__ import annotations

import os
import subprocess
import sys

from parallel import WORLD

# What launchers tell a rank about its job.
_LAUNCHERS = ("HYDRA", "I_MPI_", "MPICH_", "MPI_", "OMPI_", "PMI", "PRTE_", "SLURM_")


def run_alone(code: str) -> str:
    """What ``code`` prints when rank 0 runs it; every rank gets it. Raises if the process fails.

    Collective: every rank must call.
    """
    status, output = 0, ""
    if WORLD.rank == 0:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command,
            env=environment,
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
