"""Mutation testing with cosmic-ray: does a test fail if one thing in the code is wrong?

    scripts/mutate                                        all mutants of cosmic-ray.toml: hours
    scripts/mutate --sample 40 --seed 1 exchange.py       40 mutants of one module, chosen at random
    scripts/mutate --jobs 2 --session FILE exchange.py    continues the last run with FILE

Each job tries its mutants in a copy of the tree. The script prints the mutants that survive, and
their share in percent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    options = parse()
    import toml

    with tempfile.TemporaryDirectory(prefix="mutants-") as name, contextlib.ExitStack() as workers:
        folder = Path(name)
        copies = [copy_tree(folder / str(job)) for job in range(options.jobs)]
        urls = [start_worker(copy, workers) for copy in copies]
        config = toml.load(ROOT / "cosmic-ray.toml")
        config["cosmic-ray"]["distributor"]["http"] = {"worker-urls": urls}
        if options.modules:
            config["cosmic-ray"]["module-path"] = [f"mpisyncbn/{module}" for module in options.modules]
        session = (options.session or folder / "session.sqlite").absolute()
        settings = folder / "cosmic-ray.toml"
        settings.write_text(toml.dumps(config))

        def call(*command: str | Path) -> None:
            subprocess.run(command, cwd=copies[0], check=True)

        start = time.monotonic()
        call("cosmic-ray", "baseline", settings)
        if 3 * (time.monotonic() - start) > config["cosmic-ray"]["timeout"]:
            print("mutate: slow here: mutants may count as killed for want of time", file=sys.stderr)
        if not session.exists():
            call("cosmic-ray", "init", settings, session)
            call("cr-filter-operators", session, settings)
            choose(session, options.sample, options.seed)
        call("cosmic-ray", "exec", settings, session)
        call("cr-report", "--surviving-only", "--show-diff", session)
        call("cr-rate", session)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="modules of mpisyncbn; default: those in cosmic-ray.toml")
    parser.add_argument("--sample", type=int, metavar="N", help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at the same time")
    parser.add_argument("--session", type=Path, metavar="FILE", help="cosmic-ray session to keep")
    return parser.parse_args()


def copy_tree(copy: Path) -> Path:
    for name in ("mpisyncbn", "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def start_worker(copy: Path, workers: contextlib.ExitStack) -> str:
    """Start a worker of cosmic-ray. Return its URL when it listens.

    The exit stack ``workers`` ends it, after the mutant that it tries.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = ["cosmic-ray", "http-worker", "--port", str(port)]
    worker = workers.enter_context(subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL))
    workers.callback(worker.terminate)
    while worker.poll() is None:
        with contextlib.suppress(ConnectionError):
            socket.create_connection(("localhost", port)).close()
            return f"http://localhost:{port}"
        time.sleep(0.1)
    sys.exit("mutate: a worker of cosmic-ray ended as it started")


def choose(session: Path, sample: int | None, seed: int) -> None:
    """Keep ``sample`` random mutants, or all if it is None, and delete the others.

    Those that the filter skipped are deleted too: cr-rate would count them as killed.
    """
    with contextlib.closing(sqlite3.connect(session)) as database, database:
        found = database.execute(
            "SELECT job_id FROM mutation_specs WHERE job_id NOT IN (SELECT job_id FROM work_results)"
            " ORDER BY module_path, operator_name, occurrence"
        )
        jobs = [job for (job,) in found]
        random.Random(seed).shuffle(jobs)
        for table in ("work_results", "mutation_specs", "work_items"):
            delete = f"DELETE FROM {table} WHERE job_id NOT IN (SELECT value FROM json_each(?))"
            database.execute(delete, [json.dumps(jobs[:sample])])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # the command has printed why
        sys.exit(error.returncode)
