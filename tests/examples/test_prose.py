"""The pages are wrapped at 100 characters, and their links lead to files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.jobs import ROOT
from support.ranks import no_exchange

pytestmark = no_exchange
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = 100

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> list[str]:
    """The lines of a page; those of code and tables are empty."""
    lines, fence = [], ""
    for line in page.read_text().splitlines():
        mark = re.match(r" *(```+|~~~+|:::+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif not fence and not line.startswith(("    ", "|")):
            lines.append(line)
            continue
        lines.append("")
    return lines


def headings(page: Path) -> set[str]:
    """The anchors of a page, as repository viewers and MyST make them."""
    titles = [line.lstrip("#").strip() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_no_line_of_prose_is_too_long(page: Path) -> None:
    shortened = [re.sub(r"\]\([^)]*\)|https?://\S+", "", line) for line in prose(page)]
    too_long = [number for number, line in enumerate(shortened, 1) if len(line) > LONGEST]
    assert not too_long, f"{page.relative_to(ROOT)}: lines of more than {LONGEST} characters: {too_long}"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), f"{page.relative_to(ROOT)} links to {target}: no such file"
        assert not anchor or anchor in headings(found), (
            f"{page.relative_to(ROOT)} links to {target}: no heading"
        )
