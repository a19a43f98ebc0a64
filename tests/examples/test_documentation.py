"""Tests of the documentation: its code runs and prints what the page shows, its links have targets.

Conventions of a page:

- A block ``python`` runs by itself, at any number of ranks, unless it begins with a comment that is
  a file's name, such as ``# train.py``. Then it is that file, for the commands of the page.
- A block ``diff`` with the lines ``--- old.py`` and ``+++ new.py`` makes new.py from old.py. The
  old lines after each ``@@`` must be in old.py exactly once.
- A block ``console`` has commands after ``$``, each with its output below it. They run in order, in
  one folder for a page. ``...`` stands for any text; numbers with a decimal point are compared to
  5 % or 0.01. Output on stderr follows that on stdout. This machine is called node1, and the page's
  folder /home/me. A command must end with status 0, unless ``$ echo $?`` follows. A block without
  any output is not run.
- Blocks in other languages, or in none, are not run.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
from mpi4py import MPI

import mpisyncbn
from mpisyncbn import config
from support import jobs, pages
from support.jobs import ROOT
from support.pages import PAGES, Block, Command
from support.ranks import no_exchange, starts_mpiexec
from support.slurm import slurm

REFERENCE = ROOT / "docs" / "reference"
PUBLIC_MODULES = ("mpisyncbn", "mpisyncbn.functional", "mpisyncbn.distributed", "mpisyncbn.lightning")
# tests/integrations/ runs these, with tools that only the full tier installs.
ELSEWHERE = {"docs/guides/integrations.md"}
QUICK = {"README.md"}  # the jobs of other pages take longer


def runs_python(block: Block) -> bool:
    return block.language == "python" and block.file is None


def of_slurm(block: Block) -> bool:
    return any(command.text.startswith("sbatch ") for command in pages.commands(block))


def runs_commands(block: Block) -> bool:
    return block.language == "console" and bool(pages.commands(block)) and not of_slurm(block)


def with_blocks(wanted, *marks_unless_quick):
    """Return a pytest parameter for each page with a block for which ``wanted`` is true.

    Pages that are not in ``QUICK`` get the marks.
    """
    found = []
    for page in PAGES:
        name = pages.name_of(page)
        if name not in ELSEWHERE and any(wanted(block) for block in pages.blocks(page)):
            marks = [] if name in QUICK else [*marks_unless_quick]
            if name == "docs/guides/compile.md":  # torch's tools warn
                marks.append(pytest.mark.filterwarnings("ignore"))
            found.append(pytest.param(page, id=name, marks=marks))
    return found


@pytest.mark.parametrize("page", with_blocks(runs_python))
def test_code_runs(page, tmp_path, monkeypatch):
    """Each Python block of a page runs by itself, at any number of ranks."""
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(filter(runs_python, pages.blocks(page)), 1):
        where = f"{pages.name_of(page)}, block {number}"
        exec(compile(block.code, where, "exec"), {"__name__": "__main__"})


def check(command: Command, folder: Path, variables: Mapping[str, str], status: int) -> int:
    """Run a command, compare its output, return its status. ``status``: the previous command's."""
    if command.text == "echo $?":
        assert command.output.strip() == str(status)
        return 0
    assert status == 0, f"status {status}, before: {command.text}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    end = jobs.run(["bash", "-c", command.text], folder, variables={**variables, "PATH": path})
    printed = (end.stdout + end.stderr).replace(str(folder), "/home/me")
    printed = re.sub(rf"\b{re.escape(MPI.Get_processor_name())}\b", "node1", printed)
    problem = pages.difference(command.output, printed)
    assert problem is None, f"{command.text}: {problem}"
    assert end.status is not None, f"{command.text}: it did not end"
    return end.status


def check_page(page: Path, folder: Path, wanted, variables: Mapping[str, str]) -> None:
    """Write the files of a page to ``folder``, and run the commands of the wanted blocks there."""
    for block in pages.blocks(page, "python", "bash", "diff", "console"):
        if block.language == "diff" or block.file:
            pages.write(block, folder)
        elif wanted(block):
            status = 0
            for command in pages.commands(block):
                status = check(command, folder, variables, status)
            assert status == 0, f"the last command of a block ended with status {status}:\n{block.code}"


