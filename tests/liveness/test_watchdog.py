"""The watchdog limits how long a rank waits, and ends the job. scripts/faults tries it in jobs."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from mpisyncbn import Communicator, SyncBatchNorm
from mpisyncbn.comm.runtime import world_ranks
from mpisyncbn.liveness import rank_status, reports, watchdog
from mpisyncbn.liveness.rank_status import DEFAULT_TIMEOUT, RankStatus, agreed_timeout
from support.oracle import local_batch, shard
from support.ranks import WORLD, several

RANK, SIZE = WORLD.rank, WORLD.size


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ([None, None], DEFAULT_TIMEOUT),
        ([None, 30.0], 30.0),
        ([40.0, 30.0, None], 30.0),
        ([None, 0.0], 0.0),
        ([0.0, 30.0], 30.0),
    ],
)
def test_ranks_agree_on_the_limit(given, limit):
    assert agreed_timeout(given) == limit


@several
def test_a_limit_given_to_one_rank_holds_for_all(monkeypatch):
    """One rank's limit is enough: Open MPI gives the environment to the first host only."""
    monkeypatch.delenv("MPISYNCBN_TIMEOUT", raising=False)
    if RANK == SIZE - 1:
        monkeypatch.setenv("MPISYNCBN_TIMEOUT", "77")
    group = Communicator().ready()
    assert group.rank_status.timeout == 77


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused_on_every_rank(value, monkeypatch):
    if RANK == 0:
        monkeypatch.setenv("MPISYNCBN_TIMEOUT", value)
    layer = SyncBatchNorm(3, process_group=Communicator())
    problem = None
    try:
        layer(shard((local_batch(), 3)))
    except ValueError as error:
        problem = error
    assert f"MPISYNCBN_TIMEOUT must be seconds, or 0 for no limit, got {value!r}" in str(problem)
    assert f"on rank 0 of {SIZE}" in str(problem)


def test_waiting_counts_in_one_exchange_only():
    group = RankStatus(0, 2)
    group.timeout = 10.0
    waits = [group.add_wait(4.0)]
    group.current_call, group.exchanges = "forward", 1
    waits += [group.add_wait(4.0) for _ in range(3)]  # the first call sees the exchange begin
    group.exchanges = 2
    waits += [group.add_wait(4.0) for _ in range(3)]
    group.current_call = None
    waits += [group.add_wait(100.0)]
    group.current_call = "backward"
    waits += [group.add_wait(4.0) for _ in range(3)]
    assert waits == [False] * 11
    assert group.add_wait(4.0)


def test_no_limit_is_no_limit():
    group = RankStatus(0, 2)
    group.timeout, group.current_call = 0.0, "forward"
    assert not any(group.add_wait(1e6) for _ in range(3))


def test_time_in_which_the_process_was_stopped_is_not_waited(monkeypatch):
    """A job that was suspended goes on: at most 5 seconds of the suspension count as waiting."""
    looks = []
    group = RankStatus(0, 2)
    monkeypatch.setattr(group, "add_wait", lambda elapsed: looks.append(elapsed))
    monkeypatch.setattr(watchdog, "all_statuses", lambda: [group])
    monkeypatch.setattr(watchdog, "_stop", Ticks(3))
    monkeypatch.setattr(time, "monotonic", Clock([0.0, 0.25, 3600.0, 3600.25]))
    watchdog._tick()
    assert looks == [0.25, watchdog._JUMP, 0.25]


class Clock:
    """A clock that gives this thread the given times, and other threads the real time."""

    def __init__(self, times):
        self.times, self.thread, self.others = iter(times), threading.get_ident(), time.monotonic

    def __call__(self):
        return next(self.times) if threading.get_ident() == self.thread else self.others()


class Ticks:
    """An event, set after ``looks`` waits of this thread. Other threads get the real one."""

    def __init__(self, looks):
        self.looks, self.thread, self.others = looks, threading.get_ident(), watchdog._stop

    def wait(self, seconds):
        if threading.get_ident() != self.thread:
            return self.others.wait(seconds)
        self.looks -= 1
        return self.looks < 0


