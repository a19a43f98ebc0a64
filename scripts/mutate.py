"""Mutation testing: does a test fail where one thing in the code is wrong?

    scripts/mutate                                        all mutants of all modules below, which takes hours
    scripts/mutate --sample 40 --seed 1 exchange.py       some, at random
    scripts/mutate --jobs 2 --results FILE exchange.py    goes on where the last run with FILE was stopped
    scripts/mutate --again --results FILE exchange.py     after new tests: and tries what survived once more

Mutants are cosmic-ray's, one operator at one place, and those that lack a statement. Each is tried in a
copy of the tree: by a few tests, with and without native kernels, which go past parts of the code; where
those pass, by more of them, at 2 ranks, and by most of the suite at 3. A mutant that hangs is ended, and
counts as killed. Prints those that survive.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import parso
import pytest
from cosmic_ray import mutating, plugins
from cosmic_ray.operators.operator import Operator

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    ranks: int
    native: bool
    tests: tuple[str, ...]


class Mutant(NamedTuple):
    module: str
    code: str
    change: str
    key: str  # the same for the same text of the whole module


class Outcome(NamedTuple):
    stage: int | None  # from 1, the one that killed it; None where it survived
    status: int = 0  # of the tests; 124 where they hung
    test: str = ""  # the one that failed


FEW = ("exchange", "digits", "diagnostics", "remaining", "functional", "arguments")
MORE = ("state", "batchnorm", "autograd", "fused", "fuzz", "cupy", "communicator", "transport")
REST = ("distributed", "ddp", "compile", "cuda")
STAGES = (
    Stage(1, True, FEW),  # the quickest, and enough for most
    Stage(1, False, FEW),
    Stage(1, True, MORE),
    Stage(2, True, FEW),
    Stage(2, False, FEW),
    Stage(3, True, (*FEW, *MORE, *REST)),
)
# Half the time of the few, for processes that begin and end: left to the last stage.
LATER = "test_mpi_that_is_not_ready"
# One rank is forked from a process that has torch, which takes longer to import than the tests take.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["__main__", "pytest", "torch"])
FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(\S+)", re.MULTILINE)
MODULES = ("exchange.py", "functional.py", "arguments.py", "diagnostics.py")

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
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at the same time")
    parser.add_argument("--results", type=Path, metavar="FILE", help="of each mutant, a line of JSON")
    parser.add_argument("--again", action="store_true", help="also those that survived, by FILE")
    options = parser.parse_args()
    everything = {module: list(mutants(module)) for module in options.modules}
    for found in everything.values():
        random.Random(options.seed).shuffle(found)
    chosen = [mutant for found in everything.values() for mutant in found[: options.sample]]
    known = outcomes(options.results)
    if options.again:
        known = {key: outcome for key, outcome in known.items() if outcome.stage is not None}
    left = [mutant for mutant in chosen if mutant.key not in known]
    counts: dict[str, Counter[int | None]] = {module: Counter() for module in everything}
    for mutant, outcome in itertools.chain(
        ((mutant, known[mutant.key]) for mutant in chosen if mutant.key in known),
        tried(left, options.jobs, options.results) if left else (),
    ):
        counts[mutant.module][outcome.stage] += 1
        if outcome.stage is None:
            print(mutant.change, flush=True)
    for module, count in counts.items():
        killed = [count[number + 1] for number in range(len(STAGES))]
        print(
            f"{module}: {len(everything[module])} mutants, {count.total()} tried, {sum(killed)} killed "
            f"({' + '.join(map(str, killed))} by stage), {count[None]} survived"
        )
    return 0


def outcomes(results: Path | None) -> dict[str, Outcome]:
    """By the key of the mutant; of two lines the later one."""
    text = results.read_text() if results is not None and results.exists() else ""
    lines = map(json.loads, text.splitlines())
    return {line["mutant"]: Outcome(*(line[name] for name in Outcome._fields)) for line in lines}


def tried(chosen: list[Mutant], jobs: int, results: Path | None) -> Iterator[tuple[Mutant, Outcome]]:
    """In the order in which they are done."""
    trees: queue.SimpleQueue[dict[bool, Path]] = queue.SimpleQueue()

    def attempt(mutant: Mutant) -> Outcome:
        copies = trees.get()
        files = [copy / "mpisyncbn" / mutant.module for copy in copies.values()]
        source = files[0].read_text()
        try:
            for file in files:
                file.write_text(mutant.code)
            return first_to_fail(mutant.module, copies, limits)
        finally:
            for file in files:
                file.write_text(source)
            trees.put(copies)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            every = [copy_trees(Path(folder) / str(job)) for job in range(jobs)]
            limits = [max(pool.map(limit_of, [stage] * jobs, every)) for stage in STAGES]
            for copies in every:
                trees.put(copies)
            waiting = {pool.submit(attempt, mutant): mutant for mutant in chosen}
            for done in as_completed(waiting):
                mutant, outcome = waiting[done], done.result()
                if results is not None:
                    line = {"module": mutant.module, "mutant": mutant.key, **outcome._asdict()}
                    with results.open("a") as lines:
                        print(json.dumps({**line, "change": mutant.change}), file=lines)
                yield mutant, outcome
        finally:
            pool.shutdown(cancel_futures=True)


def mutants(module: str) -> Iterator[Mutant]:
    """Each once, and only what compiles."""
    source = (ROOT / "mpisyncbn" / module).read_text()
    seen = {source}
    for operator in operators():
        for occurrence in itertools.count():
            code = mutating.mutate_code(source, operator, occurrence)
            if code is None:
                break
            if code not in seen and compiles(code):
                seen.add(code)
                key = hashlib.sha256(f"{module}\n{code}".encode()).hexdigest()[:16]
                yield Mutant(module, code, difference(module, source, code), key)


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
        return bool(compile(code, "mutant", "exec"))
    except SyntaxError:
        return False


def copy_trees(folder: Path) -> dict[bool, Path]:
    """With native kernels, and without."""
    copies = {True: folder / "native", False: folder / "plain"}
    for native, copy in copies.items():
        ignored = shutil.ignore_patterns("__pycache__", *([] if native else ["_cpu*.so"]))
        for name in ("mpisyncbn", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
    return copies


def limit_of(stage: Stage, copies: dict[bool, Path]) -> float:
    """Three times what the tests take without a mutant, and some. They must pass.

    They leave bytecode, and those with a mutant none: it would be taken for that of the next one.
    """
    start = time.monotonic()
    status, output = run(stage, copies[stage.native], 1800)
    if status:
        sys.exit(f"{output}\nmutate: tests fail without a mutant: {stage}")
    return 3 * (time.monotonic() - start) + 30


def first_to_fail(module: str, copies: dict[bool, Path], limits: list[float]) -> Outcome:
    for number, (stage, limit) in enumerate(zip(STAGES, limits, strict=True)):
        status, output = run(stage, copies[stage.native], limit, module, PYTHONDONTWRITEBYTECODE="1")
        if status:
            return Outcome(number + 1, status, next(iter(FAILED.findall(output)), ""))
    return Outcome(None)


def run(stage: Stage, copy: Path, limit: float, module: str = "", **variables: str) -> tuple[int, str]:
    """Status and output of the tests. Those named after the module come first: most mutants fail there."""
    variables |= {"PYTHONPATH": str(copy), "MPISYNCBN_TEST_EXAMPLES": "10", "MPISYNCBN_TIMEOUT": "20"}
    tests = sorted(stage.tests, key=lambda name: f"{name}.py" != module)
    arguments = ["-p", "no:cacheprovider", "-x", *(f"tests/test_{name}.py" for name in tests)]
    if stage.tests is FEW:
        arguments += ["-k", f"not {LATER}"]
    if stage.ranks == 1:
        process = FORK.Process(target=run_here, args=(copy, arguments, variables), daemon=True)
        process.start()
        process.join(limit)
        if (status := process.exitcode) is None:
            process.kill()
            process.join()
        return 124 if status is None else status, (copy / "output").read_text(errors="replace")
    # mpiexec ends its ranks when timeout ends it, and in the foreground at Ctrl-C.
    launch = ["timeout", "--foreground", "--kill-after=10", str(limit), "mpiexec", "-n", str(stage.ranks)]
    done = subprocess.run(
        [*launch, sys.executable, "-m", "pytest", *arguments],
        cwd=copy,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def run_here(copy: Path, arguments: list[str], variables: dict[str, str]) -> None:
    os.chdir(copy)
    os.environ.update(variables)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in variables
    with Path("output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(int(pytest.main(arguments)))


def difference(module: str, source: str, mutant: str) -> str:
    before, after = source.splitlines(), mutant.splitlines()
    return "\n".join(difflib.unified_diff(before, after, module, module, "", "survived", n=1, lineterm=""))


if __name__ == "__main__":
    sys.exit(main())
