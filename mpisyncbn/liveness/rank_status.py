"""The state of this rank in one group, its answers to ranks that ask, and its last report."""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import config
from . import arrivals, reports
from .pending import keep_alive

if TYPE_CHECKING:
    from mpi4py import MPI as mpi4py_MPI

    from ..kernels.cpu._cpu import StreamWorker

__all__ = ["DEFAULT_TIMEOUT", "ProcessId", "RankStatus", "agreed_timeout", "all_statuses", "forget_all"]

ProcessId: TypeAlias = tuple[str, str, int]  # config.machine() and the pid

DEFAULT_TIMEOUT = 600.0
TIMED_OUT, RANK_DEPARTED = 124, 1  # exit statuses of the job; the first is what timeout(1) says
ASK_SECONDS, ANSWER_SECONDS = 1.0, 2.0  # at most, after the timeout
_ASK, _ANSWER, _DEPARTED = 1, 2, 3  # tags, as in kernels/cpu/leave.h; exchanges use none
_MESSAGE_BYTES = 1024

_lock = threading.Lock()
_registered: list[RankStatus] = []


def agreed_timeout(given: list[float | None]) -> float:
    """The timeout of a group in seconds: the shortest of its ranks'; 0 means no timeout.

    ``given`` has None for a rank without the variable: some launchers set it on a few ranks only.
    """
    timeouts = {seconds for seconds in given if seconds is not None}
    return min(timeouts - {0.0}, default=0.0 if timeouts else DEFAULT_TIMEOUT)


def all_statuses() -> list[RankStatus]:
    """This rank's status in each of its groups that the watchdog looks after."""
    with _lock:
        return list(_registered)


