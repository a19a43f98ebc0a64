"""Communicator: an MPI communicator of our own; groups of ranks by splitting one."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import config
from ..errors import MPISyncBNError, TransportError, on_rank
from ..kernels.link import native_link
from ..layer_names import FirstUses
from ..liveness import arrivals, watchdog
from ..liveness.rank_status import Presence, agreed_timeout
from . import ancestors, launcher, transport, unreferenced
from .staging import DeviceMessage, device_key

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "by_handle", "mpi", "new_group", "new_subgroups", "resolve", "subset"]


def mpi() -> Any:
    """The module ``mpi4py.MPI``, ready for use.

    Importing it initializes MPI, so it is imported at first use and never before: a worker process
    that only re-imports the program must stay out of MPI.
    """
    if _forked:
        raise MPISyncBNError(
            "this process was forked from one that runs MPI, which it cannot use itself: train in the "
            "parent, and use the model here in eval mode only"
        )
    if "mpi4py.MPI" not in sys.modules and _is_worker() and config.launched():
        raise MPISyncBNError(
            "this is a worker process of a rank of MPI, and no rank itself: synchronized batch norm works in "
            "training mode on the ranks that the launcher started"
        )
    if "mpi4py.MPI" not in sys.modules and (rank := ancestors.rank_above()) is not None:
        raise MPISyncBNError(ancestors.of_child(rank))
    from mpi4py import MPI

    if MPI.Is_finalized():
        raise MPISyncBNError(
            "MPI is already finalized: synchronized batch norm needs it running; call MPI.Finalize() later, "
            "or leave it to mpi4py at exit"
        )
    if not MPI.Is_initialized():
        raise MPISyncBNError(
            "MPI is not initialized (mpi4py.rc.initialize is off): call MPI.Init_thread(MPI.THREAD_MULTIPLE) "
            "before the first training step"
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise MPISyncBNError(
            f"MPI provides thread level {MPI.Query_thread()}, expected at least MPI.THREAD_SERIALIZED "
            f"({MPI.THREAD_SERIALIZED}), because autograd may run backward on another thread{on_rank()}: "
            "ask for it with mpi4py.rc.thread_level or MPI.Init_thread"
        )
    return MPI


def _is_worker() -> bool:
    """Whether multiprocessing started this process."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    return multiprocessing is not None and multiprocessing.parent_process() is not None


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
        _check(comm)
        self._source: Any = comm
        self._is_world = comm == MPI.COMM_WORLD
        # What every exchange needs of mpi4py, looked up once.
        self._is_finalized = MPI.Is_finalized
        self.in_place, self.mpi_error, self.truncated = MPI.IN_PLACE, MPI.Exception, MPI.ERR_TRUNCATE
        self.largest = MPI.MAX
        self.joining = False  # whether some ranks may be without data: joining.py
        self._freed = False
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.comm = None
        self.presence = Presence(self.rank, self.size)
        self.debug = False
        # Below THREAD_MULTIPLE MPI may be in one call at a time, whatever the communicator.
        self.lock = threading.RLock() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else _one_at_a_time
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
            if self._freed:
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
        _check(self._source)
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
        ours, world = self._source.Get_group(), mpi().COMM_WORLD.Get_group()
        try:
            return list(ours.Translate_ranks(None, world))
        finally:
            ours.Free()
            world.Free()

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
        self._freed = True
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
        return f"Communicator(rank={self.rank}, size={self.size}{', freed' if self._freed else ''})"

    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> tuple[Any, ...]:
        if self._is_world:
            return resolve, (None,)
        raise TypeError(
            f"cannot pickle {self!r}: a private group exists only in this run. Save the state_dict instead "
            "of the module, or set process_group to None (the world) before pickling and hand the group back "
            "after loading"
        )


def _make_room(buffers: dict[Any, Any]) -> None:
    if len(buffers) >= 256:  # more than the numbers of channels that a model has: they come and go
        buffers.clear()


_one_at_a_time = threading.RLock()
_numbers = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()
_world: Communicator | None = None
_keyval: int | None = None
_forked = False


def resolve(process_group: Any) -> Communicator:
    """The Communicator that stands for ``process_group``; always the same one for the same group.

    Args:
        process_group: None (the world), a Communicator, an intra-communicator of mpi4py, or a process
            group of torch.distributed, of whatever backend, among ranks of this MPI job.
    """
    global _world
    if process_group is None:
        if _world is None or _world._freed:
            _world = Communicator()
        return _world
    if isinstance(process_group, Communicator):
        return process_group
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and isinstance(process_group, torch_distributed.ProcessGroup):
        return _of_torch(process_group)
    MPI = mpi()
    if not isinstance(process_group, MPI.Comm):
        raise TypeError(
            "expected process_group to be an mpi4py communicator, an mpisyncbn.Communicator, a process group "
            "of torch.distributed that contains this rank, or None (the world), got "
            f"{_type_name(process_group)}{on_rank()}"
        )
    _check(process_group)
    if process_group == MPI.COMM_WORLD:
        return resolve(None)
    # Kept as an attribute of the user's communicator: MPI drops it with the communicator,
    # while a dictionary by handle would hand it on to the next one that gets the same handle.
    global _keyval
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval()
    communicator = process_group.Get_attr(_keyval)
    if communicator is None or communicator._freed:
        communicator = Communicator(process_group)
        process_group.Set_attr(_keyval, communicator)
    return communicator


