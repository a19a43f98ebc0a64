"""scripts/gpu_check, tried on a CPU: its message without a GPU, its verdicts, and its report."""

from __future__ import annotations

import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import conftest, launch, points, records, report
from support import jobs
from support.ranks import starts_mpiexec
from support.whole_batch import distance

pytestmark = starts_mpiexec


def run(folder: Path, *arguments: str, **variables: str) -> jobs.End:
    """Run the command as if there were no launcher, no GPU and no plugins of pytest."""
    without = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(folder)}
    (folder / "hypothesis.py").write_text("raise ImportError('this is for tests/conftest.py')")
    environment = {**jobs.unlaunched(), "PYTHON": sys.executable, **without, **variables}
    return jobs.run([f"{jobs.ROOT}/scripts/gpu_check", *arguments], folder, variables=environment)


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf), (1.0, math.inf)])
def test_no_distance_is_nan(values: tuple[float, float]) -> None:
    """``max`` leaves out a NaN that is not the first value."""
    found, expected = (torch.tensor([2.0, value]) for value in values)
    assert distance(found, expected) == math.inf
    assert distance(found[:1], expected[:1]) == 0


def test_without_a_gpu(tmp_path: Path) -> None:
    end = run(tmp_path, "--output", "found.json")
    assert end.status == conftest.NO_GPU, end
    assert end.stdout.startswith("gpu_check: no GPU here")
    assert len(end.stdout.splitlines()) == 1
    assert not (tmp_path / "found.json").exists()


@pytest.mark.full("it starts four times; the next test goes the same way, and fails")
def test_a_point_on_a_cpu(tmp_path: Path) -> None:
    end = run(tmp_path, *["--device", "cpu", "--quick", "--only", "2,3", "--output", "new/found.json"])
    assert end.status == 0, end
    written = (tmp_path / "new" / "found.json").read_text()
    found = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["environment"]["torch"] == torch.__version__
    races, correct = found["points"]
    assert (races["verdict"], correct["verdict"]) == ("skipped", "passed")
    layers = correct["runs"][0]
    assert layers["ranks"] == 2
    assert len(layers["checks"]) > 100
    assert all(check["ok"] for check in layers["checks"])
    for line in ("2 races    skipped", "3 correct  passed", "1 passed, 0 failed, 1 skipped"):
        assert line in end.stdout
    assert str(jobs.ROOT) not in written


def test_a_point_that_fails(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--only", "5,8", "--output", "found.json"]
    end = run(tmp_path, *arguments, MPISYNCBN_DEBUG="perhaps")
    assert end.status == 1, end
    failed, other = json.loads((tmp_path / "found.json").read_text())["points"]
    assert (failed["verdict"], other["verdict"]) == ("failed", "skipped")  # it went on after a failure
    part = failed["runs"][0]
    assert "MPISYNCBN_DEBUG must be one of" in part["reason"]
    assert "Traceback" in part["printed"]
    assert str(jobs.ROOT) not in part["printed"]
    assert "5 latency    failed" in end.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--only 3,99", "expected some of 1,2,3,4,5,6,7,8,9, got 3,99"), ("--wrong", "unrecognized arguments")],
)
def test_wrong_arguments(arguments: str, said: str, tmp_path: Path) -> None:
    end = run(tmp_path, *arguments.split())
    assert (end.status, end.stdout) == (2, "")
    assert said in end.stderr


