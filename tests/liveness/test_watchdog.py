"""What the watchdog knows of groups, and what ranks tell each other. scripts/faults lets it end jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, attendance, leftovers, presence, watchdog
from mpisyncbn.communicator import resolve
from mpisyncbn.presence import DEFAULT_TIMEOUT, Presence, agreed_timeout
from support.oracle import local_batch, shard
from support.ranks import WORLD

RANK, SIZE = WORLD.rank, WORLD.size
needs_two_ranks = pytest.mark.skipif(SIZE < 2, reason="one rank has nobody to wait for")


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


@needs_two_ranks
def test_a_limit_given_to_one_rank_holds_for_all(monkeypatch):
    """Open MPI hands the environment to the ranks of the first host only."""
    monkeypatch.delenv("MPISYNCBN_TIMEOUT", raising=False)
    if RANK == SIZE - 1:
        monkeypatch.setenv("MPISYNCBN_TIMEOUT", "77")
    group = Communicator().ready()
    assert group.presence.limit == 77


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
    assert f"MPISYNCBN_TIMEOUT must be seconds, or 0 for any, got {value!r}" in str(problem)
    assert f"on rank 0 of {SIZE}" in str(problem)


def test_waiting_counts_in_one_exchange_only():
    group = Presence(0, 2)
    group.limit = 10.0
    waits = [group.look(4.0)]
    group.doing, group.exchanges = "forward", 1
    waits += [group.look(4.0) for _ in range(3)]  # the first look sees it begin
    group.exchanges = 2
    waits += [group.look(4.0) for _ in range(3)]
    group.doing = None
    waits += [group.look(100.0)]
    group.doing = "backward"
    waits += [group.look(4.0) for _ in range(3)]
    assert waits == [False] * 11
    assert group.look(4.0)


def test_no_limit_is_no_limit():
    group = Presence(0, 2)
    group.limit, group.doing = 0.0, "forward"
    assert not any(group.look(1e6) for _ in range(3))


def test_time_in_which_the_process_was_stopped_is_not_waited(monkeypatch):
    """A suspended job goes on where it was."""
    looks = []
    group = Presence(0, 2)
    monkeypatch.setattr(group, "look", lambda elapsed: looks.append(elapsed))
    monkeypatch.setattr(watchdog, "everyone", lambda: [group])
    monkeypatch.setattr(watchdog, "_stop", Ticks(3))
    monkeypatch.setattr(time, "monotonic", Clock([0.0, 0.25, 3600.0, 3600.25]))
    watchdog._tick()
    assert looks == [0.25, watchdog._JUMP, 0.25]


class Clock:
    """Times for this thread; others see what they always do."""

    def __init__(self, times):
        self.times, self.thread, self.others = iter(times), threading.get_ident(), time.monotonic

    def __call__(self):
        return next(self.times) if threading.get_ident() == self.thread else self.others()


class Ticks:
    """An event that is set after so many looks of this thread; the watchdog's own go on as ever."""

    def __init__(self, looks):
        self.looks, self.thread, self.others = looks, threading.get_ident(), watchdog._stop

    def wait(self, seconds):
        if threading.get_ident() != self.thread:
            return self.others.wait(seconds)
        self.looks -= 1
        return self.looks < 0


@needs_two_ranks
def test_what_a_rank_is_doing_can_be_seen_while_it_waits():
    group = Communicator().ready()
    layer = SyncBatchNorm(3, process_group=group)
    layer(shard((local_batch(), 3)))
    seen = []
    if RANK == 0:  # the others come when this one waits
        thread = threading.Thread(target=layer, args=(shard((local_batch(), 3)),))
        thread.start()
        while group.presence.doing is None:
            time.sleep(0.001)
        seen = [str(group.presence.doing), group.presence.number, group.presence.state()]
    WORLD.Barrier()
    if RANK == 0:
        thread.join()
    else:
        layer(shard((local_batch(), 3)))
    assert group.presence.doing is None
    assert group.presence.gone() is None
    if RANK == 0:
        call = "forward of the layer first used in exchange number 1 (3 channels, float32)"
        assert seen[:2] == [call, 2]
        assert seen[2].startswith(f"waits in exchange number 2, {call}, for ")


