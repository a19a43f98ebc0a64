"""Each part of a point is a test. It fails if a check fails, but not if a figure misses its bar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from . import launch, points

pytestmark = pytest.mark.gpu
_RANKS_AT_A_TIME = max(4, (os.cpu_count() or 1) - 2)


def pytest_generate_tests(metafunc: Any) -> None:
    options = metafunc.config.option
    if not metafunc.config.pluginmanager.hasplugin("gpu_check"):
        import torch

        reason = "scripts/gpu_check runs it" if torch.cuda.is_available() else "no GPU that torch can use"
        left_out = pytest.mark.skip(reason=reason)
        metafunc.parametrize(("point", "run"), [pytest.param(None, None, marks=left_out)], ids=["all"])
        return
    chosen = [point for point in points.POINTS if point.number in options.only]
    parts = {f"{point.number} {run.name}": (point, run) for point in chosen for run in point.runs}
    metafunc.parametrize(("point", "run"), parts.values(), ids=parts, indirect=["point"], scope="module")


@pytest.fixture(scope="module")
def point(request: Any) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Run the parts of a point, and yield the futures of their results by name.

    They run side by side unless some are timed. No part of another point runs at the same time.
    """
    options = request.config.option
    parts = [item.callspec.params for item in request.session.items]
    chosen = {
        part["run"].name for part in parts if part["point"] is request.param
    }  # pytest's -k leaves some out
    most = _RANKS_AT_A_TIME // 4 if request.param.side_by_side else 1
    with ThreadPoolExecutor(most) as pool:
        yield {
            run.name: pool.submit(launch.ended, run, options.device, options.quick)
            for run in request.param.runs
            if run.name in chosen
        }
        pool.shutdown(cancel_futures=True)


def test_part(point: dict[str, Future[dict[str, Any]]], run: points.Run, record_property: Any) -> None:
    found = point[run.name].result()
    for name, value in found.items():
        record_property(name, value)
    if found["verdict"] == "skipped":
        pytest.skip(found["reason"])
    if found["verdict"] == "failed":
        pytest.fail(found["reason"], pytrace=False)
