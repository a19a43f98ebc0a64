"""Lightning at two ranks with LayerSync equals one process with torch's layers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import documented
import pytest
import torch

from support.jobs import End
from support.ranks import starts_mpiexec

PROGRAM = str(Path(__file__).with_name("lightning_program.py"))
PACKAGES = "lightning.pytorch", "pytorch_lightning"


@starts_mpiexec
@pytest.mark.full("it starts two jobs that import large packages")
def test_both_packages_and_fabric(tmp_path: Path, run_job: Callable[..., End]) -> None:
    """Two ranks with uneven batches learn what one process does, and have their plain models again.

    Metrics, validation, the checkpoint and a third epoch from it are the same too.
    """
    for name in ("lightning", "pytorch_lightning"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[integrations]'")
    (expected,), found = (learned(ranks, tmp_path / f"{ranks}", run_job) for ranks in (0, 2))
    backend = "gloo" if torch.cuda.is_available() else "mpi4py"  # Lightning chooses gloo, LayerSync mpi4py
    for rank in found:
        assert rank["backend"] == backend
        assert documented.distance(rank["fabric"], expected["fabric"]) < documented.TOLERANCE
        for package in PACKAGES:
            assert rank[package].pop("plain")
            for name, values in rank[package].items():
                far = documented.distance(values, expected["lightning.pytorch"][name])
                assert far < documented.TOLERANCE, (package, name)


def learned(ranks: int, folder: Path, run_job: Callable[..., End]) -> list[dict[str, Any]]:
    folder.mkdir()
    end = run_job(PROGRAM, str(folder), ranks=ranks, folder=folder)
    assert end.status == 0, end.stdout + end.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(ranks, 1))]
