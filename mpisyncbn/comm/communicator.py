"""Communicator: a private MPI communicator for the ranks that normalize together."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import config
from ..errors import MPISyncBNError, on_rank
from ..kernels import Array
from ..kernels.link import native_link, native_stream_worker
from ..liveness import watchdog
from ..liveness.rank_status import DEFAULT_TIMEOUT, RankStatus, agreed_timeout
from . import launcher, runtime, unreferenced
from .handshake import exchange_handshakes
from .layer_names import FirstUses
from .runtime import check_comm, mpi, world_ranks
from .staging import DeviceMessage, device_key
from .streams import Device, Stream

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..kernels.cpu._cpu import Call, Link, StreamWorker

__all__ = ["Communicator", "by_graph_key", "world"]

_numbers = itertools.count()
_by_graph_key: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()
_world: Communicator | None = None


class Communicator:
    """Ranks that normalize together: a private duplicate of an mpi4py intra-communicator.

    Messages on the duplicate never meet the user's own, and its error handler is ours. The first
    exchange makes it, with every rank of the group. Building a Communicator is therefore not
    collective, and neither is building, copying or loading a layer: a rank may do it alone.

    Args:
        comm: an intra-communicator of mpi4py, or another Communicator; None: ``MPI.COMM_WORLD``.

    Raises:
        TypeError: ``comm`` is of another type.
        ValueError: it is an inter-communicator, or ``MPI.COMM_NULL`` (freed, or without this rank).
        MPISyncBNError: MPI is not initialized, already finalized, or without support for threads.
    """

    # These two may be None. They are typed Any because callers know when they are not.
    comm: MPI.Intracomm | Any  # the duplicate; None before the first exchange, and after free()
    _owner_of_source: Communicator | None = None
    _source: MPI.Intracomm | Any  # the communicator to duplicate; None for a torch group of another backend

    def __init__(self, comm: Communicator | MPI.Comm | None = None) -> None:
        MPI = mpi()
        source: Any = MPI.COMM_WORLD if comm is None else comm
        if isinstance(comm, Communicator):
            source = comm._source if comm._source is not None else comm.ready().comm
            # ``source`` is freed after the Communicator that took it over was dropped.
            self._owner_of_source = comm if source is comm.comm else comm._owner_of_source
        check_comm(source)
        self._source = source
        self._is_world = source == MPI.COMM_WORLD
        # Every exchange needs these names of mpi4py: look them up once.
        self._is_finalized = MPI.Is_finalized
        self.in_place, self.mpi_error, self.truncated = MPI.IN_PLACE, MPI.Exception, MPI.ERR_TRUNCATE
        self.max_op = MPI.MAX
        self.in_join_context = False  # whether ranks may run out of data: see uneven.py
        self.freed = False
        self.rank: int = source.Get_rank()
        self.size: int = source.Get_size()
        self.comm = None
        self.rank_status = RankStatus(self.rank, self.size)
        self.debug = False
        self.lock: AbstractContextManager[object] = runtime.lock()
        # Compiled graphs name the group by this string: they cannot hold an object.
        self.graph_key = f"group {next(_numbers)}"
        _by_graph_key[self.graph_key] = self
        self.link: Link | None = None  # native code for an exchange
        self.stream: StreamWorker | None = None  # does the exchanges of the stream transport
        self.last_stream: Stream | None = None  # kept for the worker: see enqueue.py
        self.enqueued_calls: dict[object, Call] = {}  # for ``stream``: see enqueue.py
        self.prepared: dict[Hashable, Any] = {}  # passes of layers on a GPU: see autograd/enqueued.py
        self.on_failure: Callable[[Communicator], None] | None = None  # raises what ``stream`` has found
        self.transport = "host"  # for data on a device; the ranks agree on it in ready()
        self._messages: dict[int, np.ndarray] = {}
        self._device_messages: dict[tuple[int, int, Device], DeviceMessage] = {}
        self._names = FirstUses()

    @property
    def exchanges(self) -> int:
        """How many exchanges this rank has begun."""
        return self.rank_status.exchanges

    def ready(self) -> Communicator:
        """Return this communicator, with its duplicate made. Collective at the first call."""
        if self.comm is None:
            mpi()
            if self.freed:
                raise MPISyncBNError(f"this Communicator was freed{on_rank()}: make a new one")
            with self._first_message():
                self._take_over(self._create_comm())
        elif self._is_finalized():
            mpi()  # raises
        return self

    def check_world(self) -> None:
        """Raise MPISyncBNError if this is the world and a launcher or torch knows of more ranks."""
        if self._is_world:
            launcher.check_world(mpi)

    def _create_comm(self) -> MPI.Intracomm:
        """Return a new communicator of these ranks, for this object alone. Collective."""
        check_comm(self._source)
        return self._source.Dup()

    def _take_over(self, comm: MPI.Intracomm) -> Communicator:
        """Use ``comm`` from here on; no other object may use it. Collective."""
        MPI = mpi()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        link = native_link(comm, MPI)
        try:
            handshakes = exchange_handshakes(comm, MPI, link is not None)
        except self.mpi_error as error:
            self.revoke_if_rank_lost(error, comm)
            raise
        # Some launchers hand the environment to the first host's ranks only, so the ranks agree on
        # the settings. No rank uses native code unless all have it: the two ways round differently.
        self.debug = any(each.debug for each in handshakes)
        wanted = {each.transport for each in handshakes}
        self.transport = wanted.pop() if len(wanted) == 1 else "host"
        self.link = link if all(each.has_link for each in handshakes) else None
        self.comm = comm
        if self.transport == "stream":
            self.stream = self.rank_status.stream = native_stream_worker(comm, MPI)
            unreferenced.finish_at_exit()
        status = self.rank_status
        status.agree_on_timeout([each.timeout for each in handshakes])
        status.all_native = self.link is not None
        status.process_ids = [each.process_id for each in handshakes]
        status.comm = status.p2p_comm = comm
        unreferenced.free_unreferenced(each.unreferenced for each in handshakes)
        unreferenced.track((*handshakes[0].process_id, handshakes[0].number), self)
        return self

    @contextmanager
    def _first_message(self) -> Iterator[None]:
        """A context for the first message of the group, watched by the watchdog."""
        seconds = DEFAULT_TIMEOUT
        with suppress(ValueError):  # _take_over raises it on all ranks
            seconds = agreed_timeout([config.timeout()])
        try:
            with watchdog.first_message(self.rank_status, world_ranks(self._source), seconds):
                yield
        except self.mpi_error as error:
            raise MPISyncBNError(
                f"MPI failed to duplicate the communicator{on_rank()}: {error}"
                f"{self.revoke_if_rank_lost(error)}"
            ) from error

    def synchronize(self) -> None:
        """Wait until all exchanges that this rank has enqueued are done; raise what they found.

        For the ``stream`` transport (docs/explanation/transports.md): others have nothing enqueued.
        Collective if it raises, on every rank: CollectiveMismatchError, MPISyncBNError, ValueError.
        """
        if self.stream is not None:
            with self.lock:
                self.stream.wait()
            if self.stream.failed and self.on_failure is not None:
                self.on_failure(self)

    @contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """A context for a collective other than an exchange. Reports and errors name it."""
        with self.lock:
            self.synchronize()
            self.rank_status.exchanges += 1
            self.rank_status.current_call = name
            try:
                yield
            except self.mpi_error as error:
                cure = self.revoke_if_rank_lost(error)
                raise MPISyncBNError(f"MPI failed while {name}{on_rank()}: {error}{cure}") from error
            finally:
                self.rank_status.current_call = None

    def message(self, length: int) -> np.ndarray:
        """The float64 buffer for messages of ``length`` values. The next message overwrites it."""
        buffer = self._messages.get(length)
        if buffer is None:
            _make_room(self._messages)
            buffer = self._messages[length] = np.zeros(length)
        return buffer

    def device_message(self, copies: int, length: int, like: Array) -> DeviceMessage:
        """The float64 buffer for ``copies`` messages, on the device of ``like``. It is reused."""
        key = copies, length, device_key(like)
        message = self._device_messages.get(key)
        if message is None:
            _make_room(self._device_messages)
            message = self._device_messages[key] = DeviceMessage(mpi(), copies, length, like)
        return message

    def name_of(self, layer: str) -> str:
        """The name of a layer on all ranks, by its key on this one.

        A key that begins with ``#`` is this rank's own: its layer is named after the exchange that
        first used it. (Layers are not numbered as they are built, since one rank may build more
        than another.) Every other key is a name already.
        """
        if not layer.startswith("#"):
            return layer
        name = self._names.get(layer)
        if name is None:
            name = self._names.add(layer, self.rank_status.calls_begun + 1)
        return name

    def forget_names(self) -> None:
        """Forget all names of layers: after a mismatch, ranks may have named two layers alike.

        Every rank of the group must call.
        """
        self._names.clear()

    def revoke_if_rank_lost(self, error: Exception, comm: MPI.Intracomm | None = None) -> str:
        """Revoke the communicator if an error of MPI says that a rank is gone.

        The other ranks learn of the loss by that. Returns the cure, which ends the message of the
        error. ``comm`` is a communicator that is not taken over yet.
        """
        MPI = mpi()
        losses = {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED}
        losses.discard(MPI.ERR_UNKNOWN)  # the value of all three if MPI has no such errors
        if error.Get_error_class() not in losses:  # type: ignore[attr-defined]
            return unreferenced.cure_for_many() or (
                ": see what MPI printed, and start the job again from its last checkpoint"
            )
        self.rank_status.listening = False
        comm = comm or self.comm
        if comm is not None:
            with suppress(Exception):  # not every MPI has it, and there is an error already
                comm.Revoke()
        return (
            ". A rank of the group is gone: shrink the communicator, pass it to the model with "
            "mpisyncbn.set_process_group(), and go on from the last step that all have done"
        )

    def free(self) -> None:
        """Give the duplicate back to MPI: later use raises MPISyncBNError. Collective."""
        if self.comm is not None and self._is_finalized():
            self.rank_status.unregister()
        elif self.comm is not None:
            mpi()
            with self.collective("freeing the communicator"):
                unreferenced.free_comm(self.rank_status)
        self.drop()

    def drop(self) -> None:
        """Use the group no more. unreferenced.py frees the duplicate when all ranks have."""
        with self.lock:  # not in the middle of another thread's exchange
            self.freed, self.comm, self.link, self.stream = True, None, None, None
        self.rank_status.finalize_timeout = 0.0  # a rank may go on for long without the group
        for kept in (self._messages, self._device_messages, self.enqueued_calls, self.prepared):
            kept.clear()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, size={self.size}{', freed' if self.freed else ''})"

    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Communicator:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> tuple[Callable[[None], Communicator], tuple[None]]:
        if self._is_world:
            return _unpickled_world, (None,)
        raise TypeError(
            f"cannot pickle {self!r}: a private group exists only in this run. Save the state_dict instead "
            "of the module, or set process_group to None (the world) before pickling and set the group again "
            "after loading"
        )


def world() -> Communicator:
    """Return the Communicator of all ranks: always the same one, until it is freed."""
    global _world
    if _world is None or _world.freed:
        _world = Communicator()
    return _world


def _unpickled_world(_: None) -> Communicator:
    return world()


# Pickled models refer to the function by this name.
_unpickled_world.__module__, _unpickled_world.__qualname__ = "mpisyncbn.communicator", "resolve"


def by_graph_key(graph_key: str) -> Communicator:
    """Return the Communicator with this ``graph_key``; the world's for an empty one."""
    if not graph_key:
        return world()
    if graph_key not in _by_graph_key:
        raise MPISyncBNError(
            f"the Communicator of a compiled graph is gone{on_rank()}: keep it as long as the graph"
        )
    return _by_graph_key[graph_key]


def _make_room(buffers: dict[Any, Any]) -> None:
    """Drop all buffers if there are too many."""
    if len(buffers) >= 256:  # a model has fewer: its buffers have come and gone
        buffers.clear()


def _in_child() -> None:
    """Give up MPI in a forked child: it belongs to the parent. This is the only fork hook."""
    runtime.forked()
    watchdog.forked()
    for communicator in list(_by_graph_key.values()):
        communicator.comm = communicator.link = communicator.stream = None
        communicator.lock = threading.RLock()  # a thread of the parent may hold the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
