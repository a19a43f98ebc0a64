"""A rank that fails ends the job, so that the others do not wait for it for ever.

Without this, a rank that fails prints its traceback, and then Python calls MPI_Finalize, which
waits for the other ranks, while they wait for this one in a collective. ``python -m mpi4py`` avoids
that; this module does so for programs started without it. When Python ends, it finds out how the
program ended, and tells mpi4py to abort the job, after all other exit handlers.
"""

from __future__ import annotations

import atexit
import ctypes
import dis
import functools
import gc
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TypeAlias

from .rank_status import all_statuses

__all__ = ["install", "is_over", "status"]

Exit: TypeAlias = Callable[[str | int | None], NoReturn]

_installed_in = 0  # the id of this process: a forked child, with another one, is no rank
_code: object = None  # the code of the SystemExit that ended the program, if one did


def install() -> None:
    """Let a failure of this rank, which MPI started, end the whole job from here on."""
    global _installed_in
    if not _installed_in:
        _installed_in = os.getpid()
        _note_exits()
        atexit.register(_at_exit)


def status() -> int:
    """The exit status that this process is about to end with; 0 if it is not failing."""
    return _ending()[0]


def is_over() -> bool:
    """Whether the program is over, while Python still waits for threads or runs exit handlers."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or not _is_program(frame)


def _ending() -> tuple[int, str]:
    """The exit status that this process is about to end with, and the reason for it."""
    if _code is not None:
        return (_code and (_code & 255 or 1)) if isinstance(_code, int) else 1, "sys.exit, or SystemExit"
    if hasattr(sys, "ps1") or sys.flags.inspect or sys.flags.interactive or not sys.orig_argv:
        return 0, "an interactive session or an embedding program goes on after an exception"
    error, trace = getattr(sys, "last_value", None), getattr(sys, "last_traceback", None)
    if error is not None and trace is not None and _was_left(trace.tb_frame):
        return 130 if isinstance(error, KeyboardInterrupt) else 1, "the exception above"
    return 0, "nothing"


def _note_exits() -> None:
    """Note the status of an uncaught SystemExit, at the moment when Python reads its ``code``.

    No later moment would do: Python has dropped the exception when exit handlers run.
    """
    attributes = gc.get_referents(SystemExit.__dict__)[0]  # the dict itself; SystemExit.__dict__ is read-only
    member = attributes["code"]

    def read(error: SystemExit) -> object:
        global _code
        code = member.__get__(error)
        if sys._getframe().f_back is None and threading.get_ident() == threading.main_thread().ident:
            _code = code
        return code

    attributes["code"] = property(read, member.__set__, member.__delete__, member.__doc__)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))
    if sys.version_info < (3, 12):  # an exception raised in C is no object there until it is caught
        sys.exit = _looking_at(sys.exit)  # type: ignore[assignment]


def _looking_at(original: Exit) -> Exit:
    """Wrap ``sys.exit`` so that its exception becomes an object with a ``code``."""

    @functools.wraps(original)
    def exit(status: str | int | None = None, /) -> NoReturn:
        try:
            original(status)
        finally:
            pass

    return exit


def _was_left(frame: FrameType) -> bool:
    """Whether an exception has left the program by this frame, the outermost of a traceback.

    sys.last_value alone does not tell, since pytest, the module code or the program itself may
    catch an exception and set it. A frame that caught one goes on, and returns.
    """
    ended = not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")
    return frame.f_back is None and _is_program(frame) and ended


def _is_program(frame: FrameType) -> bool:
    """Whether a frame is the program's, or of Python's runpy that runs it, and no handler's."""
    return frame.f_globals.get("__name__") in ("__main__", "runpy")


def _at_exit() -> None:
    """Let mpi4py end the job if this rank has failed."""
    MPI = sys.modules.get("mpi4py.MPI")
    code, why = _ending()
    if (
        code == 0
        or os.getpid() != _installed_in
        or MPI is None
        or not MPI.Is_initialized()
        or MPI.Is_finalized()
        or not (all_statuses() or MPI.COMM_WORLD.size > 1)  # spawned ranks are of other worlds
    ):
        return
    # mpi4py then aborts instead of calling MPI_Finalize, after all other exit handlers.
    from mpi4py.run import set_abort_status

    set_abort_status(code)
    rank = f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}"
    words = f"mpisyncbn: {rank} ends the job with status {code}, because of {why}"
    with suppress(OSError, ValueError):  # a full disk, or a closed file: the job ends all the same
        print(words, file=sys.stderr, flush=True)
