"""Ranks tell each other what they are doing, and report those that do not answer."""

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
from mpisyncbn import Communicator, SyncBatchNorm, config
from mpisyncbn.liveness import arrivals, rank_status, reports
from mpisyncbn.liveness.rank_status import RankStatus
from support.oracle import local_batch, shard
from support.ranks import WORLD, several

RANK, SIZE = WORLD.rank, WORLD.size


@several
def test_the_status_of_a_rank_while_it_waits():
    group = Communicator().ready()
    layer = SyncBatchNorm(3, process_group=group)
    layer(shard((local_batch(), 3)))
    seen = []
    if RANK == 0:  # the others come when this one waits
        thread = threading.Thread(target=layer, args=(shard((local_batch(), 3)),))
        thread.start()
        while group.rank_status.current_call is None:
            time.sleep(0.001)
        seen = [str(group.rank_status.current_call), group.rank_status.number, group.rank_status.state()]
    WORLD.Barrier()
    if RANK == 0:
        thread.join()
    else:
        layer(shard((local_batch(), 3)))
    assert group.rank_status.current_call is None
    assert group.rank_status.awaited_departed_rank() is None
    if RANK == 0:
        call = "forward of the layer first used in exchange number 1 (3 channels, float32)"
        assert seen[:2] == [call, 2]
        assert seen[2].startswith(f"waits in exchange number 2, {call}, for ")


def test_nothing_is_left_to_see_after_an_error(monkeypatch):
    group = Communicator().ready()
    group.link = None
    monkeypatch.setattr(mpisyncbn.fingerprint, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SyncBatchNorm(3, process_group=group)(shard((local_batch(), 3)))
    assert group.rank_status.current_call is None


def interrupted(*_):
    raise KeyboardInterrupt


def hear(group, until):
    """Receive messages on the test's thread until ``until()`` is true, for at most 20 seconds."""
    end = time.monotonic() + 20
    while not until() and time.monotonic() < end:
        group.listen()
        time.sleep(0.001)


@pytest.fixture
def quiet(monkeypatch):
    """The RankStatus of a group that the watchdog does not watch, and a list of its reports."""
    said = []
    monkeypatch.setattr(reports, "print_report", said.append)
    group = Communicator().ready()
    group.rank_status.unregister()
    return group.rank_status, said


@several
def test_ranks_that_are_asked_answer(quiet):
    group, said = quiet
    group.exchanges, group.current_call = 5, "forward of a layer" if RANK != 1 else None
    if RANK == 0:
        group._ask_at = time.monotonic()
        hear(group, lambda: len(group._answers) == SIZE - 1 and not group._sends)
    else:
        hear(group, lambda: group.asked_by == 0 and not group._sends)
        group._ask_at = time.monotonic()
        group.listen()  # a rank that was asked does not ask
    asked_back = RANK > 0 and (group._asked_at is not None or bool(group._sends))
    WORLD.Barrier()
    assert not asked_back
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
        assert "in test_ranks_that_are_asked_answer" in said[0]


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_that_has_asked_reports_the_answers(asked, monkeypatch):
    """A rank that has asked the others prints their answers, even if another rank has asked it too.

    The other rank may end the job before it prints the answers that it got.
    """
    said, ended = [], []
    monkeypatch.setattr(reports, "print_report", said.append)
    monkeypatch.setattr(reports, "abort_job", lambda *arguments: ended.append(arguments))
    monkeypatch.setattr(rank_status, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(rank_status, "ANSWER_SECONDS", 0.0)
    group = RankStatus(0, 2)
    group.asked_by, group._asked_at, group._answers = 1, 0.0 if asked else None, {1: "is at line 7"}
    group.abort_on_timeout()
    reports_of_answers = [text for text in said if text.startswith("what the ranks of the group")]
    assert [text.splitlines()[-1] for text in reports_of_answers] == ["  rank 1 is at line 7"] * asked
    assert len(ended) == 1


def test_a_rank_in_another_group_says_so():
    here, there = RankStatus(0, 2), RankStatus(0, 2)
    there.exchanges, there.current_call = 7, "backward of b"
    there.register()
    try:
        assert here.state() == (
            "is missing: it has done 0 exchanges of this group, and waits in exchange number 7 of another "
            "one, backward of b"
        )
    finally:
        there.unregister()


@several
def test_a_rank_that_has_left_is_heard_of(quiet):
    """A rank that leaves tells its neighbours, by native code. Here the test sends that message."""
    group, _ = quiet
    if RANK == 0:
        group._send(group.p2p_comm, 1, rank_status._DEPARTED, "10")
        hear(group, lambda: not group._sends)
    if RANK == 1:
        hear(group, lambda: group.departed)
    WORLD.barrier()
    assert group.departed == ({0: 10} if RANK == 1 else {})


@several
def test_a_rank_that_has_left_is_missed_in_later_exchanges_only(quiet):
    group, _ = quiet
    group.departed, group.exchanges = {1: 5}, 5
    assert group.awaited_departed_rank() is None
    group.current_call = "forward"
    assert group.awaited_departed_rank() is None  # rank 1 took part in this exchange before it left
    group.exchanges = 6
    assert group.awaited_departed_rank() == 1


def test_the_state_of_a_rank_that_does_not_answer():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    group = RankStatus(0, 4)
    group.process_ids = [
        (*config.machine(), os.getpid()),
        (*config.machine(), child.pid),
        ("elsewhere", "a boot", 1),
    ]
    known = [group._line(1)]
    child.send_signal(signal.SIGSTOP)
    while "alive" in group._line(1):
        time.sleep(0.01)
    known.append(group._line(1))
    child.kill()
    child.communicate()
    known += [group._line(1), group._line(2)]
    group.departed = {2: 3}
    known.append(group._line(2))
    here = f"  rank 1 on {socket.gethostname()} is missing: no answer, its process {child.pid} is"
    assert known == [
        f"{here} alive",
        f"{here} stopped",
        f"{here} gone",
        "  rank 2 on elsewhere is missing: no answer",
        "  rank 2 on elsewhere is missing: no answer, it has left the program",
    ]


@several
def test_a_rank_missing_in_the_first_exchange_is_named():
    """A missing rank is named with the oldest of its processes: the others are its children."""
    ranks, late = list(range(SIZE)), SIZE - 1
    process = WORLD.bcast(os.getpid(), late)

    def seen(*here):
        with contextlib.ExitStack() as marks:
            for group in here:
                marks.enter_context(arrivals.mark_arrival(group))
            WORLD.barrier()
            found = arrivals.describe_missing(ranks)
            WORLD.barrier()
            return found

    with subprocess.Popen(["sleep", "60"]) as worker:
        without_one = seen(*([] if late == RANK else [ranks]), [late])
        everybody = seen(ranks)
        worker.kill()
    elsewhere = arrivals.describe_missing([SIZE])
    assert without_one == {late: f"has not come: its process {process} is alive"}
    assert everybody == {}
    assert elsewhere == {SIZE: "may have come, on another host: no process of it is on this one"}
