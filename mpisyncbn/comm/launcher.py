"""The launcher of this process, and whether MPI knows of all ranks that it started.

If a launcher and an MPI library do not understand each other, neither reports an error: each rank
takes itself for the only one, and the program trains once per rank, each time on one rank's
batches. The same happens under torchrun, and other starters of ranks for torch.distributed, since
they tell MPI nothing.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from .. import config
from ..errors import MPISyncBNError, on_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "check_world",
    "check_world_size",
    "library_name",
    "ranks_in_words",
    "warn_world_size",
    "world_size_mismatch",
]

# How srun starts the ranks of a library, by mpi4py's name for the library.
_SRUN = {
    "Open MPI": "srun --mpi=pmix",
    "MPICH": "srun --mpi=pmi2",
    "Intel MPI": "srun --mpi=pmi2",
    "Cray MPICH": "srun --mpi=cray_shasta",
    "MVAPICH": "srun --mpi=pmi2",
}
_checked: Callable[[], object] = object  # returns torch's default group at the last check


class WorldSizeMismatch(NamedTuple):
    """The error that torch.distributed or a launcher knows of more ranks than MPI."""

    sizes: str  # both numbers of ranks
    cure: str
    variable: str = ""

    @property
    def text(self) -> str:
        """The sizes and the cure."""
        return f"{self.sizes}: {self.cure}"


def check_world(mpi: Callable[[], ModuleType]) -> None:
    """Call ``check_world_size`` at the first call, and after torch.distributed was initialized.

    Every forward calls this. While nothing has changed it takes a fraction of a microsecond.
    """
    global _checked
    group = _torch_group()
    if group is not _checked():
        check_world_size(mpi())
        _checked = type(None) if group is None else weakref.ref(group)


def check_world_size(MPI: ModuleType) -> None:
    """Raise MPISyncBNError if torch.distributed or a launcher knows of more ranks than MPI.

    In a shell that srun started it only warns, since srun may start a shell for each task, and
    connect a user to the first one.
    """
    found = world_size_mismatch(MPI)
    if found is None:
        return
    if found.variable.startswith("SLURM_") and _has_terminal():
        warn_world_size(MPI)
        return
    raise MPISyncBNError(
        f"{found.text} As it is, each world would train by itself, on statistics of its own batches; if "
        f"that is meant, give the layers a process_group of their own, such as MPI.COMM_SELF{on_rank()}"
    )


def warn_world_size(MPI: ModuleType) -> None:
    """Warn, once, if torch.distributed or a launcher knows of more ranks than MPI."""
    if (found := world_size_mismatch(MPI)) is not None:
        _warn(found.text)


def ranks_in_words(MPI: ModuleType) -> str:
    """The number of ranks that the launcher started, in words, for ``python -m mpisyncbn``."""
    ranks, variable = config.any_launcher_size(MPI.COMM_WORLD.Get_size())
    if not variable:
        return "none that is known here"
    least = "at least " if variable in config.RANKS_WITHOUT_SIZE else ""
    return f"{least}{ranks} rank{'' if ranks == 1 else 's'} ({variable})"


def library_name(MPI: ModuleType) -> str:
    """The name and version of the MPI library."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def world_size_mismatch(MPI: ModuleType) -> WorldSizeMismatch | None:
    """The mismatch if torch.distributed or a launcher knows of more ranks than MPI, else None."""
    size = MPI.COMM_WORLD.Get_size()
    if MPI.Comm.Get_parent() != MPI.COMM_NULL:  # spawned by MPI: a second world is intended
        return None
    if _torch_group() is not None:
        ranks = sys.modules["torch.distributed"].get_world_size()
        if ranks > size:
            return WorldSizeMismatch(
                f"torch.distributed has {ranks} ranks, MPI a world of {size}", _cure(MPI)
            )
    ranks, variable = config.any_launcher_size(size)
    if ranks <= size or (variable.startswith("SLURM_") and config.in_batch_script()):
        return None
    started = f"{ranks} ranks ({variable}={ranks})"
    if variable in config.RANKS_WITHOUT_SIZE:
        started = f"this process as rank {ranks - 1} ({variable}={ranks - 1})"
    sizes = f"the launcher started {started}, MPI has a world of {size}"
    return WorldSizeMismatch(sizes, _cure(MPI, variable), variable)


def _cure(MPI: ModuleType, variable: str = "") -> str:
    """The cure of a mismatch, in words, for this library and this launcher's variable."""
    library = library_name(MPI)
    own = f"the mpiexec that comes with {library}"
    srun = _SRUN.get(MPI.get_vendor()[0], "srun --mpi=pmix, or --mpi=pmi2")
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


def _torch_group() -> ProcessGroup | None:
    """The default group of torch.distributed; None as long as there is none."""
    # a build of torch may lack torch.distributed
    members = getattr(sys.modules.get("torch.distributed"), "GroupMember", None)
    return None if members is None else members.WORLD


def _has_terminal() -> bool:
    """Whether a user is at a terminal: Slurm gives one to ``srun --pty``, and to no other task."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


@cache
def _warn(text: str) -> None:
    """Warn once, on one rank only if the environment tells ranks apart."""
    if config.own_rank() in (0, None):
        warnings.warn(text, RuntimeWarning, stacklevel=4)
