"""What a machine with a GPU shows of mpisyncbn: eight points, in a few minutes.

    scripts/gpu_check                 all of them
    scripts/gpu_check --only 3,6      some
    scripts/gpu_check --quick         fewer cases
    scripts/gpu_check --tune          other tiles for the kernels beside those in use, and nothing else

Each part of a point is a process, or an mpiexec, of its own, with a time limit of its own, and where one
fails the others go on. Ranks share a GPU where there are fewer GPUs than ranks. A point fails where a result
is wrong; a figure that misses its bar is reported and fails nothing. Prints a table, and writes all of it to
docs/results/, to a file named after the device, the date and, if not all ran, the points. Exit status: 0, 1
where a point failed, 3 where there is no GPU.

Build the native kernels first, as for any measurement, for without them the host takes longer: by pip install
or, where nothing is to be installed, by python3 setup.py build_ext --inplace.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # where the tests load this file from elsewhere

from gpu_checks import launch, points, report

ROOT = Path(__file__).resolve().parents[1]
FAILED, NO_GPU = 1, 3


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    facts = launch.probe(options.device)
    if options.device == "cuda" and not facts.get("devices"):
        print(f"gpu_check: no GPU here that torch can use ({facts.get('why', 'torch finds none')})")
        return NO_GPU
    date = datetime.datetime.now(datetime.timezone.utc)
    results: dict[str, Any] = {
        "environment": {"date": date.strftime("%Y-%m-%d %H:%M UTC"), "quick": options.quick, **facts},
        "points": [],
    }
    path = Path(options.output) if options.output else ROOT / default_name(facts, date, options.only)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(report.heading(facts), flush=True)
    for point in [points.TUNE] if options.tune else points.chosen(options.only, options.quick):
        found = launch.run_point(point, options.device, options.quick)
        results["points"].append(found)
        # after each, so that what was found outlives what comes next
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(report.lines(found), flush=True)
    print("\n" + report.table(results["points"]))
    return FAILED if any(found["verdict"] == "failed" for found in results["points"]) else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="POINTS", help="some of 1 to 8, as in 3,6")
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--tune", action="store_true", help="time other tiles for the kernels")
    parser.add_argument("--output", metavar="PATH", help="the JSON file to write")
    # cpu: to try this script itself where there is no GPU
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(map(str, points.NUMBERS))
    if not set(wanted) <= set(map(str, points.NUMBERS)):
        parser.error(f"--only takes some of {','.join(map(str, points.NUMBERS))}, got {options.only}")
    options.only = [points.TUNE.number] if options.tune else sorted(set(map(int, wanted)))
    return options


def default_name(facts: dict[str, Any], date: datetime.datetime, numbers: list[int]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", str((facts.get("devices") or ["cpu"])[0]).lower()).strip("-")
    part = "" if numbers == list(points.NUMBERS) else "-points-" + "-".join(map(str, numbers))
    part = "-tiles" if numbers == [points.TUNE.number] else part
    return f"docs/results/gpu-{device}-{date:%Y-%m-%d}{part}.json"


if __name__ == "__main__":
    sys.exit(main())