class RankStatus:
    """This rank in a group, from its first message until the communicator is freed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.comm: mpi4py_MPI.Intracomm | None = None  # the group's own, while MPI has it
        # For point-to-point messages: ``comm``, or a duplicate if ``comm`` carries others already.
        self.p2p_comm: mpi4py_MPI.Intracomm | None = None
        self.stream: StreamWorker | None = None  # if there is one, it counts exchanges, and may be in one
        self.calls: list[Any] = []  # the calls of ``stream``, by their numbers
        self._exchanges = 0
        self._current_call: object = None
        self.given_up = False  # whether a thread of this rank is left in the group, for nothing
        self.timeout = DEFAULT_TIMEOUT  # seconds, 0: none
        self.timeout_setting = "MPISYNCBN_TIMEOUT"  # the variable or argument that sets ``timeout``
        self.timeout_is_given = False  # whether MPISYNCBN_TIMEOUT is set on any rank
        self.finalize_timeout = DEFAULT_TIMEOUT  # for the wait at the program's end
        self.all_native = False  # whether every rank has native code
        self.process_ids: list[ProcessId] = []  # of each rank
        self.world: list[int] = []  # the ranks' numbers in the world, if known
        self.listening = True  # whether messages from other ranks are received here
        self.departed: dict[int, int] = {}  # exchanges of each rank that is at its program's end
        self.p2p_lock = threading.Lock()  # held while p2p_comm is used
        self._seen, self._waited = -1, 0.0
        self._reported = False
        self.asked_by: int | None = None  # the rank that asked last: it has waited too long
        self._ask_at: float | None = None
        self._asked_at: float | None = None
        self._answers: dict[int, str] = {}
        self._sends: list[mpi4py_MPI.Request] = []

    @property
    def exchanges(self) -> int:
        """How many exchanges this rank has begun."""
        stream = self.stream  # free() may take it away
        return self._exchanges if stream is None else stream.exchanges

    @exchanges.setter
    def exchanges(self, number: int) -> None:
        if self.stream is None:
            self._exchanges = number
        else:
            self._exchanges += number - self.stream.exchanges  # those of the host alone
            self.stream.exchanges = number

    @property
    def calls_begun(self) -> int:
        """How many exchanges the host has begun or enqueued: the same on ranks that do the same."""
        return self._exchanges + (0 if self.stream is None else self.stream.enqueued)

    def align(self) -> None:
        """After an error, count as begun what all ranks have done: some have enqueued more."""
        if self.stream is not None:
            self._exchanges = self.stream.exchanges - self.stream.enqueued

    @property
    def current_call(self) -> object:
        """The collective that this rank is in, whose str() is for reports; or None."""
        if self.given_up:
            return None
        stream = self.stream
        number = -1 if stream is None else stream.current
        return self._current_call if number < 0 else self.calls[number]

    @current_call.setter
    def current_call(self, call: object) -> None:
        self._current_call = call

    def agree_on_timeout(self, given: list[float | None]) -> None:
        """Take the timeout that the ranks of the group were given, or the default."""
        self.timeout = self.finalize_timeout = agreed_timeout(given)
        self.timeout_is_given = any(seconds is not None for seconds in given)

    def register(self) -> None:
        """Let the watchdog watch this group, and answer other ranks in it, from here on."""
        self.listening = True
        with _lock:
            _registered.append(self)

    def unregister(self) -> None:
        """Let the watchdog use this group no more, so that its communicator can be freed."""
        with self.p2p_lock:
            self.listening = False
        with _lock:
            if self in _registered:
                _registered.remove(self)
        keep_alive(*self._sends)

    # Methods of the clock, which make no call of MPI.

    def add_wait(self, elapsed: float) -> bool:
        """Add seconds to the time in this exchange. Return whether it is over the timeout."""
        if self.current_call is None or self._seen != self.exchanges:
            self._seen, self._waited = -1 if self.current_call is None else self.exchanges, 0.0
            return False
        self._waited += elapsed
        return 0 < self.timeout <= self._waited

    def awaited_departed_rank(self) -> int | None:
        """A departed rank that this one waits for in vain; None if there is none."""
        if self.current_call is None:
            return None
        return next((rank for rank, exchanges in self.departed.items() if exchanges < self.exchanges), None)

    def abort_on_timeout(self) -> None:
        """Ask the other ranks what they are doing, report that, and end the job."""
        self.report(
            f"has waited {self._waited:.1f} s (the limit is {self.timeout:g} s, {self.timeout_setting}) for "
            f"other ranks of its group in exchange number {self.number}, {self.current_call}"
        )
        answers = self.ask_others()
        if self._asked_at is not None or self.asked_by is None:  # else the rank that asked prints them
            reports.print_report(answers)
        reports.abort_job(
            TIMED_OUT,
            "Every rank of a group must run the same layers in the same order. If some rank is only slow, "
            f"a larger {self.timeout_setting} gives it more time",
        )

    def ask_others(self) -> str:
        """Ask the other ranks of the group for what they do, and return a line for each.

        One rank is enough to ask. A rank that was asked returns which rank asked it. It takes at
        most ``ASK_SECONDS + ANSWER_SECONDS``.
        """
        start = time.monotonic()
        self._ask_at = start + ASK_SECONDS * self.rank / self.size
        # A rank that asks nobody waits all this time: the one that asks needs it to report.
        while time.monotonic() < start + ASK_SECONDS + ANSWER_SECONDS:
            time.sleep(0.02)
            since = self._asked_at
            if since is not None and (
                len(self._answers) == self.size - 1 or time.monotonic() > since + ANSWER_SECONDS
            ):
                break
        if self._asked_at is not None:
            return "\n".join(["what the ranks of the group were doing:", *map(self._line, range(self.size))])
        if self.asked_by is not None:
            return f"rank {self.asked_by}, which asked first, reports what the ranks of the group were doing"
        missing = "" if self.p2p_comm else self._before_the_first()
        return f"the other ranks could not be asked{missing}"

    def abort_on_departed(self, rank: int) -> None:
        """Report that this rank waits for one that has departed, and end the job."""
        self.report(
            f"waits in exchange number {self.number}, {self.current_call}, in vain: rank {rank}"
            f"{self._on_host(rank)} has left the program after exchange number {self.departed[rank]}"
        )
        reports.abort_job(RANK_DEPARTED, "Every rank of a group must run the same number of training steps")

    # Methods of the listener: messages between two ranks.

    def listen(self) -> None:
        """Receive and answer the messages of other ranks, if there is a communicator."""
        comm = self.p2p_comm
        if comm is None:
            return
        MPI = sys.modules["mpi4py.MPI"]
        heard, status = np.zeros(_MESSAGE_BYTES, np.uint8), MPI.Status()
        # Python may end this thread between two calls: Iprobe leaves the message to native code.
        while comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            source, tag = status.Get_source(), status.Get_tag()
            comm.Recv(heard, source, tag)
            text = heard.tobytes().rstrip(b"\0").decode(errors="replace")
            if tag == _ASK:
                self.asked_by = source
                self._send(comm, source, _ANSWER, self.state())
                self.report(f"was asked by rank {source}, which has waited too long: it {self.state()}")
            elif tag == _ANSWER:
                self._answers[source] = text
            else:
                self.departed[source] = int(text)
        self._sends = [request for request in self._sends if not request.Test()]
        if self._ask_at is not None and time.monotonic() >= self._ask_at and self.asked_by is None:
            self._ask_at, self._asked_at = None, time.monotonic()
            for rank in range(self.size):
                if rank != self.rank:
                    self._send(comm, rank, _ASK, str(self.rank))

    def _send(self, comm: mpi4py_MPI.Intracomm, rank: int, tag: int, text: str) -> None:
        message = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
        self._sends.append(comm.Issend(message, rank, tag))

    # The words of reports and answers.

    @property
    def number(self) -> int:
        """The number of the exchange that this rank is in, from 1."""
        return max(self.exchanges, 1)  # the first is counted once the group is made

    def state(self) -> str:
        """The words of a report that follow "rank 0" and say what this rank is doing."""
        call, exchanges = self.current_call, self.exchanges
        if call is not None:
            return f"waits in exchange number {self.number}, {call}, for {self._waited:.0f} s so far"
        missing = f"is missing: it has done {exchanges} exchanges of this group, and"
        for other in all_statuses():
            if other is not self and other.current_call is not None:
                return (
                    f"{missing} waits in exchange number {other.number} of another one, {other.current_call}"
                )
        return f"{missing} is at {reports.current_line()}"

    def report(self, what: str) -> None:
        """Print ``what`` about this rank on stderr, with its Python stacks. Only once."""
        if not self._reported:
            self._reported = True
            rank = f"rank {self.rank} of {self.size} on {socket.gethostname()}"
            reports.print_report(f"{rank} {what}\n{reports.stacks()}")

    def _on_host(self, rank: int) -> str:
        return f" on {self.process_ids[rank][0]}" if self.process_ids else ""

    def _line(self, rank: int) -> str:
        if rank == self.rank:
            what = self.state()
        else:
            what = self._answers.get(rank) or f"is missing: no answer{self._process(rank)}"
        return f"  rank {rank}{self._on_host(rank)} {what}"

    def _process(self, rank: int) -> str:
        """Words on a rank that does not answer: that it left or, on this host, its state."""
        if rank in self.departed:
            return ", it has left the program"
        if not self.process_ids or self.process_ids[rank][:2] != config.machine():
            return ""
        process = self.process_ids[rank][2]
        return f", its process {process} is {arrivals.state_of(process)}"

    def _before_the_first(self) -> str:
        """The ranks that are missing in the first message of the group, a line for each."""
        missing = arrivals.describe_missing(self.world)
        lines = [f"  rank {self.world.index(rank)} {words}" for rank, words in missing.items()]
        return "\n".join([" before the first exchange", *lines])


def forget_all() -> None:
    """Forget all groups. A forked child calls this, because it is no rank."""
    global _lock
    _lock = threading.Lock()  # a thread of the parent may hold the old one
    _registered.clear()
