"""What came out, for people."""

from __future__ import annotations

from itertools import groupby

from .launch import Outcome

_HEAD = 30  # lines of stderr of a case that failed


def line(found: Outcome) -> str:
    """A case as it ends."""
    seconds = "-" if found.seconds is None else f"{found.seconds:.1f} s"
    said = f"{_verdict(found)}  {found.name:<34} {seconds:>7} {_status(found):>4}  {found.outcome[:110]}"
    if not found.ok:
        head = (found.stderr + found.stdout).splitlines()
        more = [f"... and {len(head) - _HEAD} more lines"] if len(head) > _HEAD else []
        said += "".join(f"\n      | {each}" for each in [*head[:_HEAD], *more])
    return said


def table(outcomes: list[Outcome]) -> str:
    said = []
    for library, found in groupby(outcomes, key=lambda each: each.library):
        rows = [("fault", "outcome", "status", "seconds", "verdict")]
        for each in found:
            seconds = "-" if each.seconds is None else f"{each.seconds:.1f}"
            rows.append((each.fault, each.outcome[:60], _status(each), seconds, _verdict(each)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        said += [f"\n{library}, 4 ranks\n"]
        said += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(said)


def markdown(outcomes: list[Outcome]) -> str:
    """A row for each fault, a column for each library: seconds and status."""
    libraries = list(dict.fromkeys(each.library for each in outcomes))
    said = [_row("fault", *libraries), _row(*["---"] * (len(libraries) + 1))]
    for fault in dict.fromkeys(each.fault for each in outcomes):
        cells = {each.library: _cell(each) for each in outcomes if each.fault == fault}
        said.append(_row(fault, *[cells.get(library, "") for library in libraries]))
    return "\n".join(said)


def verdict(outcomes: list[Outcome]) -> str:
    right = sum(each.ok for each in outcomes)
    hung = sum(each.seconds is not None and each.status is None for each in outcomes)
    silent = sum(each.status == 0 and not each.ok for each in outcomes)
    return f"{right} of {len(outcomes)} as they should be, {hung} hung, {silent} with status 0"


def _verdict(found: Outcome) -> str:
    return "ok  " if found.ok else "FAIL"


def _status(found: Outcome) -> str:
    return "-" if found.status is None else str(found.status)


def _cell(found: Outcome) -> str:
    if found.status is None or found.seconds is None:
        return found.outcome
    return f"{found.seconds:.1f} s, {found.status}" + ("" if found.ok else " (FAIL)")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
