"""Errors for launchers that started more ranks than MPI knows, and the ranks of one machine."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.testing._internal.distributed.fake_pg import FakeStore

import mpisyncbn
from mpisyncbn import config
from mpisyncbn.comm import groups, launcher, nodes
from support.ranks import WORLD, once, together
from support.versions import compiles

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE")
SIZES += ("SLURM_STEP_NUM_TASKS",)
RANKS = ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
ELASTIC = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}
HOROVODRUN = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0", "HOROVOD_LOCAL_RANK": "0"}


@pytest.fixture
def variables(monkeypatch):
    """A function that sets environment variables. Those of this job's own launcher are unset."""
    for name in (*SIZES, *RANKS, *ELASTIC, *HOROVODRUN, "SLURM_TASK_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_has_terminal", lambda: False)
    monkeypatch.setattr(launcher, "_torch_group", lambda: None)
    launcher._warn.cache_clear()
    return lambda **given: [monkeypatch.setenv(name, value) for name, value in given.items()]


def library(vendor="Open MPI", size=1, parent=None):
    world, comm = SimpleNamespace(Get_size=lambda: size), SimpleNamespace(Get_parent=lambda: parent)
    return SimpleNamespace(
        COMM_WORLD=world, COMM_NULL=None, Comm=comm, get_vendor=lambda: (vendor, (5, 0, 11))
    )


@pytest.mark.parametrize("name", SIZES)
def test_every_launcher_says_how_many_tasks_it_started(name, variables):
    assert config.mpi_launcher_size() == (1, "")
    assert not config.launched()
    variables(**{name: "4"})
    assert config.mpi_launcher_size() == config.any_launcher_size(1) == (4, name)
    assert config.launched()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        # mpiexec -n 1 in a job of Slurm, where srun has started mpiexec's daemons on two nodes
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, "OMPI_COMM_WORLD_SIZE")),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, (1, "")),  # a batch script, which no launcher started
    ],
)
def test_the_launcher_nearest_to_the_rank_counts(given, found, variables):
    variables(**given)
    assert config.mpi_launcher_size() == found
    launcher.check_world_size(library())


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
def test_ranks_that_mpi_does_not_know_are_told_the_cure(vendor, given, words, variables):
    variables(**{given: "4"})
    for _ in range(2):  # each call raises the error
        with pytest.raises(mpisyncbn.MPISyncBNError, match=r"such as MPI\.COMM_SELF") as said:
            launcher.check_world_size(library(vendor))
    text = str(said.value)
    assert text.startswith(f"the launcher started 4 ranks ({given}=4), MPI has a world of 1: ")
    assert words in text
    assert words in launcher.world_size_mismatch(library(vendor)).cure


@pytest.mark.parametrize("given", [TORCHRUN, ELASTIC, HOROVODRUN, {**ELASTIC, "OMPI_COMM_WORLD_SIZE": "1"}])
def test_launchers_that_tell_mpi_nothing(given, variables):
    variables(**given)
    with pytest.raises(
        mpisyncbn.MPISyncBNError, match=r"started 2 ranks .* world of 1: torchrun, .* mpiexec"
    ):
        launcher.check_world_size(library())
    assert launcher.ranks_in_words(library()).startswith("2 ranks (")


