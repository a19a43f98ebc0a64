"""What came out, for people."""

from __future__ import annotations

from typing import Any


def heading(facts: dict[str, Any]) -> str:
    devices = facts["devices"]
    several = f"{len(devices)} x " if len(devices) > 1 else ""
    names = ("torch", "triton", "cupy", "mpi4py")
    versions = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    return f"{several}{devices[0]}: Python {facts['python']}, {versions}"


def lines(point: dict[str, Any]) -> str:
    """A point as it ends: its runs, what failed, what was missed, what was skipped."""
    found = [f"\n{point['point']}. {point['title']}: {point['verdict']}, {point['seconds']} s"]
    for run in point["runs"]:
        reason = f": {run['reason']}" if run["reason"] else ""
        checks = f", {len(run['checks'])} checks" if run.get("checks") else ""
        found.append(f"   {run['name']}: {run['verdict']}{reason} ({run['seconds']} s{checks})")
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
