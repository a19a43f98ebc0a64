"""Tests of scripts/demo.py: its claim holds on real data, and it prints and writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

import demo

comm = MPI.COMM_WORLD


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_synchronized_training_follows_one_process(dtype: torch.dtype, tolerance: float) -> None:
    train_set, _ = demo.load(dtype, seed=0)
    runs = demo.compare(train_set, comm, steps=80, batch=4, lr=0.02, seed=0)

    losses = {name: run.losses for name, run in runs.items()}
    one_process = losses[demo.ONE_PROCESS]
    assert one_process[-20:].mean() < 0.8 * one_process[:20].mean(), "a standing curve is easy to follow"
    assert demo.distance(losses[demo.SYNCHRONIZED], one_process) < tolerance
    if comm.size > 1:
        assert demo.distance(losses[demo.LOCAL], one_process) > 0.1, (
            "local batch norm would pass this test too"
        )


def test_each_rank_draws_from_its_shard() -> None:
    labels = np.arange(500) % 10

    samples = demo.draw(labels, size=4, steps=25, batch=3, seed=0)

    assert samples.shape == (25, 4, 3)
    assert (labels[samples] % 4 == np.arange(4)[:, None]).all()
    # Ranks 2 and 3 hold 100 samples each, so in 75 draws none comes twice.
    assert all(len(np.unique(samples[:, rank])) == 75 for rank in (2, 3))


def test_more_ranks_than_digits() -> None:
    with pytest.raises(ValueError, match="rank 10 holds no digit: expected at most 10 ranks, got 11"):
        demo.draw(np.arange(50) % 10, size=11, steps=1, batch=1, seed=0)


def test_options_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse(["--steps", "0"])
    assert "--steps and --batch must be at least 1, got 0 and 4" in capsys.readouterr().err


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, report = tmp_path / "new" / "demo.png", tmp_path / "demo.json"

    demo.main(["--steps", "3", "--plot", str(picture), "--json", str(report)])

    printed = capsys.readouterr()
    if comm.rank > 0:
        assert (printed.out, printed.err) == ("", "")
        assert not list(tmp_path.rglob("*.*"))
        return
    table = printed.out.splitlines()
    for name in (demo.ONE_PROCESS, demo.LOCAL, demo.SYNCHRONIZED):
        assert any(line.startswith(name) and "%" in line for line in table)
        assert name in printed.err, "the progress bar"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(report.read_text())["losses"][demo.SYNCHRONIZED]) == 3
