"""Run the examples of docs/guides/integrations.md at two ranks and compare with one process.

Prints a Markdown table; --write puts it into docs/results/integrations.md. Exit status: 0, or 1 if
a run fails or differs from one process by more than rounding in float64.
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
# Lightning, Accelerate, transformers and timm at two ranks

[Each program of the page on integrations](../guides/integrations.md) was run at two ranks and,
without the lines that name `mpisyncbn`, in one process. "Largest distance" is the largest
difference of any weight, running statistic or metric, in float64. "Lines" are those that name
`mpisyncbn`. Made by `scripts/integrations --write` with torch {torch}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/results/integrations.md")
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
    """Run Python in ``folder``, under mpiexec if ``ranks`` is not 0.

    This takes the place of the fixture ``run_job`` of the tests.
    """
    start = [jobs.find_mpiexec() or "mpiexec", "-n", str(ranks)] if ranks else []
    return jobs.run([*start, sys.executable, *arguments], folder)


if __name__ == "__main__":
    sys.exit(main())
