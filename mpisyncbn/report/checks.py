"""Checks that compare the facts of all ranks, and give problems and their cures. None uses MPI."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from .. import config
from ..comm.nodes import ranks_on_node_of
from .rank import RankFacts
from .words import by_rank, hosts, plural, ranks

__all__ = ["ERROR", "WARNING", "Problem", "find_problems", "nodes_of"]

# An error keeps a program from training, or from training as one. With a warning it trains right,
# but slower than it could, or with settings that not all ranks have.
ERROR, WARNING = "error", "warning"

_Key = TypeVar("_Key", bound=Hashable)

# The keys are mpi4py's names for the libraries.
_YIELDING = {"Open MPI": "OMPI_MCA_mpi_yield_when_idle=1", "Intel MPI": "I_MPI_WAIT_MODE=1"}
_BINDING = {
    "Open MPI": "mpiexec --map-by slot:PE={} --bind-to core",
    "MPICH": "mpiexec -bind-to core:{}",
    "Intel MPI": "mpiexec -genv I_MPI_PIN_DOMAIN {}",
}


class Problem(NamedTuple):
    """Something that is wrong, and its cure."""

    level: str
    what: str
    cure: str


def find_problems(facts: Sequence[RankFacts]) -> list[Problem]:
    """The problems that the facts of all ranks, in their order, show: errors first."""
    checks: tuple[Callable[[Sequence[RankFacts]], Iterator[Problem]], ...] = (
        _worlds,
        _settings,
        _transport,
        _thread_level,
        _versions,
        _cores,
        _cores_of_tasks,
        _shared_memory,
        _native,
        _gpus,
        _triton,
    )
    found = [problem for check in checks for problem in check(facts)]
    return sorted(found, key=lambda problem: problem.level != ERROR)


def nodes_of(facts: Sequence[RankFacts]) -> list[list[RankFacts]]:
    """The facts of the ranks of each node."""
    gathered = [(each.first, each.machine) for each in facts]
    found = {tuple(ranks_on_node_of(gathered, each.rank)): None for each in facts}
    return [[facts[rank] for rank in node] for node in found]


def _worlds(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    mismatch = facts[0].mismatch
    if mismatch is not None:
        yield Problem(ERROR, f"{mismatch.sizes}: each world would train by itself", mismatch.cure)


def _settings(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    for text, found in _grouped(facts, lambda each: map(_without_rank, each.invalid)).items():
        what, _, cure = text.rpartition(": ")
        yield Problem(ERROR, f"{what}, on {ranks(found, facts)}", cure)
    for (name, near), found in _grouped(facts, lambda each: each.unknown_settings.items()).items():
        yield Problem(
            WARNING,
            f"{name} is set on {ranks(found, facts)}, but there is no such setting",
            f"rename it to {near}, or unset it"
            if near
            else f"unset it; there are {', '.join(config.SETTINGS)}",
        )
    for name in config.SETTINGS:
        values = [each.settings.get(name, "not set") for each in facts]
        if len(set(values)) > 1:
            yield Problem(
                WARNING,
                f"{name} differs between ranks: {by_rank(values)}",
                f"give it to all ranks: mpiexec -x {name} (Open MPI), -genv {name} VALUE (MPICH, Intel MPI), "
                "srun --export=ALL",
            )


def _transport(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    refused = [each for each in facts if each.transport[0] == "none" and not each.invalid]
    for text, found in _grouped(refused, lambda each: [_without_rank(each.transport[1])]).items():
        what, _, cure = text.rpartition(". " if ". " in text else ": ")
        yield Problem(ERROR, f"{what}, on {ranks(found, facts)}", cure)


def _without_rank(text: str) -> str:
    """The text of an error without its rank."""
    return re.sub(r" \(on rank \d+ of \d+\)", "", text)


def _thread_level(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    lost = {
        "THREAD_SERIALIZED": "mpisyncbn.distributed.join() raises, and update_bn() where layers have several "
        "groups; threads that use several groups must use them in one order on all ranks; a rank that waits "
        "in vain cannot ask the others what they are doing",
    }
    for level, found in _grouped(facts, lambda each: [each.mpi["thread level"]]).items():
        if level != "THREAD_MULTIPLE":
            what = lost.get(level, "no layer trains, for autograd may run backward on another thread")
            yield Problem(
                WARNING if level in lost else ERROR,
                f"MPI provides {level} on {ranks(found, facts)}: {what}",
                "unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, or use an MPI library that is built "
                "with THREAD_MULTIPLE",
            )


def _versions(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    for name in (*facts[0].versions, "MPI"):
        values = [each.mpi["vendor"] if name == "MPI" else each.versions[name] for each in facts]
        if len(set(values)) > 1:
            yield Problem(
                ERROR,
                f"versions of {name} differ between ranks: {by_rank(values)}",
                "start all ranks in one environment, on a disk that all nodes see",
            )


class _Pool(NamedTuple):
    """A set of cores, or a limit of processor time, and the ranks of a node that share it."""

    ranks: list[RankFacts]
    size: float  # in cores
    limited: bool  # whether it is a control group's limit of time

    @property
    def threads(self) -> int:
        return sum(each.threads for each in self.ranks)

    @property
    def has_few_cores(self) -> bool:
        return 1 < len(self.ranks) > self.size

    @property
    def fullness(self) -> tuple[float, int]:
        return self.threads / self.size, -len(self.ranks)

    @property
    def cores(self) -> str:
        share = "the processor time of " if self.limited else ""
        return f"{share}{self.size:g} core{'' if self.size == 1 else 's'}"


def _pools(node: Sequence[RankFacts]) -> Iterator[_Pool]:
    """The cores that ranks of a node are bound to, and the limits of their control groups."""
    for bound in {each.cores for each in node} | {frozenset[int]().union(*(each.cores for each in node))}:
        yield _Pool([each for each in node if each.cores <= bound], len(bound), False)
    for group, size in {each.quota for each in node if each.quota is not None}:
        yield _Pool([each for each in node if each.quota == (group, size)], size, True)


def _cores(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    crowded: dict[tuple[object, ...], list[_Pool]] = {}
    for node in nodes_of(facts):
        pools = [pool for pool in _pools(node) if _is_crowded(pool)]
        fullest = max((pool.fullness for pool in pools), default=None)  # it stands for those that contain it
        for pool in pools:
            if pool.fullness == fullest:
                key = len(pool.ranks), pool.size, pool.threads, pool.limited
                crowded.setdefault(key, []).append(pool)
    for pools in crowded.values():
        pool = pools[0]
        where = f"{ranks([each for pool in pools for each in pool.ranks], facts)} on "
        where += hosts(pools, lambda pool: pool.ranks[0].machine[0])
        if len(pools) > 1:
            where += " each" if len(pool.ranks) == 1 else f", {len(pool.ranks)} at a time,"
        yield _oversubscribed(pool, where) if pool.has_few_cores else _too_many_threads(pool, where)


def _is_crowded(pool: _Pool) -> bool:
    """Whether the ranks of a pool have too few cores, or too many threads.

    A rank that yields its core still uses up the time of its control group.
    """
    waits = pool.limited or not all(each.yields for each in pool.ranks)
    if waits and pool.has_few_cores:
        return True
    return pool.threads > pool.size and any(each.threads > 1 for each in pool.ranks)


def _oversubscribed(pool: _Pool, where: str) -> Problem:
    fewer = max(1, int(pool.size))
    what = f"{where} share {pool.cores}"
    cure = f"start {fewer} rank{plural(fewer)} there, or "
    cure += "raise that limit" if pool.limited else "bind each rank to a core of its own"
    if pool.threads > len(pool.ranks):
        what += f" and have {pool.threads} threads"
        cure += "; set OMP_NUM_THREADS=1"
    if pool.limited:
        what += ". A rank that waits uses up that time, and then all stop for milliseconds"
    elif not all(each.yields for each in pool.ranks):
        what += ". A rank that waits keeps its core from the others: a message can take milliseconds"
        variable = _YIELDING.get(_vendor(pool.ranks[0]))
        cure += f"; or set {variable}, so that it yields" if variable else ""
    return Problem(WARNING, what, cure)


def _too_many_threads(pool: _Pool, where: str) -> Problem:
    count, most = len(pool.ranks), max(each.threads for each in pool.ranks)
    fair = max(1, int(pool.size / count))
    have = (
        f"{'have' if where.endswith(' each') else 'has'} {most} threads"
        if count == 1
        else f"have {pool.threads} threads together"
    )
    cure = f"set OMP_NUM_THREADS={fair}"
    if not pool.limited:
        cure += f", or give each rank {most} cores: {' or '.join(_binding(pool.ranks[0], most))}"
    return Problem(WARNING, f"{where} {have} for {pool.cores}", cure)


def _binding(rank: RankFacts, cores: int) -> list[str]:
    """The commands that give a rank so many cores, by mpiexec, if known, and by srun."""
    how = _BINDING.get(_vendor(rank))
    return [*([how.format(cores)] if how else []), f"srun --cpus-per-task={cores}"]


def _vendor(rank: RankFacts) -> str:
    return rank.mpi["vendor"].rpartition(" ")[0]


def _cores_of_tasks(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    short = [each for each in facts if len(each.cores) < each.cpus_per_task]
    if short:
        wanted, cores = short[0].cpus_per_task, len(short[0].cores)
        yield Problem(
            WARNING,
            f"the job has {wanted} cores for each task (SLURM_CPUS_PER_TASK), but {ranks(short, facts)} "
            f"may use {cores} only",
            "before srun, export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK, which srun does not take from "
            f"sbatch; or use {_binding(short[0], wanted)[0]}",
        )


def _shared_memory(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    apart = [node for node in nodes_of(facts) if len({each.first for each in node}) > 1]
    if apart:
        yield Problem(
            WARNING,
            f"{ranks(apart[0], facts)} on {apart[0][0].machine[0]} share no memory, so that messages go by "
            "the network",
            "let containers use the /dev/shm of the host: apptainer without --contain, docker --ipc=host",
        )


def _native(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    for why, found in _grouped(facts, lambda each: [each.no_native] if each.no_native else []).items():
        train = "trains" if len(found) == 1 else "train"
        yield Problem(
            WARNING,
            f"{ranks(found, facts)} {train} without native kernels, because {why}. ATen and NumPy operations "
            "serve instead, which are slower",
            "install a C++17 compiler and Python's headers, then mpisyncbn again, with pip's "
            "--force-reinstall --no-cache-dir",
        )


def _gpus(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    for why, found in _grouped(facts, lambda each: [each.gpu_error] if each.gpu_error else []).items():
        yield Problem(
            ERROR,
            f"the GPU cannot be used on {ranks(found, facts)}: {why}",
            "nvidia-smi or rocm-smi says whether the driver works, and who else uses the GPU",
        )
    without = [each for each in facts if not each.gpus]
    if 0 < len(without) < len(facts):
        yield Problem(
            WARNING,
            f"torch sees no GPU on {ranks(without, facts)}, and one or more on the others",
            "ask for GPUs on every node, srun --gpus-per-node, and look at CUDA_VISIBLE_DEVICES",
        )
    elif without and (missed := [each for each in facts if each.gpus_given and _has_torch(each)]):
        first = missed[0]
        yield Problem(
            WARNING,
            f"there are GPUs ({first.gpus_given}), but torch {first.versions['torch']} sees none",
            "install a torch that is built for them; nvidia-smi or rocm-smi says whether the driver works",
        )
    for node in nodes_of(facts):
        users: dict[str, list[RankFacts]] = {}
        for index, each in enumerate(node):
            if each.gpus:  # as the documentation tells each rank to choose
                users.setdefault(each.gpus[index % len(each.gpus)], []).append(each)
        shared = [each for found in users.values() if len(found) > 1 for each in found]
        if shared:
            gpus = len({gpu for each in node for gpu in each.gpus})
            yield Problem(
                WARNING,
                f"{ranks(shared, facts)} on {node[0].machine[0]} share GPUs: {len(node)} ranks, {gpus} GPU"
                f"{plural(gpus)}",
                f"start as many ranks on each node as it has GPUs: srun --ntasks-per-node={gpus} "
                f"--gpus-per-node={gpus}, or mpiexec --map-by ppr:{gpus}:node (Open MPI), -ppn {gpus}",
            )


def _has_torch(rank: RankFacts) -> bool:
    return rank.versions["torch"] != "not installed"


def _triton(facts: Sequence[RankFacts]) -> Iterator[Problem]:
    for words, found in _grouped(facts, lambda each: [each.kernels.get("torch, cuda", "Triton")]).items():
        if words != "Triton":
            yield Problem(
                WARNING,
                f"the kernels for GPUs on {ranks(found, facts)} are {words}",
                "pip install triton, in the version that this torch names",
            )


def _grouped(
    facts: Sequence[RankFacts], keys: Callable[[RankFacts], Iterable[_Key]]
) -> dict[_Key, list[RankFacts]]:
    """The ranks for each key that ``keys`` returns."""
    found: dict[_Key, list[RankFacts]] = {}
    for each in facts:
        for key in keys(each):
            found.setdefault(key, []).append(each)
    return found
