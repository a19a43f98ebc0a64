"""Mutation testing: does a test fail where one thing in the code is wrong?

    scripts/mutate                                        all mutants of all modules below, which takes hours
    scripts/mutate --sample 40 --seed 1 exchange.py       some, at random

Mutants are cosmic-ray's, one operator at one place, and those that lack a statement. Each is tried in a
copy of the tree: by a few tests, with and without native kernels, which go past parts of the code; where
those pass, by more of the suite at 3 ranks. A mutant that hangs is ended, and counts as killed. Prints those
that survive.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import parso
from cosmic_ray import mutating, plugins
from cosmic_ray.operators.operator import Operator

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    ranks: int
    native: bool
    tests: tuple[str, ...]


FEW = ("test_exchange", "test_functional", "test_diagnostics", "test_arguments", "test_remaining")
MORE = (
    "test_autograd",
    "test_batchnorm",
    "test_communicator",
    "test_distributed",
    "test_ddp",
    "test_cupy",
    "test_fused",
    "test_transport",
)
STAGES = (
    Stage(1, True, FEW),  # the quickest, and enough for most
    Stage(2, True, FEW),
    Stage(2, False, FEW),
    Stage(3, True, (*FEW, *MORE)),
)
MODULES = ("exchange.py", "functional.py", "diagnostics.py")

# Of the seven replacements of each comparison, and the eleven of each arithmetic operator, one or two.
OPERATORS = re.compile(
    "core/("
    "ReplaceComparisonOperator_"
    "(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is)|"
    "ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Mul_Add|Div_Mul|Pow_Mul|BitAnd_BitOr|LShift_RShift)|"
    "ReplaceUnaryOperator_(Delete_.*|USub_UAdd)|Replace(AndWithOr|OrWithAnd|TrueWithFalse|FalseWithTrue)|"
    "Replace(BreakWithContinue|ContinueWithBreak)|"
    "AddNot|NumberReplacer|ExceptionReplacer|RemoveDecorator|ZeroIterationForLoop)"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", default=MODULES, help=f"of {', '.join(MODULES)}")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = {native: copy_tree(Path(folder) / str(native), native) for native in (True, False)}
        limits = [limit_of(stage, copies[stage.native]) for stage in STAGES]
        for module in options.modules:
            source = (ROOT / "mpisyncbn" / module).read_text()
            everything = list(mutants(source))
            chosen = list(everything)
            random.Random(options.seed).shuffle(chosen)
            chosen = chosen[: options.sample]
            killed = [0] * len(STAGES)
            for mutant in chosen:
                stage = first_to_fail(module, mutant, copies, limits)
                if stage is None:
                    print(difference(module, source, mutant), flush=True)
                else:
                    killed[stage] += 1
            survived = len(chosen) - sum(killed)
            rows.append(
                f"{module}: {len(everything)} mutants, {len(chosen)} tried, {sum(killed)} killed "
                f"({' + '.join(map(str, killed))} by stage), {survived} survived"
            )
            for copy in copies.values():
                (copy / "mpisyncbn" / module).write_text(source)
    print("\n".join(rows))
    return 0


def mutants(source: str) -> Iterator[str]:
    """Each once, and only what compiles."""
    seen = {source}
    for operator in operators():
        for occurrence in itertools.count():
            mutant = mutating.mutate_code(source, operator, occurrence)
            if mutant is None:
                break
            if mutant not in seen and compiles(mutant):
                seen.add(mutant)
                yield mutant


def operators() -> Iterable[Operator]:
    names = [name for name in sorted(plugins.operator_names()) if OPERATORS.fullmatch(name)]
    return [*(plugins.get_operator(name)() for name in names), RemoveStatement()]


class RemoveStatement(Operator):
    """``pass`` in place of a statement in a function, unless it is a docstring or brings in names."""

    KEPT = ("string", "strings", "import_name", "import_from", "global_stmt", "nonlocal_stmt")

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and parso.tree.search_ancestor(node, "funcdef"):
            statement = node.children[0]
            if statement.type not in self.KEPT and statement.get_code().strip() != "pass":
                yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        statement = node.children[0]
        node.children[0] = parso.python.tree.Keyword(
            "pass", statement.start_pos, statement.get_first_leaf().prefix
        )
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def copy_tree(copy: Path, native: bool) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", *([] if native else ["_cpu*.so"]))
    for name in ("mpisyncbn", "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def limit_of(stage: Stage, copy: Path) -> float:
    """Three times what the tests take without a mutant, and some. They must pass."""
    start = time.monotonic()
    done = run(stage, copy, 1800)
    if done.returncode:
        sys.exit(f"{done.stdout}\nmutate: tests fail without a mutant: {stage}")
    return 3 * (time.monotonic() - start) + 30


def first_to_fail(module: str, mutant: str, copies: dict[bool, Path], limits: list[float]) -> int | None:
    for copy in copies.values():
        (copy / "mpisyncbn" / module).write_text(mutant)
    return next(
        (
            number
            for number, (stage, limit) in enumerate(zip(STAGES, limits, strict=True))
            if run(stage, copies[stage.native], limit).returncode
        ),
        None,
    )


def run(stage: Stage, copy: Path, limit: float) -> subprocess.CompletedProcess[str]:
    # mpiexec ends its ranks when timeout ends it, and in the foreground at Ctrl-C.
    launch = ["timeout", "--foreground", "--kill-after=10", str(limit), "mpiexec", "-n", str(stage.ranks)]
    tests = [f"tests/{name}.py" for name in stage.tests]
    return subprocess.run(
        [*launch, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *tests],
        cwd=copy,
        # Bytecode would be taken for that of the next mutant.
        env=os.environ
        | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        | {"MPISYNCBN_TEST_EXAMPLES": "10", "MPISYNCBN_TIMEOUT": "20"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def difference(module: str, source: str, mutant: str) -> str:
    before, after = source.splitlines(), mutant.splitlines()
    return "\n".join(difflib.unified_diff(before, after, module, module, "", "survived", n=1, lineterm=""))


if __name__ == "__main__":
    sys.exit(main())
