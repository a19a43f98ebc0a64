"""Threads, worker processes, the end of the interpreter, and communicators that come and go."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mpisyncbn
from mpisyncbn import CollectiveMismatchError, Communicator, SyncBatchNorm
from support.jobs import End, run_alone
from support.oracle import bits_equal_on_all_ranks, distance, local_batch, oracle, shard
from support.ranks import WORLD, no_exchange, starts_mpiexec, together

RANK, SIZE = WORLD.rank, WORLD.size
full = pytest.mark.full("thousands, or one job each")
needs_threads = pytest.mark.skipif(
    MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="MPI takes one thread at a time"
)


# Threads.

THREADS, ROUNDS = 3, 8


def step(layer: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, ...]:
    x, dy = data(seed)
    y = layer(x.requires_grad_())
    y.backward(dy)
    return y.detach(), x.grad


def data(seed: int) -> tuple[Tensor, Tensor]:
    shape = (local_batch(), 3, 4)
    return shard(shape, 2 * seed, mean=seed), shard(shape, 2 * seed + 1)


def errors(results: tuple[Tensor, ...], seed: int, comm: Any = WORLD) -> list[float]:
    """Collective: every rank of ``comm`` must call."""
    expected = oracle(*data(seed), comm=comm)
    return [distance(results[0], expected.y), distance(results[1], expected.dx)]


@needs_threads
def test_a_layer_and_a_communicator_for_each_thread() -> None:
    layers = [SyncBatchNorm(3, process_group=Communicator().ready()) for _ in range(THREADS)]

    def train(thread: int) -> list[tuple[Tensor, ...]]:
        return [step(layers[thread], seed) for seed in range(thread, 100, 100 // ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(train, range(THREADS)))
    wrong = [
        max(errors(results, seed))
        for thread in range(THREADS)
        for results, seed in zip(found[thread], range(thread, 100, 100 // ROUNDS), strict=True)
    ]
    same = [bits_equal_on_all_ranks(layer.running_var) for layer in layers]
    for layer in layers:
        layer.process_group.free()
    assert max(wrong) < 1e-5
    assert all(same)


@needs_threads
def test_threads_of_one_rank_share_a_communicator() -> None:
    """Every result is right: a group of one rank has no order of calls to agree on."""
    group = Communicator(MPI.COMM_SELF)

    def train(thread: int) -> list[tuple[Tensor, ...]]:
        layer = SyncBatchNorm(3, process_group=group)
        return [step(layer, thread) for _ in range(50)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(train, range(THREADS)))
    group.free()
    with together():
        for thread, rounds in enumerate(found):
            assert max(max(errors(results, thread, MPI.COMM_SELF)) for results in rounds) < 1e-5


@needs_threads
def test_threads_that_share_a_communicator_of_several_ranks_do_not_mix_up() -> None:
    """If threads call in one order on all ranks, results are right; else all ranks raise."""
    group = Communicator().ready()
    model = nn.ModuleDict({"0": nn.BatchNorm1d(3), "1": nn.BatchNorm1d(3)})
    model = mpisyncbn.convert_sync_batchnorm(model, group)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def forward(thread: int) -> Tensor | None:
        try:
            return model[str(thread)](data(thread)[0])
        except CollectiveMismatchError:
            return None

    outcomes, wrong = [], []
    with ThreadPoolExecutor(2) as pool:
        for turn in range(20):
            started = [0, 1] if turn % 3 or RANK else [1, 0]
            threads = {thread: pool.submit(forward, thread) for thread in started}
            found = [threads[thread].result() for thread in (0, 1)]
            outcomes.append(WORLD.allgather([y is not None for y in found]))
            if all(y is not None for y in found):
                for thread, y in enumerate(found):
                    wrong.append(distance(y, oracle(*data(thread)).y))
    group.free()
    right = sum(all(map(all, outcome)) for outcome in outcomes)
    for outcome in outcomes:
        assert len({answer for answers in outcome for answer in answers}) == 1, outcomes
    assert max(wrong, default=0.0) < 1e-5
    assert model["0"].num_batches_tracked == right
    assert right or all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# Worker processes.

BATCHES = """
import sys
import torch
import mpisyncbn

