"""setup.py: it installs with and without a compiler, and works without native kernels.

A shell script takes the compiler's place. It records its arguments and makes empty outputs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mpisyncbn
from support import jobs
from support.jobs import ROOT, run_alone
from support.kernels import needs_native
from support.ranks import once

pytestmark = once("setup.py is no MPI program")

STABLE_ABI = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
SUFFIX = ".abi3.so" if STABLE_ABI else sysconfig.get_config_var("EXT_SUFFIX")
NATIVE = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "mpisyncbn" / "kernels" / "cpu").iterdir()
    if path.suffix in (".cpp", ".h")
)
SOURCES = [path for path in NATIVE if path.endswith(".cpp")]
COMPILER = """\
#!/bin/sh
echo "$@" >>{folder}/calls
if {fails}; then echo "no such luck" >&2; exit 1; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : >"$2"; fi; shift; done
"""
NO_OPENMP = 'case "$*" in *-fopenmp*) true;; *) false;; esac'


class Tree:
    """A copy of the sources in a folder of its own, with a fake nanobind and a fake compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = folder / "sources"
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "mpisyncbn", self.sources / "mpisyncbn", ignore=ignore)
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy2(file, self.sources)
        (folder / "nanobind.py").write_text(
            f"__version__ = '3'\ndef include_dir():\n    return {str(folder / 'nanobind/include')!r}\n"
        )

    def setup(self, *arguments: str, fails: str = "false", **variables: str) -> str:
        compiler = self.folder / "compiler"
        compiler.write_text(COMPILER.format(folder=self.folder, fails=fails))
        compiler.chmod(0o755)
        (self.folder / "calls").write_text("")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
        chosen = {"CC": str(compiler), "CXX": str(compiler), "PYTHONPATH": str(self.folder), **variables}
        command = [sys.executable, "setup.py", *arguments]
        done = jobs.run(command, self.sources, variables=kept | chosen)
        assert done.status == 0, done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[str]:
        """Return the arguments of the calls that compiled or linked the kernels."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if "kernels" in line]

    def built(self) -> list[Path]:
        return list(self.sources.rglob("*.so"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def lines_about_native(output: str) -> list[str]:
    return [
        line for line in output.splitlines() if line.startswith("mpisyncbn: native kernels were not built")
    ]


@pytest.mark.parametrize(
    ("variables", "reason", "cure"),
    [
        ({"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}, "/nowhere/c++", "install a C++17 compiler"),
        ({"fails": "true"}, "compiler", "install a C++17 compiler"),
        ({"MPISYNCBN_NO_NATIVE": "1"}, "(MPISYNCBN_NO_NATIVE is set)", "unset it"),
        (None, "(no nanobind)", "pip install nanobind"),
    ],
    ids=["no compiler", "one that fails", "not wanted", "no nanobind"],
)
def test_without_native_kernels(tree: Tree, variables: dict[str, str] | None, reason: str, cure: str) -> None:
    if variables is None:
        (tree.folder / "nanobind.py").write_text("raise ImportError('no nanobind')\n")
    stale = tree.sources / "mpisyncbn" / "kernels" / "cpu" / f"_cpu{SUFFIX}"
    stale.touch()

    for arguments in (["build_ext", "--inplace"], ["build"]):
        (said,) = lines_about_native(tree.setup(*arguments, **variables or {}))
        assert reason in said
        assert len(said) < 400
        assert f"The cure: {cure}" in said
        assert tree.built() == []


def test_with_native_kernels(tree: Tree) -> None:
    output = tree.setup("build_ext", "--inplace", CXXFLAGS="-O1 -DMINE", LDFLAGS="-Wl,-z,now")
    assert "mpisyncbn: " not in output
    assert {path.name for path in tree.built()} == {f"_cpu{SUFFIX}"}
    *compilations, linked = tree.calls()
    assert len(compilations) == len(SOURCES)
    compiled = next(line for line in compilations if "/module.cpp" in line)
    assert compiled.index("-O3") < compiled.rindex("-O1 -DMINE"), "what was asked for comes last"
    assert "-fopenmp" in compiled
    assert "-fopenmp" in linked
    assert "-Wl,-z,now" in linked
    assert "-ffast-math" not in compiled

    tree.setup("build_ext", "--inplace", CXXFLAGS="-O1 -DMINE", LDFLAGS="-Wl,-z,now")
    assert tree.calls() == [], "nothing had changed"
    tree.setup("build_ext", "--inplace")
    assert len(tree.calls()) == len(SOURCES) + 1, "the flags had"
    for name in (
        "mpisyncbn/kernels/cpu/module.cpp",
        "mpisyncbn/kernels/cpu/lanes.h",
        "mpisyncbn/kernels/cpu/loops.h",
    ):
        later = max(path.stat().st_mtime for path in tree.built()) + 1
        os.utime(tree.sources / name, (later, later))
        tree.setup("build_ext", "--inplace")
        assert len(tree.calls()) == len(SOURCES) + 1, f"{name} had"
        os.utime(tree.sources / name, (0, 0))

    # If the build fails, an extension that was built from other sources must not stay.
    assert lines_about_native(tree.setup("build_ext", "--inplace", "--force", fails="true"))
    assert tree.built() == []


def test_a_compiler_without_openmp(tree: Tree) -> None:
    output = tree.setup("build", fails=NO_OPENMP)
    assert "mpisyncbn: the compiler has no OpenMP" in output
    assert lines_about_native(output) == []
    assert len(tree.built()) == 1
    assert "-fopenmp" not in "".join(tree.calls())


@pytest.mark.skipif(not STABLE_ABI, reason="before Python 3.12 a build has one name")
def test_an_earlier_build_is_not_imported_first(tree: Tree) -> None:
    """Python would import the extension of version 0.1 (no stable ABI) first. It is removed."""
    earlier = tree.sources / f"mpisyncbn/kernels/cpu/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.touch()
    tree.setup("-q", "build_ext", "--inplace")
    assert {path.name for path in tree.built()} == {f"_cpu{SUFFIX}"}


def test_sources_are_distributed(tree: Tree) -> None:
    tree.setup("-q", "sdist", "--formats=tar", MPISYNCBN_NO_NATIVE="1")
    (archive,) = tree.sources.glob("dist/*.tar")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"setup.py", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", *NATIVE} <= names


def test_wheel(tree: Tree) -> None:
    """A wheel has the right tag and contents. The fake compiler makes an empty extension."""
    tree.setup("-q", "bdist_wheel")
    (wheel,) = tree.sources.glob("dist/*.whl")
    python, abi, platform = wheel.stem.split("-")[-3:]
    major_minor = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert (python, abi) == (("cp312", "abi3") if STABLE_ABI else (major_minor, major_minor))
    assert platform.startswith("linux_")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert f"mpisyncbn/kernels/cpu/_cpu{SUFFIX}" in names
    assert {"mpisyncbn/py.typed", "mpisyncbn/kernels/cpu/_cpu.pyi"} <= names
    assert all(name.split("/")[0].startswith("mpisyncbn") for name in names), "no tests, no tools"
    assert f"Version: {mpisyncbn.__version__}\n" in metadata


@needs_native
def test_threads_are_torchs() -> None:
    """Only torch's libgomp is loaded, whether torch or the extension is imported first."""
    code = """
import {first}, {second}, mpisyncbn.kernels.cpu, torch, pathlib
lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(*{{line.split()[-1] for line in lines if "libgomp" in line}}, sep="\\n")
"""
    before, after = "torch", "mpisyncbn.kernels.cpu"
    found = run_alone(code.format(first=before, second=after)).split()
    assert len(found) == 1
    assert len(run_alone(code.format(first=after, second=before)).split()) == 1


