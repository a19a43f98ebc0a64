"""``liveness.exits`` finds out how a program ends, while Python still runs exit handlers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.jobs import End
from support.libraries import own
from support.ranks import once

pytestmark = once("it starts a program of its own")

BEGINNING = """
import atexit, sys
from mpisyncbn import exits
exits.install()
atexit.register(lambda: print("status", exits.status()))
def leave(status):
    try:
        sys.exit(status)
    finally:
        pass
"""
CATCHING = """
def careful(error):
    try:
        raise error
    except type(error) as caught:
        return getattr(caught, "code", None)
"""
# The last lines of a program, the status that exits.status() returns, and Python's exit status.
PROGRAMS = {
    "comes to its end": ("", 0, 0),
    "sys.exit(5)": ("sys.exit(5)", 5, 5),
    "sys.exit(5), with a finally": ("leave(5)", 5, 5),
    "sys.exit(0)": ("sys.exit(0)", 0, 0),
    "sys.exit(None)": ("sys.exit(None)", 0, 0),
    "sys.exit()": ("sys.exit()", 0, 0),
    "sys.exit('why')": ("sys.exit('why')", 1, 1),
    "sys.exit(''), which is a text": ("sys.exit('')", 1, 1),
    "sys.exit(256), of which nothing is left": ("sys.exit(256)", 1, 0),
    "sys.exit(-1)": ("sys.exit(-1)", 255, 255),
    "sys.exit(True)": ("sys.exit(True)", 1, 1),
    "sys.exit(1.0), which is no status": ("sys.exit(1.0)", 1, 1),
    "raise SystemExit(7)": ("raise SystemExit(7)", 7, 7),
    "raise SystemExit": ("raise SystemExit", 0, 0),
    "raise SystemExit(0)": ("raise SystemExit(0)", 0, 0),
    "raise SystemExit('why')": ("raise SystemExit('why')", 1, 1),
    "raise SystemExit(1, 2)": ("raise SystemExit(1, 2)", 1, 1),
    "exit(7)": ("exit(7)", 7, 7),
    "quit(7)": ("quit(7)", 7, 7),
    "a SystemExit of its own": ("class Done(SystemExit): pass\nraise Done(7)", 7, 7),
    "another code": ("try:\n    leave(5)\nexcept SystemExit as error:\n    error.code = 6\n    raise", 6, 6),
    "a caught sys.exit": (CATCHING + "careful(SystemExit(5))", 0, 0),
    "a caught sys.exit, at the top": ("try:\n    leave(5)\nexcept SystemExit:\n    pass\nx = 1", 0, 0),
    "a caught sys.exit that is kept": ("try:\n    leave(5)\nexcept SystemExit as e:\n    kept = e", 0, 0),
    "a caught sys.exit before another end": (CATCHING + "careful(SystemExit(5))\nraise SystemExit(0)", 0, 0),
    "an exception": ("1 / 0", 1, 1),
    "an exception with a finally": ("try:\n    1 / 0\nfinally:\n    x = 1", 1, 1),
    "an exception raised again": ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise", 1, 1),
    "an interrupt": ("raise KeyboardInterrupt", 130, 130),
    "an exception for a hook of the program's": ("sys.excepthook = lambda *_: print('mine')\n1 / 0", 1, 1),
    "an exception, and a hook that exits": ("sys.excepthook = lambda *_: sys.exit(3)\n1 / 0", 3, 3),
    "an exception that somebody only looked at": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n"
        "    sys.last_value, sys.last_traceback = error, error.__traceback__\nx = 1",
        0,
        0,
    ),
    "an exception in a console of the program's": (
        "import code, io\nsys.stdin = io.StringIO('1 / 0')\nsys.ps1 = ''\ncode.interact(local=globals())\n"
        "for name in ('ps1', 'ps2'):\n    sys.__dict__.pop(name, None)",
        0,
        0,
    ),
    "an exception in a thread": (
        "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()",
        0,
        0,
    ),
    "sys.exit in a thread": (
        "import threading\nthread = threading.Thread(target=leave, args=(5,))\n"
        "thread.start()\nthread.join()\nraise SystemExit(0)",
        0,
        0,
    ),
    "an exception at a prompt": ("sys.ps1 = '> '\n1 / 0", 0, 1),
    "an exception for a program around Python": ("sys.orig_argv.clear()\n1 / 0", 0, 1),
}


WAYS = {"file": ["program.py"], "module": ["-m", "program"], "inspected": ["-i", "program.py"]}


@pytest.fixture
def run(run_job: Callable[..., End], tmp_path: Path) -> Callable[..., End]:
    """``run(text, way="file", **variables)`` runs a program as file or module, by -c or -i."""

    def start(text: str, way: str = "file", **variables: str) -> End:
        (tmp_path / "program.py").write_text(text)
        return run_job(*WAYS.get(way, ["-c", text]), variables=variables)

    return start


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_knows_how_it_ends(name, run):
    text, told, status = PROGRAMS[name]
    done = run(BEGINNING + text)
    assert f"status {told}" in done.stdout.splitlines()
    assert done.status == status
    assert ("mine" in done.stdout.splitlines()) == ("for a hook" in name)


@pytest.mark.parametrize("way", ["module", "command"])
@pytest.mark.parametrize(
    "name", ["sys.exit(5)", "raise SystemExit('why')", "an exception raised again", "a caught sys.exit"]
)
def test_a_program_run_otherwise_knows_how_it_ends(name, way, run):
    text, told, status = PROGRAMS[name]
    done = run(BEGINNING + text, way)
    assert (done.stdout, done.status) == (f"status {told}\n", status)


def test_under_i_nothing_is_over(run):
    for text in ("1 / 0", "raise SystemExit(7)"):
        done = run(BEGINNING + text, "inspected")
        assert (done.stdout, done.status) == ("status 0\n", 0)


def test_the_code_of_system_exit_is_unchanged(run):
    """A program reads and sets ``SystemExit.code`` as without this package."""
    text = """