class Batches(torch.utils.data.Dataset):
    def __init__(self):
        self.layer = None

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.layer is None:
            self.layer = mpisyncbn.SyncBatchNorm(3).eval()
        with torch.no_grad():
            x = self.layer(torch.full((2, 3), float(index)))
        return x, "mpi4py.MPI" in sys.modules
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_beside_training(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "batches_of_a_worker.py").write_text(BATCHES)  # unlike a test module, it does not import MPI
    monkeypatch.syspath_prepend(tmp_path)
    import batches_of_a_worker

    layer = SyncBatchNorm(3, momentum=1.0)
    loader = DataLoader(
        batches_of_a_worker.Batches(), batch_size=2, num_workers=1, multiprocessing_context=start
    )
    read, wrong = [], []
    for number, (batch, uses_mpi) in enumerate(loader):
        read.append((batch[:, 0, 0].tolist(), uses_mpi.any().item()))
        wrong += errors(step(layer, number), number)
    sys.modules.pop("batches_of_a_worker")
    with together():
        expected = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        assert [values for values, _ in read] == [pytest.approx(pair, abs=1e-4) for pair in expected]
        assert start == "fork" or not any(uses_mpi for _, uses_mpi in read)
        assert max(wrong) < 1e-5


FORKED = """
import os, signal, sys
import numpy, torch
import mpisyncbn
layer = mpisyncbn.SyncBatchNorm(3)
x = torch.randn(4, 3, requires_grad=True)
y = layer(x)
state = [value.clone() for value in layer.state_dict().values()]
child = os.fork()
if child == 0:
    signal.alarm(20)
    for call in (
        lambda: layer(x),
        lambda: y.sum().backward(),
        lambda: mpisyncbn.SyncBatchNorm(3, process_group=layer.process_group)(x),
        lambda: mpisyncbn.sync_batch_norm(x, None, None),
        lambda: mpisyncbn.functional.batch_norm_forward(numpy.ones((4, 3))),
    ):
        try:
            call()
        except mpisyncbn.MPISyncBNError as error:
            print("refused:", error)
        else:
            print("no error")
    same = all(map(torch.equal, state, layer.state_dict().values()))
    print("evaluated", tuple(layer.eval()(x).shape), same)
    sys.stdout.flush()
    os._exit(0)
print("child", os.waitpid(child, 0)[1], flush=True)
y.sum().backward()
layer(x)
"""


def test_a_model_in_a_forked_process() -> None:
    lines = run_alone(FORKED).strip().splitlines()
    assert [line.partition(" ")[0] for line in lines[:-2]] == ["refused:"] * 5, lines
    assert lines[-2:] == ["evaluated (4, 3) True", "child 0"]


# The end of the interpreter.

BEGIN = """
import atexit, gc, os, sys
import mpi4py
{first}
import torch
import mpisyncbn
from mpi4py import MPI
layer = mpisyncbn.SyncBatchNorm(3)
half = mpisyncbn.SyncBatchNorm(3, process_group=MPI.COMM_WORLD.Split(0))
x = torch.ones(2 + MPI.COMM_WORLD.rank, 3, requires_grad=True)
y = layer(half(x))
y.sum().backward()
print("trained", flush=True)
"""
EXCHANGE = "atexit.register(lambda: print('exchanged', (layer(x) + half(x)).sum().backward(), flush=True))"
GROUP = """
mpisyncbn.init_process_group()
work = torch.distributed.all_reduce(torch.ones(3), async_op=True)
"""
DESTROYED_BY_SOME = """
mpisyncbn.init_process_group()
groups = [None, torch.distributed.new_group()]
for group in groups:
    torch.distributed.all_reduce(torch.ones(3), group=group)
mpisyncbn.SyncBatchNorm(3, process_group=groups[1])(torch.randn(4, 3))
torch.distributed.destroy_process_group(groups[torch.distributed.get_rank()])
"""
# Code before the imports of torch, MPI and the package, code after the training, and added output.
ENDS = {
    "layers in globals": ("", "", ""),
    "layers in a cycle": ("", "layer.itself, half.itself = layer, half; del layer, half", ""),
    "layers deleted": ("", "del layer, half, x, y", ""),
    "layers outlive MPI": ("", "MPI.Finalize()", ""),
    "layers deleted after MPI": ("", "MPI.Finalize(); del layer, half, x, y; gc.collect()", ""),
    "layers deleted before MPI": ("", "del layer, half, x, y; gc.collect(); MPI.Finalize()", ""),
    "MPI ends in a handler": ("mpi4py.rc.finalize = False", "atexit.register(MPI.Finalize)", ""),
    "an exchange in a handler": ("", EXCHANGE, "exchanged None\n"),
    "an exchange in the last handler": (EXCHANGE, "", "exchanged None\n"),
    "MPI ends after an exchange": (
        "mpi4py.rc.finalize = False",
        f"atexit.register(MPI.Finalize); {EXCHANGE}",
        "exchanged None\n",
    ),
    "a process group": ("", GROUP, ""),
    "process groups that one rank destroys": ("", DESTROYED_BY_SOME, ""),
    "sys.exit": ("", "sys.exit(0)", ""),
}


