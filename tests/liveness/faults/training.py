"""One rank fails in a training program of torch, and the others wait for it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .case import case, ends_job, traceback
from .job import Job, sleep

if TYPE_CHECKING:
    import torch

_RAISED = r"RuntimeError: no more of it"


def _net() -> torch.nn.Sequential:
    import torch

    import mpisyncbn

    layers = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    net = torch.nn.Sequential(*layers)
    mpisyncbn.convert_sync_batchnorm(net)
    return net


def _step(net: torch.nn.Module, batch: torch.Tensor) -> None:
    net(batch).sum().backward()


def _raise(job: Job) -> None:
    if job.is_at_fault:
        job.fault()
        raise RuntimeError("no more of it")


@case(2, says=[_RAISED, ends_job(2), traceback("hook")], status=1)
def backward_hook(job: Job) -> None:
    """raises in a hook of backward"""
    import torch

    net = _net()

    def hook(_: Any) -> None:
        _raise(job)

    next(net.parameters()).register_hook(hook)
    job.train(lambda: _step(net, torch.randn(2 + job.rank, 3)))


@case(1, says=[_RAISED, ends_job(1), traceback("step")], status=1)
def optimizer_step(job: Job) -> None:
    """raises in the optimizer's step"""
    import torch

    class Optimizer(torch.optim.SGD):
        def step(self, *arguments: Any) -> Any:
            _raise(job)
            return super().step(*arguments)

    net = _net()
    optimizer = Optimizer(net.parameters(), lr=0.1)

    def train() -> None:
        _step(net, torch.randn(2 + job.rank, 3))
        optimizer.step()

    job.train(train)


@case(0, says=[_RAISED, ends_job(0), "DataLoader worker"], status=1)
def loader_worker(job: Job) -> None:
    """raises in a DataLoader's worker"""
    _load(job, lambda: _raise(job))


@case(
    3,
    says=[r"RuntimeError: DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)", ends_job(3)],
    status=1,
)
def loader_worker_killed(job: Job) -> None:
    """loses its DataLoader's worker to SIGKILL"""

    def fail() -> None:
        if job.is_at_fault:
            job.fault()
            os.kill(os.getpid(), signal.SIGKILL)

    _load(job, fail)


def _load(job: Job, fail: Callable[[], None]) -> None:
    from torch import Tensor, randn
    from torch.utils.data import DataLoader, IterableDataset

    class Data(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for step in range(1000):
                if step == 10:
                    fail()
                yield randn(3)

    net = _net()
    # With one batch prefetched, the worker starts a batch after the last one has arrived. Torch
    # reports a worker that dies while a batch is received as a broken connection.
    batches = DataLoader(Data(), batch_size=2 + job.rank, num_workers=1, prefetch_factor=1)
    for batch in batches:
        _step(net, batch)


@case(1, says=[_RAISED, ends_job(1)], status=1)
def distributed(job: Job) -> None:
    """raises under DistributedDataParallel, with init_process_group()"""
    _train_distributed(job, lambda: _raise(job))


@case(2, says=[r"^(mpisyncbn:|  rank 2\b).* has left the program"], status=1)
def distributed_end(job: Job) -> None:
    """comes to its end with fewer batches, under DistributedDataParallel"""

    def end() -> None:
        if job.is_at_fault:
            job.fault()
            sys.exit()

    _train_distributed(job, end)


@case(
    3,
    says=[
        "CollectiveTimeoutError: all_reduce .* waited 3 s",
        r"^(\[rank\d\]: )?  rank 3 on \S+ is missing: .* is at .*, line \d+, in \w+$",
        traceback("distributed_wait"),
    ],
    status=1,
    variables={"MPISYNCBN_TIMEOUT": "3"},
)
def distributed_wait(job: Job) -> None:
    """sleeps where the others are in an all_reduce of torch.distributed"""
    import torch
    from torch.distributed import all_reduce

    import mpisyncbn

    mpisyncbn.init_process_group()
    all_reduce(torch.ones(3))
    if job.is_at_fault:
        job.fault()
        sleep()
    all_reduce(torch.ones(3))


def _train_distributed(job: Job, fail: Callable[[], None]) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import mpisyncbn

    mpisyncbn.init_process_group()
    net = DistributedDataParallel(_net())
    for _ in range(3):
        _step(net, torch.randn(2 + job.rank, 3))
    fail()
    job.train(lambda: _step(net, torch.randn(2 + job.rank, 3)))
