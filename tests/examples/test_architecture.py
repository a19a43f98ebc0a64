"""How the package is put together: who imports whom, what importing it costs, and that the README runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mpisyncbn
from support.jobs import ROOT, run_alone
from support.ranks import no_exchange

PACKAGE = ROOT / "mpisyncbn"
# Data goes down this list and back; imports go down it and never up.
ORDER = [
    "__init__",
    "__main__",
    "distributed",
    "collectives",
    "steps",
    "rendezvous",
    "store",
    "buffers",
    "progress",
    "joining",
    "batchnorm",
    "convert",
    "convertible",
    "tracing",
    "autograd",
    "evaluation",
    "functional",
    "arguments",
    "arrays",
    "exchange",
    "nodes",
    "communicator",
    "names",
    "leftovers",
    "watchdog",
    "presence",
    "attendance",
    "ancestors",
    "transport",
    "staging",
    "diagnostics",
    "kernels",
    "compiling",
    "profiling",
    "exits",
    "launcher",
    "config",
    "errors",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(path: Path) -> str:
    """Where a file stands in ORDER: a kernel module stands with its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str]]:
    """``(module, name)`` of every import in the file, wherever it stands; our own without the dots."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = place(path)
    inside = here == "kernels"
    for module, name in imports(path):
        if not module.startswith("."):
            assert not module.startswith("mpisyncbn"), f"{path.name} imports {module} by its full name"
            continue
        if inside and module.startswith(".") and not module.startswith(".."):
            continue  # kernel modules stand together
        target = module.lstrip(".").partition(".")[0] or name
        assert target in ORDER, f"{path.name} imports {target}, which has no place in the house"
        assert ORDER.index(target) > ORDER.index(here), f"{path.name} imports {target}, which is above it"


def test_every_module_has_a_place():
    assert {place(path) for path in MODULES} == set(ORDER)


def test_one_place_reads_the_environment():
    readers = {place(path) for path in MODULES if re.search(r"\benviron\b|\bgetenv\b", path.read_text())}
    assert readers == {"config"}


def test_no_bare_assert():
    for path in MODULES:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree(path))), path


def test_every_public_name_is_there():
    for name in mpisyncbn.__all__:
        assert getattr(mpisyncbn, name).__doc__, f"{name} has no docstring"
        assert name in dir(mpisyncbn)
    with pytest.raises(AttributeError, match="has no attribute 'SyncBachNorm'"):
        mpisyncbn.SyncBachNorm  # noqa: B018


def test_collective_functions_say_so():
    for function in (
        mpisyncbn.sync_batch_norm,
        mpisyncbn.new_group,
        mpisyncbn.new_subgroups,
        mpisyncbn.local_rank,
        mpisyncbn.functional.batch_norm_forward,
        mpisyncbn.functional.batch_norm_backward,
        mpisyncbn.Communicator.free,
    ):
        assert "Collective" in function.__doc__


@no_exchange
def test_importing_costs_nothing():
    """Neither torch nor CuPy, and MPI is not started: DataLoader workers import the program again."""
    out = run_alone(
        "import sys, mpisyncbn, mpisyncbn.functional; mpisyncbn.Communicator, mpisyncbn.new_group\n"
        "print(sorted({'torch', 'cupy', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    assert out.split() == ["[]"]
    out = run_alone("import sys, mpisyncbn.batchnorm; print('mpi4py.MPI' in sys.modules)")
    assert out.split() == ["False"]


@no_exchange
def test_numpy_alone():
    """Where torch is not installed: the NumPy path works, and what needs torch says so."""
    out = run_alone(
        """
import sys
sys.modules["torch"] = None  # import torch fails
import numpy as np, mpisyncbn
x = np.random.default_rng(0).normal(size=(6, 3, 4)).astype("f4")
y, stats = mpisyncbn.functional.batch_norm_forward(x, np.ones(3, "f4"), np.zeros(3, "f4"))
dx, dweight, dbias = mpisyncbn.functional.batch_norm_backward(y, x, stats, np.ones(3, "f4"))
mpisyncbn.functional.update_running_stats(np.zeros(3), np.ones(3), stats, 0.1)
print(abs(y.mean()) < 1e-6, abs(y.std() - 1) < 1e-4, abs(dx).max() < 1e-3)
try:
    mpisyncbn.SyncBatchNorm
except ImportError as error:
    print("mpisyncbn.SyncBatchNorm needs torch: pip install" in str(error))
"""
    )
    assert out.split() == ["True"] * 4


@no_exchange
def test_report_without_torch():
    out = run_alone(
        "import sys; sys.modules['torch'] = None; sys.argv = ['x']\n"
        "from mpisyncbn.__main__ import main; main()"
    )
    assert "torch is not installed" in out


def test_hooks_of_git_run_what_the_tests_run_first():
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook.removesuffix(" --fix") for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    steps = re.findall(r'run "(ruff check|ruff format|mypy)" ', (ROOT / "scripts" / "test").read_text())
    assert steps == ["ruff check", "ruff format", "mypy"]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name", ["README.md", "docs/algorithm.md", "docs/distributed.md", "docs/sharp_bits.md"]
)
def test_code_in_the_documentation_runs(name, tmp_path, monkeypatch, capsys):
    """Each block by itself, at any number of ranks."""
    monkeypatch.chdir(tmp_path)
    found = blocks(name)
    assert found or name != "README.md"
    for number, code in enumerate(found):
        exec(compile(code, f"{name}, block {number + 1}", "exec"), {"__name__": "__main__"})


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, line by line."""
    text = (ROOT / name).read_text().partition(heading)[2]
    lines = re.findall(r"^\| (.*) \|$", text.partition("\n\n## ")[0], re.MULTILINE)
    return [line.split(" | ") for line in lines[1:] if not line.startswith("---")]


def test_each_claim_of_the_comparison_names_tests_that_exist():
    shown = dict(table("docs/comparison.md", "# The comparison"))
    assert list(shown) == [claim for claim, *_ in table("README.md", "## Beside torch.nn.SyncBatchNorm")]
    for claim, tests in shown.items():
        files = re.split(r"`(test_\w+\.py)`", tests)[1:]
        assert files, claim
        for file, rest in zip(files[::2], files[1::2], strict=True):
            (path,) = (ROOT / "tests").rglob(file)
            functions = {node.name for node in tree(path).body if hasattr(node, "name")}
            named = set(re.findall(r"`(test_\w+)`", rest))
            assert named <= functions, f"{claim}: {file} has no {named - functions}"
