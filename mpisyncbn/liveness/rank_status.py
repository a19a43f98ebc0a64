"""One rank in one group: what it is doing, what it tells other ranks that ask, and its last words."""

from __future__ import annotations

import os
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import arrivals

__all__ = [
    "DEFAULT_TIMEOUT",
    "Presence",
    "agreed_timeout",
    "end_job",
    "everyone",
    "forget_all",
    "say",
    "within",
]

DEFAULT_TIMEOUT = 600.0
TIMED_OUT, STRANDED = 124, 1  # statuses of the job; the first is what timeout(1) says
ASKING, ANSWERING, ENDING = 1.0, 2.0, 1.0  # seconds at most, after the limit
_FORWARDING = 0.25  # seconds for the launcher: what it has not passed on when the job ends may be lost
_ASK, _ANSWER, _LEFT = 1, 2, 3  # tags; exchanges use none; kernels/cpu/leave.h sends the last
_LENGTH = 1024  # bytes of a message

_lock = threading.Lock()
_presences: list[Presence] = []


def agreed_timeout(given: list[float | None]) -> float:
    """The limit of a group, from what the environment of each rank says: some launchers hand it to few."""
    limits = {seconds for seconds in given if seconds is not None}
    return min(limits - {0.0}, default=0.0 if limits else DEFAULT_TIMEOUT)


def everyone() -> list[Presence]:
    """This rank in all its groups."""
    with _lock:
        return list(_presences)