error = SystemExit(7)
print(error.code, SystemExit().code, SystemExit(1, 2).code, SystemExit.code.__doc__)
error.code = 8
print(error.code, error.args)
try:
    sys.exit()
except SystemExit as error:
    print(error.code, error.args, sys.exit.__name__)
"""
    done = run(BEGINNING + text)
    expected = ["7 None (1, 2) exception code", "8 (7,)", "None () exit", "status 0"]
    assert done.stdout.splitlines() == expected


def test_a_program_knows_when_it_is_over(run):
    """The program is over when Python only waits for a thread of it, which may still run."""
    text = """
import threading, time
def look():
    print(exits.is_over())
    release.set()
    while not exits.is_over():
        time.sleep(0.01)
    print(exits.status(), "over")
release = threading.Event()
threading.Thread(target=look).start()
release.wait()
"""
    done = run(BEGINNING + text + "1 / 0")
    assert done.stdout.splitlines() == ["False", "1 over", "status 1"]


@pytest.mark.parametrize("launched", [False, True])
def test_a_process_that_no_launcher_started_is_left_alone(launched, run):
    text = "import sys\nbefore = sys.exit, vars(SystemExit)['code']\nimport mpisyncbn\n"
    text += "print(before == (sys.exit, vars(SystemExit)['code']))"
    done = run(text, **({"OMPI_COMM_WORLD_SIZE": "4"} if launched else {}))
    assert done.stdout.split() == [str(not launched)]


def test_one_rank_ends_as_ever(run):
    """The only rank of a world fails without an abort or a message: no other rank waits for it."""
    done = run(
        "import mpisyncbn.liveness.exits\nmpisyncbn.liveness.exits.install()\nfrom mpi4py import MPI\n1 / 0"
    )
    assert done.status == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


TRAINED = """
import os, sys, numpy, mpisyncbn
from mpi4py import MPI
parent = MPI.Comm.Get_parent()
if MPI.COMM_WORLD.size > 1:
    comm = MPI.COMM_WORLD
elif parent != MPI.COMM_NULL:
    comm = parent.Merge(True)
else:
    comm = MPI.COMM_SELF.Spawn(sys.executable, sys.argv).Merge(False)
mpisyncbn.functional.batch_norm_forward(numpy.ones((4 + comm.rank, 3)), process_group=comm)
if comm.rank == 1:
    {failure}
comm.Barrier()
"""


no_spawn = pytest.mark.skipif(own() == "impi", reason="Spawn of Intel MPI fails over shared memory")


@pytest.mark.parametrize(
    ("ranks", "failure", "statuses"),
    [
        pytest.param(
            2, "os.dup2(os.open('/dev/full', os.O_WRONLY), 2); raise ValueError", [1], id="on a full disk"
        ),
        pytest.param(1, "sys.exit(7)", [7, 9], id="spawned", marks=no_spawn),  # MPICH's mpiexec says 9
    ],
)
def test_a_rank_that_fails_ends_the_job(ranks, failure, statuses, tmp_path, run_job):
    (tmp_path / "program.py").write_text(TRAINED.format(failure=failure))
    done = run_job("program.py", ranks=ranks, variables={"MPISYNCBN_TIMEOUT": "0"})
    assert done.status in statuses, done.stderr
