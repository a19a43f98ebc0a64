"""What started this process, and whether MPI knows of it.

A launcher and an MPI library that do not understand each other are no error to either: each rank believes
to be the only one, and the program trains as many times as there are ranks, each on its own batches.
"""

from __future__ import annotations

import warnings
from typing import Any

from . import config

__all__ = ["cure", "describe", "warn_if_alone"]

# Of a library, by mpi4py's name for it: what its own mpiexec is, and how srun starts its ranks.
_SRUN = {
    "Open MPI": "srun --mpi=pmix",
    "MPICH": "srun --mpi=pmi2",
    "Intel MPI": "srun --mpi=pmi2",
    "Cray MPICH": "srun --mpi=cray_shasta",
    "MVAPICH": "srun --mpi=pmi2",
}
_looked = False


def warn_if_alone(MPI: Any) -> None:
    """Warn, once, where the launcher speaks of several ranks and MPI of one."""
    global _looked
    if _looked:  # what is looked at does not change, and takes microseconds
        return
    _looked = True
    if is_alone(MPI) and config.own_rank() in (0, None):  # one voice is enough, where they can be told apart
        warnings.warn(
            f"the launcher started {config.tasks()[0]} tasks, but this process is alone in its world: "
            f"{cure(MPI)} As it is, each rank trains by itself, on statistics of its own batches",
            RuntimeWarning,
            stacklevel=2,
        )


def is_alone(MPI: Any) -> bool:
    return MPI.COMM_WORLD.Get_size() == 1 and config.tasks()[0] > 1


def describe(MPI: Any) -> dict[str, str]:
    """For the report of ``python -m mpisyncbn``."""
    tasks, variable = config.tasks()
    known = f"{tasks} task{'' if tasks == 1 else 's'} ({variable})" if variable else "none that is known here"
    return {"launcher": known, **({"ALONE": cure(MPI)} if is_alone(MPI) else {})}


def cure(MPI: Any) -> str:
    """What to change, for this library and this launcher."""
    vendor, version = MPI.get_vendor()
    library = f"{vendor} {'.'.join(map(str, version))}"
    variable = config.tasks()[1]
    own = f"the mpiexec that comes with {library}"
    if not variable.startswith("SLURM_"):
        return (
            f"what started it ({variable} is set) is not of {library}, the library that mpi4py loads. Start "
            f"the ranks with {own}, or let MPI4PY_LIBMPI name the library of the launcher."
        )
    srun = _SRUN.get(vendor, "srun --mpi=pmix, or --mpi=pmi2")
    return (
        f"srun did not tell {library}, the library that mpi4py loads, of the other ranks. Use {srun} (srun "
        f"--mpi=list says what there is), or {own}, inside the job."
    )
