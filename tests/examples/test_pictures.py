"""Tests of scripts/pictures: pictures and tables show the results; runs are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pictures
from benchmarks import charts, runs, style, tables
from support.ranks import no_exchange

pytestmark = no_exchange
DOCS = pictures.DOCS


def test_tables_in_the_documentation_are_those_of_the_results() -> None:
    for path, text in pictures.pages(DOCS / "results").items():
        assert path.read_text() == text, "scripts/pictures writes it"


def test_pictures_in_the_documentation_show_the_results() -> None:
    sources = pictures.sources(DOCS / "results")
    assert set(sources) == set(pictures.DRAWN)
    for name, data in sources.items():
        drawn = (DOCS / "pictures" / f"{name}.svg").read_text()
        assert style.fingerprint(data) in drawn, "scripts/pictures draws it"
    assert all(path.stat().st_size < 100_000 for path in (DOCS / "pictures").iterdir())


def files(folder: Path, *medians: float) -> runs.Sections:
    """Write a result file with one case of one section for each run, and load the files."""
    for number, median in enumerate(medians):
        figures = {name: {"median": median, "minimum": 1.0} for name in ("local", "ours")}
        row = {"family": "f", "shape": [2, 3], "dtype": "float32", "format": "contiguous", "us": figures}
        row |= {"values": 6, "bytes": 24, "ranks": 1, "threads": 2}
        row["ours to"] = {"local": {"median": median, "minimum": 1.0}}
        facts = {"ranks": 1, "threads": 2, "date": f"day {number}", "cpu": "c", "cores": 2}
        facts |= {"mpi": "m", "torch": "t"}
        report = {"environment": facts, "sections": {"threads": [row]}}
        (folder / f"cpu-{number}.json").write_text(json.dumps(report))
    return runs.load(folder)


def test_runs_as_one(tmp_path: Path) -> None:
    sections = files(tmp_path, 3.0, 1.5, 2.0)
    (row,) = runs.rows(sections, "threads")
    assert row["ours to"]["local"] == {"median": 2.0, "lowest": 1.5, "highest": 3.0}
    page = tables.page(sections)
    assert "`threads`: 1 rank, 2 threads each; 3 runs, day 0, day 1, day 2; c, 2 cores; m, torch t" in page
    assert "| (2, 3) | float32, contiguous | 2.00 us | 2.00 us | 2.00 (1.50 to 3.00) |  |" in page
    assert charts.threads_data(sections) is None, "there is nothing to compare with"


def test_runs_of_other_cases(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [{"shape": [2, 3]}, {"shape": [2, 4]}]
    with pytest.raises(ValueError, match=r"expected runs of the same cases, got \[\[2, 3\], \[2, 4\]\]"):
        runs.merged(values)


def test_bytes_of_a_picture_are_the_same_again(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        picture = style.figure(1)
        picture.subplots().plot([1, 2])
        style.save(picture, tmp_path / name, {"data": 1})
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
