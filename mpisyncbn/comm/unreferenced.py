"""Communicators of groups that nobody uses any more, given back to MPI.

MPI has room for some thousand communicators, and giving one back is collective, while Python drops an object
whenever it likes, on each rank for itself. So whenever ranks meet to make a new group they tell each other
what they have dropped, and what all of its ranks have dropped is freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..liveness.rank_status import Presence

__all__ = ["dropped", "free", "give_back", "keep"]

Name = tuple[str, int, int]  # host and process of a group's first rank, and which of its groups it is
_kept: dict[Name, tuple[weakref.ref[Any], Presence]] = {}


def keep(name: Name, group: Any) -> None:
    """Remember what ``group``, a Communicator, got from MPI."""
    _kept[name] = weakref.ref(group), group.presence


def dropped() -> list[Name]:
    """Groups that this rank has no use for."""
    return [name for name, (group, _) in list(_kept.items()) if group() is None]


def free(everyone: Iterable[list[Name]]) -> None:
    """Free the groups whose ranks are all here and have all ``dropped`` them. Collective."""
    for name, ranks in sorted(Counter(name for names in everyone for name in names).items()):
        if name in _kept and _kept[name][1].size == ranks:
            give_back(_kept.pop(name)[1])


def give_back(presence: Presence) -> None:
    """Free the communicator of a group, unless that was done. Collective among its ranks."""
    presence.end()
    comm, channel = presence.comm, presence.channel
    presence.comm = presence.channel = None
    if comm is not None:
        if channel is not comm:
            channel.Free()
        comm.Free()
