"""Compare the examples of docs/guides/integrations.md at two ranks with one process.

As a program, ``documented.py FILE FOLDER`` runs one example and saves what it learned.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision_on_cpu

from support import whole_batch
from support.jobs import ROOT, End

PAGE = ROOT / "docs" / "guides" / "integrations.md"
TOLERANCE = 1e-12  # in float64, of weights and statistics of about 1


class Example(NamedTuple):
    """An example of the page: the block of code in one section, for one tool."""

    heading: str
    distribution: str  # the tool's name at PyPI
    tried: str  # the task of the block, for the table
    edit: tuple[str, str] = "", ""  # a text of the block, and its replacement for this tool


LIGHTNING = "fit with validation and `log(sync_dist=True)`, two epochs"
# Each is a row of the table. To add one, write a section with one block of code, and a line here.
EXAMPLES = (
    Example("Lightning", "lightning", LIGHTNING),
    Example("Lightning", "pytorch-lightning", LIGHTNING, ("lightning.pytorch as", "pytorch_lightning as")),
    Example("Accelerate", "accelerate", "the loop of its guide, with a scheduler, two epochs"),
    Example("Hugging Face Trainer (transformers)", "transformers", "train and evaluate a ResNet, two epochs"),
    Example("timm", "timm", "three batches of an EfficientNet in training mode"),
)


class Result(NamedTuple):
    """How an example at two ranks compares with its run in one process."""

    distance: float  # the largest, of all tensors of the model and all logged numbers, on any rank
    glue: int  # lines of the example that name mpisyncbn


def version(example: Example) -> str | None:
    """The installed version of the tool; None if it is not installed."""
    try:
        return metadata.version(example.distribution)
    except metadata.PackageNotFoundError:
        return None


def code_of(example: Example) -> str:
    """The block of code in the example's section."""
    section = PAGE.read_text().partition(f"\n## {example.heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code.replace(*example.edit)


def compare(example: Example, folder: Path, run: Callable[..., End]) -> Result:
    """Run the example at two ranks and, without the lines that name mpisyncbn, in one process.

    Args:
        folder: the runs write their files here.
        run: the fixture ``run_job``.

    Raises:
        RuntimeError: a run failed. The message has its output.
    """
    lines = code_of(example).splitlines(keepends=True)
    its_own = [line for line in lines if "mpisyncbn" not in line]
    one = _learned(its_own, 0, folder / "one process", run)
    two = _learned(lines, 2, folder / "two ranks", run)
    distances = [distance(rank, one[0]) for rank in two]
    return Result(max(distances), len(lines) - len(its_own))


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of the tensors; infinite if the dictionaries have other keys."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max(whole_batch.distance(actual[name], expected[name], 1.0) for name in expected)


def _learned(
    lines: list[str], ranks: int, folder: Path, run: Callable[..., End]
) -> list[dict[str, torch.Tensor]]:
    """Run an example, and return the tensors that each rank has saved."""
    folder.mkdir()
    file = folder / "example.py"
    file.write_text("".join(lines))
    end = run(__file__, str(file), str(folder), ranks=ranks, folder=folder)
    if end.status != 0:
        raise RuntimeError(f"{file} ended with status {end.status}:\n{end.stdout}{end.stderr}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(ranks, 1))]


def main(file: str, folder: str) -> None:
    """Run one example in float64, and save its ``net`` and ``metrics``."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # no example downloads anything
    torchvision_on_cpu.allow()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(compile(Path(file).read_text(), file, "exec"), scope)

    from mpi4py import MPI

    metrics = {name: torch.as_tensor(value) for name, value in scope.get("metrics", {}).items()}
    torch.save(scope["net"].state_dict() | metrics, Path(folder) / f"{MPI.COMM_WORLD.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
