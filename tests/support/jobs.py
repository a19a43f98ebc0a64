"""Processes and MPI jobs that a test starts beside its own job, and that end with the test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from open_mpi import OVERSUBSCRIBED, SETTINGS

ROOT = Path(__file__).resolve().parents[2]
# Every process of a job has this environment variable, so that those that outlive the job are
# found. Its value is the job's folder.
MARK = "MPISYNCBN_TEST_JOB"
LEAVE = 7.0  # seconds for a job's last processes to end: a DataLoader's workers check every 5
# Prefixes of the variables by which launchers tell a rank about its job.
_LAUNCHERS = ("HYDRA", "I_MPI_", "MPICH_", "MPI_", "OMPI_", "PMI", "PRTE_", "SLURM_")


class End(NamedTuple):
    """How a job ended."""

    status: int | None  # as in a shell; None if it had to be killed
    seconds: float | None  # since its first fault; None without one
    left: int  # processes that outlived it
    stdout: str
    stderr: str


def unlaunched() -> dict[str, str]:
    """The environment without a launcher's variables, and with pytest's ``pythonpath``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}
    paths = [f"{ROOT}/tests", f"{ROOT}/scripts", str(ROOT), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1"}


def for_jobs(*, oversubscribe: bool = True) -> dict[str, str]:
    """``unlaunched()`` with settings for MPI jobs. Under Slurm, ``oversubscribe`` must be False."""
    return unlaunched() | SETTINGS | (OVERSUBSCRIBED if oversubscribe else {})


def find_mpiexec() -> str | None:
    folders = [str(Path(sys.executable).parent), f"{sys.prefix}/bin", f"{os.environ.get('MPI_HOME', '')}/bin"]
    return shutil.which("mpiexec") or shutil.which("mpiexec", path=os.pathsep.join(folders))


@contextmanager
def started(
    command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a folder, with its output in files ``stdout`` and ``stderr`` there.

    The end of the block ends all its processes.

    Args:
        variables: the whole environment; ``for_jobs()`` unless it is given.
    """
    environment = {**(for_jobs() if variables is None else variables), MARK: str(folder)}
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        files = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        job = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **files)
        try:
            yield job
        finally:
            job.terminate()  # mpiexec ends its ranks
            with suppress(subprocess.TimeoutExpired):
                job.wait(3)
            end_all(folder)
            job.wait()


def run(
    command: Sequence[str],
    folder: Path,
    *,
    limit: float = 240.0,  # on a slow machine, some jobs take 100
    start: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> End:
    """Run a command in a folder, end all its processes, and return how it ended.

    Args:
        limit: seconds after which the command is killed.
        start: seconds within which a file ``fault-*`` must appear in the folder, if given.
            ``limit`` counts from then.
        variables: the whole environment; ``for_jobs()`` unless it is given.
    """
    with started(command, folder, variables) as job:
        deadline = time.time() + (limit if start is None else start)
        while job.poll() is None and time.time() < deadline:
            time.sleep(0.01)
            if start is not None and (fault := time_of_fault(folder)) is not None:
                deadline = fault + limit
        end, status = time.time(), job.poll()
        left = 0 if status is None else count_left(folder)
    fault = time_of_fault(folder)
    said = [(folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    status = 128 - status if status is not None and status < 0 else status
    return End(status, None if fault is None else round(end - fault, 1), left, *said)


def time_of_fault(folder: Path) -> float | None:
    return min((file.stat().st_mtime for file in folder.glob("fault-*")), default=None)


def count_left(folder: Path) -> int:
    """The number of a job's processes that still run, after a wait of at most ``LEAVE`` s."""
    limit = time.monotonic() + LEAVE
    while (count := len(list(processes(folder)))) and time.monotonic() < limit:
        time.sleep(0.1)
    return count


def end_all(folder: Path) -> None:
    """Kill the processes of a job, and wait for their end: the next job needs the machine."""
    limit = time.monotonic() + LEAVE
    while (left := list(processes(folder))) and time.monotonic() < limit:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def processes(folder: Path) -> Iterator[int]:
    wanted = f"{MARK}={folder}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in file.read_bytes().split(b"\0"):
                yield int(file.parent.name)


def run_alone(code: str) -> str:
    """Run ``code`` in a new process on rank 0, and return its output. Raises if the process fails.

    Collective: every rank must call.
    """
    from support.ranks import WORLD  # starts MPI, which scripts/gpu_check must not

    done = None
    if WORLD.rank == 0:
        with tempfile.TemporaryDirectory(prefix="mpisyncbn-") as folder:
            # torch 2.6 leaves a temporary folder of its own to the end
            warnings = "-W", "error", "-W", "ignore:Implicitly cleaning up"
            done = run([sys.executable, *warnings, "-c", code], Path(folder), variables=unlaunched())
    done = WORLD.bcast(done)
    assert done.status == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