def test_nothing_is_left_to_see_after_an_error(monkeypatch):
    group = Communicator().ready()
    group.link = None
    monkeypatch.setattr(mpisyncbn.diagnostics, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SyncBatchNorm(3, process_group=group)(shard((local_batch(), 3)))
    assert group.presence.doing is None


def interrupted(*_):
    raise KeyboardInterrupt


def hear(group, until):
    """Listen in the test's own thread for as long as it takes."""
    end = time.monotonic() + 20
    while not until() and time.monotonic() < end:
        group.listen()
        time.sleep(0.001)


@pytest.fixture
def quiet(monkeypatch):
    """A group that the threads leave alone, and what is said about it."""
    said = []
    monkeypatch.setattr(presence, "say", said.append)
    group = Communicator().ready()
    group.presence.end()
    return group.presence, said


@needs_two_ranks
def test_ranks_that_are_asked_say_what_they_do(quiet):
    group, said = quiet
    group.exchanges, group.doing = 5, "forward of a layer" if RANK != 1 else None
    if RANK == 0:
        group._ask_at = time.monotonic()
        hear(group, lambda: len(group._answers) == SIZE - 1 and not group._sends)
    else:
        hear(group, lambda: group._was_asked and not group._sends)
    WORLD.Barrier()
    if RANK == 0:
        lines = [group._line(rank) for rank in range(SIZE)]
        host = socket.gethostname()
        assert lines[0].startswith(
            f"  rank 0 on {host} waits in exchange number 5, forward of a layer, for 0 s"
        )
        assert lines[1].startswith(
            f"  rank 1 on {host} is missing: it has done 5 exchanges of this group, and is at {__file__}"
        )
        assert all("waits in exchange number 5, forward of a layer" in line for line in lines[2:])
        assert said == []
    else:
        assert len(said) == 1
        assert f"rank {RANK} of {SIZE} on {socket.gethostname()} was asked by rank 0, which has" in said[0]
        assert "Python stack of MainThread, innermost call last:" in said[0]
        assert "in test_ranks_that_are_asked_say_what_they_do" in said[0]


@needs_two_ranks
def test_who_was_asked_does_not_ask(quiet):
    group, _ = quiet
    if RANK == 0:
        group._ask_at = time.monotonic()
        hear(group, lambda: len(group._answers) == SIZE - 1 and not group._sends)
    else:
        hear(group, lambda: group._was_asked and not group._sends)
        group._ask_at = time.monotonic()
        group.listen()
        assert group._asked_at is None
        assert not group._sends


def test_a_rank_in_another_group_says_so():
    here, there = Presence(0, 2), Presence(0, 2)
    there.exchanges, there.doing = 7, "backward of b"
    there.begin()
    try:
        assert here.state() == (
            "is missing: it has done 0 exchanges of this group, and waits in exchange number 7 of another "
            "one, backward of b"
        )
    finally:
        there.end()


@needs_two_ranks
def test_a_rank_that_has_left_is_heard_of(quiet):
    """By its neighbours, to which native code says so."""
    group, _ = quiet
    if RANK == 0:
        group._send(1, presence._LEFT, "10")
        hear(group, lambda: not group._sends)
    if RANK == 1:
        hear(group, lambda: group.left)
    WORLD.barrier()
    assert group.left == ({0: 10} if RANK == 1 else {})


@needs_two_ranks
def test_a_rank_that_has_left_is_missed_in_later_exchanges_only(quiet):
    group, _ = quiet
    group.left, group.exchanges = {1: 5}, 5
    assert group.gone() is None
    group.doing = "forward"
    assert group.gone() is None  # it was in this one too, and done with it sooner
    group.exchanges = 6
    assert group.gone() == 1


def test_what_is_known_of_a_rank_that_does_not_answer():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    group = Presence(0, 4)
    group.homes = [(socket.gethostname(), os.getpid()), (socket.gethostname(), child.pid), ("elsewhere", 1)]
    known = [group._line(1)]
    child.send_signal(signal.SIGSTOP)
    while "alive" in group._line(1):
        time.sleep(0.01)
    known.append(group._line(1))
    child.kill()
    child.communicate()
    known += [group._line(1), group._line(2)]
    group.left = {2: 3}
    known.append(group._line(2))
    here = f"  rank 1 on {socket.gethostname()} is missing: no answer, its process {child.pid} is"
    assert known == [
        f"{here} alive",
        f"{here} stopped",
        f"{here} gone",
        "  rank 2 on elsewhere is missing: no answer",
        "  rank 2 on elsewhere is missing: no answer, it has left the program",
    ]


@needs_two_ranks
def test_who_has_not_come_to_the_first_exchange_is_named():
    """By its process, which is older than those it started."""
    ranks, late = list(range(SIZE)), SIZE - 1
    process = WORLD.bcast(os.getpid(), late)

    def seen(*here):
        with contextlib.ExitStack() as marks:
            for group in here:
                marks.enter_context(attendance.mark(group))
            WORLD.barrier()
            found = attendance.absent(ranks)
            WORLD.barrier()
            return found

    with subprocess.Popen(["sleep", "60"]) as worker:
        without_one = seen(*([] if late == RANK else [ranks]), [late])
        everybody = seen(ranks)
        worker.kill()
    elsewhere = attendance.absent([SIZE])
    assert without_one == {late: f"has not come: its process {process} is alive"}
    assert everybody == {}
    assert elsewhere == {SIZE: "may have come, on another host: no process of it is on this one"}


@needs_two_ranks
def test_groups_know_their_ranks_of_the_world_before_they_meet(ending):
    """For then they cannot be asked."""
    order = list(reversed(range(SIZE)))
    comm = WORLD.Split(0, key=-RANK)
    group = Communicator(comm)
    assert group._world_ranks() == order
    waiting = Presence(comm.rank, SIZE)
    waiting.world, waiting.doing = order, "the first message of a group"
    with pytest.raises(Ended):
        waiting.expire()
    WORLD.barrier()
    lines = ending[1].splitlines()
    assert lines[0] == "the other ranks could not be asked before the first exchange"
    assert [line.split(" has not come: its process ")[0] for line in lines[1:]] == [
        f"  rank {rank}" for rank in range(SIZE)
    ]


class Ended(Exception):
    """The job did."""


@pytest.fixture
def ending(monkeypatch):
    """What is said and how the job ends, if it does."""
    said = []

    def end_job(status, cure):
        said.append((status, cure))
        raise Ended

    monkeypatch.setattr(presence, "say", said.append)
    monkeypatch.setattr(presence, "end_job", end_job)
    monkeypatch.setattr(presence, "ASKING", 0.01)
    monkeypatch.setattr(presence, "ANSWERING", 0.01)
    return said


def test_a_rank_that_waited_too_long_says_so_and_ends_the_job(ending):
    group = Presence(1, 4)
    group.limit, group.doing, group.exchanges, group._waited = 3.0, "forward of bn1", 12, 3.25
    with pytest.raises(Ended):
        group.expire()
    host = socket.gethostname()
    assert ending[0].startswith(
        f"rank 1 of 4 on {host} has waited 3.2 s (the limit is 3 s, MPISYNCBN_TIMEOUT) for other ranks of "
        "its group in exchange number 12, forward of bn1\nPython stack of "
    )
    assert "Python stack of MainThread, innermost call last:\n" in ending[0]
    assert ending[1] == "the other ranks could not be asked before the first exchange"
    assert ending[2][0] == presence.TIMED_OUT


def test_a_rank_that_waits_in_vain_says_so_and_ends_the_job(ending):
    group = Presence(1, 4)
    group.doing, group.exchanges, group.left = "forward of bn1", 12, {3: 11}
    with pytest.raises(Ended):
        group.strand(group.gone())
    assert (
        f"rank 1 of 4 on {socket.gethostname()} waits in exchange number 12, forward of bn1, in vain"
        in ending[0]
    )
    assert "rank 3 has left the program after exchange number 11" in ending[0]
    assert ending[1][0] == presence.STRANDED


@pytest.mark.parametrize(("status", "over"), [(1, True), (1, False), (0, True)])
def test_a_rank_that_failed_and_lingers_ends_the_job(status, over, ending, monkeypatch):
    monkeypatch.setattr(watchdog.exits, "status", lambda: status)
    monkeypatch.setattr(watchdog.exits, "is_over", lambda: over)
    monkeypatch.setattr(watchdog, "everyone", list)
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


def test_nobody_waits_for_what_never_returns():
    release = threading.Event()
    presence.within(0.01, release.wait)
    release.set()


def test_groups_of_one_rank_are_not_watched():
    group = resolve(WORLD.Split(RANK)).ready()
    assert group.presence not in presence.everyone()


def test_groups_are_watched_until_they_are_freed():
    group = Communicator().ready()
    watched = [group.presence in presence.everyone()]
    group.free()
    watched.append(group.presence in presence.everyone())
    assert watched == [SIZE > 1, False]


def test_what_nobody_uses_any_more_is_given_back():
    x = shard((local_batch(), 3))
    SyncBatchNorm(3, process_group=Communicator())(x)
    before = len(leftovers._kept)
    for _ in range(20):
        SyncBatchNorm(3, process_group=Communicator())(x)
    assert len(leftovers._kept) == before


@needs_two_ranks
def test_what_one_rank_uses_still_is_not_given_back():
    x = shard((local_batch(), 3))
    group = Communicator()
    SyncBatchNorm(3, process_group=group)(x)
    kept = group.presence
    if RANK:
        del group
    for _ in range(3):
        Communicator().ready()
    alive = kept.comm is not None
    if not RANK:
        del group
    for _ in range(2):
        Communicator().ready()
    assert alive
    assert kept.comm is None


def test_a_duplicate_outlives_the_communicator_it_was_made_of():
    comm = WORLD.Dup()
    layer = SyncBatchNorm(3, process_group=comm)
    x = shard((local_batch(), 3))
    layer(x)
    comm.Free()
    Communicator().ready()
    layer(x)
    kept = layer.communicator.presence
    del layer
    Communicator().ready()
    assert kept.comm is None
