"""Rare errors, such as those of an MPI without threads, a forked process or wrong ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mpisyncbn
from mpisyncbn import MPISyncBNError, uneven
from mpisyncbn.comm import staging
from mpisyncbn.distributed import host_tensors, process_group, rendezvous, work
from support.ranks import WORLD, several

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = pytest.mark.usefixtures("world")


@several
def test_rows_that_cannot_be_shared_out() -> None:
    x = torch.zeros(SIZE + 1, 2)
    with pytest.raises(ValueError, match=f"expected rows for {SIZE} equal parts, got {SIZE + 1}"):
        dist.all_to_all_single(torch.zeros(SIZE, 2), x)


def test_an_mpi_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    serialized = SimpleNamespace(Query_thread=lambda: 2, THREAD_MULTIPLE=3)
    monkeypatch.setattr(uneven, "mpi", lambda: serialized)
    with (
        pytest.raises(MPISyncBNError, match=r"join\(\) needs MPI_THREAD_MULTIPLE, MPI provides level 2"),
        mpisyncbn.distributed.join(model),
    ):
        pass


def test_torch_counts_otherwise() -> None:
    options = SimpleNamespace(global_ranks_in_group=[], group_rank=RANK + 1, group_size=SIZE + 1)
    with pytest.raises(
        ValueError, match=f"calls this rank {RANK + 1} of {SIZE + 1}, MPI {RANK} of {SIZE}: unset RANK"
    ):
        process_group.create_process_group(options, None)


def test_ranks_are_found_once() -> None:
    found: Any = rendezvous._find_by_mpi("mpi4py://", timedelta(seconds=60))
    store, rank, size = next(found)
    with pytest.raises(RuntimeError, match="cannot find other ranks than it has found"):
        next(found)
    del store
    assert (rank, size) == (RANK, SIZE)


def test_a_message_on_a_device_that_mpi_does_not_know() -> None:
    with pytest.raises(MPISyncBNError, match="expected CUDA or ROCm memory, got an array on meta"):
        staging.DeviceMessage(None, 1, 3, torch.zeros(3, device="meta"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_host_memory_for_a_sparse_result() -> None:
    sparse = torch.sparse_coo_tensor(size=(2, 2), device="meta")
    with pytest.raises(TypeError, match=r"expected a dense tensor, got one of layout torch\.sparse_coo"):
        host_tensors.host_output_for(sparse)


def test_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = work.CollectiveThread("of the parent")
    monkeypatch.setattr(os, "getpid", lambda: thread._process + 1)
    with pytest.raises(MPISyncBNError, match="a forked process cannot use the process groups"):
        thread.submit(lambda: None, work.Work(None, "all_reduce"))


def test_an_mpi_that_fails() -> None:
    group: Any = dist.group.WORLD

    def fail(_: Any) -> None:
        raise group._collective_group.mpi_error(1)

    with pytest.raises(MPISyncBNError, match="MPI failed in all_reduce"):
        group._call_mpi("all_reduce", fail)
