"""Memory of messages that are not done: MPI may still read or write it, so it must not be freed."""

from __future__ import annotations

__all__ = ["keep_alive"]

_kept_alive: list[object] = []


def keep_alive(*memory: object) -> None:
    """Keep memory, or requests that hold it, until the process ends."""
    _kept_alive.extend(memory)
