"""A child process of a rank is refused. A rank that a shell or a nested mpiexec started is not."""

from __future__ import annotations

import os
import sys

import pytest

from mpisyncbn import config
from mpisyncbn.comm import ancestors
from support import jobs
from support.ranks import no_exchange, starts_mpiexec

CHILD = """
import sys
import mpisyncbn, numpy as np
if sys.argv[1:]:
    from mpi4py import MPI
try:
    mpisyncbn.functional.batch_norm_forward(np.ones((2, 3)))
    print("trained", flush=True)
except mpisyncbn.MPISyncBNError as error:
    print(str(error).partition(",")[0], flush=True)
"""
RANK = """
import os, subprocess, sys
import mpisyncbn, numpy as np
from mpi4py import MPI

x = np.ones((2, 3))
mpisyncbn.functional.batch_norm_forward(x)
if MPI.COMM_WORLD.rank == 1:
    child, mpiexec = [sys.executable, "child.py"], sys.argv[1]
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "SLURM_"))}
    print(f"rank 1 is process {os.getpid()}", flush=True)
    subprocess.run(child)
    os.system(f"bash -c '{' '.join(child)}; true'")
    subprocess.run(child, env=alone)
    subprocess.run([mpiexec, "-n", "2", *child])
    child = [sys.executable, "-W", "error", "child.py", "imports MPI"]
    warned = subprocess.run(child, stderr=subprocess.PIPE)
    print(warned.stderr.decode().splitlines()[-1].partition(",")[0])
MPI.COMM_WORLD.barrier()
"""


@starts_mpiexec
def test_children_of_a_rank(tmp_path):
    """A child that inherits the variables of a rank is refused. The rank runs under a shell."""
    mpiexec = jobs.find_mpiexec()
    if mpiexec is None:
        pytest.skip("no mpiexec")
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "rank.py").write_text(RANK)
    shell = ["bash", "-c", f"{sys.executable} rank.py {mpiexec}; true"]
    done = jobs.run([mpiexec, "-n", "2", *shell], tmp_path)
    assert done.status == 0, done
    first, *found = done.stdout.splitlines()
    refused = f"this process is a child of process {first.split()[-1]}"
    assert found == [refused] * 2 + ["trained"] * 3 + [f"RuntimeWarning: {refused}"], done.stderr


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "11"}
PMIX = {"PMIX_NAMESPACE": "job-1@1", "PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
RUNS_MPI = "7f0 r-xp /site-packages/mpi4py/MPI.openmpi.so"


@no_exchange
@pytest.mark.parametrize(
    ("mine", "socket", "above", "found"),
    [
        (PMIX, "", [(PMIX, "", RUNS_MPI)], 101),
        (PMIX, "", [(PMIX, "", "bash"), (PMIX, "", RUNS_MPI), ({}, "", "prted")], 102),
        (PMIX, "", [(PMIX, "", "torchrun"), ({}, "", "prted")], None),
        (PMIX, "", [({}, "", "prted"), ({}, "", RUNS_MPI)], None),
        (PMIX, "", [({**PMIX, "PMIX_NAMESPACE": "job-0@1"}, "", RUNS_MPI)], None),  # mpiexec in a rank
        ({**PMIX, "OMPI_COMM_WORLD_SIZE": "1"}, "", [(PMIX, "", RUNS_MPI)], None),
        (HYDRA, "socket:[7]", [(HYDRA, "socket:[7]", RUNS_MPI)], 101),
        (HYDRA, "", [(HYDRA, "socket:[7]", RUNS_MPI)], 101),
        (HYDRA, "/a/log", [(HYDRA, "", "sh"), (HYDRA, "socket:[7]", RUNS_MPI)], 102),
        (HYDRA, "socket:[8]", [(HYDRA, "socket:[6]", "proxy"), (HYDRA, "socket:[7]", RUNS_MPI)], None),
        (HYDRA, "", [({**HYDRA, "PMI_RANK": "0"}, "", RUNS_MPI)], None),
        ({**HYDRA, "PMI_SIZE": "1"}, "", [({**HYDRA, "PMI_SIZE": "1"}, "socket:[7]", RUNS_MPI)], 101),
        ({}, "", [({}, "", RUNS_MPI)], None),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "",
            [({"SLURM_PROCID": "0"}, "", RUNS_MPI)],
            None,
        ),
    ],
)
def test_the_ancestor_that_is_a_rank(mine, socket, above, found, tmp_path, monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("PMI", "OMPI_", "SLURM_", "PALS_")):
            monkeypatch.delenv(name)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(config, "PROC", tmp_path)
    monkeypatch.setattr(os, "getppid", lambda: 101)
    for process, (variables, link, maps) in enumerate([({}, socket, ""), *above], 100):
        folder = tmp_path / str(os.getpid() if process == 100 else process)
        (folder / "fd").mkdir(parents=True)
        (folder / "environ").write_text("\0".join(f"{name}={value}" for name, value in variables.items()))
        (folder / "maps").write_text(maps)
        (folder / "stat").write_text(f"{process} (a) name) S {process + 1} 1")
        if link:
            (folder / "fd" / "11").symlink_to(link)
    assert ancestors.ancestor_rank_pid() == found


@no_exchange
def test_a_child_that_has_started_mpi_is_warned(monkeypatch):
    """A worker imports the program again, in which mpi4py.MPI may stand before mpisyncbn."""
    monkeypatch.setattr(ancestors, "ancestor_rank_pid", lambda: 7)
    with pytest.warns(RuntimeWarning, match="this process is a child of process 7"):
        ancestors.guard()
