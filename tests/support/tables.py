"""pytest with a plug-in that prints the "row" of each test: ``python -m support.tables ARGUMENTS``.

The table is that of tests/liveness/test_faults.py, or with ``--nodes`` of test_launchers.py.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

_HEAD = 30  # lines of output that are shown if a test fails


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tables")
    group.addoption("--only", metavar="PATTERN", default="", help="the faults whose name or title matches")
    group.addoption("--json", metavar="FILE", type=Path, help="write what was found, with all of stderr")
    group.addoption("--markdown", action="store_true", help="the table with a column for each library")
    group.addoption("--list", action="store_true", help="print the faults, run none")
    group.addoption("--nodes", type=int, nargs="+", help="numbers of nodes for the table of launchers")


def pytest_configure(config: pytest.Config) -> None:
    # An exit ends the job of the test that runs; a signal would leave it behind.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", 128 + signal.SIGTERM))
    config.pluginmanager.register((Launchers if config.option.nodes else Faults)(config.option))


class Table:
    """Keeps the rows that tests record, and prints errors outside of tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        session.config.pluginmanager.unregister(name="terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = dict(report.user_properties).get("row")
        if report.when == "call" and row:
            self.rows.append(SimpleNamespace(**row))
            self.show(self.rows[-1])
        else:
            self.pytest_collectreport(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.stderr, flush=True)

    def show(self, row: SimpleNamespace) -> None:
        """Print a row when its test ends."""


class Faults(Table):
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = {}
        for item in items:
            case = hasattr(item, "callspec") and item.callspec.params.get("case")
            if case and any(re.search(self.options.only, text) for text in (case.name, case.title)):
                chosen[item] = case
        if self.options.list:
            print(*dict.fromkeys(f"{case.name:<34} {case.title}" for case in chosen.values()), sep="\n")
        items[:] = [] if self.options.list else chosen
        self.count = len(items) // len(self.options.mpi.split(","))

    def show(self, row: SimpleNamespace) -> None:
        if row.library not in [each.library for each in self.rows[:-1]]:
            print(f"{row.library}: {self.count} faults")
        print(line(row), flush=True)
        if self.options.json:  # after each row, so that it outlives a failure of the next ones
            self.options.json.write_text(json.dumps([*map(vars, self.rows)], indent=1) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.options.list:
            print("\n" + (markdown if self.options.markdown else table)(self.rows))
            print("\n" + verdict(self.rows))
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = int(not self.options.list)


class Launchers(Table):
    """The table of launchers. The exit status is 2 if no job has run."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.skipped: dict[str, None] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        super().pytest_collectreport(report)
        if report.skipped:
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for reason in self.skipped:
            print(f"launchers: {reason}", file=sys.stderr)
        if self.rows:
            print(launchers(self.rows))
        session.exitstatus = session.exitstatus or int(bool(self.skipped)) if self.rows else 2


def line(row: SimpleNamespace) -> str:
    """A line about one fault, and the beginning of its output if it is not as it should be."""
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f} s"
    said = f"{_verdict(row)}  {row.name:<34} {seconds:>7} {_status(row):>4}  {row.outcome[:110]}"
    if not row.ok:
        head = (row.stderr + row.stdout).splitlines()
        more = [f"... and {len(head) - _HEAD} more lines"] if len(head) > _HEAD else []
        said += "".join(f"\n      | {each}" for each in [*head[:_HEAD], *more])
    return said


def table(rows: list[SimpleNamespace]) -> str:
    said = []
    for library, found in groupby(rows, key=lambda row: row.library):
        lines = [("fault", "outcome", "status", "seconds", "verdict")]
        for row in found:
            seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
            lines.append((row.fault, row.outcome[:60], _status(row), seconds, _verdict(row)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        said += [f"\n{library}, 4 ranks\n"]
        said += ["  ".join(map(str.ljust, each, widths)).rstrip() for each in lines]
    return "\n".join(said)


def markdown(rows: list[SimpleNamespace]) -> str:
    """A table of seconds and status, with a row for each fault and a column for each library."""
    cells = {(row.fault,): {} for row in rows}
    for row in rows:
        cells[row.fault,][row.library] = _cell(row)
    return _markdown(["fault"], cells)


def launchers(rows: list[SimpleNamespace]) -> str:
    """A table with a row for each library and number of nodes, and a column for each launcher."""
    cells = {(row.library, row.nodes): {} for row in sorted(rows, key=lambda row: row.nodes)}
    for row in rows:
        cells[row.library, row.nodes][f"`{row.launcher}`"] = row.cell
    return _markdown(["MPI", "nodes"], cells)


def _markdown(names: list[str], cells: dict[tuple[object, ...], dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [[*names, *columns], ["---"] * (len(names) + len(columns))]
    lines += [[*start, *(line.get(column, "") for column in columns)] for start, line in cells.items()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def verdict(rows: list[SimpleNamespace]) -> str:
    right = sum(row.ok for row in rows)
    hung = sum(row.seconds is not None and row.status is None for row in rows)
    silent = sum(row.status == 0 and not row.ok for row in rows)
    return f"{right} of {len(rows)} as they should be, {hung} hung, {silent} with status 0"


def _verdict(row: SimpleNamespace) -> str:
    return "ok  " if row.ok else "FAIL"


def _status(row: SimpleNamespace) -> str:
    return "-" if row.status is None else str(row.status)


def _cell(row: SimpleNamespace) -> str:
    if row.status is None or row.seconds is None:
        return row.outcome
    return f"{row.seconds:.1f} s, {row.status}" + ("" if row.ok else " (FAIL)")


if __name__ == "__main__":
    status = int(pytest.main(["-p", "support.tables", "-p", "no:cacheprovider", *sys.argv[1:]]))
    sys.exit(2 if status == pytest.ExitCode.USAGE_ERROR else status)
