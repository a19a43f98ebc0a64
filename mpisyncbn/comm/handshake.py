"""The first message of a new group, by which its ranks learn each other's settings."""

from __future__ import annotations

import itertools
import os
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from .. import config
from ..errors import TransportError
from . import transport, unreferenced

if TYPE_CHECKING:
    from mpi4py import MPI as mpi4py_MPI

    from ..liveness.rank_status import ProcessId
    from .unreferenced import GroupId

__all__ = ["exchange_handshakes"]

_numbers = itertools.count()


class Handshake(NamedTuple):
    """The settings and the process of one rank of a new group."""

    debug: bool
    transport: str
    timeout: float | None
    has_link: bool
    process_id: ProcessId
    number: int  # how many groups this rank has seen so far
    unreferenced: list[GroupId]
    error: Exception | None  # raised by a wrong setting of its environment


def exchange_handshakes(comm: mpi4py_MPI.Intracomm, MPI: ModuleType, has_link: bool) -> list[Handshake]:
    """Exchange the handshakes of all ranks of ``comm``, and return them in the order of ranks.

    Raises ValueError or TransportError, on every rank, if the environment of any has an error;
    ``comm`` is freed then. Collective: every rank must call.
    """
    handshakes = [Handshake(*each) for each in comm.allgather(tuple(_own(MPI, has_link)))]
    for each in handshakes:
        if each.error is not None:
            comm.Free()
            raise each.error
    return handshakes


def _own(MPI: ModuleType, has_link: bool) -> Handshake:
    problem: Exception | None
    debug, where, timeout, problem = False, "host", None, None
    try:
        debug, where, timeout = config.debug(), transport.chosen(MPI)[0], config.timeout()
    except (ValueError, TransportError) as error:
        problem = error
    process_id, number = (*config.machine(), os.getpid()), next(_numbers)
    return Handshake(debug, where, timeout, has_link, process_id, number, unreferenced.ids(), problem)