class _OfTorch(Communicator):
    """The ranks of a process group of another backend, gloo or nccl, which know each other by that."""

    def __init__(self, group: Any) -> None:
        super().__init__(mpi().COMM_SELF)
        self._source, self._group, self._is_world = None, group, False
        self.rank, self.size = group.rank(), group.size()

    def _make(self) -> MPI.Intracomm:
        from torch.distributed import all_gather_object

        if self.size > 1:
            launcher.refuse_if_apart(mpi())
        world = mpi().COMM_WORLD
        ranks: list[Any] = [None] * self.size
        all_gather_object(ranks, world.rank, group=self._group)
        if len(set(ranks)) < self.size:
            raise MPISyncBNError(
                f"expected a process group of ranks of one MPI job, got one of {self.size} that MPI knows as "
                f"ranks {ranks} of a world of {world.size}{on_rank()}: start all of them with one mpiexec"
            )
        self._group = None  # which may end before this does
        return subset(world, ranks)


_of_torch_groups: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()


def _of_torch(group: Any) -> Communicator:
    ours = getattr(group, "communicator", None)  # of backend mpi4py
    if ours is not None:
        return ours
    communicator = _of_torch_groups.get(group)
    if communicator is None or communicator._freed:
        communicator = _of_torch_groups[group] = _OfTorch(group)
    return communicator


def subset(comm: MPI.Intracomm, ranks: list[int]) -> MPI.Intracomm:
    """A communicator of some ranks of ``comm``, in that order. Collective among them alone."""
    group = comm.Get_group().Incl(ranks)
    try:
        return comm.Create_group(group)
    finally:
        group.Free()


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


def by_handle(handle: str) -> Communicator:
    """The Communicator with this ``handle``; the world for an empty one."""
    if not handle:
        return resolve(None)
    if handle not in _by_handle:
        raise MPISyncBNError(
            f"the Communicator of a compiled graph is gone{on_rank()}: keep it as long as the graph"
        )
    return _by_handle[handle]


def _check(comm: Any) -> None:
    MPI = mpi()
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"expected an mpi4py communicator, got {_type_name(comm)}{on_rank()}")
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


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def new_group(ranks: Iterable[int], comm: Any = None) -> Communicator | None:
    """A group of some of the ranks of ``comm``.

    Collective: every rank of ``comm`` must call, with the same ranks, also those outside the group.

    Args:
        ranks: ranks in ``comm``, each once. In the group they are in ascending order.
        comm: the communicator to choose from; None: the world.

    Returns:
        The group's Communicator; None on a rank outside it. None as a process_group means the
        world, so build layers of this group on its own ranks only.

    Raises:
        ValueError: on every rank, where ``ranks`` is empty, names a rank twice or one that does not
            exist, or differs between ranks.
        MPISyncBNError: ``comm`` is the world, and torch.distributed or a launcher knows of more ranks.
    """
    parent = resolve(comm)
    parent.check_world()

    def read() -> list[int]:
        chosen = sorted(int(index(rank)) for rank in ranks)
        if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= parent.size:
            raise ValueError
        return chosen

    chosen = _agree(parent, "ranks", ranks, read, f"distinct ranks from 0 to {parent.size - 1}, at least one")
    with parent.taking_part("making a new group"):
        group = parent.comm.Split(0 if parent.rank in chosen else mpi().UNDEFINED, key=parent.rank)
    return None if group == mpi().COMM_NULL else _child(group)


def new_subgroups(group_size: int | None = None, comm: Any = None) -> Communicator:
    """Split ``comm`` into groups of consecutive ranks, and return the one this rank is in.

    Collective: every rank of ``comm`` must call, with the same ``group_size``.

    Args:
        group_size: ranks per group, a divisor of the size of ``comm``; None: one group per node
            (ranks that share memory).
        comm: the communicator to split; None: the world.

    Raises:
        ValueError: on every rank, where ``group_size`` does not divide the number of ranks, or
            differs between ranks.
        MPISyncBNError: ``comm`` is the world, and torch.distributed or a launcher knows of more ranks.
    """
    parent = resolve(comm)
    parent.check_world()

    def read() -> int | None:
        size = None if group_size is None else int(index(group_size))
        if size is not None and (size < 1 or parent.size % size):
            raise ValueError
        return size

    size = _agree(parent, "group_size", group_size, read, f"a divisor of the {parent.size} ranks, or None")
    with parent.taking_part("making new groups"):
        if size is None:
            comm = parent.comm.Split_type(mpi().COMM_TYPE_SHARED, key=parent.rank)
        else:
            comm = parent.comm.Split(parent.rank // size, key=parent.rank)
    return _child(comm)


def _child(comm: MPI.Intracomm) -> Communicator:
    child = Communicator(comm)
    with child._beginning():
        return child._adopt(comm)


def _agree(parent: Communicator, name: str, given: Any, read: Callable[[], Any], expected: str) -> Any:
    """What ``read`` makes of ``given``.

    Raises on every rank if it cannot on any, or the ranks differ: nobody is left waiting alone.
    """
    try:
        value, problem = read(), None
    except Exception:  # of any kind: the other ranks have to hear of it
        value, problem = None, f"expected {expected}, got {given!r}"
    comm = parent.ready().comm
    with parent.taking_part(f"agreeing on the {name} of a new group"):
        everyone = comm.allgather((value, problem))
    for rank, (_, theirs) in enumerate(everyone):
        if theirs is not None:
            raise ValueError(f"{name}: {theirs} on rank {rank}")
    for rank, (theirs, _) in enumerate(everyone):
        if theirs != value:
            raise ValueError(
                f"{name}: expected the same on every rank, got {theirs} on rank {rank} "
                f"and {value} on rank {parent.rank}"
            )
    return value


def _in_child() -> None:
    """A forked process: what it has of MPI belongs to its parent."""
    global _forked, _one_at_a_time
    _forked = "mpi4py.MPI" in sys.modules
    _one_at_a_time = threading.RLock()
    for communicator in list(_by_handle.values()):
        communicator.comm = communicator.link = None
        communicator.lock = threading.RLock()  # a thread that is not here may hold the other


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
