"""Jobs of 4 Slurm tasks show which launchers start the ranks of each MPI library as one world.

With the wrong launcher each rank may be a world of one, and the job still ends with status 0. So
the tests compare the sizes of the worlds. They start a Slurm cluster of their own.
scripts/launchers prints a table of the outcomes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import tables
from support.libraries import Library
from support.ranks import once
from support.slurm import Slurm

pytestmark = once("it starts jobs itself")
TASKS = 4
LAUNCHERS = ("mpiexec", "srun --mpi=pmix", "srun --mpi=pmi2")
ONE, SINGLE, ERROR, UNKNOWN = "one world", f"{TASKS} singletons", "error", "nothing known"
EXPECTED = {
    "openmpi 5": (ONE, ONE, SINGLE),
    "openmpi 4": (ONE, ONE, ERROR),
    "mpich 5": (ONE, ERROR, ONE),
    "mpich 4": (ONE, SINGLE, ONE),
    "impi 2021": (ONE, ONE, ONE),
}
LIMIT = 40  # seconds for a job
REFUSAL = "MPI has a world of"
RANK = """
import os
import numpy as np, mpisyncbn
from mpi4py import MPI
try:
    mpisyncbn.functional.batch_norm_forward(np.ones((2, 3)))
except mpisyncbn.MPISyncBNError as error:  # where the launcher has started more ranks than this world has
    print(error)
world = MPI.COMM_WORLD
os.write(1, f"rank {world.rank} of {world.size} on {MPI.Get_processor_name()}\\n".encode())  # in one piece
"""


def pytest_generate_tests(metafunc: Any) -> None:
    if "nodes" in metafunc.fixturenames:
        metafunc.parametrize("nodes", metafunc.config.getoption("nodes", None) or [1, 2])


@pytest.mark.full("it tries every launcher")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_world(
    launcher: str, nodes: int, mpi_library: Library, cluster: Slurm, record_property: Any
) -> None:
    cluster.need(launcher, nodes)
    status, output = run(cluster, mpi_library, launcher, nodes)
    outcome = judge(status, output, nodes)
    said = f"{outcome}, refused" if REFUSAL in output else outcome
    version = re.search(r"\d+", mpi_library.title)
    known = EXPECTED.get(f"{mpi_library.name} {version and version[0]}", (UNKNOWN,) * len(LAUNCHERS))
    expected = known[LAUNCHERS.index(launcher)]
    cell = said if outcome == expected else f"**{said}, expected {expected}**"
    record_property("row", {"library": mpi_library.title, "nodes": nodes, "launcher": launcher, "cell": cell})
    assert outcome == expected, output


def run(cluster: Slurm, library: Library, launcher: str, nodes: int) -> tuple[str, str]:
    """Run a job, and return its exit code, or "" if it exceeded the time limit, and its output."""
    start = f"{library.mpiexec} -n {TASKS}" if launcher == "mpiexec" else f"{launcher} --kill-on-bad-exit=1"
    program, script = cluster.folder / "rank.py", cluster.folder / "job.sh"
    program.write_text(RANK)
    script.write_text(f"#!/bin/bash\n{start} {sys.executable} {program}\n")
    where = [f"--nodes={nodes}", f"--ntasks-per-node={TASKS // nodes}", f"--output={cluster.folder}/%j.out"]
    # I_MPI_FABRICS=shm is for jobs on one host: shared memory does not reach a second node.
    variables = {name: value for name, value in library.variables.items() if name != "I_MPI_FABRICS"}
    if library.name == "impi" and launcher.endswith("pmix"):  # Intel MPI finds no libpmix by itself
        pmix = next(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so*"), "libpmix.so")
        variables["I_MPI_PMI_LIBRARY"] = str(pmix)
    job = cluster.submit(*where, str(script), **variables)
    try:
        status = cluster.wait(job, LIMIT)["ExitCode"]
    except TimeoutError:
        status = ""
    return status, (cluster.folder / f"{job}.out").read_text(errors="replace")


def judge(status: str, output: str, nodes: int) -> str:
    """Return the outcome of a job in words, by its exit code and the ranks that it printed."""
    found = re.findall(r"rank (\d) of (\d) on (\S+)", output)
    sizes = [int(size) for _, size, _ in found]
    ranks, hosts = sorted(int(rank) for rank, _, _ in found), {host for _, _, host in found}
    whole = (sizes, ranks, len(hosts)) == ([TASKS] * TASKS, [*range(TASKS)], nodes)
    if not status:
        return "hang, after one world" if whole else "hang"
    if status != "0:0":
        return ERROR
    if whole:
        return ONE
    return SINGLE if sizes == [1] * TASKS else f"ranks {ranks} of {sizes} on {len(hosts)} nodes"


WORLD_OF_4 = "".join(f"rank {rank} of 4 on n{rank // 2}\n" for rank in range(4))
ALONE = "the launcher started 4 ranks (PMI_SIZE=4), MPI has a world of 1: ...\nrank 0 of 1 on n0\n"


@pytest.mark.parametrize(
    ("output", "status", "outcome"),
    [
        (WORLD_OF_4, "0:0", ONE),
        (ALONE * 4, "0:0", SINGLE),
        (WORLD_OF_4.partition("\n")[2], "0:0", "ranks [1, 2, 3] of [4, 4, 4] on 2 nodes"),
        (WORLD_OF_4.replace("n1", "n0"), "0:0", "ranks [0, 1, 2, 3] of [4, 4, 4, 4] on 1 nodes"),
        ("", "0:0", "ranks [] of [] on 0 nodes"),
        (WORLD_OF_4, "1:0", ERROR),
        (WORLD_OF_4, "0:9", ERROR),
        (WORLD_OF_4, "", "hang, after one world"),
        (ALONE, "", "hang"),
    ],
)
def test_the_outcome_of_a_job(output: str, status: str, outcome: str) -> None:
    assert judge(status, output, nodes=2) == outcome


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table, session = tables.Launchers(None), SimpleNamespace(exitstatus=0)
    table.rows = [
        SimpleNamespace(library=library, nodes=nodes, launcher=launcher, cell=f"{launcher[0]} {nodes}")
        for library in ("MPI 4", "MPI 5")
        for nodes in (1, 2)
        for launcher in LAUNCHERS[:2]
    ]
    table.pytest_sessionfinish(session)
    assert session.exitstatus == 0
    assert capsys.readouterr().out.splitlines() == [
        "| MPI | nodes | `mpiexec` | `srun --mpi=pmix` |",
        "| --- | --- | --- | --- |",
        "| MPI 4 | 1 | m 1 | s 1 |",
        "| MPI 5 | 1 | m 1 | s 1 |",
        "| MPI 4 | 2 | m 2 | s 2 |",
        "| MPI 5 | 2 | m 2 | s 2 |",
    ]
    table.rows, table.skipped = [], {"no slurmd": None}
    table.pytest_sessionfinish(session)
    assert (session.exitstatus, capsys.readouterr().err) == (2, "launchers: no slurmd\n")
