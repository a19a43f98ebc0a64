"""Reports of a rank on stderr about itself, and the end of the job."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

__all__ = ["ABORT_SECONDS", "abort_job", "current_line", "print_report", "run_with_timeout", "stacks"]

ABORT_SECONDS = 1.0  # at most, for a call that may never return
_FORWARD_SECONDS = 0.25  # time for the launcher to pass on output, else it may be lost


def current_line() -> str:
    """The place of the program: its innermost line outside of Python and installed packages."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    lines, paths = traceback.extract_stack(frame), sysconfig.get_paths()
    others = (str(Path(__file__).parents[1]), "<frozen", paths["stdlib"], paths["purelib"], paths["platlib"])
    line = ([line for line in lines if not line.filename.startswith(others)] or lines)[-1]
    return f"{line.filename}, line {line.lineno}, in {line.name}"


def stacks() -> str:
    """The Python stacks of all threads of the program."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    shown = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "")
        if name and not name.startswith("mpisyncbn "):
            lines = "".join(traceback.format_stack(frame)).rstrip()
            shown.append(f"Python stack of {name}, innermost call last:\n{lines}")
    return "\n".join(shown)


def print_report(text: str) -> None:
    """Print a text on stderr. Gives up after ``ABORT_SECONDS``."""
    run_with_timeout(ABORT_SECONDS, lambda: print(f"mpisyncbn: {text}", file=sys.stderr, flush=True))


def abort_job(status: int, cure: str) -> None:
    """End the job with an exit status, and report that with the cure. It does not return."""
    print_report(f"this ends the job with status {status}. {cure}")
    time.sleep(_FORWARD_SECONDS)
    run_with_timeout(ABORT_SECONDS, lambda: sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status))
    # Without a network, Abort may not reach the launcher. No launcher takes SIGKILL for an end.
    os.kill(os.getpid(), signal.SIGKILL)


def run_with_timeout(seconds: float, function: Callable[[], object]) -> None:
    """Call a function on another thread, and wait at most ``seconds`` for it.

    It may never return, because MPI, or the reader of stderr, may be stuck.
    """
    thread = threading.Thread(target=function, name="mpisyncbn helper", daemon=True)
    thread.start()
    thread.join(seconds)
