"""What is said of launchers that MPI knows nothing of, and which ranks are on one machine."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from mpi4py import MPI
from parallel import WORLD, together
from singleton import run_alone

import mpisyncbn
from mpisyncbn import config, launcher, nodes

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE")
SIZES += ("SLURM_STEP_NUM_TASKS",)
RANKS = ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")


@pytest.fixture
def variables(monkeypatch):
    """Sets them, and takes away what this job's own launcher has set."""
    for name in (*SIZES, *RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_looked", False)
    return lambda **given: [monkeypatch.setenv(name, value) for name, value in given.items()]


def library(vendor="Open MPI", size=1):
    world = SimpleNamespace(Get_size=lambda: size)
    return SimpleNamespace(COMM_WORLD=world, get_vendor=lambda: (vendor, (5, 0, 11)))


@pytest.mark.parametrize("name", SIZES)
def test_every_launcher_says_how_many_tasks_it_started(name, variables):
    assert config.tasks() == (1, "")
    assert not config.launched()
    variables(**{name: "4"})
    assert config.tasks() == (4, name)
    assert config.launched()


def test_the_launcher_nearest_to_the_rank_counts(variables):
    """mpiexec -n 1 in a job, whose daemons srun has started on two nodes."""
    variables(OMPI_COMM_WORLD_SIZE="1", SLURM_STEP_NUM_TASKS="2")
    assert config.tasks() == (1, "OMPI_COMM_WORLD_SIZE")
    assert not launcher.is_alone(library())


def test_a_job_without_steps_is_one_task(variables):
    """The batch script itself, where python was started by nothing but bash."""
    variables(SLURM_NTASKS="4", SLURM_JOB_ID="7")
    assert config.tasks() == (1, "")


@pytest.mark.parametrize("name", RANKS)
def test_the_rank_that_a_launcher_gave(name, variables):
    assert config.own_rank() is None
    variables(**{name: "3"})
    assert config.own_rank() == 3


@pytest.mark.parametrize(
    ("vendor", "given", "words"),
    [
        (
            "Open MPI",
            "SLURM_STEP_NUM_TASKS",
            "Use srun --mpi=pmix (srun --mpi=list says what there is)",
        ),
        ("MPICH", "SLURM_STEP_NUM_TASKS", "Use srun --mpi=pmi2 "),
        ("Intel MPI", "SLURM_STEP_NUM_TASKS", "Use srun --mpi=pmi2 "),
        ("another", "SLURM_STEP_NUM_TASKS", "Use srun --mpi=pmix, or --mpi=pmi2 "),
        ("Open MPI", "PMI_SIZE", "Start the ranks with the mpiexec that comes with Open MPI 5.0.11"),
        ("MPICH", "OMPI_COMM_WORLD_SIZE", "Start the ranks with the mpiexec that comes with MPICH 5.0.11"),
    ],
)
def test_a_rank_that_believes_to_be_alone_is_told_the_cure(vendor, given, words, variables):
    variables(**{given: "4"})
    with pytest.warns(RuntimeWarning, match="alone in its world") as said:
        launcher.warn_if_alone(library(vendor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher.warn_if_alone(library(vendor))  # not again
    text = str(said[0].message)
    assert text.startswith("the launcher started 4 tasks, but this process is alone in its world: ")
    assert words in text
    assert words in launcher.describe(library(vendor))["ALONE"]


def test_one_of_them_says_it_for_all(variables):
    variables(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher.warn_if_alone(library())


@pytest.mark.parametrize(("size", "tasks"), [(4, "4"), (1, "1"), (4, "8")])
def test_nothing_is_said_where_mpi_knows_of_ranks(size, tasks, variables):
    variables(PMI_SIZE=tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher.warn_if_alone(library(size=size))
    described = launcher.describe(library(size=size))
    assert described == {"launcher": f"{tasks} task{'s' * (tasks != '1')} (PMI_SIZE)"}


def test_it_is_said_at_the_first_use():
    said = run_alone(
        """
import os, warnings
os.environ["SLURM_STEP_NUM_TASKS"] = "4"
import numpy as np, mpisyncbn
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        mpisyncbn.functional.batch_norm_forward(np.ones((2, 3)))
print(len(said), str(said[0].message)[:70])
"""
    )
    assert said.strip() == "1 the launcher started 4 tasks, but this process is alone in its world:"


def test_local_rank():
    shared = WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    expected = shared.rank
    shared.Free()
    half = WORLD.Split(WORLD.rank % 2, key=-WORLD.rank)
    found = mpisyncbn.local_rank(), mpisyncbn.local_rank(half)
    with together():
        assert found == (expected, half.rank)  # all ranks of the suite are on one machine
    half.Free()


@pytest.mark.parametrize(
    ("everyone", "beside"),
    [
        ([(0, "a"), (0, "a"), (2, "b"), (2, "b")], {0: [0, 1], 3: [2, 3]}),
        ([(0, "a"), (1, "b"), (0, "a"), (1, "b")], {2: [0, 2], 1: [1, 3]}),
        # containers that share no memory, on one machine
        ([(0, "a"), (1, "a"), (2, "b")], {0: [0, 1], 1: [0, 1], 2: [2]}),
        # containers that do, each with a name of its own
        ([(0, "a"), (0, "b"), (2, "c"), (2, "b")], {0: [0, 1, 2, 3]}),
    ],
)
def test_ranks_beside(everyone, beside):
    for rank, ranks in beside.items():
        assert nodes._ranks_beside(everyone, rank) == ranks