def test_without_pytest(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('No module named pytest')")
    end = run(tmp_path)
    assert (end.status, end.stdout) == (2, "")
    assert "gpu_check: No module named pytest. pip install pytest, or" in end.stderr


def test_points() -> None:
    """Each part names an existing function, and has a time limit in a known range."""
    assert [point.number for point in points.POINTS] == [*points.NUMBERS, points.TUNE]
    for point in points.POINTS:
        assert len({part.name for part in point.runs}) == len(point.runs)
        for part in point.runs:
            module, _, function = part.function.partition(".")
            path = jobs.ROOT / "tests" / "gpu" / "checks" / f"{module}.py"
            assert f"\ndef {function}(context: Context" in path.read_text()
            assert 30 <= part.limit <= (420 if point.number == points.TUNE else 240)


Calls = list[tuple[str, tuple[Any, ...]]]  # calls of methods of Records


def written(folder: Path, *ranks: Calls, whole: bool = True) -> tuple[dict[str, Any], str, str]:
    """Write the records of each rank; return all of them merged, the verdict, and its reason."""
    for rank, calls in enumerate(ranks):
        mine = records.Records(folder / f"rank-{rank}.jsonl")
        for name, arguments in [*calls, *([("end", ())] if whole else [])]:
            getattr(mine, name)(*arguments)
    found = records.merged(folder, len(ranks))
    return (found, *records.verdict(found, ""))


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_the_worst_rank_counts(tmp_path: Path, value: float) -> None:
    ranks = [[("at_most", ("y", each, 1.0))] for each in (0.5, value, 0)]
    found, verdict, reason = written(tmp_path, *ranks)
    (check,) = found["checks"]
    assert (check["ok"], check["rank"]) == (False, 1)
    assert (verdict, reason[:3]) == ("failed", "y: ")
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("calls", "whole", "expected"),
    [
        ([("holds", ("works", True))], True, "passed"),
        ([("holds", ("works", True)), ("skip", ("more", "no time"))], True, "passed"),
        ([("bar", ("speed", 2.0, 1.0))], True, "passed"),  # a missed bar fails nothing
        ([("skip", ("all", "no time"))], True, "skipped"),
        ([("holds", ("works", True))], False, "failed"),  # it did not come to its end
        ([], True, "skipped"),
    ],
)
def test_verdicts(tmp_path: Path, calls: Calls, whole: bool, expected: str) -> None:
    found, verdict, _ = written(tmp_path, calls, whole=whole)
    assert verdict == expected, found


def test_an_exception_is_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = records.Records(tmp_path / "rank-0.jsonl")
    with mine.trying("division"):
        1 / 0  # noqa: B018
    mine.end()
    found = records.merged(tmp_path, 1)
    assert records.verdict(found, "") == ("failed", "division: ZeroDivisionError: division by zero")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_part_that_hangs_is_ended() -> None:
    """A part that exceeds its time limit is ended, with all processes that it started."""
    sleep = "import time; time.sleep(60)"
    start = f"subprocess.Popen([sys.executable, '-c', '{sleep}'])"
    code = f"import subprocess, sys; print({start}.pid, flush=True)"
    part = points.Run("sleeps", "", 0, 2, under=(sys.executable, "-c", f"{code}; {sleep}"))
    found = launch.ended(part, "cpu", quick=True)
    assert (found["verdict"], found["reason"]) == ("failed", "over its 2 s")
    left = Path("/proc", found["printed"].strip(), "cmdline")
    assert not (left.exists() and left.read_bytes())


def test_table() -> None:
    bars = [{"name": "fast", "value": 2.0, "bar": 1.0, "at": "most", "met": False}]
    part = {"name": "part", "ranks": 2, "verdict": "passed", "reason": "", "seconds": 1.0}
    part |= {"checks": [{"name": "y", "ok": True}], "bars": bars, "figures": {"us": {"a": 1}}, "skipped": []}
    point = {"point": 5, "title": "latency", "verdict": "passed", "seconds": 1.5, "runs": [part]}
    assert "5 latency  passed   2        1 checks; 0 of 1 bars met" in report.table([point])
    said = report.lines(part)
    assert "missed: fast 2.0, at most 1.0" in said
    assert "us: a 1" in said


def test_name_of_the_file() -> None:
    date = datetime.datetime(2026, 3, 4)
    for numbers, part in ((points.NUMBERS, ""), ([2, 7], "-points-2-7"), ([points.TUNE], "-tiles")):
        name = report.default_name({"devices": ["NVIDIA H200"]}, date, numbers)
        assert name == f"docs/results/gpu-nvidia-h200-2026-03-04{part}.json"
