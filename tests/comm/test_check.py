"""python -m mpisyncbn --check: what it finds. Most problems are made, in jobs of their own."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from mpisyncbn import config
from mpisyncbn.comm import launcher
from mpisyncbn.report import ERROR, WARNING, cores
from mpisyncbn.report.checks import Problem, find_problems
from mpisyncbn.report.rank import RankFacts, find
from mpisyncbn.report.text import problems_as_text
from mpisyncbn.report.words import by_rank
from support import jobs
from support.ranks import no_exchange, once, starts_mpiexec

CHECK = ["-m", "mpisyncbn", "--check"]
NO_CORES = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "0"}
needs_taskset = pytest.mark.skipif(shutil.which("taskset") is None, reason="there is no taskset")
open_mpi = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="it is Open MPI's")
one_core = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
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
    gpus_given="",
)


def job(*changed: dict[str, object], nodes: int = 1) -> list[RankFacts]:
    """The facts of a rank for each argument, on so many nodes, the first ranks on the first."""
    size = len(changed) // nodes
    return [
        FACTS._replace(
            rank=rank, first=rank - rank % size, machine=(f"n{rank // size + 1}", "boot")
        )._replace(**facts)
        for rank, facts in enumerate(changed)
    ]


def said(*changed: dict[str, object], nodes: int = 1) -> list[str]:
    return [f"{found.level}: {found.what}" for found in find_problems(job(*changed, nodes=nodes))]


# Real jobs.


@starts_mpiexec
def test_all_is_well(run_job):
    done = run_job(*CHECK, ranks=2)
    assert re.fullmatch(
        r"mpisyncbn: no problems \(2 ranks on 1 node, .* \d.*, kernels: (native|generic).*\)\n", done.stdout
    ), done.stderr
    assert done.status == 0


@starts_mpiexec
@needs_taskset
@open_mpi
def test_many_problems(run_job, tmp_path):
    """Two ranks on one core, with two environments."""
    mpiexec, program = jobs.find_mpiexec(), [sys.executable, *CHECK]
    first = ["env", "MPISYNCBN_TIMOUT=5", "MPISYNCBN_TIMEOUT=90", *program]
    settings = {
        "MPI4PY_RC_THREAD_LEVEL": "serialized",
        "MPISYNCBN_TRANSPORT": "device",
        "OMP_NUM_THREADS": "4",
        **NO_CORES,
    }
    done = jobs.run(
        [*one_core, mpiexec, "-n", "1", *first, ":", "-n", "1", *program],
        tmp_path,
        variables=jobs.for_jobs() | settings,
    )
    problems = re.findall(r"^(error|warning): (.*)", done.stdout, re.MULTILINE)
    assert [level for level, _ in problems] == ["error"] + ["warning"] * 4, done.stdout + done.stderr
    for (_, what), start in zip(
        problems,
        (
            "MPISYNCBN_TRANSPORT=device asks for messages in device memory, but Open MPI",
            "MPISYNCBN_TIMOUT is set on rank 0, but there is no such setting.",
            "MPISYNCBN_TIMEOUT differs between ranks: 90 on rank 0; not set on rank 1.",
            "MPI provides THREAD_SERIALIZED on all ranks: ",
            "all ranks on ",
        ),
        strict=True,
    ):
        assert what.startswith(start)
    text = " ".join(done.stdout.split())
    assert "cure: rename it to MPISYNCBN_TIMEOUT, or unset it." in text
    assert re.search(r"share 1 core and have \d+ threads\. A rank that waits keeps its core", text)
    assert "or set OMPI_MCA_mpi_yield_when_idle=1, so that it yields." in text
    assert "\033" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.status == 1


@starts_mpiexec
@pytest.mark.full("one more job of the kind above")
@needs_taskset
def test_warnings_alone_end_every_rank_with_3(run_job, tmp_path):
    script = f"{sys.executable} {' '.join(CHECK)}; echo $? >{tmp_path}/status.$$"
    command = [*one_core, jobs.find_mpiexec(), "-n", "2", "sh", "-c", script]
    done = jobs.run(command, tmp_path, variables=jobs.for_jobs() | {"OMP_NUM_THREADS": "2"})
    assert [path.read_text() for path in tmp_path.glob("status.*")] == ["3\n"] * 2, done
    assert re.match(r"warning: all ranks on \S+ share 1 core and have [48] threads\.", done.stdout)


@once("it starts processes itself")
@needs_taskset
def test_problems_of_one_process(tmp_path):
    """Without native kernels, bound to too few cores, and so on."""
    code = (
        "import runpy, sys; sys.modules['mpisyncbn.kernels.cpu._cpu'] = None; sys.argv[1:] = ['--check']\n"
        "runpy.run_module('mpisyncbn', run_name='__main__')"
    )
    settings = {
        "MPISYNCBN_DEBUG": "yes",
        "SLURM_CPUS_PER_TASK": "4096",
        "CUDA_VISIBLE_DEVICES": "0",
        "MPI4PY_RC_THREAD_LEVEL": "funneled",
        "OMP_NUM_THREADS": "2",
    }
    done = jobs.run([*one_core, sys.executable, "-c", code], tmp_path, variables=jobs.for_jobs() | settings)
    text = " ".join(done.stdout.split())
    for words in (
        "error: MPISYNCBN_DEBUG must be one of 0, 1, got 'yes', on rank 0. cure: correct or unset it.",
        "error: MPI provides THREAD_FUNNELED on rank 0: no layer trains",
        " has 2 threads for 1 core. cure: set OMP_NUM_THREADS=1, or give each rank 2 cores: ",
        "warning: the job has 4096 cores for each task (SLURM_CPUS_PER_TASK), but rank 0 may use 1 only.",
        "warning: rank 0 trains without native kernels, because they were not built. ",
        "cure: install a C++17 compiler and Python's headers",
        "warning: there are GPUs (CUDA_VISIBLE_DEVICES=0), but torch ",
    ):
        assert words in text, done.stdout + done.stderr
    assert done.status == 1


@once("it starts processes itself")
@pytest.mark.full("test_ranks_are_apart has it in one process")
def test_singletons(tmp_path):
    """Two processes that a launcher started and MPI takes for two worlds: one prints, both fail."""
    script = (
        f"for i in 0 1; do (SLURM_PROCID=$i {sys.executable} {' '.join(CHECK)}; echo status $?) & done; wait"
    )
    variables = jobs.for_jobs() | {"SLURM_STEP_NUM_TASKS": "2"}
    done = jobs.run(["sh", "-c", script], tmp_path, variables=variables)
    assert done.stdout.count("status 1\n") == 2, done.stderr
    sizes = "error: the launcher started 2 ranks (SLURM_STEP_NUM_TASKS=2), MPI has a world of 1: "
    assert done.stdout.count(sizes) == 1
    assert " ".join(done.stdout.split()).count("cure: srun did not tell ") == 1


@once("it starts processes itself")
def test_no_library(tmp_path):
    variables = jobs.for_jobs() | {"MPI4PY_LIBMPI": "/no/library"}
    done = jobs.run([sys.executable, *CHECK], tmp_path, variables=variables)
    assert done.stdout.startswith("error: mpi4py cannot be used: ")
    assert "MPI4PY_LIBMPI=/path/to/libmpi.so" in done.stdout
    assert done.status == 1


@starts_mpiexec
@pytest.mark.full("it waits for a rank that does not come")
@pytest.mark.parametrize("start", ["from mpi4py import MPI", ""])
def test_the_time_limit(run_job, start):
    """Where a rank does not come, or does not even start MPI, so that MPI does not start elsewhere."""
    code = (
        f"import os, runpy, sys, time\nif os.environ.get('PMIX_RANK', os.environ.get('PMI_RANK')) == '1':\n"
        f"    {start}\n    time.sleep(60)\n"
        "sys.argv[1:] = ['--check', '--timeout', '0.5']\nrunpy.run_module('mpisyncbn', run_name='__main__')"
    )
    done = run_job("-c", code, ranks=2, limit=30)
    assert done.status == 1, done
    words = (
        "rank 0 of 2 has waited 0.5 s for other ranks\n  rank 1 has not come: its process"
        if start
        else "Timeout"
    )
    assert words in done.stderr


# What cannot be made here: by facts that no rank has found.


@no_exchange
def test_nothing_is_said_where_all_is_well():
    assert said(*[{"threads": 2}] * 4, nodes=2) == []
    assert said(*[{"yields": True}] * 8) == []  # more ranks than cores, which yield
    assert said(*[{"gpus": ("a", "b")}] * 4, nodes=2) == []
    assert said({"gpus": ("a",)}, {"gpus": ("b",)}) == []  # one is visible to each


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
def test_what_differs_is_said_by_rank():
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
    assert level == MPI.Query_thread() == MPI.THREAD_MULTIPLE  # MPI_T_init_thread changes neither
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
    monkeypatch.setattr(config, "PROC", Path(tmp_path))
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert config.gpus_given() == ""
    (tmp_path / "driver/nvidia/gpus").mkdir(parents=True)
    assert config.gpus_given() == str(tmp_path / "driver/nvidia/gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert config.gpus_given() == ""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert config.gpus_given() == "SLURM_GPUS_ON_NODE=4"
