"""The argument of a case's program: the rank, whether it is at fault, and training steps."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from .case import Case

SIZE = 4


class Job:
    def __init__(self, case: Case) -> None:
        from mpi4py import MPI

        self.world = MPI.COMM_WORLD
        self.rank: int = self.world.rank
        self.is_at_fault = self.rank in case.at_fault
        if self.is_at_fault:
            os.environ.update(case.own_variables)
        import mpisyncbn  # noqa: F401 (as programs do at their top)

        if self.world.size != SIZE:
            raise RuntimeError(f"expected {SIZE} ranks, got {self.world.size}: mpiexec is another library's")

    def fault(self) -> None:
        """Mark the time of the fault by a file. The time until the job ends counts from there."""
        Path(f"fault-{os.getpid()}").touch()

    def step(self, group: Any = None, channels: int = 3, dtype: str = "float32") -> None:
        """Do one exchange forward, one backward. Collective: every rank of the group must call."""
        from mpisyncbn import functional

        x = np.random.default_rng(self.rank).normal(size=(2 + self.rank, channels, 5)).astype(dtype)
        y, stats = functional.batch_norm_forward(x, process_group=group)
        functional.batch_norm_backward(y, x, stats, process_group=group)

    def steps(self, count: int = 3) -> None:
        for _ in range(count):
            self.step()

    def after_steps(self, action: Callable[[], object], others: Callable[[], object] | None = None) -> None:
        """The ranks at fault do ``action`` after three steps. Others train, or do ``others``."""
        self.steps()
        if self.is_at_fault:
            self.fault()
            action()
        else:
            (others or self.train)()

    def train(self, step: Callable[[], object] | None = None) -> NoReturn:
        """Make steps for ever, so that only the fault can end the job."""
        for _ in itertools.count():
            (step or self.step)()
            time.sleep(0.001)  # there are more ranks than cores
        raise AssertionError


def sleep() -> NoReturn:
    while True:
        time.sleep(1000)