@several
def test_groups_know_their_ranks_of_the_world_before_they_meet(ending):
    """A group knows its ranks in the world before its first exchange, when none can be asked."""
    order = list(reversed(range(SIZE)))
    comm = WORLD.Split(0, key=-RANK)
    group = Communicator(comm)
    assert world_ranks(group._source) == order
    merged = SimpleNamespace(Translate_ranks=lambda *_: [0, MPI.UNDEFINED], Free=lambda: None)
    assert world_ranks(SimpleNamespace(Get_group=lambda: merged)) == [], "one rank is of another world"
    waiting = RankStatus(comm.rank, SIZE)
    waiting.world, waiting.current_call = order, "the first message of a group"
    with pytest.raises(Ended):
        waiting.abort_on_timeout()
    WORLD.barrier()
    lines = ending[1].splitlines()
    assert lines[0] == "the other ranks could not be asked before the first exchange"
    assert [line.split(" has not come: its process ")[0] for line in lines[1:]] == [
        f"  rank {rank}" for rank in range(SIZE)
    ]


class Ended(Exception):
    """Raised in place of ending the job."""


@pytest.fixture
def ending(monkeypatch):
    """The list of reports. At the job's end it gets ``(status, cure)``, and Ended raises."""
    said = []

    def abort_job(status, cure):
        said.append((status, cure))
        raise Ended

    monkeypatch.setattr(reports, "print_report", said.append)
    monkeypatch.setattr(reports, "abort_job", abort_job)
    monkeypatch.setattr(rank_status, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(rank_status, "ANSWER_SECONDS", 0.01)
    return said


def test_a_rank_that_waited_too_long_says_so_and_ends_the_job(ending):
    group = RankStatus(1, 4)
    group.timeout, group.current_call, group.exchanges, group._waited = 3.0, "forward of bn1", 12, 3.25
    with pytest.raises(Ended):
        group.abort_on_timeout()
    host = socket.gethostname()
    assert ending[0].startswith(
        f"rank 1 of 4 on {host} has waited 3.2 s (the limit is 3 s, MPISYNCBN_TIMEOUT) for other ranks of "
        "its group in exchange number 12, forward of bn1\nPython stack of "
    )
    assert "Python stack of MainThread, innermost call last:\n" in ending[0]
    assert ending[1] == "the other ranks could not be asked before the first exchange"
    assert ending[2][0] == rank_status.TIMED_OUT


def test_a_rank_that_waits_in_vain_says_so_and_ends_the_job(ending):
    group = RankStatus(1, 4)
    group.current_call, group.exchanges, group.departed = "forward of bn1", 12, {3: 11}
    with pytest.raises(Ended):
        group.abort_on_departed(group.awaited_departed_rank())
    assert (
        f"rank 1 of 4 on {socket.gethostname()} waits in exchange number 12, forward of bn1, in vain"
        in ending[0]
    )
    assert "rank 3 has left the program after exchange number 11" in ending[0]
    assert ending[1][0] == rank_status.RANK_DEPARTED


@pytest.mark.parametrize(("status", "over"), [(1, True), (1, False), (0, True)])
def test_a_rank_that_failed_and_lingers_ends_the_job(status, over, ending, monkeypatch):
    monkeypatch.setattr(watchdog.exits, "status", lambda: status)
    monkeypatch.setattr(watchdog.exits, "is_over", lambda: over)
    monkeypatch.setattr(watchdog, "all_statuses", list)
    monkeypatch.setattr(watchdog, "_stop", Ticks(10))
    monkeypatch.setattr(time, "monotonic", Clock(range(0, 100, 4)))
    monkeypatch.setattr(watchdog, "_LINGERING", 30.0)
    if status and over:
        with pytest.raises(Ended):
            watchdog._tick()
        assert ending[0][0] == 1
        assert "something keeps it from its end" in ending[0][1]
    else:
        watchdog._tick()
        assert ending == []


def test_a_call_that_never_returns_is_given_up():
    release = threading.Event()
    reports.run_with_timeout(0.01, release.wait)
    release.set()
