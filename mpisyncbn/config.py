"""The one place that reads the environment."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .errors import on_rank

__all__ = ["debug", "device_aware", "launched", "rank_of", "rendezvous_given", "timeout", "transport"]


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}{on_rank()}: correct or unset it"
        )
    return value


def transport() -> str:
    """``MPISYNCBN_TRANSPORT``: where the message lives; ``auto`` (default), ``host`` or ``device``."""
    return _choice("MPISYNCBN_TRANSPORT", "auto", ("auto", "host", "device"))


def debug() -> bool:
    """``MPISYNCBN_DEBUG=1``: the ranks agree on what they are about to do before every collective."""
    return _choice("MPISYNCBN_DEBUG", "0", ("0", "1")) == "1"


def timeout() -> float | None:
    """``MPISYNCBN_TIMEOUT``: seconds that a rank waits in an exchange; 0: for ever; None: not given."""
    value = os.environ.get("MPISYNCBN_TIMEOUT", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(
            f"MPISYNCBN_TIMEOUT must be seconds, or 0 for any, got {value!r}{on_rank()}: correct or unset it"
        )
    return seconds


def launched() -> bool:
    """Whether a launcher started this process as one of several ranks, as far as the environment says."""
    sizes = (
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "SLURM_STEP_NUM_TASKS",
        "FLUX_JOB_SIZE",
        "JSM_NAMESPACE_SIZE",
    )
    ranks = ("PMIX_RANK", "PALS_RANKID")  # of launchers that give no size
    return any(os.environ.get(name, "1") != "1" for name in sizes) or any(
        name in os.environ for name in ranks
    )


def rank_of(process: int) -> int | None:
    """The rank that a launcher gave to a process of this host, if it did and the process may be looked at."""
    try:
        given = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    variables = dict(each.split(b"=", 1) for each in given.split(b"\0") if b"=" in each)
    for name in ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID"):
        value = variables.get(name.encode(), b"")
        if value.isdigit():
            return int(value)
    return None


def device_aware(kind: str) -> str | None:
    """The variable, if any, by which a user told MPI to take pointers to device memory, "cuda" or "rocm"."""
    names = ["MPICH_GPU_SUPPORT_ENABLED"]  # Cray MPICH
    if kind == "cuda":  # MVAPICH2-GDR, Intel MPI, conda-forge's Open MPI 4
        names += ["MV2_USE_CUDA", "I_MPI_OFFLOAD", "OMPI_MCA_opal_cuda_support"]
    else:
        names.append("MV2_USE_ROCM")
    for name in names:
        if os.environ.get(name, "").strip().lower() in ("1", "2", "true", "yes", "on"):
            return name
    return None


def rendezvous_given() -> bool:
    """Whether the variables are set by which torch's own launchers tell ranks of each other."""
    return any(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
