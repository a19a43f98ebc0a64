"""How a program is about to end, as told at its very end; and what of it ends the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from parallel import once
from singleton import unlaunched

ROOT = Path(__file__).parent.parent
one_rank = once("it starts a program of its own")

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
def careful():
    try:
        leave(5)
    except SystemExit:
        pass
"""
# The end of a program, what it tells of its status, and what Python makes of it.
PROGRAMS = {
    "comes to its end": ("", 0, 0),
    "sys.exit(5)": ("leave(5)", 5, 5),
    "sys.exit(0)": ("leave(0)", 0, 0),
    "sys.exit(None)": ("leave(None)", 0, 0),
    "sys.exit('why')": ("leave('why')", 1, 1),
    "sys.exit(256), of which nothing is left": ("leave(256)", 1, 0),
    "a caught sys.exit": (CATCHING + "careful()", 0, 0),
    "a caught sys.exit, at the top": ("try:\n    leave(5)\nexcept SystemExit:\n    pass\nx = 1", 0, 0),
    "a caught sys.exit before another end": (CATCHING + "careful()\nraise SystemExit(0)", 0, 0),
    "an exception": ("1 / 0", 1, 1),
    "an exception with a finally": ("try:\n    1 / 0\nfinally:\n    x = 1", 1, 1),
    "an interrupt": ("raise KeyboardInterrupt", 130, -2),
    "an exception for a hook of the program's": ("sys.excepthook = lambda *_: print('mine')\n1 / 0", 1, 1),
    "an exception that somebody only looked at": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n"
        "    sys.last_value, sys.last_traceback = error, error.__traceback__\nx = 1",
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
}


@one_rank
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("module", [False, True])
def test_a_program_knows_how_it_ends(name, module, tmp_path):
    text, told, status = PROGRAMS[name]
    done = run(BEGINNING + text, tmp_path, module)
    assert f"status {told}" in done.stdout.splitlines()
    assert done.returncode == status
    assert ("mine" in done.stdout.splitlines()) == ("hook" in name)


@one_rank
def test_a_program_knows_when_it_is_over(tmp_path):
    """A thread of it may go on, and Python waits for that."""
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
    done = run(BEGINNING + text + "1 / 0", tmp_path)
    assert done.stdout.splitlines() == ["False", "1 over", "status 1"]


@one_rank
def test_a_process_that_no_launcher_started_is_left_alone(tmp_path):
    done = run("import sys\nbefore = sys.exit\nimport mpisyncbn\nprint(sys.exit is before)", tmp_path)
    assert done.stdout.split() == ["True"]
    done = run(
        "import sys\nbefore = sys.exit\nimport mpisyncbn\nprint(sys.exit is before)",
        tmp_path,
        OMPI_COMM_WORLD_SIZE="4",
    )
    assert done.stdout.split() == ["False"]


@one_rank
def test_one_rank_ends_as_ever(tmp_path):
    """A world of one has nobody to wait: no abort, no word."""
    done = run("import mpisyncbn.exits\nmpisyncbn.exits.install()\nfrom mpi4py import MPI\n1 / 0", tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def run(text: str, folder: Path, module: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """A program in a file, run by itself or as a module."""
    (folder / "program.py").write_text(text)
    environment = unlaunched()
    return subprocess.run(
        [sys.executable, *(["-m", "program"] if module else ["program.py"])],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
