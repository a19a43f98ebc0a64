"""The one place that reads the environment."""

from __future__ import annotations

import difflib
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import on_rank

__all__ = [
    "PROC",
    "RANKS_WITHOUT_SIZE",
    "any_launcher_size",
    "colour",
    "cpus_per_task",
    "debug",
    "device_aware",
    "gpus_given",
    "in_batch_script",
    "launched",
    "mpi_launcher_size",
    "own_rank",
    "parent_of",
    "rank_by_launcher",
    "rank_identity",
    "rank_of",
    "rendezvous_given",
    "settings",
    "timeout",
    "transport",
    "unknown_settings",
]


PROC = Path("/proc")


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    """The value of a variable, or ``default``. Raises ValueError unless it is in ``choices``."""
    value = os.environ.get(name, "").strip().lower() or default
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}{on_rank()}: correct or unset it"
        )
    return value


def transport() -> str:
    """``MPISYNCBN_TRANSPORT``, where messages live: auto, host, device or stream."""
    return _choice("MPISYNCBN_TRANSPORT", "auto", ("auto", "host", "device", "stream"))


def debug() -> bool:
    """``MPISYNCBN_DEBUG=1``: the ranks compare their calls before each exchange."""
    return _choice("MPISYNCBN_DEBUG", "0", ("0", "1")) == "1"


def timeout() -> float | None:
    """``MPISYNCBN_TIMEOUT``: seconds to wait in an exchange. 0: for ever. None: it is not set."""
    value = os.environ.get("MPISYNCBN_TIMEOUT", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(
            f"MPISYNCBN_TIMEOUT must be seconds, or 0 for no limit, got {value!r}{on_rank()}: correct or "
            "unset it"
        )
    return seconds


SETTINGS = "MPISYNCBN_DEBUG", "MPISYNCBN_TIMEOUT", "MPISYNCBN_TRANSPORT"
_KNOWN = *SETTINGS, "MPISYNCBN_NO_NATIVE"  # the last one is for pip install
_OF_TESTS = "MPISYNCBN_TEST_", "MPISYNCBN_STANDIN"


def settings() -> dict[str, str]:
    """The variables of this package that are set, and the number of threads."""
    return {name: os.environ[name] for name in (*SETTINGS, "OMP_NUM_THREADS") if name in os.environ}


def unknown_settings() -> dict[str, str]:
    """Variables that look like this package's but are not, with the nearest known name, if any."""
    found = {}
    for name in os.environ:
        near = difflib.get_close_matches(name, _KNOWN, 1, 0.85)
        if name not in _KNOWN and (near or name.startswith("MPISYNCBN_")) and not name.startswith(_OF_TESTS):
            found[name] = "".join(near)
    return found


# The launcher nearest to the rank comes first: mpiexec inside a job may start its helpers with
# srun, whose variables the ranks inherit.
_SIZES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "FLUX_JOB_SIZE",
    "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
_RANKS = ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")
RANKS_WITHOUT_SIZE = ("PMIX_RANK", "PALS_RANKID")  # from launchers that give no size
# The variables by which MPI knows which rank of which job a process is.
_IDENTITY: tuple[str, ...] = ("PMIX_NAMESPACE", "PMIX_RANK", "PMI_FD", "PMI_PORT", "PMI_ID", "PMI_RANK")
_IDENTITY += ("PALS_APID", "PALS_RANKID")
# Variables of launchers that tell MPI nothing. A single one may be left over from anything, so all
# must be set.
_NOT_OF_MPI = (("WORLD_SIZE", "RANK", "LOCAL_RANK"), ("HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK"))


def mpi_launcher_size() -> tuple[int, str]:
    """How many ranks a launcher of MPI started, and the variable that says so; else 1 and ""."""
    return _sizes()[0]


def any_launcher_size(size: int) -> tuple[int, str]:
    """How many ranks any launcher started, and the variable that says so.

    ``size`` is that of MPI's world. It tells which variables may be left over from other launchers.
    """
    given = _sizes()
    if size > 1:  # some launcher told MPI so, and variables of another one are left over
        return next((each for each in given if each[0] == size), given[0])
    ranks, variable = given[0] if given[0][1] else _ranks_up_to_own()
    # mpiexec -n 1 may have started this process alone, and other variables may be left over. Only
    # torchrun sets its own one.
    unknown = not variable or variable.startswith("SLURM_")
    unknown = unknown and not any(name in os.environ for name in RANKS_WITHOUT_SIZE)
    if unknown or "TORCHELASTIC_RUN_ID" in os.environ:
        return _size_outside_mpi() or (ranks, variable)
    return ranks, variable


def _ranks_up_to_own() -> tuple[int, str]:
    """How many ranks a launcher without a size has started at least, and the variable of the rank.

    Rank 0 does not know of others: 1 and "".
    """
    ranks = ((_rank_in(os.environ, (name,)), name) for name in RANKS_WITHOUT_SIZE)
    return next(((rank + 1, name) for rank, name in ranks if rank), (1, ""))


def _size_outside_mpi() -> tuple[int, str] | None:
    """How many ranks a launcher outside MPI started, and the variable that says so; or None."""
    for names in _NOT_OF_MPI:
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdecimal() for value in values) and int(values[0]) > max(1, *map(int, values[1:])):
            return int(values[0]), names[0]
    return None


