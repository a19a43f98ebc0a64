"""What each test file costs and what it is good for: seconds, lines of the package, mutants killed.

    python scripts/test_table.py --json FILE                  seconds and lines, at 1 and at 2 ranks
    python scripts/test_table.py --json FILE --mutants 60     mutants, at 1 rank, by the tests not marked full
    python scripts/test_table.py --json FILE --table          only print what FILE has

Run it in the environment of scripts/mutate. Each file runs by itself under coverage.py. A line that one file
alone runs is its own; one that all of them run, as importing the package does, counts for none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds for one run of pytest
OPERATORS = "NumberReplacer ReplaceComparisonOperator ReplaceBinaryOperator AddNot ReplaceTrue ReplaceFalse"
PREFIXES = tuple(f"core/{name}" for name in OPERATORS.split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--mutants", type=int, default=0, metavar="N", help="at random, of the whole package")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at the same time")
    parser.add_argument("--table", action="store_true", help="print the table of FILE")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {"files": {}, "mutants": {}}
    if not options.table:
        if options.mutants:
            found["mutants"] = mutants(options.mutants, options.jobs)
        else:
            found["files"] = files(options.jobs)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def files(jobs: int) -> dict[str, Any]:
    """By file: seconds at 1 and 2 ranks, lines, and lines that are its own."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(jobs) as pool:
            alone = dict(
                zip(paths, pool.map(lambda path: measured(path, 1, Path(folder)), paths), strict=True)
            )
        pair = {path: measured(path, 2, Path(folder)) for path in paths}
        lines = lines_by_file(Path(folder))
    everything = {path: lines.get(path.stem, set()) for path in paths}
    return {
        str(path.relative_to(ROOT / "tests")): {
            "seconds": [alone[path], pair[path]],
            "lines": len(mine),
            "own": len(mine - set().union(*(other for each, other in everything.items() if each != path))),
        }
        for path, mine in everything.items()
    }


def measured(path: Path, ranks: int, folder: Path) -> float:
    """Seconds in the tests of a file, which leave their coverage in the folder."""
    report = folder / f"{path.stem}-{ranks}.xml"
    launch = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    command = [*launch, sys.executable, "-m", "coverage", "run", f"--context={path.stem}", "-m", "pytest"]
    pytest(
        [*command, "-m", "not untraced", f"--junitxml={report}", str(path)],
        ROOT,
        COVERAGE_FILE=str(folder / "coverage"),
    )
    return round(sum(float(case.get("time", 0)) for case in cases(report)), 1)


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
    """By the change: the test files in which a test fails, or "all" where pytest does not end."""
    everything = [mutant for path in sorted((ROOT / "mpisyncbn").rglob("*.py")) for mutant in mutated(path)]
    chosen = random.Random(0).sample(everything, count)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies = [copied(Path(folder) / str(job)) for job in range(jobs)]
        waiting = list(copies)

        def attempt(mutant: tuple[Path, int, str, str]) -> tuple[str, list[str]]:
            path, line, change, code = mutant
            copy = waiting.pop()
            file = copy / path.relative_to(ROOT)
            file.write_text(code)
            report = copy / "report.xml"
            report.unlink(missing_ok=True)
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-m",
                "not full",
                f"--junitxml={report}",
                "--timeout=60",
            ]
            pytest(command, copy, MPISYNCBN_TEST_EXAMPLES="10", PYTHONDONTWRITEBYTECODE="1")
            failed = {
                case.get("classname", "").rpartition(".")[2]
                for case in cases(report)
                if any(case.find(tag) is not None for tag in ("failure", "error"))
            }
            shutil.copy(path, file)
            waiting.append(copy)
            killers = sorted(failed) if report.exists() else ["all"]
            print(
                f"{path.relative_to(ROOT)}:{line}: {change}: {', '.join(killers) or 'survived'}", flush=True
            )
            return f"{path.relative_to(ROOT)}:{line}: {change}", killers

        return dict(pool.map(attempt, chosen))


def mutated(path: Path) -> list[tuple[Path, int, str, str]]:
    """File, line, the change, and the whole text of each mutant."""
    from cosmic_ray import mutating, plugins

    source, found = path.read_text(), []
    operators = [name for name in plugins.operator_names() if name.startswith(PREFIXES)]
    for operator in map(plugins.get_operator, sorted(operators)):
        for occurrence in itertools.count():
            code = mutating.mutate_code(source, operator(), occurrence)
            if code is None:
                break
            pairs = zip(source.splitlines(), code.splitlines(), strict=False)
            number, (old, new) = next(each for each in enumerate(pairs, 1) if each[1][0] != each[1][1])
            found.append((path, number, f"`{old.strip()}` to `{new.strip()}`", code))
    return found


def copied(folder: Path) -> Path:
    for name in ("mpisyncbn", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def table(found: dict[str, Any]) -> str:
    killed = [killers for killers in found["mutants"].values() if killers]
    rows = ["| file | seconds, 1 rank | 2 ranks | lines | its own | mutants | alone |", f"|{' --- |' * 7}"]
    for name, row in found["files"].items():
        stem = Path(name).stem
        mine = [killers for killers in killed if stem in killers]
        alone = sum(killers == [stem] for killers in mine)
        one, two = row["seconds"]
        rows.append(f"| {name} | {one} | {two} | {row['lines']} | {row['own']} | {len(mine)} | {alone} |")
    total = f"{len(killed)} of {len(found['mutants'])} mutants killed"
    return "\n".join([*rows, "", total])


if __name__ == "__main__":
    sys.exit(main())
