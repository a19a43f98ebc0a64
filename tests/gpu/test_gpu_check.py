"""scripts/gpu_check: what it says without a GPU, and how it counts, tried on a CPU."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import conftest, launch, points, records, report
from support.jobs import ROOT, unlaunched
from support.ranks import starts_mpiexec

pytestmark = starts_mpiexec


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, as if nobody had started this process by mpiexec."""
    kept = unlaunched()
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_check"), *arguments],
        env={**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    done = run("--output", str(output))
    assert done.returncode == conftest.NO_GPU, done.stdout
    assert done.stdout.startswith("gpu_check: no GPU here")
    assert len(done.stdout.splitlines()) == 1
    assert not output.exists()


def test_a_point_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "new" / "found.json"
    done = run("--device", "cpu", "--quick", "--only", "2,3", "--output", str(output))
    assert done.returncode == 0, done.stdout
    found = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["environment"]["torch"] == torch.__version__
    races, correct = found["points"]
    assert (races["verdict"], correct["verdict"]) == ("skipped", "passed")
    layers = correct["runs"][0]
    assert layers["ranks"] == 2
    assert len(layers["checks"]) > 100
    assert all(check["ok"] for check in layers["checks"])
    for line in ("2 races    skipped", "3 correct  passed", "1 passed, 0 failed, 1 skipped"):
        assert line in done.stdout
    assert str(ROOT) not in output.read_text()


def test_a_point_that_fails(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    arguments = "--device", "cpu", "--quick", "--only", "5,8", "--output", str(output)
    done = run(*arguments, MPISYNCBN_DEBUG="perhaps")
    assert done.returncode == 1, done.stdout
    failed, other = json.loads(output.read_text())["points"]
    assert (failed["verdict"], other["verdict"]) == ("failed", "skipped")  # it went on
    (part,) = failed["runs"]
    assert "MPISYNCBN_DEBUG must be one of" in part["reason"]
    assert "Traceback" in part["printed"]
    assert str(ROOT) not in part["printed"]
    assert "5 latency    failed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--only 3,9", "expected some of 1,2,3,4,5,6,7,8, got 3,9"), ("--wrong", "unrecognized arguments")],
)
def test_wrong_arguments(arguments: str, said: str) -> None:
    done = run(*arguments.split())
    assert done.returncode == 2
    assert said in done.stdout


def test_without_pytest(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('No module named pytest')")
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "gpu_check: No module named pytest. pip install pytest, or" in done.stdout


def test_points() -> None:
    """Every function is there, and all the time limits together are known."""
    assert [point.number for point in points.POINTS] == [*points.NUMBERS, points.TUNE]
    for point in points.POINTS:
        assert len({part.name for part in point.runs}) == len(point.runs)
        for part in point.runs:
            module, _, function = part.function.partition(".")
            path = ROOT / "tests" / "gpu" / "checks" / f"{module}.py"
            assert f"\ndef {function}(context: Context" in path.read_text()
            assert 30 <= part.limit <= (420 if point.number == points.TUNE else 240)


def written(
    folder: Path, *ranks: list[tuple[str, tuple[Any, ...]]], whole: bool = True
) -> tuple[Any, str, str]:
    """What the launcher makes of what ranks wrote down."""
    for rank, calls in enumerate(ranks):
        mine = records.Records(folder / f"rank-{rank}.jsonl")
        for name, arguments in calls:
            getattr(mine, name)(*arguments)
        if whole:
            mine.end()
    found = records.merged(folder, len(ranks))
    return (found, *records.verdict(found, ""))


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_the_worst_rank_counts(tmp_path: Path, value: float) -> None:
    found, verdict, reason = written(
        tmp_path,
        [("at_most", ("y", 0.5, 1.0))],
        [("at_most", ("y", value, 1.0))],
        [("at_most", ("y", 0, 1.0))],
    )
    (check,) = found["checks"]
    assert (check["ok"], check["rank"]) == (False, 1)
    assert verdict == "failed"
    assert reason.startswith("y: ")
    json.dumps(found, allow_nan=False)


def test_verdicts(tmp_path: Path) -> None:
    for number, (calls, whole, expected) in enumerate(
        [
            ([("holds", ("works", True))], True, "passed"),
            ([("holds", ("works", True)), ("skip", ("more", "no time"))], True, "passed"),
            ([("bar", ("speed", 2.0, 1.0))], True, "passed"),  # missed, but right
            ([("skip", ("all", "no time"))], True, "skipped"),
            ([("holds", ("works", True))], False, "failed"),  # died on the way
            ([], True, "skipped"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, verdict, _ = written(folder, calls, whole=whole)
        assert verdict == expected, (number, found)


def test_an_exception_is_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = records.Records(tmp_path / "rank-0.jsonl")
    with mine.trying("division"):
        1 / 0  # noqa: B018
    mine.end()
    found = records.merged(tmp_path, 1)
    assert records.verdict(found, "") == ("failed", "division: ZeroDivisionError: division by zero")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_hangs_is_ended() -> None:
    """With all that it started."""
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
    for numbers, part in ((points.NUMBERS, ""), ([2, 7], "-points-2-7"), ([9], "-tiles")):
        name = report.default_name({"devices": ["NVIDIA H200"]}, date, numbers)
        assert name == f"docs/results/gpu-nvidia-h200-2026-03-04{part}.json"
