"""A communicator that notes its messages."""

from __future__ import annotations

from typing import Any

from mpisyncbn.comm.communicator import Communicator


class Recorder:
    """Takes the place of a group's communicator: notes each message, and what the rank would say then."""

    def __init__(self, group: Communicator) -> None:
        self.group, self.comm, self.rank_status = group, group.ready().comm, group.rank_status
        self.messages: list[tuple[str, Any]] = []
        self.states: list[str] = []
        group.comm, group.link = self, None  # native code has messages of its own

    def note(self, name: str, message: Any) -> None:
        self.messages.append((name, message))
        self.states.append(self.rank_status.state())

    def Allreduce(self, in_place: Any, message: Any, **options: Any) -> None:
        self.note("Allreduce", message.copy())
        self.comm.Allreduce(in_place, message, **options)

    def Allgather(self, message: Any, gathered: Any) -> None:
        self.note("Allgather", message.copy())
        self.comm.Allgather(message, gathered)

    def allgather(self, value: Any) -> Any:
        self.note("allgather", value)
        return self.comm.allgather(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)