RESULTS = """
import json, sys
if {blocked}:
    sys.modules["mpisyncbn.kernels.cpu._cpu"] = None  # importing it fails
import numpy as np, torch, mpisyncbn
from mpisyncbn import kernels
from mpisyncbn.kernels import generic
found = []
rng = np.random.default_rng(0)
for shape in ((6, 3), (5, 7, 4), (3, 5, 6, 7)):
    x, dy = rng.normal(1, 2, (2, *shape)).astype("f4")
    weight, bias = rng.normal(size=(2, shape[1])).astype("f4")
    y, stats = mpisyncbn.functional.batch_norm_forward(x, weight, bias)
    found += [y, *mpisyncbn.functional.batch_norm_backward(dy, x, stats, weight)]
    layer = mpisyncbn.SyncBatchNorm(shape[1])
    t = torch.from_numpy(x).requires_grad_()
    out = layer(t)
    out.backward(torch.from_numpy(dy))
    found += [out.detach().numpy(), t.grad.numpy(), layer.weight.grad.numpy(), layer.running_var.numpy()]
if {blocked}:
    assert kernels.native() is None
    assert kernels.kernels_for(x) is generic
    assert kernels.kernels_for(t).__name__ == "mpisyncbn.kernels.aten"
print(json.dumps([np.asarray(values).ravel().tolist() for values in found]))
"""


def test_without_the_extension_results_are_the_same() -> None:
    with_it, without = (json.loads(run_alone(RESULTS.format(blocked=blocked))) for blocked in (False, True))
    assert len(with_it) == len(without) > 0
    for one, other in zip(with_it, without, strict=True):
        assert np.abs(np.subtract(one, other)).max() <= 1e-6 * max(1.0, np.abs(one).max())
