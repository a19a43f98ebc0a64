"""scripts/train.py: the same run whoever sums the gradients, and the same again from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import WORLD, together

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))  # where worker processes find it too

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


imports = pytest.mark.skipif(WORLD.size > 2, reason="each worker imports torch: too slow for many ranks")


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
