"""A rank that waits too long for the others: it says so, finds out what they are doing, and ends the job.

Two threads see to that, from the first group of several ranks on. The clock looks at the exchange that each
group is in, a few times a second; it makes no call of MPI, so whatever MPI is stuck in cannot hold it up. The
listener answers the questions of other ranks, through the communicator of the group that they ask in. All
that an exchange pays for this is two assignments.

A rank that comes to the end of its program tells its neighbours in each group, and waits until all ranks have
come there, as it would in MPI_Finalize. One that waits in an exchange for a rank that has left then knows
that it waits in vain, and ends the job.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import exits, presence
from .presence import Presence, everyone

__all__ = ["leave", "watch"]

_TICK = 0.25  # seconds between two looks
_JUMP = 5.0  # of a longer time between two looks no more counts: this process was stopped
_LINGERING = 30.0  # seconds for a rank that has failed to come to its end

_lock = threading.Lock()
_threads: list[threading.Thread] = []
_stop = threading.Event()
_keyval: int | None = None


def watch(group: Presence) -> None:
    """Keep an eye on a group from now on."""
    global _keyval
    with _lock:
        if _keyval is None:
            # MPI calls this at the beginning of MPI_Finalize, which a program may call itself.
            MPI = sys.modules["mpi4py.MPI"]
            _keyval = MPI.Comm.Create_keyval(delete_fn=lambda *_: leave())
            MPI.COMM_SELF.Set_attr(_keyval, True)
        if group.size > 1:
            group.begin()
            if not _threads and not _stop.is_set():
                _start()


def _start() -> None:
    MPI = sys.modules["mpi4py.MPI"]
    loops = {"clock": _tick}
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        loops["listener"] = _listen
    for name, loop in loops.items():
        thread = threading.Thread(target=loop, name=f"mpisyncbn {name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is at its end already
            return
        _threads.append(thread)
    exits.install()
    atexit.register(_at_exit)


def _tick() -> None:
    last, lingering = time.monotonic(), 0.0
    while not _stop.wait(_TICK):
        now = time.monotonic()
        elapsed, last = min(now - last, _JUMP), now
        status = exits.status()
        lingering = lingering + elapsed if status and exits.is_over() else 0.0
        if lingering > _LINGERING:
            presence.end_job(
                status, "A rank has failed, and something keeps it from its end: a thread, or a handler"
            )
        for group in everyone():
            if group.look(elapsed):
                group.expire()
            rank = group.gone()
            if rank is not None:
                group.strand(rank)


def _listen() -> None:
    while not _stop.wait(_TICK):
        for group in everyone():
            with group.talking:
                if group.channel is not None and not group.deaf:
                    try:
                        group.listen()
                    except Exception:  # MPI's: the communicator was revoked
                        group.deaf = True


def _at_exit() -> None:
    if exits.status() == 0:
        leave()


def leave() -> None:
    """At the end of the program: wait until all ranks of all groups have come there. Once.

    Collective, as MPI_Finalize is, which follows.
    """
    MPI = sys.modules["mpi4py.MPI"]
    if _stop.is_set() or MPI.Is_finalized():
        return
    _stop.set()
    for thread in _threads:
        if thread is not threading.current_thread():
            thread.join(presence.ENDING)
    waiting = [_leaving(group, MPI) for group in everyone() if group.channel is not None and not group.deaf]
    pause = 1e-5
    while waiting := [all_have for all_have in waiting if not all_have()]:
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def _leaving(group: Presence, MPI: Any) -> Callable[[], bool]:
    """Whether all ranks of a group have come to their end, or MPI says that this will never be."""
    try:
        all_have = group.leave()
    except MPI.Exception:
        return lambda: True

    def is_over() -> bool:
        try:
            return all_have()
        except MPI.Exception:  # a rank is dead, and this MPI lives on
            return True

    return is_over


def _in_child() -> None:
    """A forked process has none of the threads."""
    global _lock, _stop
    _lock, _stop = threading.Lock(), threading.Event()
    _stop.set()
    _threads.clear()
    presence.forget_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
