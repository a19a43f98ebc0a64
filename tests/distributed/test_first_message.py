"""A rank that does not come to ``init_process_group`` or ``new_group`` ends the job in time."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

import mpisyncbn
import mpisyncbn.distributed
from mpisyncbn.liveness import watchdog
from support.jobs import End
from support.ranks import WORLD, several, starts_mpiexec, together

RANK, SIZE = WORLD.rank, WORLD.size


@starts_mpiexec
def test_a_rank_that_does_not_come(run_job: Callable[..., End]) -> None:
    code = """
import time, mpisyncbn
from datetime import timedelta
from mpi4py import MPI
time.sleep(1000 * MPI.COMM_WORLD.rank)
mpisyncbn.init_process_group(timeout=timedelta(seconds=2))
"""
    done = run_job("-c", code, ranks=2)
    assert done.status == 124
    for said in (
        r"\(the limit is 2 s, timeout=\) .*, init_process_group$",
        "^  rank 1 has not come: its process",
    ):
        assert re.search(said, done.stderr, re.MULTILINE), done.stderr


@several
def test_every_first_message_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """``timeout=`` is the limit if given, else ``MPISYNCBN_TIMEOUT``. Only the group is awaited."""
    seen, world, last, first_message = [], tuple(range(SIZE)), [SIZE - 1], watchdog.first_message

    def noted(status: Any, ranks: list[int], seconds: float, *call: str) -> Any:
        seen.extend((name, tuple(ranks), seconds) for name in call)
        return first_message(status, ranks, seconds, *call)

    monkeypatch.setattr(watchdog, "first_message", noted)
    monkeypatch.setenv("MPISYNCBN_TIMEOUT", "77")
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    dist.new_group()
    dist.new_group(last, timeout=timedelta(seconds=50))
    dist.new_group(last, backend="gloo")
    dist.group.WORLD.split_group(last, timedelta(seconds=40))
    dist.destroy_process_group()
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    dist.destroy_process_group()
    with together():
        whole, part = "init_process_group", "new_group"
        assert list(dict.fromkeys(seen)) == [
            (whole, world, 60.0),
            (part, world, 77.0),
            *((part, (SIZE - 1,), seconds) for seconds in (50.0, 77.0, 40.0) if RANK in last),
            (whole, world, 30.0),
        ]
