"""Jobs of a Slurm that the tests start: launchers, and batch scripts of scripts/slurm."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from support.jobs import ROOT
from support.ranks import once
from support.slurm import Slurm

pytestmark = [
    once("it starts jobs itself"),
    pytest.mark.full("Slurm takes its time"),
    pytest.mark.timeout(400),
]
# The MPI plug-in of srun that works with the MPI library in use. With the other one, each rank is a
# world of one, or the job fails.
PMI = "pmix" if MPI.get_vendor()[0] == "Open MPI" else "pmi2"
LAUNCHERS = ["mpiexec", f"srun --mpi={PMI}"]
FLAGS = ["--float64", "--workers", "0", "--epochs", "2"]
WHO = """
from mpi4py import MPI
import os
line = f"{MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {MPI.Get_processor_name()}\\n"
os.write(1, line.encode())  # in one piece
"""


class Jobs:
    """Submits jobs to a cluster and waits for them. Their output goes to ``folder``."""

    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(self, nodes: int, *arguments: str, tasks: int = 4, **variables: str) -> int:
        where = [f"--nodes={nodes}", f"--ntasks-per-node={tasks // nodes}", f"--chdir={ROOT}"]
        output = f"--output={self.folder}/%j.out"
        return self.cluster.submit(*where, output, *arguments, **variables)

    def said(self, job: int | str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def completed(self, job: int, limit: float) -> str:
        """Wait until the job has completed without an error, and return its output."""
        shown = self.cluster.wait(job, limit)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), self.said(job)
        return self.said(job)

    def until(self, job: int, what: str, ready: Any, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not ready():
            assert time.monotonic() < deadline, f"not {what} in {limit:g} s: {self.said(job)}"
            time.sleep(0.1)

    def restarted(self, job: int, limit: float) -> None:
        """Wait until the job is back in the queue and its processes have ended, then let it start.

        By itself, a requeued job would wait two minutes.
        """

        def queued() -> bool:
            shown = self.cluster.show(job)
            waits = shown["JobState"] == "PENDING"
            return shown["Restarts"] == "1" and not (waits and self.cluster.steps(job))

        self.until(job, "requeued", queued, limit)
        with suppress(subprocess.CalledProcessError):  # the job has started already
            self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def script(self, text: str) -> str:
        path = self.folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{text}\n")
        return str(path)


@pytest.fixture(scope="module")
def jobs(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module", autouse=True)
def limited(jobs: Jobs) -> int:
    """Submit a job that SIGUSR1 interrupts before its time limit, and return its number.

    Slurm checks time limits every 30 seconds, and the other tests run in the meantime. A script
    takes the place of mpiexec, and runs until it gets the signal.
    """
    launcher = jobs.folder / "launcher"
    launcher.write_text("""#!/bin/bash