def _sizes() -> list[tuple[int, str]]:
    """How many ranks each launcher of MPI started, and the variable that says so."""
    given = [(os.environ.get(name, ""), name) for name in _SIZES]
    return [(int(value), name) for value, name in given if value.isdecimal()] or [(1, "")]


def launched() -> bool:
    """Whether the environment says that a launcher started this process as a rank of several."""
    return mpi_launcher_size()[0] > 1 or any(name in os.environ for name in RANKS_WITHOUT_SIZE)


def in_batch_script() -> bool:
    """Whether this process belongs to the script of a batch job of Slurm, which is one task.

    The script may have inherited variables of a step from the shell that submitted the job.
    """
    parent = parent_of(os.environ.get("SLURM_TASK_PID", ""))
    try:
        return ".batch]" in (PROC / str(parent) / "cmdline").read_text()
    except OSError:
        return False


def machine() -> tuple[str, str]:
    """The name of this machine, and the id of its boot, since two machines may have one name."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"unknown, of process {os.getpid()}"  # so it counts as a machine of its own
    return socket.gethostname(), boot


def own_rank() -> int | None:
    """The rank that a launcher gave to this process, if any did."""
    return _rank_in({name: os.environ.get(name, "") for name in _RANKS})


def rank_by_launcher(variable: str) -> int | None:
    """The rank that the launcher of this variable gave to this process, if it did.

    If the variable gives no size, it counts from the first rank that knows of others, rank 1.
    """
    if variable in RANKS_WITHOUT_SIZE:
        return int(os.environ[variable]) - 1
    outside = next((names[1] for names in _NOT_OF_MPI if names[0] == variable), None)
    return own_rank() if outside is None else int(os.environ[outside])


def rank_of(process: int) -> int | None:
    """The rank that a launcher gave to a process of this host, if that is known."""
    return _rank_in(_variables_of(process))


def parent_of(process: int | str) -> int:
    """The id of the process that started another process of this host; 0 if it is not known."""
    try:
        return int((PROC / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def rank_identity(process: int | None = None) -> dict[str, str]:
    """The variables that make a process of this host a certain rank of a certain job."""
    variables = os.environ if process is None else _variables_of(process)
    return {name: variables.get(name, "") for name in _IDENTITY}


def _variables_of(process: int) -> dict[str, str]:
    """The variables with which a process was started; empty if this process may not read them."""
    try:
        given = (PROC / str(process) / "environ").read_bytes()
    except OSError:
        return {}
    text = given.decode(errors="replace")
    return dict(each.split("=", 1) for each in text.split("\0") if "=" in each)


def _rank_in(variables: Mapping[str, str], names: Sequence[str] = _RANKS) -> int | None:
    """The rank that a launcher gave to a process with these variables, if any did."""
    return next((int(variables[name]) for name in names if variables.get(name, "").isdecimal()), None)


def device_aware(kind: str) -> str | None:
    """The variable, if any, by which a user told MPI to take pointers to "cuda" or "rocm"."""
    names = ["MPICH_GPU_SUPPORT_ENABLED"]  # Cray MPICH
    if kind == "cuda":  # MVAPICH2-GDR, Intel MPI, conda-forge's Open MPI 4
        names += ["MV2_USE_CUDA", "I_MPI_OFFLOAD", "OMPI_MCA_opal_cuda_support"]
    else:
        names.append("MV2_USE_ROCM")
    for name in names:
        if os.environ.get(name, "").strip().lower() in ("1", "2", "true", "yes", "on"):
            return name
    return None


def rendezvous_given() -> dict[str, str]:
    """The values of the variables by which torch's launchers tell ranks of each other, if set."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def cpus_per_task() -> int:
    """How many cores each task of a Slurm job was to have; 0 if that is not known."""
    value = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(value) if value.isdecimal() else 0


def gpus_given() -> str:
    """The variable or folder that says that this process may use GPUs; "" if there is none."""
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        value = os.environ.get(name, "").strip()
        if value not in ("", "-1", "NoDevFiles") and f"{name}={value}" != "SLURM_GPUS_ON_NODE=0":
            return f"{name}={value}"
    folder = PROC / "driver/nvidia/gpus"
    return str(folder) if "CUDA_VISIBLE_DEVICES" not in os.environ and folder.exists() else ""


def colour(terminal: bool) -> bool:
    """Whether to print colours. NO_COLOR, FORCE_COLOR, CLICOLOR_FORCE and CLICOLOR decide first.

    ``terminal``: whether a terminal shows them. See https://no-color.org, https://force-color.org
    and https://bixense.com/clicolors.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return terminal and os.environ.get("CLICOLOR") != "0" and os.environ.get("TERM") != "dumb"
