"""A rank that waits too long for others asks what they are doing, reports that, and ends the job.

Two threads do this, from the first group of several ranks on. The clock looks a few times a second
at the exchange that each group is in. It makes no call of MPI, so it goes on if MPI is stuck. The
listener answers the questions of other ranks, on the communicator of the group that they ask in.
This costs an exchange two assignments.

A rank at the end of its program tells its neighbours in each group, and waits until all ranks are
there. It does so in MPI_Finalize, by native code (kernels/cpu/leave.h), after all exit handlers of
the program. A rank that waits in an exchange for a departed rank then knows that it waits in vain,
and ends the job.
"""

from __future__ import annotations

import atexit
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

from ..kernels import link, native
from . import arrivals, exits, reports
from .rank_status import RankStatus, all_statuses, forget_all

__all__ = ["first_message", "forked", "watch"]

_TICK = 0.25  # seconds between two looks
_JUMP = 5.0  # seconds that count at most between two looks: the process was stopped for the rest
_LINGERING = 30.0  # seconds that a failed rank may take to end

_lock = threading.Lock()
_threads: list[threading.Thread] = []
_stop = threading.Event()
_keyval: int | None = None


def watch(rank_status: RankStatus) -> None:
    """Watch this rank in a group from now on."""
    global _keyval
    with _lock:
        if _keyval is None:
            MPI = sys.modules["mpi4py.MPI"]
            _install_finalize_hook(MPI)
            # MPI calls this at the beginning of MPI_Finalize, if the program calls that itself.
            _keyval = MPI.Comm.Create_keyval(delete_fn=lambda *_: _finalizing())
            MPI.COMM_SELF.Set_attr(_keyval, True)
        if rank_status.size > 1:
            rank_status.register()
            if not _threads and not _stop.is_set():
                _start()


@contextmanager
def first_message(
    rank_status: RankStatus, world: list[int], seconds: float, call: str = "the first message of a group"
) -> Iterator[None]:
    """A context for the first message of a group, which ends the job if a rank does not come to it.

    Args:
        rank_status: this rank in the group. It stays watched, unless the body fails.
        world: the rank in the world of each rank of the group; empty if that is not known.
        seconds: how long to wait; 0: for ever.
        call: what this rank is in, for reports, unless it is in a call of the group already.
    """
    rank_status.timeout, rank_status.world = seconds, world
    watch(rank_status)
    before = rank_status.current_call
    rank_status.current_call = before or call
    try:
        with arrivals.mark_arrival(world):
            yield
    except BaseException:
        rank_status.unregister()
        raise
    finally:
        rank_status.current_call = before


def _start() -> None:
    """Start the threads."""
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
    """The clock's thread: end the job if this rank waits too long or in vain, or does not end."""
    last, lingering = time.monotonic(), 0.0
    while not _stop.wait(_TICK):
        now = time.monotonic()
        elapsed, last = min(now - last, _JUMP), now
        status = exits.status()
        lingering = lingering + elapsed if status and exits.is_over() else 0.0
        if lingering > _LINGERING:
            reports.abort_job(
                status, "A rank has failed, and something keeps it from its end: a thread, or a handler"
            )
        for rank_status in all_statuses():
            if rank_status.add_wait(elapsed):
                rank_status.abort_on_timeout()
            rank = rank_status.awaited_departed_rank()
            if rank is not None:
                rank_status.abort_on_departed(rank)


def _listen() -> None:
    """The listener's thread: receive and answer the messages of other ranks."""
    while not _stop.wait(_TICK):
        for rank_status in all_statuses():
            with rank_status.p2p_lock:
                if rank_status.listening:
                    try:
                        rank_status.listen()
                    except Exception:  # MPI's: the communicator was revoked
                        rank_status.listening = False


def _install_finalize_hook(MPI: ModuleType) -> None:
    """Let MPI_Finalize call native code before it does anything else."""
    kernels = native()
    if kernels is None:
        return
    names = "Comm_create_keyval", "Comm_set_attr", "Issend", "Improbe", "Mrecv", "Ibarrier", "Test", "Abort"
    with suppress(AttributeError, OSError):  # without the hook, MPI_Finalize runs no native code
        functions = link.addresses(MPI, *[f"MPI_{name}" for name in names])
        own, world, byte = (link.handle(MPI, each) for each in (MPI.COMM_SELF, MPI.COMM_WORLD, MPI.BYTE))
        int_handles = MPI._sizeof(MPI.COMM_SELF) == 4
        kernels.install_finalize_hook(functions, own, world, byte, MPI.ANY_SOURCE, int_handles)


def _at_exit() -> None:
    # Later exit handlers may use groups. After them Python collects garbage and calls _at_last.
    gc.enable()
    gc.callbacks.append(_at_last)


def _at_last(*_: object) -> None:
    if sys.is_finalizing():  # the threads are gone
        gc.callbacks.remove(_at_last)
        _hand_to_native_code()


def _finalizing() -> None:
    """End the threads: the program has called MPI_Finalize itself."""
    if not _stop.is_set():
        _stop.set()
        for thread in _threads:
            if thread is not threading.current_thread():
                thread.join(reports.ABORT_SECONDS)
        _hand_to_native_code()


def _hand_to_native_code() -> None:
    """Tell native code which groups this rank departs from, after how many exchanges."""
    kernels = native()
    if kernels is None:
        return
    for rank_status in all_statuses():
        if rank_status.p2p_comm is not None and rank_status.all_native and rank_status.listening:
            hostnames = [hostname for hostname, *_ in rank_status.process_ids]
            comm = link.handle(sys.modules["mpi4py.MPI"], rank_status.p2p_comm)
            kernels.add_departing_group(
                comm, rank_status.rank, rank_status.exchanges, rank_status.finalize_timeout, hostnames
            )


def forked() -> None:
    """Note that this process was forked: it has none of the threads."""
    global _lock, _stop
    _lock, _stop = threading.Lock(), threading.Event()
    _stop.set()
    _threads.clear()
    forget_all()
