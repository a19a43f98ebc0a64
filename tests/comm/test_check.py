"""Jobs of ``python -m mpisyncbn --check``, most of them with problems that it must find."""

from __future__ import annotations

import os
import re
import shutil
import sys

import pytest
from mpi4py import MPI

from support import jobs
from support.ranks import once, starts_mpiexec

CHECK = ["-m", "mpisyncbn", "--check"]
NO_CORES = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "0"}
needs_taskset = pytest.mark.skipif(shutil.which("taskset") is None, reason="there is no taskset")
open_mpi = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="it is Open MPI's")
one_core = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]


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
    """Two ranks on one core, whose environments differ, have one error and four warnings."""
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
    """All problems of one process are found, such as missing native kernels and too few cores."""
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
    """If MPI takes the two ranks of a job for two worlds, one prints the error and both fail."""
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
    """The check ends at its time limit if a rank does not come.

    If that rank does not start MPI either, MPI cannot start on the other one.
    """
    code = (
        f"import os, runpy, sys, time\nif os.environ.get('PMIX_RANK', os.environ.get('PMI_RANK')) == '1':\n"
        f"    {start}\n    time.sleep(600)\n"
        "sys.argv[1:] = ['--check', '--timeout', '0.5']\nrunpy.run_module('mpisyncbn', run_name='__main__')"
    )
    done = run_job("-c", code, ranks=2)
    assert done.status == 1, done
    words = (
        "rank 0 of 2 has waited 0.5 s for other ranks\n  rank 1 has not come: its process"
        if start
        else "Timeout"
    )
    assert words in done.stderr


@once("it starts processes itself")
@pytest.mark.full("each is a process")
@pytest.mark.parametrize(
    ("way", "status", "words"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, "no problems"),
        ("| true", 0, ""),
        (">/dev/full", 0, "cannot be printed"),
        ("--timeout 1e300", 0, "no problems"),
        ("--timeout 0.001", 1, "has waited 0.001 s"),
        ("NOT INITIALIZED", 1, "MPI is not initialized, because MPI4PY_RC_INITIALIZE turns that off"),
    ],
)
def test_one_process(tmp_path, way, status, words):
    """The status is about the ranks, and not about the output. Limits may be of any length."""
    settings = {"MPI4PY_RC_INITIALIZE": "0"} if way == "NOT INITIALIZED" else {}
    program = f"{sys.executable} {' '.join(CHECK)} {'' if settings else way}; exit ${{PIPESTATUS[0]}}"
    done = jobs.run(["bash", "-c", program], tmp_path, variables=jobs.unlaunched() | settings)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.status == status, done.stderr
