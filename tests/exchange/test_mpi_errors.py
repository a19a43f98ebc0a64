"""If MPI fails in an exchange, or a rank does not answer, each rank raises an error."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from mpi4py import MPI

import mpisyncbn
from mpisyncbn import CollectiveMismatchError, Communicator, MPISyncBNError, SyncBatchNorm, fingerprint
from mpisyncbn.comm import unreferenced
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.liveness import pending
from support.ranks import WORLD

RANK, SIZE = WORLD.rank, WORLD.size
CALL = LayerCall("a layer", "forward", 3, "float32")


class Failing:
    """A communicator with some of its functions replaced, by ones that fail."""

    def __init__(self, comm, **failures):
        self.comm = comm
        vars(self).update(failures)

    def __getattr__(self, name):
        return getattr(self.comm, name)


def fails(error):
    def call(*_, **__):
        raise MPI.Exception(error)

    return call


@pytest.mark.parametrize(
    ("dtype", "function", "code", "error", "words"),
    [
        (torch.float32, "Allreduce", MPI.ERR_INTERN, MPISyncBNError, "MPI failed in rank {} of"),
        (torch.float64, "Allgather", MPI.ERR_INTERN, MPISyncBNError, "MPI failed in rank {} of"),
        (torch.float32, "Allreduce", MPI.ERR_TRUNCATE, CollectiveMismatchError, "rank {} "),
    ],
)
def test_an_error_of_mpi_says_where(dtype, function, code, error, words):
    """The error names the rank and the exchange. A message that is too long is a mismatch."""
    group = Communicator().ready()
    layer = SyncBatchNorm(3, process_group=group, dtype=dtype)
    group.comm, group.link = Failing(group.comm, **{function: fails(code)}), None
    with pytest.raises(MPISyncBNError, match=words.format(RANK) + ".*forward of the layer") as caught:
        layer(torch.ones(2, 3, dtype=dtype))
    assert type(caught.value) is error
    if error is MPISyncBNError:
        assert f"of {SIZE}, exchange number 1 of this communicator, forward" in str(caught.value)
        assert str(caught.value).endswith("start the job again from its last checkpoint")
        assert isinstance(caught.value.__cause__, MPI.Exception)
    assert layer.num_batches_tracked == 0


def test_an_error_of_mpi_in_debug_mode_and_before_it(monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", "1")
    group = Communicator().ready()
    layer = SyncBatchNorm(3, process_group=group)
    group.comm = Failing(group.comm, allgather=fails(MPI.ERR_INTERN))
    with pytest.raises(MPISyncBNError, match=f"MPI failed before the forward of .* on rank {RANK}"):
        layer(torch.ones(2, 3))
    unready = Communicator()
    unready._source = Failing(WORLD, Dup=fails(MPI.ERR_INTERN))
    with (
        patch.object(mpisyncbn.comm.communicator, "check_comm"),
        pytest.raises(MPISyncBNError, match=rf"MPI failed to duplicate .* \(on rank {RANK} of {SIZE}\)"),
    ):
        unready.ready()


@pytest.mark.parametrize("many", [0, 10**6])
def test_mpi_has_no_room_for_a_new_group(many, monkeypatch):
    """Groups that all ranks have dropped are freed before MPI makes a new one."""
    parent, dropped = Communicator().ready(), mpisyncbn.new_subgroups(1)
    status = dropped.rank_status
    del dropped
    gc.collect()
    monkeypatch.setattr(unreferenced, "_MANY", many)
    parent.comm = Failing(parent.comm, Split=fails(MPI.ERR_INTERN))
    cure = "start the job again" if many else "groups, and MPI has room for some thousand: drop groups"
    with pytest.raises(MPISyncBNError, match=rf"MPI failed while making new groups \(on rank {RANK}.*{cure}"):
        mpisyncbn.new_subgroups(1, parent)
    assert status.comm is None


def test_a_rank_that_does_not_answer_is_not_waited_for(monkeypatch):
    """A rank cannot answer if MPI has left it waiting for the rest of a longer message."""
    monkeypatch.setattr(fingerprint, "_PATIENCE", 0.01)
    monkeypatch.setattr(pending, "_kept_alive", [])
    unanswered = SimpleNamespace(Test=lambda: False)
    group = Communicator(MPI.COMM_SELF).ready()
    group.size, group.comm = 2, SimpleNamespace(Iallgather=lambda *_: unanswered)
    with pytest.raises(
        CollectiveMismatchError, match=r"rank 0 on .*: forward of a layer[^$]*rank 1 no answer in"
    ):
        fingerprint.mismatch(group, CALL)
    assert pending._kept_alive[0] is unanswered


@pytest.mark.parametrize("looks", [1, 2, 5])
def test_an_answer_that_takes_a_moment_is_waited_for(looks, monkeypatch):
    """A waiting rank sleeps at most 10 ms at a time: the other rank may share its core."""
    naps, answers = [], iter([False] * (looks - 1) + [True])
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr(fingerprint, "time", clock)
    monkeypatch.setattr(pending, "_kept_alive", [])
    group = Communicator(MPI.COMM_SELF).ready()
    group.comm = SimpleNamespace(Iallgather=lambda *_: SimpleNamespace(Test=lambda: next(answers)))
    with pytest.raises(CollectiveMismatchError, match=r"rank 0 on .*: forward of a layer"):
        fingerprint.mismatch(group, CALL)
    assert len(naps) == looks - 1
    assert all(0 < nap <= 0.01 for nap in naps)
    assert not pending._kept_alive
