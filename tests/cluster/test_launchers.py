"""scripts/launchers.py: what it makes of a job's output, with jobs that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import launchers
from fault_cases.libraries import Library
from support.ranks import once
from support.slurm import Unavailable

pytestmark = once("its jobs are made up")
WORLD_OF_4, ALONE = (
    "world of 4\n",
    "the launcher started 4 ranks (PMI_SIZE=4), MPI has a world of 1: ...\nworld of 1\n",
)


class Jobs:
    """Every job prints and ends as it was told, by the launcher in its script."""

    def __init__(self, folder: Path, ends: dict[str, tuple[str, str]], nodes: int = 1) -> None:
        self.folder, self.ends, self.nodes = folder, ends, ["n"] * nodes
        self.variables: list[dict[str, str]] = []
        self.options: list[tuple[str, ...]] = []

    def submit(self, *arguments: str, **variables: str) -> int:
        *options, script = arguments
        text = Path(script).read_text()
        self.launcher = next(name for name in self.ends if f"{name} " in text)
        self.options.append(tuple(options))
        self.variables.append(variables)
        (self.folder / "7.out").write_text(self.ends[self.launcher][0])
        return 7

    def wait(self, job: int, limit: float) -> dict[str, str]:
        status = self.ends[self.launcher][1]
        if not status:
            raise TimeoutError
        return {"ExitCode": status}


def library(name: str = "openmpi", version: str = "5.0.8", **variables: str) -> Library:
    return Library(name, f"MPI {version}", "/there/mpiexec", variables, {})


@pytest.mark.parametrize(
    ("output", "status", "outcome", "refused"),
    [
        (WORLD_OF_4 * 4, "0:0", "one world", False),
        (ALONE * 4, "0:0", "4 singletons", True),
        ("world of 1\n" * 4, "0:0", "4 singletons", False),
        (WORLD_OF_4 * 3, "0:0", "worlds of [4, 4, 4]", False),
        ("world of 2\n" * 4, "0:0", "worlds of [2, 2, 2, 2]", False),
        ("", "0:0", "worlds of []", False),
        (WORLD_OF_4 * 4, "1:0", "error", False),
        (WORLD_OF_4 * 4, "0:9", "error", False),
        (WORLD_OF_4 * 4, "", "hang, after one world", False),
        (ALONE, "", "hang", True),
    ],
)
def test_the_outcome_of_a_job(output: str, status: str, outcome: str, refused: bool, tmp_path: Path) -> None:
    jobs: Any = Jobs(tmp_path, {"/there/mpiexec": (output, status)})
    assert launchers.run(jobs, library(), "mpiexec") == (outcome, refused)


def test_what_a_job_is_given(tmp_path: Path) -> None:
    intel = library("impi", "2021.18", I_MPI_FABRICS="shm", MPI4PY_LIBMPI="/there/libmpi.so")
    jobs: Any = Jobs(tmp_path, {"srun --mpi=pmix": ("", "0:0")}, nodes=2)
    launchers.run(jobs, intel, "srun --mpi=pmix")
    (variables,), (options,) = jobs.variables, jobs.options
    assert {"--nodes=2", "--ntasks-per-node=2"} < {*options}
    assert variables["MPI4PY_LIBMPI"] == "/there/libmpi.so"
    assert "I_MPI_FABRICS" not in variables, "which would not reach the second node"
    assert "libpmix" in variables["I_MPI_PMI_LIBRARY"]


def table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: Any, *found: Library
) -> tuple[int, list[str]]:
    @contextmanager
    def slurm(*_: Any) -> Iterator[Any]:
        if jobs is None:
            raise Unavailable("no slurmd")
        yield jobs

    monkeypatch.setattr(launchers, "slurm", slurm)
    monkeypatch.setattr(launchers, "installed", lambda: iter(found))
    status = launchers.main(["--nodes", "1"])
    out, err = capsys.readouterr()
    return status, [*out.splitlines()[2:], *err.splitlines()]


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {
        "/there/mpiexec": (WORLD_OF_4 * 4, "0:0"),
        "srun --mpi=pmix": (WORLD_OF_4 * 4, "0:0"),
        "srun --mpi=pmi2": (ALONE * 4, "0:0"),
    }
    as_expected = "| MPI 5.0.8 | 1 | one world | one world | 4 singletons, refused |"
    assert table(monkeypatch, capsys, Jobs(tmp_path, ends), library()) == (0, [as_expected])
    # One cell that differs fails the whole, be it in the first of two rows.
    different = (
        "| MPI 4.1 | 1 | one world | one world | **4 singletons, refused, expected error** |",
        "| MPI 9 | 1 | "
        + " | ".join(
            f"**{said}, expected nothing known**"
            for said in ("one world", "one world", "4 singletons, refused")
        )
        + " |",
    )
    jobs = Jobs(tmp_path, ends)
    assert table(monkeypatch, capsys, jobs, library(version="4.1"), library()) == (
        1,
        [different[0], as_expected],
    )
    assert table(monkeypatch, capsys, jobs, library(version="9")) == (1, [different[1]])


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(monkeypatch, capsys, None, library()) == (2, ["launchers: no slurmd"])
