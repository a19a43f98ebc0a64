from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.slurm import Slurm, slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    """A Slurm cluster of two nodes, or of one if the tests do not run as root."""
    with slurm(2 if os.geteuid() == 0 else 1) as made:
        yield made
