"""What started this process, and whether MPI knows of all ranks.

A launcher and an MPI library that do not understand each other are no error to either: each rank believes
to be the only one, and the program would train as many times as there are ranks, each on its own batches.
So do torchrun, and whatever else starts ranks for torch.distributed, which tells MPI nothing.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from .. import config
from ..errors import MPISyncBNError, on_rank

__all__ = ["compare", "describe", "refuse_if_apart", "warn_if_apart"]

# Of a library, by mpi4py's name for it: how srun starts its ranks.
_SRUN = {
    "Open MPI": "srun --mpi=pmix",
    "MPICH": "srun --mpi=pmi2",
    "Intel MPI": "srun --mpi=pmi2",
    "Cray MPICH": "srun --mpi=cray_shasta",
    "MVAPICH": "srun --mpi=pmi2",
}
_compared: Callable[[], Any] = object  # gives torch's group at the last comparison, which it does not keep


class _Apart(NamedTuple):
    """That something knows of more ranks than MPI."""

    words: str  # what knows of how many, and the cure
    variable: str = ""


def compare(mpi: Callable[[], Any]) -> None:
    """``refuse_if_apart``, the first time and again whenever torch.distributed was initialized since.

    For every forward: as long as nothing has changed, it costs a fraction of a microsecond.
    """
    global _compared
    group = _torch_group()
    if group is not _compared():
        refuse_if_apart(mpi())
        _compared = type(None) if group is None else weakref.ref(group)


def refuse_if_apart(MPI: Any) -> None:
    """Raise MPISyncBNError if torch.distributed or a launcher knows of more ranks than MPI.

    Only warn in a shell that srun started: there may be one for each task, and somebody sits in the first.
    """
    found = _apart(MPI)
    if found is None:
        return
    if found.variable.startswith("SLURM_") and _has_terminal():
        warn_if_apart(MPI)
        return
    raise MPISyncBNError(
        f"{found.words} As it is, each world would train by itself, on statistics of its own batches; if "
        f"that is meant, give the layers a process_group of their own, such as MPI.COMM_SELF{on_rank()}"
    )


def warn_if_apart(MPI: Any) -> None:
    """The same for what is no training: a warning, once."""
    if (found := _apart(MPI)) is not None:
        _warn(found.words)


def describe(MPI: Any) -> dict[str, str]:
    """For the report of ``python -m mpisyncbn``."""
    ranks, variable = config.started(MPI.COMM_WORLD.Get_size())
    known = f"{ranks} rank{'' if ranks == 1 else 's'} ({variable})" if variable else "none that is known here"
    found = _apart(MPI)
    return {"launcher": known, **({} if found is None else {"APART": found.words})}


def _apart(MPI: Any) -> _Apart | None:
    size = MPI.COMM_WORLD.Get_size()
    if MPI.Comm.Get_parent() != MPI.COMM_NULL:  # spawned: a world beside another, on purpose
        return None
    if _torch_group() is not None:
        ranks = sys.modules["torch.distributed"].get_world_size()
        if ranks > size:
            return _Apart(f"torch.distributed has {ranks} ranks, MPI a world of {size}: {_cure(MPI)}")
    ranks, variable = config.started(size)
    if ranks <= size or (variable.startswith("SLURM_") and config.in_batch_script()):
        return None
    words = f"the launcher started {ranks} ranks ({variable}={ranks}), MPI has a world of {size}: "
    return _Apart(words + _cure(MPI, variable), variable)


def _cure(MPI: Any, variable: str = "") -> str:
    """What to change, for this library and this launcher."""
    vendor, version = MPI.get_vendor()
    library = f"{vendor} {'.'.join(map(str, version))}"
    own = f"the mpiexec that comes with {library}"
    srun = _SRUN.get(vendor, "srun --mpi=pmix, or --mpi=pmi2")
    if variable in ("", "WORLD_SIZE", "HOROVOD_SIZE"):
        return (
            "torchrun, mp.spawn and the like do not tell MPI of the ranks that they start. Instead, start "
            f"all of them with {own}, or with {srun} in a job of Slurm."
        )
    if not variable.startswith("SLURM_"):
        return (
            f"what started it is not of {library}, the library that mpi4py loads. Start the ranks with "
            f"{own}, or let MPI4PY_LIBMPI name the library of the launcher."
        )
    return (
        f"srun did not tell {library}, the library that mpi4py loads, of the other ranks. Use {srun} (srun "
        f"--mpi=list says what there is), or {own}, inside the job."
    )


def _torch_group() -> Any:
    """The default group of torch.distributed; None as long as there is none."""
    members = getattr(
        sys.modules.get("torch.distributed"), "GroupMember", None
    )  # not in every build of torch
    return None if members is None else members.WORLD


def _has_terminal() -> bool:
    """Whether somebody sits there: Slurm gives a terminal to the shell of ``srun --pty`` and to no task."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


@cache
def _warn(words: str) -> None:
    """Once. One rank's voice is enough, where they can be told apart."""
    if config.own_rank() in (0, None):
        warnings.warn(words, RuntimeWarning, stacklevel=4)
