"""``python -m mpisyncbn``, alone or under mpiexec: what is installed, what is used and why.

Collective: every rank of the world runs it; rank 0 prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import sys
import time
import zlib
from types import ModuleType
from typing import TypeAlias

import numpy as np

from . import config, exchange, fingerprint
from .comm import launcher, transport
from .comm.communicator import Communicator
from .comm.runtime import mpi
from .errors import TransportError
from .kernels import Array, cuda_kernels_for, kernels_for, native
from .liveness.rank_status import agreed_timeout

_OPTIONAL = ("numpy", "mpi4py", "torch", "cupy", "triton")
_CHANNELS = 256

Facts: TypeAlias = dict[str, object]  # of one topic, by name


def main() -> None:
    """Print the report on rank 0. Collective."""
    parser = argparse.ArgumentParser(prog="python -m mpisyncbn", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args()
    try:
        facts = report()
    except ValueError as error:  # an environment variable has an invalid value
        parser.error(str(error))
    if Communicator().rank == 0:
        print(json.dumps(facts, indent=2) if options.json else as_text(facts))


def report() -> dict[str, Facts]:
    """All facts, by topic. Collective."""
    MPI = mpi()
    group = Communicator(MPI.COMM_WORLD.Dup())  # not the world, which may refuse to work
    facts = {
        "versions": {
            "mpisyncbn": sys.modules["mpisyncbn"].__version__,
            "python": platform.python_version(),
            **_versions(),
        },
        "mpi": {
            "library": MPI.Get_library_version().strip("\0\n ").splitlines()[0],
            "vendor": "{} {}".format(MPI.get_vendor()[0], ".".join(map(str, MPI.get_vendor()[1]))),
            "standard": "{}.{}".format(*MPI.Get_version()),
            "thread level": _thread_level(MPI),
            "sums": _sums(MPI),
        },
        "ranks": _ranks(),
        "transport": _transport(),
        "kernels": _kernels(),
        "environment": {
            "MPISYNCBN_TRANSPORT": config.transport(),
            "MPISYNCBN_TIMEOUT": f"{agreed_timeout([config.timeout()]):g}",
            "MPISYNCBN_DEBUG": "1" if config.debug() else "0",
        },
    }
    try:
        facts["exchange"] = _latency(group)
    except TransportError as error:
        facts["exchange"] = {"error": str(error)}
    return facts


def as_text(facts: dict[str, Facts]) -> str:
    """The facts as text: a line for each, indented below its topic."""
    width = max(len(name) for topic in facts.values() for name in topic)
    lines = []
    for topic, entries in facts.items():
        lines += [topic, *(f"  {name:<{width}}  {value}" for name, value in entries.items())]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    """The version of each package that can be used, or "not installed"."""
    found = {}
    for name in _OPTIONAL:
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


def _sums(MPI: ModuleType) -> str:
    """Whether MPI_Allreduce gives the same bits for the same values, in words. Collective.

    This tries it, since no library says. Some libraries choose the order of a long sum by the
    processor and by the addresses of the buffers. The sums here are as long as the gradients of a
    model; the messages of a layer are far shorter.
    """
    world, memory = MPI.COMM_WORLD, np.empty(1_000_600, np.float32)
    everywhere, repeated = True, True
    for length in (300_000, 1_000_000):
        values = np.random.default_rng(world.rank).standard_normal(length, np.float32)
        found = set()
        for start in (0, 1, 16, 100, 600):
            total = memory[start : start + length]
            total[:] = values
            world.Allreduce(MPI.IN_PLACE, total)
            found.add(zlib.crc32(total.data))
        everywhere = everywhere and len(set(world.allgather(frozenset(found)))) == 1
        repeated = repeated and len(found) == 1
    if not everywhere:
        return "other bits on some ranks: running statistics may drift apart"
    if not repeated:
        cure = ": set I_MPI_CBWR=1" if MPI.get_vendor()[0] == "Intel MPI" else ""
        return f"the same bits on all ranks, other bits where buffers lie elsewhere{cure}"
    return "the same bits on all ranks and in all buffers"


def _ranks() -> Facts:
    """The number of ranks, their hosts, and their launcher. Collective."""
    world = mpi().COMM_WORLD
    hosts = world.allgather(socket.gethostname())
    shared = world.Split_type(mpi().COMM_TYPE_SHARED)
    nodes = world.allgather(shared.rank == 0)
    per_node = [size for size, first in zip(world.allgather(shared.size), nodes, strict=True) if first]
    shared.Free()
    return {
        "world size": world.size,
        "nodes": len(per_node),
        "ranks per node": ", ".join(map(str, per_node)),
        "hosts": ", ".join(dict.fromkeys(hosts)),
        **launcher.describe(mpi()),
        "cores of rank 0": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def _transport() -> Facts:
    """The transport for data on a device. Data in host memory needs none."""
    try:
        return dict(zip(("in use", "because"), transport.chosen(mpi()), strict=True))
    except TransportError as error:
        return {"in use": "none", "because": str(error)}


def _kernels() -> Facts:
    """The kernels for each kind of array, in words."""
    used: Facts = {"NumPy": _on_host(np.zeros((1, 1)), "generic: composed of NumPy operations")}
    try:
        import torch
    except ImportError:
        return {**used, "torch": "torch is not installed"}
    used["torch, cpu"] = _on_host(torch.zeros(1, 1), "aten: composed of ATen operations")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        used["torch, accelerator"] = "torch finds no accelerator"
    elif accelerator.type == "cuda":
        used["torch, cuda"] = cuda_kernels_for(torch.device("cuda", torch.cuda.current_device()))[1]
    else:
        used[f"torch, {accelerator.type}"] = "generic: composed of torch operations"
    if "not installed" in _versions()["cupy"]:
        used["CuPy"] = "CuPy is not installed"
    elif accelerator is not None and accelerator.type == "cuda":
        used["CuPy"] = "those of torch, cuda, by way of DLPack"
    else:
        used["CuPy"] = "generic: composed of CuPy operations"
    return used


def _on_host(x: Array, otherwise: str) -> str:
    """The kernels for an array in host memory, in words: native, or else ``otherwise``."""
    host = native()
    if host is None or kernels_for(x) is not host:
        return (
            f"{otherwise}, for native kernels were not built: install a C++ compiler and Python's headers, "
            "then mpisyncbn again, with pip's --force-reinstall --no-cache-dir"
        )
    threads = host.threads()
    plural = "" if threads == 1 else "s"
    return f"native, instruction set {host.instruction_set()}, {threads} thread{plural}"


def _latency(group: Communicator, repeats: int = 200) -> Facts:
    """The time of one exchange of a layer with 256 channels, on the slowest rank. Collective."""
    call = fingerprint.LayerCall("the latency measurement", "forward", _CHANNELS, "float32")
    zeros, seconds = np.zeros(_CHANNELS), []
    for repeat in range(repeats + 20):
        begin = time.perf_counter()
        exchange.merge_moments(group, call, 1, zeros, zeros)
        if repeat >= 20:  # warm
            seconds.append(time.perf_counter() - begin)
    median, minimum = (group.comm.allreduce(f(seconds), op=mpi().MAX) for f in (statistics.median, min))
    group.free()
    return {
        "what": f"forward, {_CHANNELS} channels, {8 * (2 * _CHANNELS + 3):,} bytes, slowest rank",
        "median, us": round(median * 1e6, 1),
        "minimum, us": round(minimum * 1e6, 1),
    }


if __name__ == "__main__":
    main()
