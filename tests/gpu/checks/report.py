"""A plugin of pytest that writes the results as JSON, and prints them for people."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.jobs import ROOT

from .points import NUMBERS, TUNE, Point, Run


class Report:
    """The plugin. It writes the JSON file after each part, so that a later crash loses nothing."""

    def __init__(self, facts: dict[str, Any], options: Any) -> None:
        date = datetime.datetime.now(datetime.timezone.utc)
        environment = {"date": date.strftime("%Y-%m-%d %H:%M UTC"), "quick": options.quick, **facts}
        self.points: list[dict[str, Any]] = []
        self.whole = {"environment": environment, "points": self.points}
        self.path = Path(options.output) if options.output else ROOT / default_name(facts, date, options.only)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        print(heading(facts), flush=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Iterator[None]:
        report: Any = yield
        if report.when == "call" or report.failed:
            self.add(**item.callspec.params, report=report)
        return report

    def add(self, point: Point, run: Run, report: Any) -> None:
        if not self.points or self.points[-1]["point"] != point.number:
            self.points.append({"point": point.number, "title": point.title, "runs": []})
            self.begin = time.monotonic() - report.duration
            print(f"\n{point.number}. {point.title}")
        found = {"name": run.name, "ranks": run.ranks, "verdict": report.outcome, "seconds": 0.0}
        found |= {"reason": report.longreprtext, **dict(report.user_properties)}
        last = self.points[-1]
        last["runs"].append(found)
        verdicts = {each["verdict"] for each in last["runs"]}
        last["verdict"] = next((each for each in ("failed", "passed") if each in verdicts), "skipped")
        last["seconds"] = round(time.monotonic() - self.begin, 1)
        self.path.write_text(json.dumps(self.whole, indent=1) + "\n")
        print(lines(found), flush=True)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_sessionfinish(self) -> None:
        print("\n" + table(self.points))


def default_name(facts: dict[str, Any], date: datetime.datetime, numbers: list[int]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["devices"][0]).lower()).strip("-")
    part = "-tiles" if numbers == [TUNE] else "-points-" + "-".join(map(str, numbers))
    part = "" if numbers == NUMBERS else part
    return f"docs/results/gpu-{device}-{date:%Y-%m-%d}{part}.json"


def heading(facts: dict[str, Any]) -> str:
    devices = facts["devices"]
    several = f"{len(devices)} x " if len(devices) > 1 else ""
    names = ("torch", "triton", "cupy", "mpi4py")
    versions = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    return f"{several}{devices[0]}: Python {facts['python']}, {versions}"


def lines(run: dict[str, Any]) -> str:
    """Return the lines to print for a part: its verdict, figures and bars, and what it skipped."""
    reason = f": {run['reason']}" if run["reason"] else ""
    checks = f", {len(run['checks'])} checks" if run.get("checks") else ""
    found = [f"   {run['name']}: {run['verdict']}{reason} ({run['seconds']} s{checks})"]
    found += [f"      {name}: {_short(value)}" for name, value in run.get("figures", {}).items()]
    found += [f"      {_bar(each)}" for each in run.get("bars", [])]
    if run["verdict"] != "skipped":
        found += [f"      skipped {each['name']}: {each['reason']}" for each in run.get("skipped", [])]
    return "\n".join(found)


def table(points: list[dict[str, Any]]) -> str:
    rows = [("point", "verdict", "seconds", "figures")]
    for point in points:
        name = f"{point['point']} {point['title']}"
        rows.append((name, point["verdict"], f"{point['seconds']:.0f}", _figures(point)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    found = ["  ".join((*map(str.ljust, row[:3], widths), row[3])).rstrip() for row in rows]
    verdicts = [point["verdict"] for point in points]
    counted = [f"{verdicts.count(each)} {each}" for each in ("passed", "failed", "skipped")]
    return "\n".join((*found, "", ", ".join(counted)))


def _figures(point: dict[str, Any]) -> str:
    runs = point["runs"]
    checks = sum(len(run.get("checks", ())) for run in runs)
    bars = [bar for run in runs for bar in run.get("bars", ())]
    met = sum(bar["met"] for bar in bars)
    parts = [f"{checks} checks"] if checks else []
    parts += [f"{met} of {len(bars)} bars met"] if bars else []
    skipped = [run for run in runs if run["verdict"] == "skipped"]
    skipped += [each for run in runs if run["verdict"] != "skipped" for each in run.get("skipped", ())]
    parts += (
        [f"{len(skipped)} skipped ({skipped[0]['name']}: {skipped[0]['reason'][:70]})"] if skipped else []
    )
    failed = [f"{run['name']}: {run['reason']}" for run in runs if run["verdict"] == "failed"]
    return "; ".join([*failed[:1], *parts])


def _bar(bar: dict[str, Any]) -> str:
    return f"{'met' if bar['met'] else 'missed'}: {bar['name']} {bar['value']}, at {bar['at']} {bar['bar']}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
