"""The records of a part: each rank writes its own as it runs, so that they outlive a crash.

``merged`` puts those of all ranks together. ``checks`` decide whether the part passes, ``bars`` are
aims that a figure meets or misses, ``figures`` are for the reader, and ``skipped`` are the things
that could not be tried, with the reasons.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_END = "end"


class Records:
    """The records of one rank, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def at_most(self, name: str, value: float, bar: float) -> None:
        """Record a check, which fails if ``value`` is above ``bar`` or NaN."""
        self._write("check", name, value=value, bar=bar, ok=bool(value <= bar))

    def holds(self, name: str, ok: bool, detail: str = "") -> None:
        self._write("check", name, ok=bool(ok), **({"detail": detail} if detail else {}))

    def bar(self, name: str, value: float, bar: float, *, most: bool = True) -> None:
        """Record a figure that should be at most ``bar``; at least ``bar`` if not ``most``."""
        met = value <= bar if most else value >= bar
        self._write("bar", name, value=value, bar=bar, at="most" if most else "least", met=bool(met))

    def figure(self, name: str, value: Any) -> None:
        self._write("figure", name, value=value)

    def skip(self, name: str, reason: str) -> None:
        self._write("skip", name, reason=reason)

    def end(self) -> None:
        self._write(_END, _END)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A context that turns an exception into a failed check of this name. The run goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.holds(name, False, summary(error))

    def _write(self, kind: str, name: str, **rest: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "name": name, **_plain(rest)}) + "\n")


def summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]


def _plain(value: Any) -> Any:
    """Return a value for JSON: floats with four digits, infinities and NaN as strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def merged(folder: Path, ranks: int) -> dict[str, Any]:
    """Merge the records of all ranks: the worst of each check, and the bars and figures of rank 0.

    ``whole`` in the result is whether every rank came to its end.
    """
    found: dict[str, Any] = {"checks": [], "bars": [], "figures": {}, "skipped": [], "whole": True}
    checks: dict[str, dict[str, Any]] = {}
    for rank in range(ranks):
        path = folder / f"rank-{rank}.jsonl"
        written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found["whole"] &= any(each["kind"] == _END for each in written)
        for each in written:
            kind = each.pop("kind")
            if kind == "check":
                checks[each["name"]] = _worse(checks.get(each["name"]), {**each, "rank": rank})
            elif kind == "skip":
                found["skipped"] += [each] if each not in found["skipped"] else []
            elif rank == 0 and kind == "bar":
                found["bars"].append(each)
            elif rank == 0 and kind == "figure":
                found["figures"][each["name"]] = each["value"]
    found["checks"] = list(checks.values())
    return found


def _worse(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    return other if one is None or _badness(other) > _badness(one) else one


def _badness(check: dict[str, Any]) -> tuple[bool, float]:
    value = float(check.get("value", 0.0))
    return not check["ok"], math.inf if math.isnan(value) else value


def verdict(found: dict[str, Any], problem: str) -> tuple[str, str]:
    """Return ``passed``, ``failed`` or ``skipped``, and a reason. Removes ``whole``."""
    failed = [check for check in found["checks"] if not check["ok"]]
    whole = found.pop("whole")
    if problem or failed or not whole:
        reasons = [_said(check) for check in failed[:3]]
        reasons += [f"and {len(failed) - 3} more"] if len(failed) > 3 else []
        reasons += [problem] if problem else [] if whole else ["a rank did not come to its end"]
        return "failed", "; ".join(reasons)
    if found["checks"] or found["bars"] or found["figures"]:
        return "passed", ""
    return "skipped", "; ".join(f"{each['name']}: {each['reason']}" for each in found["skipped"])


def _said(check: dict[str, Any]) -> str:
    what = check.get("detail") or (f"{check['value']} > {check['bar']}" if "value" in check else "no")
    return f"{check['name']}: {what}"