@pytest.mark.parametrize("name", ["PMIX_RANK", "PALS_RANKID"])
def test_a_launcher_that_gives_only_a_rank(name, variables):
    """A rank above 0 in a world of 1 shows that MPI does not know the launcher."""
    variables(**{name: "3"})
    with pytest.raises(mpisyncbn.MPISyncBNError, match=f"as rank 3 .{name}=3., MPI has a world of 1: what "):
        launcher.check_world_size(library("Intel MPI"))
    assert launcher.ranks_in_words(library()) == f"at least 4 ranks ({name})"
    assert config.rank_by_launcher(name) == 2  # rank 0 does not know, so rank 1 speaks for all
    variables(PMI_SIZE="1")  # mpiexec -n 1 on this rank
    launcher.check_world_size(library())


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (1, {"PMI_SIZE": "1"}),
        (1, {"PMI_SIZE": "²"}),  # "²".isdigit() is true
        (1, {"PMIX_RANK": "0"}),
        (4, {"PMI_SIZE": "4"}),
        (2, ELASTIC),  # one torchrun for each rank
        (1, {"WORLD_SIZE": "2"}),  # left over from another program
        (1, {"WORLD_SIZE": "2", "RANK": "0"}),
        (1, {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}),
        (1, {"WORLD_SIZE": "2", "RANK": "", "LOCAL_RANK": "0"}),
        (1, {**ELASTIC, "WORLD_SIZE": "1", "RANK": "0"}),
        (1, {**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "1"}),
        (1, {**TORCHRUN, "PMIX_RANK": "0"}),
        (2, {**ELASTIC, "WORLD_SIZE": "8"}),
        (2, {"OMPI_COMM_WORLD_SIZE": "8", "PMI_SIZE": "2"}),  # mpiexec of MPICH inside a job of Open MPI
    ],
)
def test_nothing_is_said_where_the_launcher_of_mpi_agrees(size, given, variables):
    variables(**given)
    launcher.check_world_size(library(size=size))
    assert launcher.world_size_mismatch(library(size=size)) is None


def test_sizes_are_compared(variables):
    """A world of several ranks is refused if the launcher started more; a spawned one is not."""
    variables(PMI_SIZE="8")
    with pytest.raises(mpisyncbn.MPISyncBNError, match=r"started 8 ranks .* world of 4"):
        launcher.check_world_size(library(size=4))
    launcher.check_world_size(library(size=4, parent="another world"))  # another world spawned this one


