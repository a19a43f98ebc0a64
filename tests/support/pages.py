"""The pages of the documentation: their blocks of code, files, commands and links."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.jobs import ROOT

PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))

_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:#!.*\n)?# (\w+\.\w+)\n")
_NUMBER = r"-?\d+\.\d+(?:e[+-]?\d+)?"


class Block(NamedTuple):
    language: str
    code: str

    @property
    def file(self) -> str | None:
        """The file name in the comment that the block begins with; None without one."""
        found = _FILE.match(self.code)
        return found and found[1]


class Command(NamedTuple):
    """A command of a console block, and what it prints."""

    text: str
    output: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order; without languages all of them."""
    found = [Block(*block) for block in _BLOCK.findall(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> list[Command]:
    """The commands of a console block, which begin with ``$``; none unless it shows some output."""
    parts = re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]
    found = [Command(*part.split("\n", 1)) for part in parts]
    return found if any(command.output for command in found) else []


def write(block: Block, folder: Path) -> None:
    """Write the file that a block shows to ``folder``, or apply the diff that it shows there."""
    if block.language != "diff":
        (folder / str(block.file)).write_text(block.code)
        return
    head, *hunks = re.split(r"^@@.*\n", block.code, flags=re.MULTILINE)
    old, new = re.findall(r"^[-+]{3} (\S+)$", head, re.MULTILINE)
    text = (folder / old).read_text()
    for hunk in hunks:
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"{old} has this {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    (folder / new).write_text(text)


def difference(shown: str, printed: str) -> str | None:
    """Tell how the output that a page shows differs from what was printed; None if it does not.

    ``...`` stands for any text. Numbers with a decimal point may differ by 5 % or 0.01.
    """
    shown, printed = (re.sub(r"[ \t]+$", "", text.strip(), flags=re.MULTILINE) for text in (shown, printed))
    numbers = [float(number) for number in re.findall(_NUMBER, shown)]
    parts = re.split(rf"(\.\.\.|{_NUMBER})", shown)
    pattern = "".join(
        re.escape(part) if index % 2 == 0 else ".*?" if part == "..." else f"({_NUMBER})"
        for index, part in enumerate(parts)
    )
    found = re.fullmatch(pattern, printed, re.DOTALL)
    if found is None:
        return f"the page shows\n{shown}\nand what was printed is\n{printed}"
    for number, actual in zip(numbers, found.groups(), strict=True):
        if not math.isclose(number, float(actual), rel_tol=0.05, abs_tol=0.01):
            return f"the page shows {number}, and what was printed is {actual}, in\n{printed}"
    return None


def links(page: Path) -> Iterator[str]:
    """The targets of the links and pictures of a page, without those of other sites."""
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text()))
    inline = re.findall(r"\]\(<?([^)>\s]+)", text)
    for target in [*inline, *re.findall(r'(?:src|href)="([^"]+)"', text)]:
        if not re.match(r"\w+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The names of the headings of a page, as repository viewers make them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(page: Path) -> list[str]:
    """The lines of a page, without the targets of links. Lines of code and tables are empty."""
    lines, fence = [], ""
    for line in page.read_text().splitlines():
        mark = re.match(r" *(```+|~~~+|:::+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif not fence and not line.startswith(("    ", "|")):
            lines.append(re.sub(r"\]\([^)]*\)|https?://\S+", "", line))
            continue
        lines.append("")
    return lines
