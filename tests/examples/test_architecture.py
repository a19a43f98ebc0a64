"""The structure of the package: its imports, their cost, and the pages that describe it."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest
import torch

import architecture
import mpisyncbn
from support.jobs import ROOT, run_alone
from support.ranks import no_exchange

pytestmark = no_exchange

PACKAGE = ROOT / "mpisyncbn"
# Each module imports only from modules that are later in its line. Calls pass data in that
# direction, and results come back. The modules of kernels/ have no order.
FLOORS = {
    "": "__init__ __main__ communicator fusing mixed_class report lightning precise_bn distributed uneven"
    " batchnorm autograd convert functional exchange enqueue merging fingerprint running_stats arguments"
    " batch_stats activations comm liveness kernels profiling torch_versions config errors",
    "arguments": "__init__ statistics arrays",
    "autograd": "__init__ fused enqueued compiled composite evaluation layer_context",
    "comm": "__init__ nodes groups communicator runtime ancestors handshake transport staging streams"
    " unreferenced layer_names launcher",
    "convert": "__init__ checks mixed_class registry fusing tracing",
    "distributed": "__init__ joining process_group rendezvous store collectives point_to_point checked"
    " mpi_collectives host_tensors work no_compile",
    "liveness": "__init__ watchdog exits rank_status reports arrivals pending",
    "report": "__init__ text checks words rank cores",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    folder, *name = path.relative_to(PACKAGE).with_suffix("").parts
    top, inside = FLOORS[""].split(), FLOORS.get(folder, "").split()
    for target, *rest in architecture.imports(path):
        if target != folder:
            assert top.index(target) > top.index(folder), f"{path.name} imports {target}, which is above it"
        elif rest and inside:
            assert inside.index(rest[0]) > inside.index(name[0]), f"{path.name} imports {rest[0]}, above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_imported_by_its_full_name(path):
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        assert not any(name.startswith("mpisyncbn") for name in names), f"{path} imports by the full name"


def test_every_module_has_a_place():
    places = [path.relative_to(PACKAGE).with_suffix("").parts for path in MODULES]
    for folder, line in FLOORS.items():
        here = {place[0] for place in places} if not folder else {p[1] for p in places if p[0] == folder}
        assert here == set(line.split()), folder


def test_a_model_pickled_before_modules_moved():
    model = pickle.loads((ROOT / "tests" / "autograd" / "model_of_0.1.pickle").read_bytes())
    assert [type(layer).__name__ for layer in model] == ["Linear", "SyncBatchNorm", "SyncBatchNorm"]
    assert model.state_dict().keys() >= {"1.running_mean", "2.num_batches_tracked"}
    assert model.eval()(torch.ones(2, 2)).shape == (2, 3)


def test_one_place_reads_the_environment():
    readers = {path.stem for path in MODULES if re.search(r"\benviron\b|\bgetenv\b", path.read_text())}
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


def test_importing_costs_nothing():
    """Importing the package imports neither torch nor CuPy, and does not start MPI.

    DataLoader workers may import the program again.
    """
    out = run_alone(
        "import sys, mpisyncbn, mpisyncbn.functional; mpisyncbn.Communicator, mpisyncbn.new_group\n"
        "print(sorted({'torch', 'cupy', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    assert out.split() == ["[]"]
    out = run_alone("import sys, mpisyncbn.batchnorm; print('mpi4py.MPI' in sys.modules)")
    assert out.split() == ["False"]


def test_eager_layers_do_not_import_the_compiler():
    """torch's compiler, sympy and Triton take as long to import as torch itself, on every rank."""
    out = run_alone(
        """
import sys, torch, mpisyncbn
theirs = set(sys.modules)
model = mpisyncbn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()))
x = torch.rand(4, 3, 2, 2, requires_grad=True)
model(x).sum().backward()
model[0](x, mask=torch.ones(4, 1, 2, 2, dtype=torch.bool)).sum().backward()
model.eval()(x)
mpisyncbn.init_process_group()
torch.distributed.all_reduce(torch.ones(3))
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "triton"} & set(sys.modules) - theirs))
"""
    )
    assert out.split() == ["[]"]


def test_numpy_alone():
    """Without torch, the functions work with NumPy arrays. The rest raises ImportError."""
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


def test_report_without_torch():
    out = run_alone(
        "import sys; sys.modules['torch'] = None; sys.argv = ['x']\n"
        "from mpisyncbn.__main__ import main; main()"
    )
    assert "torch is not installed" in out


def test_git_hooks_run_the_same_checks_as_the_tests():
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook.removesuffix(" --fix") for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    steps = re.findall(r'run "(ruff check|ruff format|mypy)" ', (ROOT / "scripts" / "test").read_text())
    assert steps == ["ruff check", "ruff format", "mypy"]


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, line by line."""
    text = (ROOT / name).read_text().partition(heading)[2]
    lines = re.findall(r"^\| (.*) \|$", text.partition("\n\n## ")[0], re.MULTILINE)
    return [line.split(" | ") for line in lines[1:] if not line.startswith("---")]


def test_each_claim_of_the_comparison_names_tests_that_exist():
    page = "docs/explanation/comparison.md"
    shown = dict(table(page, "## Tests of each line"))
    assert list(shown) == [claim for claim, *_ in table(page, "## torch.nn.SyncBatchNorm")]
    assert {claim for claim, *_ in table("README.md", "## Beside torch.nn.SyncBatchNorm")} <= shown.keys()
    for claim, tests in shown.items():
        files = re.split(r"`(test_\w+\.py)`", tests)[1:]
        assert files, claim
        for file, rest in zip(files[::2], files[1::2], strict=True):
            (path,) = (ROOT / "tests").rglob(file)
            functions = {node.name for node in tree(path).body if hasattr(node, "name")}
            named = set(re.findall(r"`(test_\w+)`", rest))
            assert named <= functions, f"{claim}: {file} has no {named - functions}"


def test_the_page_on_the_architecture_is_up_to_date():
    shown = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    assert architecture.table() in shown, "the table comes from python scripts/architecture.py"
    lines, longest = architecture.sizes()
    assert max(lines.values()) <= 350, max(lines, key=lines.__getitem__)
    assert max(longest.values()) <= 50, max(longest, key=longest.__getitem__)
