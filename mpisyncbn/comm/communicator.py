"""Communicator: an MPI communicator of our own, for the ranks that normalize together."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import config
from ..errors import MPISyncBNError, TransportError, on_rank
from ..kernels.link import native_link
from ..layer_names import FirstUses
from ..liveness import arrivals, watchdog
from ..liveness.rank_status import Presence, agreed_timeout
from . import launcher, runtime, transport, unreferenced
from .runtime import mpi
from .staging import DeviceMessage, device_key

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "by_handle", "check_comm", "type_name", "world"]


_numbers = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()
_world: Communicator | None = None


class Communicator:
    """Ranks that normalize together: a private duplicate of an mpi4py intra-communicator.

    Messages on the duplicate never meet the user's own, and its error handler is ours. It is made
    at the first exchange, when every rank of the group is there anyway, so building one (and
    building, copying or loading a layer) is not collective and ranks may do it alone.

    Args:
        comm: an intra-communicator of mpi4py, or another Communicator; None: ``MPI.COMM_WORLD``.

    Raises:
        TypeError: ``comm`` is neither.
        ValueError: it is an inter-communicator, or ``MPI.COMM_NULL``: freed, or a group without this rank.
        MPISyncBNError: MPI is not initialized, already finalized, or without support for threads.
    """

    comm: Any  # the duplicate, an MPI.Intracomm; None until the first exchange, and after free()

    def __init__(self, comm: Any = None) -> None:
        MPI = mpi()
        if isinstance(comm, Communicator):
            comm = comm._source if comm._source is not None else comm.ready().comm
        elif comm is None:
            comm = MPI.COMM_WORLD
        check_comm(comm)
        self._source: Any = comm
        self._is_world = comm == MPI.COMM_WORLD
        # What every exchange needs of mpi4py, looked up once.
        self._is_finalized = MPI.Is_finalized
        self.in_place, self.mpi_error, self.truncated = MPI.IN_PLACE, MPI.Exception, MPI.ERR_TRUNCATE
        self.largest = MPI.MAX
        self.joining = False  # whether some ranks may be without data: joining.py
        self.freed = False
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.comm = None
        self.presence = Presence(self.rank, self.size)
        self.debug = False
        self.lock = runtime.lock()
        # A name for this process alone, for compiled graphs, which can hold a string but no object.
        self.handle = f"group {next(_numbers)}"
        _by_handle[self.handle] = self
        self.link: Any = None  # native code for an exchange
        self.transport = "host"  # of data on a device, agreed on with the duplicate
        self._messages: dict[int, np.ndarray] = {}
        self._device_messages: dict[Any, DeviceMessage] = {}
        self._names = FirstUses()

    @property
    def exchanges(self) -> int:
        """How many exchanges this rank has begun."""
        return self.presence.exchanges

    def ready(self) -> Communicator:
        """This communicator with its duplicate made. Collective at the first call."""
        if self.comm is None:
            mpi()
            if self.freed:
                raise MPISyncBNError(f"this Communicator was freed{on_rank()}: make a new one")
            with self._beginning():
                self._adopt(self._make())
        elif self._is_finalized():
            mpi()  # says so
        return self

    def check_world(self) -> None:
        """Before training: raise MPISyncBNError if this is the world, and something knows of more ranks."""
        if self._is_world:
            launcher.compare(mpi)

    def _make(self) -> MPI.Intracomm:
        """A communicator that nobody else knows. Collective."""
        check_comm(self._source)
        return self._source.Dup()

    def _adopt(self, comm: MPI.Intracomm) -> Communicator:
        """Take over a communicator that nobody else knows. Collective."""
        MPI = mpi()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        link = native_link(comm, MPI)
        # Some launchers hand the environment to the ranks of the first host only. A rank that agrees
        # with the others before each exchange, or refuses to start, must not be alone in it.
        # And where some ranks have native code and others not, none uses it: each rounds in its own way.
        mine = _Settings.of(MPI, link is not None)
        try:
            settings = [_Settings(*each) for each in comm.allgather(tuple(mine))]
        except self.mpi_error as error:
            self.lost(error, comm)
            raise
        for each in settings:
            if each.error is not None:
                comm.Free()
                raise each.error
        self.debug = any(each.debug for each in settings)
        self.transport = "device" if all(each.transport == "device" for each in settings) else "host"
        self.link = link if all(each.has_link for each in settings) else None
        self.comm = comm
        presence = self.presence
        presence.limit = presence.last_limit = agreed_timeout([each.timeout for each in settings])
        presence.all_native = self.link is not None
        presence.homes = [each.home for each in settings]
        presence.comm = presence.channel = comm
        unreferenced.free(each.dropped for each in settings)
        unreferenced.keep((*settings[0].home, settings[0].number), self)
        return self

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        """Under the eyes of the watchdog, while the ranks of a group meet for the first time."""
        presence = self.presence
        with suppress(ValueError):  # of which all ranks hear from _adopt
            presence.limit = agreed_timeout([config.timeout()])
        presence.world = self._world_ranks()
        watchdog.watch(presence)
        before = presence.doing
        presence.doing = before or "the first message of a group"
        try:
            with arrivals.mark(presence.world):
                yield
        except BaseException as error:
            presence.end()
            if isinstance(error, self.mpi_error):
                raise MPISyncBNError(
                    f"MPI failed to duplicate the communicator{on_rank()}: {error}{self.lost(error)}"
                ) from error
            raise
        finally:
            presence.doing = before

    def _world_ranks(self) -> list[int]:
        """The ranks in the world of all ranks of the group, where this one knows them."""
        if self._source is None or self._source == mpi().COMM_NULL:  # freed, of which _make hears
            return []
        ours, everybody = self._source.Get_group(), mpi().COMM_WORLD.Get_group()
        try:
            return list(ours.Translate_ranks(None, everybody))
        finally:
            ours.Free()
            everybody.Free()

    @contextmanager
    def taking_part(self, doing: str) -> Iterator[None]:
        """In what is not an exchange, but collective too."""
        with self.lock:
            self.presence.exchanges += 1
            self.presence.doing = doing
            try:
                yield
            finally:
                self.presence.doing = None

    def message(self, length: int) -> np.ndarray:
        """The float64 buffer for messages of ``length`` values. Reused: copy what must stay."""
        buffer = self._messages.get(length)
        if buffer is None:
            _make_room(self._messages)
            buffer = self._messages[length] = np.zeros(length)
        return buffer

    def device_message(self, copies: int, length: int, like: Any) -> DeviceMessage:
        """The same, for so many messages one after the other, in the memory of the device of ``like``."""
        key = copies, length, device_key(like)
        message = self._device_messages.get(key)
        if message is None:
            _make_room(self._device_messages)
            message = self._device_messages[key] = DeviceMessage(mpi(), copies, length, like)
        return message

    def name_of(self, layer: str) -> str:
        """The name of a layer on all ranks, by its key on this one.

        A key that begins with ``#`` is this rank's own, and stands for the exchange the layer was
        first used in: not for the order of construction, since a rank may build layers of its own.
        Every other key is a name already.
        """
        if not layer.startswith("#"):
            return layer
        name = self._names.get(layer)
        if name is None:
            name = self._names.add(layer, self.exchanges + 1)
        return name

    def forget_names(self) -> None:
        """After a mismatch, where the ranks may have named different layers alike. On every rank."""
        self._names.clear()

    def lost(self, error: Any, comm: Any = None) -> str:
        """More words for an error of MPI that says that a rank is gone, which the others learn then too."""
        MPI = mpi()
        losses = {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED}
        losses.discard(MPI.ERR_UNKNOWN)  # which they are where MPI has no such errors
        if error.Get_error_class() not in losses:
            return ""
        self.presence.deaf = True
        comm = comm or self.comm
        if comm is not None:
            with suppress(Exception):  # not in every MPI, and failing already
                comm.Revoke()
        return (
            ". A rank of the group is gone: shrink the communicator, hand it to the model with "
            "mpisyncbn.set_process_group(), and go on from the last step that all have done"
        )

    def free(self) -> None:
        """Give the duplicate back to MPI, unless MPI_Finalize has taken it already.

        Collective: every rank of the group must call.
        """
        self.freed = True
        if self.comm is not None:
            if self._is_finalized():
                self.presence.end()
            else:
                mpi()
                with self.taking_part("freeing the communicator"):
                    unreferenced.give_back(self.presence)
            self.comm = self.link = None
            self._messages.clear()
            self._device_messages.clear()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, size={self.size}{', freed' if self.freed else ''})"

    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> tuple[Any, ...]:
        if self._is_world:
            return _unpickled_world, (None,)
        raise TypeError(
            f"cannot pickle {self!r}: a private group exists only in this run. Save the state_dict instead "
            "of the module, or set process_group to None (the world) before pickling and hand the group back "
            "after loading"
        )


def world() -> Communicator:
    """The Communicator of all ranks: always the same one, until it is freed."""
    global _world
    if _world is None or _world.freed:
        _world = Communicator()
    return _world


def _unpickled_world(_: None) -> Communicator:
    return world()


# The name that pickles of models have for it.
_unpickled_world.__module__, _unpickled_world.__qualname__ = "mpisyncbn.communicator", "resolve"


def by_handle(handle: str) -> Communicator:
    """The Communicator with this ``handle``; the world for an empty one."""
    if not handle:
        return world()
    if handle not in _by_handle:
        raise MPISyncBNError(
            f"the Communicator of a compiled graph is gone{on_rank()}: keep it as long as the graph"
        )
    return _by_handle[handle]


def check_comm(comm: Any) -> None:
    """Raise TypeError or ValueError unless this is an intra-communicator of mpi4py that has this rank."""
    MPI = mpi()
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"expected an mpi4py communicator, got {type_name(comm)}{on_rank()}")
    if comm == MPI.COMM_NULL:
        raise ValueError(
            f"expected a communicator that contains this rank, got MPI.COMM_NULL{on_rank()}: it was freed, "
            "or this rank is not in the group; build the layer only on the group's own ranks"
        )
    if comm.Is_inter():
        raise ValueError(
            f"expected an intra-communicator, got an inter-communicator{on_rank()}: "
            "merge it first, comm.Merge()"
        )


def type_name(value: object) -> str:
    """The full name of the type of a value, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Settings(NamedTuple):
    """What a rank brings along to a new group."""

    debug: bool
    transport: str
    timeout: float | None
    has_link: bool
    home: tuple[str, int]  # host and process
    number: int  # of groups that this rank has seen so far
    dropped: list[unreferenced.Name]
    error: Exception | None  # what is wrong with its environment

    @classmethod
    def of(cls, MPI: Any, has_link: bool) -> _Settings:
        problem: Exception | None
        debug, where, timeout, problem = False, "host", None, None
        try:
            debug, where, timeout = config.debug(), transport.chosen(MPI)[0], config.timeout()
        except (ValueError, TransportError) as error:
            problem = error
        home = socket.gethostname(), os.getpid()
        return cls(debug, where, timeout, has_link, home, next(_numbers), unreferenced.dropped(), problem)


def _make_room(buffers: dict[Any, Any]) -> None:
    if len(buffers) >= 256:  # more than the numbers of channels that a model has: they come and go
        buffers.clear()


def _in_child() -> None:
    """A forked process, the only place that sees to it: what it has of MPI belongs to its parent."""
    runtime.forked()
    watchdog.forked()
    for communicator in list(_by_handle.values()):
        communicator.comm = communicator.link = None
        communicator.lock = threading.RLock()  # a thread that is not here may hold the other


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
