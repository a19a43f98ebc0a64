"""The end of one rank must not leave the others waiting.

A rank that fails prints its traceback, and then Python calls MPI_Finalize, in which it waits for the others,
as they wait for it in a collective: a hang, unless the program was started with ``python -m mpi4py``. Here is
the same for programs that were not. No hook is replaced: how the program ended is read off at its very end.
"""

from __future__ import annotations

import atexit
import dis
import functools
import os
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["install", "is_over", "status"]

_installed_in = 0  # the process; a forked child is no rank
_exit: tuple[SystemExit, FrameType] | None = None  # what sys.exit raised last, and the program it was in


def install() -> None:
    """See to it that a failure of this rank ends the whole job. For what a launcher of MPI has started."""
    global _installed_in
    if not _installed_in:
        _installed_in = os.getpid()
        # Python forgets this exception before it calls anything at exit, so somebody has to remember it.
        sys.exit = _noting(sys.exit)
        atexit.register(_at_exit)


def status() -> int:
    """What this process is about to end with, if it fails; 0 as long as nothing says so."""
    return _ending()[0]


def is_over() -> bool:
    """Whether the program has come to its end, and Python not yet: it waits for threads, or runs handlers."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or not _is_program(frame)


def _ending() -> tuple[int, str]:
    """The status, and why."""
    if hasattr(sys, "ps1") or sys.flags.inspect or sys.flags.interactive:
        return 0, "somebody sits there, and goes on after an exception"
    error, trace = getattr(sys, "last_value", None), getattr(sys, "last_traceback", None)
    if error is not None and trace is not None and _was_ended(trace.tb_frame, trace):
        return 130 if isinstance(error, KeyboardInterrupt) else 1, "the exception above"
    if _exit is not None and _was_ended(_exit[1], _exit[0].__traceback__):
        code = _exit[0].code
        return (code and (code & 255 or 1)) if isinstance(code, int) else int(code is not None), "sys.exit"
    return 0, "nothing"


def _noting(original: Any) -> Any:
    @functools.wraps(original)
    def exit(status: Any = None, /) -> None:
        global _exit
        try:
            original(status)
        except SystemExit as error:
            frame = sys._getframe()
            while frame.f_back is not None:
                frame = frame.f_back
            _exit = error, frame
            raise

    return exit


def _was_ended(program: FrameType, trace: TracebackType | None) -> bool:
    """Whether an exception with this traceback is what ended the program.

    Others see an exception too: pytest sets sys.last_value, and what sys.exit raises may be caught. The frame
    that caught it, the outermost of the traceback, goes on and returns.
    """
    return (
        trace is not None
        and _is_program(program)
        and not _returned(program)
        and not _returned(trace.tb_frame)
    )


def _is_program(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in ("__main__", "runpy")


def _returned(frame: FrameType) -> bool:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")


def _at_exit() -> None:
    MPI = sys.modules.get("mpi4py.MPI")
    code, why = _ending()
    if (
        code == 0
        or os.getpid() != _installed_in
        or MPI is None
        or not MPI.Is_initialized()
        or MPI.Is_finalized()
        or MPI.COMM_WORLD.size == 1
    ):
        return
    rank = f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}"
    print(
        f"mpisyncbn: {rank} ends the job with status {code}, because of {why}",
        file=sys.stderr,
        flush=True,
    )
    # mpi4py aborts then, instead of MPI_Finalize, after all that others have registered for the end.
    from mpi4py.run import set_abort_status

    set_abort_status(code)
