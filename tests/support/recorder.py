"""A communicator that records its messages."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from mpisyncbn.comm.communicator import Communicator


class Recorder:
    """A stand-in for a group's communicator: it records each message, and the rank's state then."""

    def __init__(self, group: Communicator) -> None:
        self.group, self.comm, self.rank_status = group, group.ready().comm, group.rank_status
        self.messages: list[tuple[str, object]] = []
        self.states: list[str] = []
        group.comm, group.link = self, None  # native code would send its messages past this object

    def note(self, name: str, message: object) -> None:
        self.messages.append((name, message))
        self.states.append(self.rank_status.state())

    def Allreduce(self, in_place: object, message: np.ndarray, **options: MPI.Op) -> None:
        self.note("Allreduce", message.copy())
        self.comm.Allreduce(in_place, message, **options)

    def Allgather(self, message: np.ndarray, gathered: np.ndarray) -> None:
        self.note("Allgather", message.copy())
        self.comm.Allgather(message, gathered)

    def allgather(self, value: object) -> object:
        self.note("allgather", value)
        return self.comm.allgather(value)

    def __getattr__(self, name: str) -> object:
        return getattr(self.comm, name)
