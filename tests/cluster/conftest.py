from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.slurm import Slurm, slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    """A Slurm of two nodes, or of one where two take root."""
    with slurm(2 if os.geteuid() == 0 else 1) as made:
        yield made
