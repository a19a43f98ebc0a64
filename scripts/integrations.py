"""Runs the examples of docs/guides/integrations.md at two ranks, beside the tools' own runs in one process.

Prints a table in Markdown; with --write, puts it into docs/results/integrations.md. Exit status: 0, or 1
where a run fails or is further from one process than rounding in float64 brings it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [f"{ROOT}/tests", f"{ROOT}/tests/integrations"]

import documented  # noqa: E402
import torch  # noqa: E402

from support import jobs  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "integrations.md"
HEAD = """\
# The tools of integrations.md at two ranks

By `scripts/integrations --write`, with torch {torch}: the largest distance, in float64, between
the tool's run at two ranks and its own in one process, of any weight, running statistic or metric
of the example; and the number of lines that name `mpisyncbn`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/results/integrations.md")
    write = parser.parse_args().write
    rows = ["| tool | version | tried | largest distance | lines |", "| --- | --- | --- | --- | --- |"]
    print(*rows, sep="\n", flush=True)
    right = True
    for example in documented.EXAMPLES:
        with tempfile.TemporaryDirectory(prefix="mpisyncbn-") as folder:
            try:
                distance, glue = documented.compare(example, Path(folder), run)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                distance, glue = float("nan"), 0
        right &= distance < documented.TOLERANCE
        name, version = example.distribution, documented.version(example)
        rows.append(f"| {name} | {version} | {example.tried} | {distance:.0e} | {glue} |")
        print(rows[-1], flush=True)
    if write:
        RESULTS.write_text("\n".join([HEAD.format(torch=torch.__version__), *rows, ""]))
    return 0 if right else 1


def run(*arguments: str, ranks: int, folder: Path) -> jobs.End:
    """As the fixture ``run_job`` of the tests."""
    start = [jobs.find_mpiexec() or "mpiexec", "-n", str(ranks)] if ranks else []
    return jobs.run([*start, sys.executable, *arguments], folder)


if __name__ == "__main__":
    sys.exit(main())
