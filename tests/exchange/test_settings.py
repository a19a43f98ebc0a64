"""Bad process groups and variables, and an MPI that is not ready, are errors on all ranks."""

from __future__ import annotations

import re

import pytest
import torch
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, TransportError, functional
from support.jobs import run_alone
from support.ranks import WORLD, error_of, several

RANK, SIZE = WORLD.rank, WORLD.size
HERE = f" (on rank {RANK} of {SIZE})"
X = torch.zeros(4, 3, 2)


def freed():
    comm = WORLD.Dup()
    comm.Free()
    return comm


NULL = "expected a communicator that contains this rank, got MPI.COMM_NULL"
GROUPS = {
    "COMM_NULL": (lambda: MPI.COMM_NULL, ValueError, NULL),
    "freed": (freed, ValueError, NULL),
    "without this rank": (lambda: WORLD.Split(MPI.UNDEFINED), ValueError, NULL),
    "object": (object, TypeError, "expected process_group to be an mpi4py communicator"),
    "a torch object": (lambda: torch.ones(2), TypeError, "or None (the world), got torch.Tensor"),
    "ranks": (lambda: [0, 1], TypeError, "or None (the world), got builtins.list"),
    "MPI.Group": (lambda: WORLD.group, TypeError, "or None (the world), got mpi4py.MPI.Group"),
}
USERS = {
    "SyncBatchNorm": lambda group: SyncBatchNorm(3, process_group=group),
    "convert": lambda group: mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group),
    "sync_batch_norm": lambda group: mpisyncbn.sync_batch_norm(X, None, None, process_group=group),
    "functional": lambda group: functional.batch_norm_forward(X.numpy(), process_group=group),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", GROUPS)
def test_a_bad_process_group(name, user):
    make, error, words = GROUPS[name]
    group = make()
    with pytest.raises(error, match=re.escape(words) + ".*" + re.escape(HERE)):
        USERS[user](group)


@pytest.mark.parametrize("function", [mpisyncbn.local_rank, lambda comm: mpisyncbn.new_group([0], comm)])
def test_a_bad_comm(function):
    words = r"expected comm to be an mpi4py .*, got builtins\.list.*: mpisyncbn\.new_group\(ranks\) makes"
    with pytest.raises(TypeError, match=words):
        function([0])


@pytest.mark.parametrize("name", ["COMM_NULL", "freed", "object"])
def test_a_communicator_of_a_bad_communicator(name):
    make, error, _ = GROUPS[name]
    words = NULL if error is ValueError else "expected an mpi4py communicator, got builtins.object"
    with pytest.raises(error, match=re.escape(words + HERE)):
        Communicator(make())


@several
@pytest.mark.parametrize("user", USERS)
def test_an_inter_communicator(user):
    side = RANK % 2
    inter = WORLD.Split(side).Create_intercomm(0, WORLD, 1 - side)
    words = f"expected an intra-communicator, got an inter-communicator{HERE}: merge it first"
    with pytest.raises(ValueError, match=re.escape(words)):
        USERS[user](inter)


@pytest.mark.parametrize("everywhere", [True, False], ids=["on every rank", "on one rank"])
@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        (
            "TRANSPORT",
            "device",
            TransportError,
            "MPISYNCBN_TRANSPORT=device asks for .*, or set the variable to auto",
        ),
        (
            "TRANSPORT",
            "gpu",
            ValueError,
            "MPISYNCBN_TRANSPORT must be one of auto, host, device, stream, got 'gpu' .*: correct",
        ),
        (
            "DEBUG",
            "yes",
            ValueError,
            "MPISYNCBN_DEBUG must be one of 0, 1, got 'yes' .*: correct or unset it",
        ),
    ],
)
def test_a_bad_variable_is_an_error_on_every_rank(variable, value, error, words, everywhere, monkeypatch):
    if everywhere or RANK == SIZE - 1:
        monkeypatch.setenv(f"MPISYNCBN_{variable}", value)
    group = Communicator()
    module = SyncBatchNorm(3, process_group=group)
    caught = [error_of(lambda: module(X), error) for _ in range(2)]
    monkeypatch.undo()
    y = module(X)
    for problem in caught:
        assert re.match(words, str(problem))
        assert f"on rank {0 if everywhere else SIZE - 1} of {SIZE}" in str(problem)
    assert y.shape == X.shape


@pytest.mark.parametrize(
    ("variable", "value"), [("TRANSPORT", "HOST"), ("TRANSPORT", " auto "), ("DEBUG", "")]
)
def test_a_variable_is_read_kindly(variable, value, monkeypatch):
    monkeypatch.setenv(f"MPISYNCBN_{variable}", value)
    functional.batch_norm_forward(X.numpy(), process_group=Communicator())


TRY = """
import numpy, mpi4py, mpisyncbn
{before}
for call in (
    lambda: mpisyncbn.functional.batch_norm_forward(numpy.ones((2, 3))),
    lambda: mpisyncbn.Communicator(),
    lambda: mpisyncbn.new_subgroups(),
):
    try:
        call()
    except mpisyncbn.MPISyncBNError as error:
        print(error)
    else:
        print("no error")
{after}
"""
FINALIZED = "MPI is already finalized: synchronized batch norm needs it running; call MPI.Finalize() later"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "mpi4py.rc.initialize = False",
            "from mpi4py import MPI; MPI.Init_thread(MPI.THREAD_MULTIPLE); call(); MPI.Finalize()",
            "MPI is not initialized (mpi4py.rc.initialize is off): call MPI.Init_thread(MPI.THREAD_MULTIPLE)",
        ),
        ("from mpi4py import MPI; MPI.Finalize()", "", FINALIZED),
        ("mpisyncbn.new_subgroups(); from mpi4py import MPI; MPI.Finalize()", "", FINALIZED),
        (
            "mpi4py.rc.thread_level = 'funneled'",
            "",
            f"MPI provides thread level {MPI.THREAD_FUNNELED}, expected at least MPI.THREAD_SERIALIZED "
            f"({MPI.THREAD_SERIALIZED}), because autograd may run backward on another thread "
            "(on rank 0 of 1): ask for it with mpi4py.rc.thread_level",
        ),
    ],
    ids=["not initialized", "finalized", "finalized after use", "threads"],
)
def test_mpi_that_is_not_ready(before, after, words):
    output = run_alone(TRY.format(before=before, after=after))
    lines = output.strip().splitlines()
    assert len(lines) == 3, output
    for line in lines:
        assert line.startswith(words)