QUICK = "layers outlive MPI", "an exchange in the last handler"


@starts_mpiexec
@pytest.mark.parametrize("end", [each if each in QUICK else pytest.param(each, marks=full) for each in ENDS])
def test_the_end(end: str, run_job: Callable[..., End]) -> None:
    first, last, printed = ENDS[end]
    done = run_job("-W", "error", "-c", BEGIN.format(first=first) + last, ranks=2)
    expected = f"trained\n{printed}" * 2
    assert sorted(done.stdout.splitlines()) == sorted(expected.splitlines()), done.stdout
    assert (done.status, done.stderr) == (0, "")


@full
@starts_mpiexec
def test_one_rank_works_on_after_all_have_destroyed_a_group(run_job: Callable[..., End]) -> None:
    code = """
import time, torch, mpisyncbn
mpisyncbn.init_process_group()
torch.distributed.all_reduce(torch.ones(3))
rank = torch.distributed.get_rank()
torch.distributed.destroy_process_group()
time.sleep(4 * rank)
"""
    done = run_job("-c", code, ranks=2, variables={"MPISYNCBN_TIMEOUT": "1"})
    assert (done.status, done.stderr) == (0, "")


@no_exchange
@pytest.mark.parametrize("last", ["os._exit(0)", "sys.exit(0)"], ids=["os._exit", "never finalized"])
def test_an_end_without_mpi(last: str) -> None:
    """One process ends well without MPI_Finalize. With several, mpiexec ends the job."""
    printed = run_alone(BEGIN.format(first="mpi4py.rc.finalize = False") + last)
    assert printed == "trained\n"


# Communicators.

MANY, FEW = (10_000, 3_000) if SIZE == 2 else (1_000, 300)


class Duplicates:
    """Counts duplicates of communicators that are not freed, by an attribute that MPI copies."""

    def __init__(self) -> None:
        self.made = self.alive = 0
        self.keyval = MPI.Comm.Create_keyval(self._copied, self._deleted)

    def count(self, comm: MPI.Comm) -> None:
        comm.Set_attr(self.keyval, False)

    def _copied(self, *_: Any) -> bool:
        self.made += 1
        self.alive += 1
        return True

    def _deleted(self, comm: MPI.Comm, keyval: int, is_copy: bool) -> None:
        self.alive -= is_copy


@pytest.fixture
def duplicates() -> Iterator[Duplicates]:
    counter = Duplicates()
    counter.count(WORLD)
    yield counter
    WORLD.Delete_attr(counter.keyval)


def test_duplicates_are_counted(duplicates: Duplicates) -> None:
    comm = WORLD.Dup()
    alive = duplicates.alive
    comm.Free()
    assert (alive, duplicates.alive, duplicates.made) == (1, 0, 1)


def use(group: Any) -> None:
    """Build a layer, use it, drop it."""
    x = torch.ones(2, 3)
    SyncBatchNorm(3, process_group=group)(x)


@full
@pytest.mark.parametrize("given", ["None", "COMM_WORLD", "a communicator"])
def test_many_layers_of_one_group(given: str, duplicates: Duplicates) -> None:
    comm = {"None": None, "COMM_WORLD": WORLD}.get(given, WORLD.Dup())
    for _ in range(MANY):
        use(comm)
    gc.collect()
    assert duplicates.made <= 2  # the package's, and WORLD.Dup() above
    assert duplicates.alive <= 2


@full
def test_many_communicators_that_are_dropped(duplicates: Duplicates) -> None:
    for _ in range(MANY):
        use(Communicator())
    gc.collect()
    use(Communicator())
    assert duplicates.made >= MANY
    assert duplicates.alive < 100


def test_many_process_groups_that_are_destroyed() -> None:
    """Some ranks destroy the last groups later than others."""
    mpisyncbn.init_process_group()
    statuses, alive = [], []
    for number in range(20):
        group = dist.new_group()
        dist.all_reduce(torch.ones(2), group=group)
        use(group)
        statuses += group._collective_group.rank_status, group.communicator.rank_status
        alive.append(sum(status.comm is not None for status in statuses))
        if number < 12 or number % SIZE != RANK:
            dist.destroy_process_group(group)
    dist.destroy_process_group()
    use(Communicator())
    assert max(alive[:12]) <= 4
    assert not any(status.comm for status in statuses)


@full
def test_many_communicators_that_the_user_frees(duplicates: Duplicates) -> None:
    for _ in range(FEW):
        comm = WORLD.Split(RANK % 2)
        duplicates.count(comm)
        use(comm)
        comm.Free()
    gc.collect()
    use(None)
    assert duplicates.made >= FEW
    assert duplicates.alive < 100
