"""A fixture for tests of the CUDA stand-in: its driver, with its work done late or early."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.standin_driver import Driver, library


@pytest.fixture(params=["late", "early"])
def driver(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("MPISYNCBN_STANDIN_ORDER", request.param)
    return Driver(library(tmp_path / "standin.so"))