def test_in_a_shell_of_slurm_it_is_a_warning(variables, monkeypatch):
    """A shell that ``srun --pty`` started as one of several tasks may train, with a warning.

    If torch.distributed has more ranks than MPI, it is an error there too.
    """
    variables(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0")
    monkeypatch.setattr(launcher, "_has_terminal", lambda: True)
    with pytest.warns(RuntimeWarning, match="started 4 ranks"):
        launcher.check_world_size(library())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher.check_world_size(library())  # it warns only once
    monkeypatch.setattr(launcher, "_torch_group", lambda: "a group")
    monkeypatch.setitem(sys.modules, "torch.distributed", SimpleNamespace(get_world_size=lambda: 2))
    with pytest.raises(mpisyncbn.MPISyncBNError, match=r"torch\.distributed has 2 ranks, MPI a world of 1: "):
        launcher.check_world_size(library())  # torch.distributed's ranks know each other, so none is a shell


def test_a_batch_script_has_variables_of_the_shell_that_submitted_it(variables, tmp_path, monkeypatch):
    variables(SLURM_STEP_NUM_TASKS="4", SLURM_TASK_PID="5")
    for process, words in (("5", "5 (bash) S 4 5 5"), ("4", "slurmstepd: [7.batch]")):
        (tmp_path / process).mkdir()
        (tmp_path / process / "stat").write_text(words)
        (tmp_path / process / "cmdline").write_text(words)
    monkeypatch.setattr(config, "PROC", tmp_path)
    launcher.check_world_size(library())
    (tmp_path / "4/cmdline").write_text("slurmstepd: [7.0]")
    with pytest.raises(mpisyncbn.MPISyncBNError, match="started 4 ranks"):
        launcher.check_world_size(library())


def test_one_of_them_says_it_for_all(variables):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1")
        launcher.warn_world_size(library())


@pytest.fixture
def larger():
    """A function that initializes torch.distributed with a rank more than MPI, as torchrun."""
    yield lambda: dist.init_process_group("fake", rank=0, world_size=WORLD.size + 1, store=FakeStore())
    dist.destroy_process_group()


X = torch.arange(12.0).reshape(4, 3)
TRAINING = {
    "the world": lambda net: net(X),
    "compiled": lambda net: torch.compile(net, backend="eager", fullgraph=True)(X),
    "a function": lambda _: mpisyncbn.sync_batch_norm(X, None, None),
    "NumPy": lambda _: mpisyncbn.functional.batch_norm_forward(X.double().numpy()),
    "COMM_WORLD": lambda _: mpisyncbn.SyncBatchNorm(3, process_group=WORLD)(X),
    "Communicator": lambda _: mpisyncbn.SyncBatchNorm(3, process_group=mpisyncbn.Communicator())(X),
    "torch's group": lambda _: mpisyncbn.SyncBatchNorm(3, process_group=dist.group.WORLD)(X),
    "new_group": lambda _: mpisyncbn.new_group([0]),
    "new_subgroups": lambda _: mpisyncbn.new_subgroups(),
    "init_process_group": lambda _: mpisyncbn.init_process_group(),
    "a group of backend mpi4py": lambda _: dist.new_group([0], backend="mpi4py"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch gives them while it compiles
@pytest.mark.parametrize(
    "train",
    [pytest.param(call, id=name, marks=[compiles] * (name == "compiled")) for name, call in TRAINING.items()],
)
def test_training_apart_is_refused(train, larger):
    """No rank trains if torch.distributed has more ranks than MPI, even from a later step on."""
    net = mpisyncbn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    net(X)
    larger()
    for _ in range(2):
        with pytest.raises(mpisyncbn.MPISyncBNError) as said:
            train(net)
        sizes = (
            f"torch.distributed has {WORLD.size + 1} ranks, MPI a world of {WORLD.size}: torchrun, mp.spawn"
        )
        assert str(said.value).startswith(sizes)
    assert net[0].num_batches_tracked == 1


def test_apart_on_purpose(larger):
    alone, outer = mpisyncbn.SyncBatchNorm(3, process_group=MPI.COMM_SELF), mpisyncbn.SyncBatchNorm(3)
    larger()
    alone(X)
    outer.eval()(X)
    mpisyncbn.SyncBatchNorm(3, process_group=dist.group.WORLD).eval()(X)
    launcher._warn.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mpisyncbn.local_rank()
    dist.destroy_process_group()
    outer.train()(X)  # allowed again without torch.distributed
    larger()
    with together():
        assert torch.allclose(alone.running_mean, outer.running_mean)
        assert len(said) == (WORLD.rank == 0)


def test_a_torch_group_of_several_mpi_jobs(monkeypatch):
    """A torch group of ranks from two MPI jobs is refused: both are rank 0 in MPI."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda ranks, *_, **__: ranks.__setitem__(slice(None), [0, 0])
    )
    with pytest.raises(mpisyncbn.MPISyncBNError, match=r"knows as ranks \[0, 0\] of .* with one mpiexec"):
        groups._OtherBackendCommunicator(group).ready()


@pytest.mark.full("torchrun takes its time")
@once("it starts torchrun itself")
def test_torchrun(tmp_path, run_job):
    program = tmp_path / "apart.py"
    program.write_text("""
import sys
import torch, torch.distributed as dist, mpisyncbn

def error(process_group=None):
    try:
        mpisyncbn.SyncBatchNorm(3, process_group=process_group)(torch.ones(4, 3))
    except mpisyncbn.MPISyncBNError as error:
        return str(error).partition(",")[0]

first = error()
dist.init_process_group("gloo")
found = [first, error(), error(dist.group.WORLD), error(dist.new_subgroups(1)[0])]
sys.stdout.write(f"{found}\\n")
dist.destroy_process_group()
""")
    done = run_job("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program))
    said = ["the launcher started 2 ranks (WORLD_SIZE=2)", *["torch.distributed has 2 ranks"] * 2, None]
    assert done.stdout.splitlines() == [str(said)] * 2, done.stderr


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
        # containers that share memory, some with host names of their own
        ([(0, "a"), (0, "b"), (2, "c"), (2, "b")], {0: [0, 1, 2, 3]}),
    ],
)
def test_ranks_beside(everyone, beside):
    for rank, ranks in beside.items():
        assert nodes.ranks_on_node_of(everyone, rank) == ranks
