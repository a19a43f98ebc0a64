"""Measure the speed of this package, its peers and the machine, in turn in the same processes.

    mpiexec -n 2 python scripts/benchmark.py            about ten minutes on two cores
    mpiexec -n 2 python scripts/benchmark.py --quick    under two
    python scripts/benchmark.py --threads 2             one rank and torch with two threads
    python scripts/benchmark.py --scaling               2 to 64 ranks; starts mpiexec itself
    mpiexec -n 2 python scripts/benchmark.py --only compiled    compiles for minutes
    scripts/pictures --results DIR --to DIR             pictures and tables of DIR/cpu-NAME.json

If each rank has a core of its own, bind the ranks and turn yielding off: MPI's part of an exchange
then takes half the time.

    OMPI_MCA_mpi_yield_when_idle=0 mpiexec --bind-to core -n 2 python scripts/benchmark.py

Each rank has one thread unless --threads is given. Every figure is that of the slowest rank: the
median and, in parentheses, the minimum. The cases are in benchmarks/cases.py. The last lines show
the main figures beside their aims.

glibc returns large freed blocks to the system. Getting them again takes as long as a kernel, at
unpredictable times. The script therefore tells glibc to keep them, for all peers.
``--default-allocator`` turns this off.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import model, scaling
from mpisyncbn.config import launched
from outputs import output

# The module of each section. Its function has the name of the section.
SECTIONS = {
    "layer": "layers",
    "threads": "layers",
    "kernels": "kernels",
    "exchange": "exchanges",
    "watchdog": "watchdog",
    "tiny": "layers",
    "peers": "layers",
    "masks": "masks",
    "resnet": "resnet",
    "compiled": "resnet",
    "relu": "layers",
    "memory": "memory",
    "activations": "layers",
    "reductions": "reductions",
}
Results = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.scaling and not launched():
        finish(launch_scaling(options), options)
    else:
        measure(options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of a rank; above 1, only the section threads",
    )
    parser.add_argument("--scaling", action="store_true", help="exchanges at 2 to 64 ranks, and the model")
    parser.add_argument(
        "--json", type=output, metavar="PATH", help="also write figures and environment to this file"
    )
    parser.add_argument("--default-allocator", action="store_true", help="let glibc return freed memory")
    options = parser.parse_args(arguments)
    usual = [name for name in SECTIONS if name not in ("threads", "compiled")]
    if options.threads > 1:
        usual = ["threads"]
    options.only = options.only.split(",") if options.only else usual
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only takes some of {','.join(SECTIONS)}, got {','.join(sorted(unknown))}")
    return options


def measure(options: argparse.Namespace) -> None:
    """Measure the chosen sections. Rank 0 prints. Collective: every rank of the world must call."""
    from benchmarks import environment, timing

    world = timing.WORLD
    if not options.default_allocator:
        timing.keep_freed_memory()
    if not options.scaling:
        import torch

        torch.set_num_threads(options.threads)
    allocator = "default" if options.default_allocator else "keeps freed memory"
    results: Results = {"environment": environment.facts(allocator), "sections": {}}
    started = time.monotonic()
    for name, rows in sections(options):
        results["sections"][name] = []
        for row in rows:
            results["sections"][name].append(timing.rounded(row))
            if world.rank == 0:
                show(name, row)
    results["environment"]["seconds"] = round(time.monotonic() - started)
    if world.rank == 0:
        finish(results, options)


def sections(options: argparse.Namespace) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    if options.scaling:
        yield "scaling", scaling.measure(options.quick)
        return
    for name, module in SECTIONS.items():
        if name in options.only:
            yield name, getattr(import_module(f"benchmarks.{module}"), name)(options.quick)


def launch_scaling(options: argparse.Namespace) -> Results:
    results: Results = {"environment": {}, "sections": {"scaling": []}}
    again = [str(Path(__file__).resolve()), "--scaling", *(["--quick"] if options.quick else [])]
    for row, facts in scaling.launch(again, options.quick):
        results["sections"]["scaling"].append(row)
        results["environment"] |= {**facts, "ranks": f"{row['ranks']} and fewer"}
        show("scaling", row)
    results["sections"]["model"] = model.table()
    return results


def show(section: str, row: dict[str, Any]) -> None:
    from benchmarks.summary import row_text

    print(row_text(section, row), flush=True)


def finish(results: Results, options: argparse.Namespace) -> None:
    """Print the summary, and write the file of ``--json``."""
    from benchmarks import summary

    lines = summary.summarize(results["sections"])
    print("\n" + "\n".join(map(str, lines)))
    if "model" in results["sections"]:
        print("\n" + model.text(results["sections"].get("scaling", []), results["sections"]["model"]))
    if options.json:
        judged = [{**line._asdict(), "met": line.met} for line in lines]
        options.json.write_text(json.dumps({**results, "summary": judged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
