"""Draw the pictures of the documentation, and write its tables, from the files in docs/results/.

    scripts/pictures                            docs/pictures/*.svg, docs/results/benchmark.md, and
                                                the table of claims in
                                                docs/explanation/performance.md
    scripts/pictures --results DIR --to DIR     the pictures and benchmark.md, from your own runs

scripts/benchmark.py --json DIR/cpu-NAME.json writes the files of a CPU. Several files with the same
section are several runs. scripts/gpu_check and scripts/host_time.py write the files of a GPU.
Pictures without data are left out. docs/pictures/demo.png is drawn by scripts/demo.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import charts, claims, diagrams, runs, style, tables

DOCS = Path(__file__).resolve().parents[1] / "docs"
DRAWN: dict[str, Callable[[Any], Any]] = {
    "layers": charts.layers,
    "threads": charts.threads,
    "growth": charts.growth,
    "timeline": diagrams.timeline,
    "architecture": diagrams.architecture,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=DOCS / "results", metavar="DIR")
    parser.add_argument("--to", type=Path, metavar="DIR", help="one folder for all, in place of docs/")
    options = parser.parse_args(arguments)
    pictures = options.to or DOCS / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, data in sources(options.results).items():
        path = pictures / f"{name}.svg"
        style.save(DRAWN[name](data), path, data)
        print(path)
    for path, text in pages(options.results, options.to).items():
        path.write_text(text)
        print(path)


def sources(results: Path) -> dict[str, Any]:
    """The data of each picture, by its name, without the pictures that have no data."""
    sections = runs.load(results)
    found = {
        "layers": charts.layers_data(sections),
        "threads": charts.threads_data(sections),
        "growth": charts.growth_data(sections),
        "timeline": diagrams.timeline_data(results),
        "architecture": diagrams.PARTS,
    }
    return {name: data for name, data in found.items() if data}


def pages(results: Path, to: Path | None = None) -> dict[Path, str]:
    """The text of each page that is to be written. With ``to``, that is benchmark.md alone."""
    sections = runs.load(results)
    found = {(to or results) / "benchmark.md": tables.page(sections)}
    if to is None:
        performance = DOCS / "explanation" / "performance.md"
        text = performance.read_text()
        start = text.index(f"| {' | '.join(claims.HEAD)} |")
        end = text.index("\n\n", start)
        found[performance] = text[:start] + claims.markdown(sections, results) + text[end:]
    return found


if __name__ == "__main__":
    main()
