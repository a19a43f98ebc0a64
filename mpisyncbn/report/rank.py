"""The facts that one rank finds on its machine, for the ranks to compare."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple, TypeAlias

import numpy as np

from .. import config
from ..comm import launcher, transport
from ..errors import TransportError
from ..kernels import Array, cuda_kernels_for, kernels_for, native
from .cores import cores, quota, yields

__all__ = ["Facts", "RankFacts", "find", "versions"]

Facts: TypeAlias = dict[str, object]  # of one topic, by name

_PACKAGES = ("numpy", "mpi4py", "torch", "cupy", "triton")


class RankFacts(NamedTuple):
    """The facts that one rank has found."""

    rank: int
    machine: tuple[str, str]  # config.machine()
    first: int  # the lowest of the ranks that share memory with it
    mismatch: launcher.WorldSizeMismatch | None
    versions: dict[str, str]
    mpi: dict[str, str]
    settings: dict[str, str]
    unknown_settings: dict[str, str]
    invalid: tuple[str, ...]  # the errors of wrong settings
    transport: tuple[str, str]  # its name and the reason; the name is "none" after an error
    kernels: dict[str, str]
    no_native: str  # why there are no native kernels
    cores: frozenset[int]
    quota: tuple[str, float] | None
    cpus_per_task: int
    threads: int
    yields: bool
    gpus: tuple[str, ...]  # an id of each that torch sees
    gpu_error: str  # why they cannot be used
    gpus_given: str  # the variable or folder that says that there are some


def find(MPI: ModuleType) -> RankFacts:
    """The facts of this rank. Collective: every rank of the world must call."""
    world = MPI.COMM_WORLD
    shared = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    first = shared.bcast(world.rank)
    shared.Free()
    invalid = []
    for setting in (config.debug, config.timeout, config.transport):
        try:
            setting()
        except ValueError as error:
            invalid.append(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        used = _transport(MPI)
        gpus, gpu_kernels, gpu_error = _gpus()
    return RankFacts(
        rank=world.rank,
        machine=config.machine(),
        first=first,
        mismatch=launcher.world_size_mismatch(MPI),
        versions=versions(),
        mpi={
            "library": MPI.Get_library_version().strip("\0\n ").splitlines()[0],
            "vendor": launcher.library_name(MPI),
            "standard": "{}.{}".format(*MPI.Get_version()),
            "thread level": _thread_level(MPI),
        },
        settings=config.settings(),
        unknown_settings=config.unknown_settings(),
        invalid=tuple(invalid),
        transport=used,
        kernels={**_kernels(), **gpu_kernels},
        no_native=_no_native(),
        cores=cores(),
        quota=quota(),
        cpus_per_task=config.cpus_per_task(),
        threads=_threads(),
        yields=yields(MPI),
        gpus=gpus,
        gpu_error=gpu_error,
        gpus_given=config.gpus_given(),
    )


def versions() -> dict[str, str]:
    """The version of this package, of Python and of each package that can be used."""
    found = {"mpisyncbn": sys.modules["mpisyncbn"].__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # CuPy's packages are named after the CUDA they are for
            variants = importlib.metadata.packages_distributions().get(name)
            found[name] = importlib.metadata.version(variants[0]) if variants else "not installed"
    return found


def _thread_level(MPI: ModuleType) -> str:
    """The name of the thread level that MPI provides."""
    levels = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")
    return next(name for name in levels if getattr(MPI, name) == MPI.Query_thread())


def _transport(MPI: ModuleType) -> tuple[str, str]:
    """The transport for data on a device. Data in host memory needs none."""
    try:
        return transport.chosen(MPI)
    except (TransportError, ValueError) as error:
        return "none", str(error)


@cache
def _torch() -> ModuleType | None:
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def _kernels() -> dict[str, str]:
    """The kernels for each kind of array in host memory, in words."""
    used = {"NumPy": _on_host(np.zeros((1, 1)), "generic: composed of NumPy operations")}
    torch = _torch()
    if torch is None:
        return {**used, "torch": "torch is not installed"}
    return {**used, "torch, cpu": _on_host(torch.zeros(1, 1), "aten: composed of ATen operations")}


def _on_host(x: Array, otherwise: str) -> str:
    """The kernels for an array in host memory, in words: native, or else ``otherwise``."""
    host = native()
    if host is None or kernels_for(x) is not host:
        return otherwise
    threads = host.threads()
    return f"native, instruction set {host.instruction_set()}, {threads} thread{'s' if threads != 1 else ''}"


def _no_native() -> str:
    """Why there are no native kernels; "" if there are."""
    if native() is not None:
        return ""
    try:
        importlib.import_module("..kernels.cpu._cpu", __package__)
    except ModuleNotFoundError:
        return "they were not built"
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    return "they were left out"


def _threads() -> int:
    """The number of threads that the kernels for host memory use."""
    torch, host = _torch(), native()
    if torch is not None:
        return int(torch.get_num_threads())
    return 1 if host is None else host.threads()


def _gpus() -> tuple[tuple[str, ...], dict[str, str], str]:
    """An id of each GPU that torch sees, the kernels for arrays there, and why they cannot be used.

    The id is the same in all processes that see the GPU.
    """
    torch = _torch()
    if torch is None:
        return (), {}, ""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind, gpus, used = None if accelerator is None else accelerator.type, [], {}
    if kind is None:
        used["torch, accelerator"] = "torch finds no accelerator"
    elif kind != "cuda":
        used[f"torch, {kind}"] = "generic: composed of torch operations"
    else:
        try:
            for index in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(index)
                gpus.append(f"{found.name} {getattr(found, 'uuid', index)}")
            used["torch, cuda"] = cuda_kernels_for(torch.device("cuda", torch.cuda.current_device()))[1]
        except RuntimeError as error:  # errors of CUDA are RuntimeErrors
            return tuple(gpus), {}, str(error).strip().splitlines()[0]
    if "not installed" in versions()["cupy"]:
        used["CuPy"] = "CuPy is not installed"
    elif kind == "cuda":
        used["CuPy"] = "those of torch, cuda, by way of DLPack"
    else:
        used["CuPy"] = "generic: composed of CuPy operations"
    return tuple(gpus), used, ""
