"""Measure the seconds, covered lines and killed mutants of each test file.

    python scripts/test_table.py --json FILE                    the lines of each file, at 1 rank
    python scripts/test_table.py --json FILE --mutants 60       mutants, at 1 rank, no full tests
    python scripts/test_table.py --json FILE --reports *.xml    the table, with seconds of reports

Run it in the environment of scripts/mutate. Each file runs by itself under coverage.py. A line that
only one file runs is its own. A line that all files run, as at import, counts for none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from outputs import output

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds for one run of pytest
# Mutants are tried with these tests: they start no jobs, no compiler, and not Triton.
FOLDERS = "kernels", "exchange", "autograd", "comm", "distributed"
TESTS = ["-m", "not full", "-k", "not cuda and not compile and not torchrun and not install"]
OPERATORS = "NumberReplacer ReplaceComparisonOperator ReplaceBinaryOperator AddNot ReplaceTrue ReplaceFalse"
PREFIXES = tuple(f"core/{name}" for name in OPERATORS.split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=output, required=True, metavar="FILE")
    parser.add_argument(
        "--mutants", type=int, default=0, metavar="N", help="random mutants of the whole package"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at the same time")
    parser.add_argument(
        "--reports", type=Path, nargs="+", metavar="XML", help="pytest reports, one for each number of ranks"
    )
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {"files": {}, "mutants": {}}
    if options.reports:
        print(table(found, options.reports))
        return 0
    if options.mutants:
        found["mutants"] = mutants(options.mutants, options.jobs)
    else:
        found["files"] = files(options.jobs)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def files(jobs: int) -> dict[str, Any]:
    """The number of lines that each test file runs, and of those that no other test file runs."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda path: measure(path, Path(folder)), paths))
        lines = lines_by_file(Path(folder))
    everything = {path: lines.get(path.stem, set()) for path in paths}
    others = {
        path: set().union(*(each for other, each in everything.items() if other != path)) for path in paths
    }
    return {
        str(path.relative_to(ROOT / "tests")): {"lines": len(mine), "own": len(mine - others[path])}
        for path, mine in everything.items()
    }


def measure(path: Path, folder: Path) -> None:
    """Run a test file, and write its coverage to ``folder``."""
    command = [sys.executable, "-m", "coverage", "run", f"--context={path.stem}", "-m", "pytest"]
    command += ["-m", "not untraced", str(path)]
    pytest(command, ROOT, COVERAGE_FILE=str(folder / "coverage"))


def pytest(command: list[str], cwd: Path, **variables: str) -> None:
    subprocess.run(
        ["timeout", "--kill-after=10", str(LIMIT), *command, "-p", "no:cacheprovider"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def cases(report: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).iter("testcase")) if report.exists() else []


def lines_by_file(folder: Path) -> dict[str, set[tuple[str, int]]]:
    from coverage import Coverage

    data = Coverage(data_file=str(folder / "coverage"), config_file=str(ROOT / "setup.cfg"))
    data.combine([str(folder)], keep=True)
    found: dict[str, set[tuple[str, int]]] = {}
    everything = data.get_data()
    count = len(everything.measured_contexts())
    for file in everything.measured_files():
        for line, contexts in everything.contexts_by_lineno(file).items():
            for context in contexts if len(contexts) < count else ():
                found.setdefault(context, set()).add((file, line))
    return found


def mutants(count: int, jobs: int) -> dict[str, list[str]]:
    """Try random mutants. Return, for each change, the test files in which a test fails.

    The list is ["all"] if pytest ends without a report, as at its time limit.
    """
    from mutate import copy_tree

    everything = [place for path in sorted((ROOT / "mpisyncbn").rglob("*.py")) for place in places(path)]
    chosen = random.Random(0).sample(everything, count)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies = [copy_tree(Path(folder) / str(job)) for job in range(jobs)]
        if (found := killers(copies[0])) != []:
            sys.exit(f"test_table: without a mutant, tests fail or there are none: {found}")

        def attempt(place: tuple[Path, str, int]) -> tuple[str, list[str]]:
            name, code = mutated(*place)
            copy = copies.pop()
            file = copy / place[0].relative_to(ROOT)
            file.write_text(code)
            found = killers(copy)
            shutil.copy(place[0], file)
            copies.append(copy)
            print(f"{name}: {', '.join(found) or 'survived'}", flush=True)
            return name, found

        return dict(pool.map(attempt, chosen))


def killers(copy: Path) -> list[str]:
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    folders = [f"tests/{each}" for each in FOLDERS]
    command = [sys.executable, "-m", "pytest", "--timeout=60", f"--junitxml={report}", *TESTS, *folders]
    pytest(command, copy, MPISYNCBN_TEST_EXAMPLES="10", PYTHONDONTWRITEBYTECODE="1")
    bad = [case for case in cases(report) if any(case.find(tag) is not None for tag in ("failure", "error"))]
    return (
        sorted({case.get("classname", "").rpartition(".")[2] for case in bad}) if cases(report) else ["all"]
    )


def places(path: Path) -> list[tuple[Path, str, int]]:
    """The file, operator and number of each possible mutant of a file."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    nodes = list(ast_nodes(get_ast_from_path(path)))
    operators = [name for name in sorted(plugins.operator_names()) if name.startswith(PREFIXES)]
    found = []
    for name in operators:
        operator = plugins.get_operator(name)()
        count = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        found += [(path, name, number) for number in range(count)]
    return found


def mutated(path: Path, operator: str, number: int) -> tuple[str, str]:
    """Make one mutation. Return a description of the change, and the whole text of the file."""
    from cosmic_ray import mutating, plugins

    source = path.read_text()
    code = mutating.mutate_code(source, plugins.get_operator(operator)(), number)
    pairs = zip(source.splitlines(), code.splitlines(), strict=False)
    line, (old, new) = next(each for each in enumerate(pairs, 1) if each[1][0] != each[1][1])
    return f"{path.relative_to(ROOT)}:{line}: `{old.strip()}` to `{new.strip()}`", code


def table(found: dict[str, Any], reports: list[Path]) -> str:
    """A Markdown table, a row for each test file. "only": mutants that no other file killed."""
    seconds: list[Counter[str]] = []
    for report in reports:
        seconds.append(Counter())
        for case in cases(report):
            seconds[-1][case.get("classname", "").rpartition(".")[2]] += float(case.get("time", 0))
    killed = [killers for killers in found["mutants"].values() if killers]
    names = [f"s, {report.stem}" for report in reports]
    rows = [
        f"| file | {' | '.join(names)} | lines | its own | mutants | only |",
        f"|{' --- |' * (5 + len(names))}",
    ]
    for name, row in found["files"].items():
        stem = Path(name).stem
        mine = [killers for killers in killed if stem in killers]
        cells = [f"{each[stem]:.1f}" for each in seconds]
        cells += map(str, (row["lines"], row["own"], len(mine), mine.count([stem])))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"{len(killed)} of {len(found['mutants'])} mutants killed"])


if __name__ == "__main__":
    sys.exit(main())