@starts_mpiexec
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", with_blocks(runs_commands, pytest.mark.full("jobs of several ranks")))
def test_commands_print_the_output_on_the_page(page, tmp_path):
    check_page(page, tmp_path, runs_commands, jobs.for_jobs())


@starts_mpiexec
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", with_blocks(of_slurm, pytest.mark.full("Slurm takes its time")))
def test_batch_jobs_print_the_output_on_the_page(page, tmp_path):
    with slurm(nodes=1) as cluster:
        # The next command shows the job's output, so sbatch must not return before the job ends.
        check_page(page, tmp_path, of_slurm, {**cluster.environment, "SBATCH_WAIT": "1"})


@no_exchange
def test_no_line_of_prose_is_longer_than_100_characters():
    lines = [(page, number, line) for page in PAGES for number, line in enumerate(pages.prose(page), 1)]
    assert [f"{pages.name_of(page)}:{number}" for page, number, line in lines if len(line) > 100] == []


@no_exchange
@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert ROOT in target.parents, f"{link}: outside of the repository"
        if anchor:
            assert anchor in pages.anchors(target), f"{link}: no such heading"


@no_exchange
def test_files_of_a_page_are_run():
    for page in PAGES:
        texts = [command.text for block in pages.blocks(page, "console") for command in pages.commands(block)]
        for block in pages.blocks(page):
            assert block.file is None or any(block.file in text for text in texts), (page, block.file)


@no_exchange
def test_the_comparison_of_outputs():
    same = "loss 0.50\n...\nrank 3 of 4", "loss 0.51\nsome\nlines\nrank 3 of 4\n"
    assert pages.difference(*same) is None
    assert pages.difference("loss 0.50", "loss 0.60") is not None
    assert pages.difference("rank 3 of 4", "rank 2 of 4") is not None
    assert pages.difference("loss 0.50", "loss 0.50\nand more") is not None


@no_exchange
def test_every_public_name_is_in_the_reference():
    """A function with two names, such as init_process_group, is there under one of them."""
    text = "".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))
    shown = re.findall(r"^\.\. (?:auto)?(?:module|class|exception|function|data):: (\S+)", text, re.MULTILINE)
    modules = {name: import_module(name) for name in PUBLIC_MODULES}
    assert {f"mpisyncbn.{name}" for name, home in mpisyncbn._HOME.items() if not home} < set(modules)
    public = {name: module for name, module in modules.items() if name != "mpisyncbn"}
    for name, module in modules.items():
        public |= {f"{name}.{each}": getattr(module, each) for each in module.__all__}
    assert set(shown) <= set(public)
    assert {id(public[name]) for name in shown} == set(map(id, public.values()))
    assert len(shown) == len(set(shown))


@no_exchange
def test_every_environment_variable_is_in_the_reference():
    """The reference has every environment variable that config.py and setup.py name.

    Only config.py reads the environment in the package. There are no other MPISYNCBN variables.
    """
    name = r"[A-Z][A-Z0-9_]*(?:_[a-z_]+)?"
    read = set(re.findall(rf'"({name})(?<!_)"', (ROOT / "mpisyncbn" / "config.py").read_text()))
    read |= set(re.findall(r'"(MPISYNCBN_\w+)"', (ROOT / "setup.py").read_text()))
    read -= {*config.__all__, "MPISYNCBN_STANDIN"}  # only the tests set it
    shown = set(re.findall(rf"`({name})`", (REFERENCE / "environment.md").read_text()))
    assert read - shown == set()
    assert {each for each in shown - read if each.startswith("MPISYNCBN_")} == set()


@no_exchange
def test_errors_of_the_reference_are_in_the_code():
    """Each message in the reference is in the code of the package; ``...`` stands for any text."""
    source = []
    for path in (ROOT / "mpisyncbn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                source.append(node.value)
    messages = re.findall(r"^\| `([^`]+)` \|", (REFERENCE / "errors.md").read_text(), re.MULTILINE)
    assert messages
    for message in messages:
        for part in filter(None, message.split("...")):
            assert any(part in text for text in source), f"no message has {part!r}"