class Presence:
    """This rank in a group, from the first message of the group until MPI takes the communicator back."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.comm: Any = None  # of the group alone, while MPI has it
        self.channel: Any = None  # for messages between two ranks: the same, where it has no others
        self.exchanges = 0  # begun so far
        self.doing: Any = None  # what this rank is in: a Call, or words
        self.limit = DEFAULT_TIMEOUT  # seconds, 0: none
        self.last_limit = DEFAULT_TIMEOUT  # the same for the end of the program
        self.all_native = False  # whether every rank has native code
        self.homes: list[tuple[str, int]] = []  # host and process of each rank
        self.world: list[int] = []  # the ranks in the world, where they are known before that
        self.deaf = False  # nobody listens here any more
        self.left: dict[int, int] = {}  # ranks that have come to their end, and after how many exchanges
        self.talking = threading.Lock()  # whoever uses the communicator for messages between two ranks
        self._seen, self._waited = -1, 0.0
        self._reported = self._was_asked = False
        self._ask_at: float | None = None
        self._asked_at: float | None = None
        self._answers: dict[int, str] = {}
        self._sends: list[Any] = []

    def begin(self) -> None:
        """From here on the watchdog looks, and answers."""
        self.deaf = False
        with _lock:
            _presences.append(self)

    def end(self) -> None:
        """The opposite: MPI may take the communicator back."""
        with self.talking:
            self.deaf = True
        with _lock:
            if self in _presences:
                _presences.remove(self)

    # The clock's part: no call of MPI.

    def look(self, elapsed: float) -> bool:
        """Whether this rank has waited too long in the same exchange."""
        if self.doing is None or self._seen != self.exchanges:
            self._seen, self._waited = -1 if self.doing is None else self.exchanges, 0.0
            return False
        self._waited += elapsed
        return 0 < self.limit <= self._waited

    def gone(self) -> int | None:
        """A rank that this one waits for in vain."""
        if self.doing is None:
            return None
        return next((rank for rank, exchanges in self.left.items() if exchanges < self.exchanges), None)

    def expire(self) -> None:
        """What a rank does that has waited too long. The job ends."""
        self.report(
            f"has waited {self._waited:.1f} s (the limit is {self.limit:g} s, MPISYNCBN_TIMEOUT) for other "
            f"ranks of its group in exchange number {self.number}, {self.doing}"
        )
        start = time.monotonic()
        self._ask_at = start + ASKING * self.rank / self.size  # one is enough, if it comes through
        while time.monotonic() < start + ASKING + ANSWERING:  # also for the others, to say the same
            time.sleep(0.02)
            since = self._asked_at
            if since is not None and (
                len(self._answers) == self.size - 1 or time.monotonic() > since + ANSWERING
            ):
                break
        if self._asked_at is not None:
            lines = map(self._line, range(self.size))
            say("\n".join(["what the ranks of the group were doing:", *lines]))
        elif not self._was_asked:
            say("the other ranks could not be asked" + ("" if self.channel else self._before_the_first()))
        end_job(
            TIMED_OUT,
            "Every rank of a group must run the same layers in the same order. If some rank is only slow, "
            "MPISYNCBN_TIMEOUT=<seconds> gives it more time, and 0 any",
        )

    def strand(self, rank: int) -> None:
        """The same for one that waits for a rank which has left."""
        self.report(
            f"waits in exchange number {self.number}, {self.doing}, in vain: rank {rank}{self._home(rank)} "
            f"has left the program after exchange number {self.left[rank]}"
        )
        end_job(STRANDED, "Every rank of a group must run the same number of training steps")

    # The listener's part: messages between two ranks.

    def listen(self) -> None:
        """Hear what other ranks have to say, and answer."""
        MPI = sys.modules["mpi4py.MPI"]
        heard, status = np.zeros(_LENGTH, np.uint8), MPI.Status()
        # Python may end this thread between two calls: a message that is only seen stays for native code.
        while self.channel.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            source, tag = status.Get_source(), status.Get_tag()
            self.channel.Recv(heard, source, tag)
            text = heard.tobytes().rstrip(b"\0").decode(errors="replace")
            if tag == _ASK:
                self._was_asked = True
                self._send(source, _ANSWER, self.state())
                self.report(f"was asked by rank {source}, which has waited too long: it {self.state()}")
            elif tag == _ANSWER:
                self._answers[source] = text
            else:
                self.left[source] = int(text)
        self._sends = [request for request in self._sends if not request.Test()]
        if self._ask_at is not None and time.monotonic() >= self._ask_at and not self._was_asked:
            self._ask_at, self._asked_at = None, time.monotonic()
            for rank in range(self.size):
                if rank != self.rank:
                    self._send(rank, _ASK, str(self.rank))

    def _send(self, rank: int, tag: int, text: str) -> None:
        message = np.frombuffer(text.encode()[:_LENGTH].ljust(_LENGTH, b"\0"), np.uint8)
        self._sends.append(self.channel.Issend(message, rank, tag))

    # What there is to say.

    @property
    def number(self) -> int:
        """Of the exchange that this rank is in."""
        return max(self.exchanges, 1)  # the first counts once the group is there

    def state(self) -> str:
        """What this rank is doing, in a few words for another one."""
        doing, exchanges = self.doing, self.exchanges
        if doing is not None:
            return f"waits in exchange number {self.number}, {doing}, for {self._waited:.0f} s so far"
        missing = f"is missing: it has done {exchanges} exchanges of this group, and"
        for other in everyone():
            if other is not self and other.doing is not None:
                return f"{missing} waits in exchange number {other.number} of another one, {other.doing}"
        return f"{missing} is at {_place()}"

    def report(self, what: str) -> None:
        """Say something about this rank on its stderr, and where it is in its program. Once."""
        if not self._reported:
            self._reported = True
            say(f"rank {self.rank} of {self.size} on {socket.gethostname()} {what}\n{_stacks()}")

    def _home(self, rank: int) -> str:
        return f" on {self.homes[rank][0]}" if self.homes else ""

    def _line(self, rank: int) -> str:
        if rank == self.rank:
            what = self.state()
        else:
            what = self._answers.get(rank) or f"is missing: no answer{self._process(rank)}"
        return f"  rank {rank}{self._home(rank)} {what}"

    def _process(self, rank: int) -> str:
        """What is known of a rank that does not answer; the operating system knows those on this host."""
        if rank in self.left:
            return ", it has left the program"
        if not self.homes or self.homes[rank][0] != socket.gethostname():
            return ""
        process = self.homes[rank][1]
        return f", its process {process} is {arrivals.state_of(process)}"

    def _before_the_first(self) -> str:
        """Whom a rank waits for that has not met the others of its group yet."""
        absent = arrivals.absent(self.world)
        lines = [f"  rank {self.world.index(rank)} {words}" for rank, words in absent.items()]
        return "\n".join([" before the first exchange", *lines])


def _place() -> str:
    """Where the program is: the innermost line of it that is not Python's or a package's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    places, paths = traceback.extract_stack(frame), sysconfig.get_paths()
    others = (str(Path(__file__).parents[1]), "<frozen", paths["stdlib"], paths["purelib"], paths["platlib"])
    place = ([place for place in places if not place.filename.startswith(others)] or places)[-1]
    return f"{place.filename}, line {place.lineno}, in {place.name}"


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "")
        if name and not name.startswith("mpisyncbn "):
            lines = "".join(traceback.format_stack(frame)).rstrip()
            stacks.append(f"Python stack of {name}, innermost call last:\n{lines}")
    return "\n".join(stacks)


def say(text: str) -> None:
    within(ENDING, lambda: print(f"mpisyncbn: {text}", file=sys.stderr, flush=True))


def end_job(status: int, cure: str) -> None:
    """Does not return."""
    say(f"this ends the job with status {status}. {cure}")
    time.sleep(_FORWARDING)
    within(ENDING, lambda: sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status))
    # It does not come through where the network is gone. No launcher takes this for a regular end.
    os.kill(os.getpid(), signal.SIGKILL)


def within(seconds: float, function: Callable[[], Any]) -> None:
    """Call what may never return: who reads stderr may be stuck, and so may MPI."""
    thread = threading.Thread(target=function, name="mpisyncbn helper", daemon=True)
    thread.start()
    thread.join(seconds)


def forget_all() -> None:
    """In a forked child, which is no rank."""
    global _lock
    _lock = threading.Lock()  # a thread that is not here may hold the other
    _presences.clear()
