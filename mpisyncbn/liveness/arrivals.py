"""Find ranks that have not come to the first message of their group, by the operating system.

Before that message, a rank cannot ask another what it is doing. So a rank that has come marks its
process by an open file in memory, which ends with the process. A rank that waits too long looks at
the processes of the job on its host, and reports which of them have no such mark.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from .. import config

__all__ = ["describe_missing", "mark_arrival", "state_of"]


@contextmanager
def mark_arrival(ranks: Sequence[int]) -> Iterator[None]:
    """A context in which other processes see that this one has come to this group.

    ``ranks``: the ranks of the group in the world.
    """
    file = None
    with suppress(AttributeError, OSError):  # only Linux has it
        file = os.memfd_create(_name(ranks))
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def describe_missing(ranks: Sequence[int]) -> dict[int, str]:
    """A text about each rank that is not inside ``mark_arrival(ranks)``, by its number."""
    found: dict[int, list[int]] = {}
    for rank, process in _processes():
        found.setdefault(rank, []).append(process)
    words = {}
    for rank in ranks:
        processes = found.get(rank, [])
        if any(_has_arrived(process, ranks) for process in processes):
            continue
        if processes:  # the oldest is the rank, the others are its workers
            process = min(processes, key=_start_time)
            words[rank] = f"has not come: its process {process} is {state_of(process)}"
        else:
            words[rank] = "may have come, on another host: no process of it is on this one"
    return words


def state_of(process: int) -> str:
    """The state of a process on this host, in a word or two."""
    try:
        state = _stat(process)[0]
    except (OSError, IndexError):
        return "gone"
    words = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead", "X": "dead"}
    return words.get(state, "alive")


def _name(ranks: Sequence[int]) -> str:
    """The name of the file that marks an arrival in the group of these ranks."""
    return f"mpisyncbn meets {len(ranks)} ranks {zlib.crc32(repr(list(ranks)).encode())}"


def _has_arrived(process: int, ranks: Sequence[int]) -> bool:
    """Whether a process of this host is inside ``mark_arrival(ranks)``."""
    mark = f"/memfd:{_name(ranks)}"
    with suppress(OSError):
        for file in (config.PROC / str(process) / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(file).startswith(mark):
                    return True
    return False


def _processes() -> Iterator[tuple[int, int]]:
    """Rank in the world and process id of each process of this job on this host."""
    job = _job(os.getpid())
    for folder in config.PROC.glob("[0-9]*"):
        process = int(folder.name)
        rank = config.rank_of(process)
        if rank is not None and _job(process) == job:
            yield rank, process


def _job(process: int) -> int:
    """The id of the process that started the ranks here: the nearest ancestor that is no rank."""
    while config.rank_of(process) is not None:
        process = config.parent_of(process)
    return process


def _start_time(process: int) -> int:
    """The start time of a process; far in the future for one that is gone."""
    try:
        return int(_stat(process)[19])
    except (OSError, IndexError):
        return 1 << 62


def _stat(process: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on (state, parent, ...): see proc(5)."""
    return (config.PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