[[ $* != *--check ]] || exit 3
echo "started: $*"
[[ $SLURM_RESTART_COUNT -gt 0 ]] && exit 0
trap 'touch "$CHECKPOINT"; exit 75' USR1
while :; do sleep 0.1; done
""")
    launcher.chmod(0o755)
    variables = {"LAUNCH": str(launcher), "CHECKPOINT": f"{jobs.folder}/limited.pt"}
    limit = ["--time=1", "--signal=B:USR1@50"]
    return jobs.submit(1, *limit, f"{ROOT}/scripts/slurm/train.sbatch", "--seed", "3", tasks=1, **variables)


def start(launcher: str) -> str:
    return launcher if launcher.startswith("srun") else f"{launcher} -n $SLURM_NTASKS"


def test_an_array_of_two(jobs: Jobs) -> None:
    text = f"{start('mpiexec')} python -c '{WHO}' | sed s/^/$SLURM_ARRAY_TASK_ID:/"
    job = jobs.submit(
        1, "--array=0-1", f"--output={jobs.folder}/array.out", "--open-mode=append", jobs.script(text)
    )
    for task in (0, 1):
        shown = jobs.cluster.wait(f"{job}_{task}", 60)
        assert shown["JobState"] == "COMPLETED", jobs.said("array")
    found = re.findall(r"(\d):(\d) of 4 ", jobs.said("array"))
    assert sorted(found) == [(task, rank) for task in "01" for rank in "0123"]


@pytest.mark.parametrize("script", ["test", "train"])
def test_worlds_of_one_do_not_start(script: str, jobs: Jobs) -> None:
    """If each task is a world of one, the batch scripts print one error and start no program."""
    job = jobs.submit(1, f"{ROOT}/scripts/slurm/{script}.sbatch", "--help", LAUNCH="srun --mpi=none")
    assert jobs.cluster.wait(job, 60)["JobState"] == "FAILED"
    output = " ".join(jobs.said(job).split())
    sizes = "error: the launcher started 4 ranks (SLURM_STEP_NUM_TASKS=4), MPI has a world of 1: "
    assert output.count(sizes) == 1
    assert output.count("cure: srun did not tell ") == 1
    assert "usage: " not in output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_goes_on_after_a_signal(launcher: str, jobs: Jobs) -> None:
    """After SIGUSR1 the job is requeued, and reaches the loss of one rank that was not interrupted.

    It runs on two nodes if the cluster has two.
    """
    pytest.importorskip("sklearn")
    jobs.cluster.need(launcher)
    report, checkpoint = (jobs.folder / f"{launcher.split()[0]}.{kind}" for kind in ("json", "pt"))
    arguments = [*FLAGS, "--batch", "32", "--json", str(report)]
    variables = {"LAUNCH": launcher, "CHECKPOINT": str(checkpoint)}
    nodes = len(jobs.cluster.nodes)
    job = jobs.submit(nodes, f"{ROOT}/scripts/slurm/train.sbatch", *arguments, tasks=2, **variables)
    jobs.until(job, "through an epoch", lambda: "epoch 1" in jobs.said(job), 120)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    jobs.restarted(job, 90)
    output = jobs.completed(job, 120)

    assert "train.sbatch: interrupted" in output
    assert re.findall(r"^epoch (\d): loss", output, re.MULTILINE) == ["1", "2"], output
    found = json.loads(report.read_text())
    assert found["ranks"] == 2
    losses = [epoch["loss"] for epoch in found["epochs"]]
    assert losses == pytest.approx(expected_losses(), rel=1e-10)


@functools.cache
def expected_losses() -> list[float]:
    import train

    return [epoch["loss"] for epoch in train.main(["--no-progress", *FLAGS, "--batch", "64"])]


def test_time_limit(limited: int, jobs: Jobs) -> None:
    jobs.restarted(limited, 100)
    output = jobs.completed(limited, 60)
    program = f"-n 1 python scripts/train.py --no-progress --checkpoint {jobs.folder}/limited.pt"
    assert [line for line in output.splitlines() if line.startswith("started")] == [
        f"started: {program} --seed 3",
        f"started: {program} --resume --seed 3",
    ]
    assert f"train.sbatch: interrupted (status 75), job {limited} starts again" in output


TRAIN = """
import numpy as np, mpisyncbn
try:
    mpisyncbn.functional.batch_norm_forward(np.ones((2, 3)))
    print("trained")
except mpisyncbn.MPISyncBNError as error:
    print("refused:", str(error).partition(",")[0])
"""


def test_tasks_in_worlds_of_one_are_refused(jobs: Jobs) -> None:
    """Four tasks that MPI takes for worlds of one are refused. The batch script itself trains.

    The script may have variables of a job step from the shell that submitted it.
    """
    program = jobs.folder / "apart.py"
    program.write_text(TRAIN)
    text = f"python {program}\nsrun --mpi=none python {program}"
    left_over = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40961"}
    job = jobs.submit(1, jobs.script(text), **left_over)
    refused = "refused: the launcher started 4 ranks (SLURM_STEP_NUM_TASKS=4)"
    assert jobs.completed(job, 60).splitlines() == ["trained", *[refused] * 4]


def test_a_shell_of_several_tasks_is_no_task(jobs: Jobs) -> None:
    program = jobs.folder / "interactive.py"
    program.write_text(TRAIN)
    shell = f"srun --mpi=none --ntasks=2 --pty {sys.executable} {program}"
    output = jobs.cluster.run("script", "--quiet", "--return", "--command", shell, os.devnull)
    assert "RuntimeWarning: the launcher started 2 ranks (SLURM_STEP_NUM_TASKS=2)" in output
    assert "trained" in output
