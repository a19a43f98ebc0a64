"""Which launcher makes one world of which MPI library's ranks: 4 tasks of a Slurm of one's own.

    scripts/launchers                   the libraries that are there, under each launcher, on 1 and 2 nodes
    scripts/launchers --nodes 1         what a user who is not root can have

Libraries: those of PyPI that scripts/faults knows, and Open MPI and MPICH of Debian where they are installed.
A job that makes singletons ends with status 0, so that only the size of its world tells. Prints a table;
a cell that is not as expected says both. Exit status: 0, 1 where any differs, 2 where there is no Slurm.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_cases import libraries
from support.jobs import for_jobs
from support.slurm import Slurm, Unavailable, slurm

TASKS = 4
LAUNCHERS = ("mpiexec", "srun --mpi=pmix", "srun --mpi=pmi2")
ONE, SINGLE, ERROR = "one world", f"{TASKS} singletons", "error"
EXPECTED = {
    "openmpi 5": (ONE, ONE, SINGLE),
    "openmpi 4": (ONE, ONE, ERROR),
    "mpich 5": (ONE, ERROR, ONE),
    "mpich 4": (ONE, SINGLE, ONE),
    "impi 2021": (ONE, ONE, ONE),
}
LIMIT = 40  # seconds for a job
REFUSAL = "MPI has a world of"
RANK = """
import numpy as np, mpisyncbn
from mpi4py import MPI
try:
    mpisyncbn.functional.batch_norm_forward(np.ones((2, 3)))
except mpisyncbn.MPISyncBNError as error:  # where the launcher has started more ranks than this world has
    print(error)
print(f"world of {MPI.COMM_WORLD.size}", flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/launchers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    right = True
    print("| MPI | nodes |", " | ".join(f"`{launcher}`" for launcher in LAUNCHERS), "|")
    print("| --- " * (2 + len(LAUNCHERS)) + "|", flush=True)
    rows = list(installed())
    try:
        for nodes in options.nodes:
            with slurm(
                for_jobs(oversubscribe=False) | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}, nodes
            ) as cluster:
                for row in rows:
                    cells = [cell(cluster, row, index) for index in range(len(LAUNCHERS))]
                    right = right and all(expected for expected, _ in cells)
                    said = " | ".join(text for _, text in cells)
                    print(f"| {row.title} | {nodes} | {said} |", flush=True)
    except Unavailable as error:
        print(f"launchers: {error}", file=sys.stderr)
        return 2
    return 0 if right else 1


def installed() -> Iterator[libraries.Library]:
    for name in libraries.NAMES:
        try:
            yield libraries.find(name)
        except ValueError as error:
            print(f"launchers: {error}", file=sys.stderr)
    yield from libraries.debian()


def expected_of(library: libraries.Library) -> tuple[str, str, str]:
    """By its name and the first number of its version."""
    version = re.search(r"\d+", library.title)
    unknown = "nothing known"
    return EXPECTED.get(f"{library.name} {version and version[0]}", (unknown, unknown, unknown))


def cell(cluster: Slurm, library: libraries.Library, index: int) -> tuple[bool, str]:
    """Whether the job's outcome is the expected one, and what the table says of it."""
    outcome, refused = run(cluster, library, LAUNCHERS[index])
    expected = expected_of(library)[index]
    said = f"{outcome}, refused" if refused else outcome
    return outcome == expected, said if outcome == expected else f"**{said}, expected {expected}**"


def run(cluster: Slurm, library: libraries.Library, launcher: str) -> tuple[str, bool]:
    """How the job ended, and whether its ranks were refused to train, each by itself."""
    start = f"{library.mpiexec} -n {TASKS}" if launcher == "mpiexec" else f"{launcher} --kill-on-bad-exit=1"
    program, script = cluster.folder / "rank.py", cluster.folder / "job.sh"
    program.write_text(RANK)
    script.write_text(f"#!/bin/bash\n{start} {sys.executable} {program}\n")
    nodes = len(cluster.nodes)
    where = [f"--nodes={nodes}", f"--ntasks-per-node={TASKS // nodes}", f"--output={cluster.folder}/%j.out"]
    # Shared memory alone, as for one host, does not reach a second node.
    variables = {name: value for name, value in library.variables.items() if name != "I_MPI_FABRICS"}
    if library.name == "impi" and launcher.endswith("pmix"):  # which it looks for nowhere by itself
        pmix = next(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so*"), "libpmix.so")
        variables["I_MPI_PMI_LIBRARY"] = str(pmix)
    job = cluster.submit(*where, str(script), **variables)
    try:
        status = cluster.wait(job, LIMIT)["ExitCode"]
    except TimeoutError:
        status = "over time"
    output = (cluster.folder / f"{job}.out").read_text(errors="replace")
    sizes = [int(size) for size in re.findall(r"^world of (\d+)$", output, re.MULTILINE)]
    whole = sizes == [TASKS] * TASKS
    if status == "over time":
        outcome = "hang, after one world" if whole else "hang"
    elif status != "0:0":
        outcome = ERROR
    elif whole:
        outcome = ONE
    else:
        outcome = SINGLE if sizes == [1] * TASKS else f"worlds of {sizes}"
    return outcome, REFUSAL in output


if __name__ == "__main__":
    sys.exit(main())
