"""What the scripts in scripts/ have in common: their help, and files to write."""

from __future__ import annotations

import shutil
from pathlib import Path

from outputs import output
from support import jobs
from support.jobs import ROOT
from support.ranks import once

pytestmark = once("no rank meets another in it")


def test_help_makes_nothing(tmp_path: Path) -> None:
    """Each script prints its help where there is no Python, and leaves no new file behind."""
    tree = shutil.copytree(ROOT / "scripts", tmp_path / "scripts", symlinks=True)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("bash", "dirname", "sed"):
        (commands / name).symlink_to(shutil.which(name))
    before = set(tmp_path.rglob("*"))
    scripts = {path.name for path in tree.iterdir() if path.is_file() and not path.suffix}

    for script in scripts - {"standin"}:  # its arguments are a command, which may have a --help
        for arguments in (["--help"], ["--any", "-h"]):
            command = ["bash", str(tree / script), *arguments]
            end = jobs.run(command, tmp_path, variables={"PATH": str(commands)})
            assert end.status == 0, (script, end.stderr)
            assert len(end.stdout) > 100, script
    assert set(tmp_path.rglob("*")) - {tmp_path / "stdout", tmp_path / "stderr"} == before
    assert "coverage" in scripts


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    path = output(str(tmp_path / "new" / "er" / "x.json"))
    path.write_text("")
    assert output(str(path)) == path
    assert output("") is None
