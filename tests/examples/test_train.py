"""Tests of scripts/train.py: results do not depend on the backend, or on resuming."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.jobs import End
from support.ranks import WORLD, ranks, starts_mpiexec, together

pytest.importorskip("sklearn")

import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUICK = ["--no-progress", "--batch", "64", "--workers", "0"]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of rank 0 that all ranks use."""
    return WORLD.bcast(tmp_path)


def test_the_same_curve_with_every_backend(shared: Path) -> None:
    report = shared / "report.json"
    ours = train.main([*QUICK, "--epochs", "2", "--json", str(report)])
    gloo = train.main([*QUICK, "--epochs", "2", "--ddp", "gloo"])

    with together():
        assert [each["epoch"] for each in ours] == [1, 2]
        assert ours[1]["loss"] < ours[0]["loss"] < 3
        assert [each["loss"] for each in gloo] == pytest.approx([each["loss"] for each in ours], rel=1e-3)
        assert json.loads(report.read_text())["epochs"] == ours


def test_resuming_changes_nothing(shared: Path) -> None:
    whole, halves = shared / "whole.pt", shared / "halves.pt"
    expected = train.main([*QUICK, "--epochs", "2", "--checkpoint", str(whole)])
    train.main([*QUICK, "--epochs", "2", "--checkpoint", str(halves), "--stop-after", "1"])
    resumed = train.main([*QUICK, "--epochs", "2", "--checkpoint", str(halves), "--resume"])

    with together():
        assert resumed == expected
        a, b = (torch.load(path) for path in (whole, halves))
        for name, value in a["net"].items():
            assert torch.equal(value, b["net"][name]), name


@starts_mpiexec
def test_the_reproducible_mode_is_asked_for_before_mpi_starts(run_job: Callable[..., End]) -> None:
    print_it = "import os, sys, train; print(os.environ['I_MPI_CBWR'], 'mpi4py.MPI' in sys.modules)"
    done = run_job("-c", print_it)
    assert done.stdout.split() == ["1", "False"], done.stderr


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``signal_at(step)`` sends SIGUSR1 to the last rank in the forward pass of that step."""

    def install(step: int) -> None:
        loss, steps = train.Trainer.loss, iter(range(1, step + 1))

        def signalled(self: train.Trainer, *batch: torch.Tensor) -> torch.Tensor:
            if next(steps, None) == step and WORLD.rank == WORLD.size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return loss(self, *batch)

        monkeypatch.setattr(train.Trainer, "loss", signalled)

    before = signal.getsignal(signal.SIGUSR1)
    yield install
    signal.signal(signal.SIGUSR1, before)
    train._signalled.clear()


# The last batch of the 1,437 samples is small. At 1 rank it is one sample, so one rank has none
# when 2 ranks resume that run.
EXACT = ["--no-progress", "--float64", "--workers", "0", "--epochs", "1", "--accumulate", "2"]
BATCH = ["--batch", str(1436 // WORLD.size // 4)]


@pytest.mark.full("it trains four times")
def test_a_signal_in_mid_epoch_changes_nothing(
    shared: Path, signal_at: Any, run_job: Callable[..., End]
) -> None:
    here, there, report = shared / "here.pt", shared / "there.pt", shared / "report.json"
    expected = train.main([*EXACT, *BATCH])
    signal_at(3)  # between two updates: all ranks continue to the next one
    with pytest.raises(train.Interrupted):
        train.main([*EXACT, *BATCH, "--checkpoint", str(here)])
    parts, found = torch.load(here), None
    if WORLD.rank == 0:  # resume at another number of ranks
        shutil.copy(here, there)
        rest = ["--checkpoint", str(there), "--resume", "--json", str(report)]
        done = run_job(train.__file__, *EXACT, *rest, ranks=2 if WORLD.size == 1 else 0)
        found = json.loads(report.read_text()) if done.status == 0 else done
    train._signalled.clear()
    resumed = train.main([*EXACT, *BATCH, "--checkpoint", str(here), "--resume"])
    found = WORLD.bcast(found)

    with together():
        assert (len(parts["metrics"]), parts["step"]) == (0, 4)
        assert resumed == expected
        assert isinstance(found, dict), found
        assert found["ranks"] == (2 if WORLD.size == 1 else 1)
        assert found["epochs"][0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-10)


# Every rank gets SIGUSR1 before its first step. The script runs as __main__.
SIGNALLED = """
import os, runpy, signal
import torch
class Told(torch.optim.SGD):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGUSR1)
torch.optim.SGD = Told
runpy.run_module("train", run_name="__main__")
"""


@pytest.mark.full("a job of its own")
@starts_mpiexec
def test_exit_status(tmp_path: Path, run_job: Callable[..., End]) -> None:
    """After SIGUSR1 mpiexec ends with status 75, and nothing reports that a rank has failed."""
    done = run_job("-c", SIGNALLED, *QUICK, "--checkpoint", "run.pt", ranks=2)
    assert done.status == train.TRY_AGAIN
    assert "mpisyncbn" not in done.stderr
    assert torch.load(tmp_path / "run.pt")["step"] == 1


imports = ranks("each worker imports torch: too slow for many ranks", most=2)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=imports)])
def test_worker_processes(start: str) -> None:
    flags = [*QUICK, "--epochs", "1", "--workers", "1", "--start-method", start]
    with_workers = train.main([*flags, "--amp", "--accumulate", "2"])
    without = train.main([*QUICK, "--epochs", "1", "--amp", "--accumulate", "2"])

    with together():
        assert with_workers == without


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--resume"])
    with together():
        assert "--resume needs --checkpoint" in capsys.readouterr().err
        assert isinstance(train.parse([]), argparse.Namespace)
