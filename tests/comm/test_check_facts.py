"""The checks of ``python -m mpisyncbn`` on invented facts, and the facts that a rank finds."""

from __future__ import annotations

import os

import pytest
from mpi4py import MPI

from mpisyncbn import config
from mpisyncbn.comm import launcher
from mpisyncbn.report import ERROR, WARNING, Problem, cores
from mpisyncbn.report.checks import find_problems
from mpisyncbn.report.rank import RankFacts, find
from mpisyncbn.report.text import problems_as_text
from mpisyncbn.report.words import by_rank
from support.ranks import no_exchange

FACTS = RankFacts(
    rank=0,
    machine=("n1", "boot"),
    first=0,
    mismatch=None,
    versions={"mpisyncbn": "0.1", "torch": "2.13"},
    mpi={"vendor": "Open MPI 5.0.11", "thread level": "THREAD_MULTIPLE"},
    settings={},
    unknown_settings={},
    invalid=(),
    transport=("host", "nothing else"),
    kernels={},
    no_native="",
    cores=frozenset(range(4)),
    quota=None,
    cpus_per_task=0,
    threads=1,
    yields=False,
    gpus=(),
    gpu_error="",
    gpus_given="",
)


def job(*changed: dict[str, object], nodes: int = 1) -> list[RankFacts]:
    """Return the facts of one rank for each argument: ``FACTS``, changed by the argument.

    The ranks are on ``nodes`` nodes, in blocks: the first ranks are on the first node.
    """
    size = len(changed) // nodes
    return [
        FACTS._replace(
            rank=rank, first=rank - rank % size, machine=(f"n{rank // size + 1}", "boot")
        )._replace(**facts)
        for rank, facts in enumerate(changed)
    ]


def said(*changed: dict[str, object], nodes: int = 1) -> list[str]:
    return [f"{found.level}: {found.what}" for found in find_problems(job(*changed, nodes=nodes))]


@no_exchange
def test_nothing_is_said_where_all_is_well():
    assert said(*[{"threads": 2}] * 4, nodes=2) == []
    assert said(*[{"yields": True}] * 8) == []  # more ranks than cores, but they yield
    assert said(*[{"gpus": ("a", "b")}] * 4, nodes=2) == []
    assert said({"gpus": ("a",)}, {"gpus": ("b",)}) == []  # each rank sees one GPU
    assert said({"quota": ("group", 0.5)}) == []  # no other rank shares this processor time
    no_torch = {"versions": {**FACTS.versions, "torch": "not installed"}}
    assert said({**no_torch, "gpus_given": "SLURM_GPUS_ON_NODE=4"}) == []  # CuPy may use the GPUs


@no_exchange
@pytest.mark.parametrize(
    ("ranks", "nodes", "words"),
    [
        ([{}] * 6, 1, "all ranks on n1 share 4 cores. A rank that waits keeps its core"),
        ([{}] * 12, 2, "all ranks on n1, n2, 6 at a time, share 4 cores. A rank"),
        (
            [{"yields": True, "threads": 2}] * 8,
            2,
            "all ranks on n1, n2, 4 at a time, have 8 threads together for 4 cores",
        ),
        ([{"cores": frozenset([1])}] * 2, 1, "all ranks on n1 share 1 core. A rank"),
        ([{}, {"cores": frozenset([1]), "threads": 3}], 1, "rank 1 on n1 has 3 threads for 1 core"),
        (
            [{"cores": frozenset([rank]), "threads": 2} for rank in range(4)],
            2,
            "all ranks on n1, n2 each have 2 threads for 1 core",
        ),
        (
            [{"cores": frozenset([rank]), "quota": ("group", 1.5)} for rank in range(3)],
            1,
            "all ranks on n1 share the processor time of 1.5 cores. A rank",
        ),
        (
            [{"cores": frozenset([rank]), "quota": ("group", 2.0), "yields": True} for rank in range(4)],
            1,
            "all ranks on n1 share the processor time of 2 cores. A rank that waits uses up that time",
        ),
        (
            [{"threads": 2, "quota": (f"group {rank}", 1.0)} for rank in range(2)],
            1,
            "all ranks on n1 each have 2 threads for the processor time of 1 core",
        ),
    ],
)
def test_ranks_and_cores(ranks, nodes, words):
    (text,) = said(*ranks, nodes=nodes)
    assert text.startswith(f"{WARNING}: {words}")


@no_exchange
@pytest.mark.parametrize(
    ("vendor", "binding", "yielding"),
    [
        (
            "Open MPI 5.0.11",
            "mpiexec --map-by slot:PE=2 --bind-to core or srun",
            "OMPI_MCA_mpi_yield_when_idle=1",
        ),
        ("MPICH 5.0.2", "mpiexec -bind-to core:2 or srun", ""),
        ("Intel MPI 2021.18.1", "mpiexec -genv I_MPI_PIN_DOMAIN 2 or srun", "I_MPI_WAIT_MODE=1"),
        ("Cray MPICH 8", "each rank 2 cores: srun", ""),
    ],
)
def test_cures_for_each_library(vendor, binding, yielding):
    mpi = {**FACTS.mpi, "vendor": vendor}
    (threads,) = find_problems(job(*[{"mpi": mpi, "threads": 2}] * 3))
    assert f"{binding} --cpus-per-task=2" in threads.cure
    (waits,) = find_problems(job(*[{"mpi": mpi}] * 5))
    assert waits.cure.endswith(f"or set {yielding}, so that it yields" if yielding else "core of its own")


