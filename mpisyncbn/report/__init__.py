"""The report of ``python -m mpisyncbn``: what is installed, used and why, and what is wrong."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable
from types import ModuleType

import numpy as np

from .. import exchange, fingerprint
from ..comm import launcher
from ..comm.communicator import Communicator
from ..comm.runtime import mpi
from ..errors import MPISyncBNError
from ..liveness.rank_status import agreed_timeout
from .checks import ERROR, WARNING, Problem, find_problems, nodes_of
from .rank import Facts, RankFacts, find, versions
from .words import by_rank, hosts, plural

__all__ = ["ERROR", "WARNING", "Facts", "Problem", "Report", "latency", "report", "versions"]

_CHANNELS = 256


class Report:
    """The facts that all ranks have found, and the problems that these show."""

    def __init__(self, MPI: ModuleType) -> None:
        """Collective: every rank of the world must call."""
        self.rank: int = MPI.COMM_WORLD.rank
        self.ranks: list[RankFacts] = MPI.COMM_WORLD.allgather(find(MPI))
        self.sums, problem = _sums(MPI)
        self.problems = find_problems(self.ranks) + ([] if problem is None else [problem])
        self.launcher = launcher.ranks_in_words(MPI)

    @property
    def in_short(self) -> str:
        """The job, in a few words."""
        first, ranks, nodes = self.ranks[0], len(self.ranks), len(nodes_of(self.ranks))
        return (
            f"{ranks} rank{plural(ranks)} on {nodes} node{plural(nodes)}, {first.mpi['vendor']}, "
            f"kernels: {first.kernels['NumPy'].partition(',')[0]}"
        )

    def facts(self) -> dict[str, Facts]:
        """All facts, by topic. A fact that differs between ranks is given by rank."""
        return {
            "versions": self._merged(lambda each: each.versions),
            "mpi": {**self._merged(lambda each: each.mpi), "sums": self.sums},
            "ranks": self._ranks(),
            "kernels": self._merged(lambda each: each.kernels),
            "gpu": {"GPUs for each": by_rank([len(each.gpus) for each in self.ranks])},
            "transport": self._merged(
                lambda each: dict(zip(("in use", "because"), each.transport, strict=True))
            ),
            "environment": self._merged(_settings),
        }

    def _merged(self, topic: Callable[[RankFacts], dict[str, str]]) -> Facts:
        found = [topic(each) for each in self.ranks]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: by_rank([each.get(name, "nothing") for each in found]) for name in names}

    def _ranks(self) -> Facts:
        nodes = nodes_of(self.ranks)
        quotas = [f"{each.quota[1]:g} cores" if each.quota else "none" for each in self.ranks]
        return {
            "world size": len(self.ranks),
            "nodes": len(nodes),
            "ranks per node": ", ".join(str(len(node)) for node in nodes),
            "hosts": hosts(self.ranks, lambda each: each.machine[0]),
            "launcher": self.launcher,
            "cores for each": by_rank([len(each.cores) for each in self.ranks]),
            "limit for each": by_rank(quotas),
            "threads of each": by_rank([each.threads for each in self.ranks]),
        }


def report() -> dict[str, Facts]:
    """All facts, by topic, and the time of one exchange. Collective."""
    MPI = mpi()
    return {**Report(MPI).facts(), "exchange": latency(MPI)}


def _settings(rank: RankFacts) -> dict[str, str]:
    defaults = {
        "MPISYNCBN_TRANSPORT": "auto",
        "MPISYNCBN_TIMEOUT": f"{agreed_timeout([]):g}",
        "MPISYNCBN_DEBUG": "0",
        "OMP_NUM_THREADS": "not set",
    }
    return {**defaults, **rank.settings}


def _sums(MPI: ModuleType) -> tuple[str, Problem | None]:
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
        words = "other bits on some ranks: running statistics may drift apart"
        return words, Problem(ERROR, f"MPI_Allreduce returns {words}", "use another MPI library")
    if not repeated:
        cure = ": set I_MPI_CBWR=1" if MPI.get_vendor()[0] == "Intel MPI" else ""
        return f"the same bits on all ranks, other bits where buffers lie elsewhere{cure}", None
    return "the same bits on all ranks and in all buffers", None


def latency(MPI: ModuleType, repeats: int = 200) -> Facts:
    """The time of one exchange of a layer with 256 channels, on the slowest rank. Collective."""
    call = fingerprint.LayerCall("the latency measurement", "forward", _CHANNELS, "float32")
    zeros, seconds = np.zeros(_CHANNELS), []
    try:
        group = Communicator(MPI.COMM_WORLD.Dup())  # not the world, which may refuse to work
        for repeat in range(repeats + 20):
            begin = time.perf_counter()
            exchange.merge_moments(group, call, 1, zeros, zeros)
            if repeat >= 20:  # warm
                seconds.append(time.perf_counter() - begin)
    except (MPISyncBNError, ValueError) as error:
        return {"error": str(error)}
    median, minimum = (group.comm.allreduce(f(seconds), op=MPI.MAX) for f in (statistics.median, min))
    group.free()
    return {
        "what": f"forward, {_CHANNELS} channels, {8 * (2 * _CHANNELS + 3):,} bytes, slowest rank",
        "median, us": round(median * 1e6, 1),
        "minimum, us": round(minimum * 1e6, 1),
    }
