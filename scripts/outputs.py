"""Arguments of scripts that name files to write."""

from __future__ import annotations

from pathlib import Path

__all__ = ["output"]


def output(text: str) -> Path | None:
    """The path of a file to write, or None if it is empty.

    It makes the folder now: if that fails, no work is lost.
    """
    if not text:
        return None
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