@no_exchange
def test_gpus():
    assert said(*[{"gpus": ("a", "b")}] * 3) == [f"{WARNING}: ranks 0, 2 on n1 share GPUs: 3 ranks, 2 GPUs"]
    assert said({"gpus": ("a",)}, {}) == [
        f"{WARNING}: torch sees no GPU on rank 1, and one or more on the others"
    ]
    kernels = {
        "torch, cuda": "composed of torch's operations for batch norm, because Triton is not installed"
    }
    assert said({"gpus": ("a",), "kernels": kernels}) == [
        f"{WARNING}: the kernels for GPUs on rank 0 are {kernels['torch, cuda']}"
    ]


@no_exchange
def test_differences_are_listed_by_rank():
    other = {
        "versions": {**FACTS.versions, "torch": "2.6"},
        "mpi": {**FACTS.mpi, "vendor": "Open MPI 5.0.10"},
    }
    assert said({}, {}, {}, other, nodes=2) == [
        f"{ERROR}: versions of torch differ between ranks: 2.13 on ranks 0-2; 2.6 on rank 3",
        f"{ERROR}: versions of MPI differ between ranks: {FACTS.mpi['vendor']} on ranks 0-2; "
        "Open MPI 5.0.10 on rank 3",
    ]
    assert by_rank([1, 1, 1]) == "1"
    assert by_rank([1, 2, 1, 1, 1, 2]) == "1 on ranks 0, 2-4; 2 on ranks 1, 5"
    assert by_rank(range(6)).endswith("3 on rank 3; and 2 other values")


@no_exchange
def test_containers_that_share_no_memory():
    (text,) = said({}, {"first": 1})
    assert text == (f"{WARNING}: all ranks on n1 share no memory, so that messages go by the network")


@no_exchange
def test_errors_come_first():
    mismatch = launcher.WorldSizeMismatch("2 ranks, a world of 1", "srun")
    found = find_problems(job({"no_native": "they were not built", "mismatch": mismatch}))
    assert [problem.level for problem in found] == [ERROR, WARNING]


@no_exchange
def test_colours_and_width(monkeypatch):
    problems = [Problem(ERROR, "one", "two " * 40), Problem(WARNING, "three", "four")]
    assert problems_as_text(problems, True)[0] == "\033[1;31merror\033[0m: one."
    plain = problems_as_text(problems, False, "  ")
    assert plain[-2:] == ["  warning: three.", "    cure: four."]
    assert max(map(len, plain)) <= 100
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert [config.colour(True), config.colour(False)] == [True, False]
    for name, value, expected in (
        ("TERM", "dumb", [False, False]),
        ("TERM", "xterm", [True, False]),
        ("CLICOLOR", "0", [False, False]),
        ("FORCE_COLOR", "1", [True, True]),
        ("NO_COLOR", "1", [False, False]),
    ):
        monkeypatch.setenv(name, value)
        assert [config.colour(True), config.colour(False)] == expected, name


@no_exchange
@pytest.mark.parametrize(
    ("lines", "files", "cores_given"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "200000 100000"}, 2),
        ("0::/elsewhere", {"cpu.max": "100000 100000"}, 1),  # a container shows its own group as the root
        ("0::/", {}, None),
        (
            "3:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "3:cpu:/a\n2:cpuset:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            None,
        ),
    ],
)
def test_limits_of_control_groups(lines, files, cores_given, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"{lines}\n")
    monkeypatch.setattr(config, "PROC", tmp_path)
    monkeypatch.setattr(cores, "SYSTEM", tmp_path / "sys")
    found = cores.quota()
    assert (found and found[1]) == cores_given


def test_this_rank():
    facts, level = find(MPI), MPI.Query_thread()
    assert facts.rank == MPI.COMM_WORLD.rank
    assert facts.cores == frozenset(os.sched_getaffinity(0))
    assert level == MPI.Query_thread() == MPI.THREAD_MULTIPLE  # unchanged by MPI_T_init_thread in find()
    given = dict(os.environ).get("OMPI_MCA_mpi_yield_when_idle")
    if MPI.get_vendor()[0] == "Open MPI" and given in ("0", "1"):
        assert facts.yields == (given == "1")


@no_exchange
def test_variables_that_look_like_settings(monkeypatch):
    for name in [name for name in os.environ if "SYNCBN" in name]:
        monkeypatch.delenv(name)
    for name in ("MPISYNCBN_TRANSPROT", "MPISYNBN_TIMEOUT", "MPISYNCBN_COLOUR", "MPISYNCBN_NO_NATIVE"):
        monkeypatch.setenv(name, "1")
    assert config.unknown_settings() == {
        "MPISYNCBN_TRANSPROT": "MPISYNCBN_TRANSPORT",
        "MPISYNBN_TIMEOUT": "MPISYNCBN_TIMEOUT",
        "MPISYNCBN_COLOUR": "",
    }


def test_sources_of_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "PROC", tmp_path)
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert config.gpus_given() == ""
    (tmp_path / "driver/nvidia/gpus").mkdir(parents=True)
    assert config.gpus_given() == str(tmp_path / "driver/nvidia/gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert config.gpus_given() == ""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert config.gpus_given() == "SLURM_GPUS_ON_NODE=4"
