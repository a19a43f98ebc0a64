"""Communicator: an MPI communicator of our own; groups of ranks by splitting one."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from . import config, transport
from .errors import MPISyncBNError, TransportError, on_rank
from .staging import DeviceMessage, device_key

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "by_handle", "mpi", "new_group", "new_subgroups", "resolve", "subset"]


def mpi() -> Any:
    """The module ``mpi4py.MPI``, ready for use.

    Importing it initializes MPI, so it is imported at first use and never before: a worker process
    that only re-imports the program must stay out of MPI.
    """
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
        self.exchanges = 0
        self.debug = False
        # Below THREAD_MULTIPLE MPI may be in one call at a time, whatever the communicator.
        self.lock = threading.RLock() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else _one_at_a_time
        # A name for this process alone, for compiled graphs, which can hold a string but no object.
        self.handle = f"group {next(_numbers)}"
        _by_handle[self.handle] = self
        self.link: Any = None  # native code for an exchange, see transport.direct
        self.transport = "host"  # of data on a device, agreed on with the duplicate
        self._messages: dict[int, np.ndarray] = {}
        self._device_messages: dict[Any, DeviceMessage] = {}
        self._names: dict[str, str] = {}

    def ready(self) -> Communicator:
        """This communicator with its duplicate made. Collective at the first call."""
        if self.comm is None:
            mpi()
            if self._freed:
                raise MPISyncBNError(f"this Communicator was freed{on_rank()}: make a new one")
            try:
                duplicate = self._make()
            except self.mpi_error as error:
                raise MPISyncBNError(
                    f"MPI failed to duplicate the communicator{on_rank()}: {error}"
                ) from error
            self._adopt(duplicate)
        elif self._is_finalized():
            mpi()  # says so
        return self

    def _make(self) -> MPI.Intracomm:
        """A communicator that nobody else knows. Collective."""
        _check(self._source)
        return self._source.Dup()

    def _adopt(self, comm: MPI.Intracomm) -> Communicator:
        """Take over a communicator that nobody else knows. Collective."""
        MPI = mpi()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        link = transport.direct(comm, MPI)
        # Some launchers hand the environment to the ranks of the first host only. A rank that agrees
        # with the others before each exchange, or refuses to start, must not be alone in it.
        # And where some ranks have native code and others not, none uses it: each rounds in its own way.
        settings = comm.allgather((*_settings(MPI), link is not None))
        for _, _, error, _ in settings:
            if error is not None:
                comm.Free()
                raise error
        self.debug = any(debug for debug, *_ in settings)
        self.transport = "device" if all(where == "device" for _, where, *_ in settings) else "host"
        self.link = link if all(has_link for *_, has_link in settings) else None
        self.comm = comm
        return self

    def message(self, length: int) -> np.ndarray:
        """The float64 buffer for messages of ``length`` values. Reused: copy what must stay."""
        buffer = self._messages.get(length)
        if buffer is None:
            buffer = self._messages[length] = np.zeros(length)
        return buffer

    def device_message(self, copies: int, length: int, like: Any) -> DeviceMessage:
        """The same, for so many messages one after the other, in the memory of the device of ``like``."""
        key = copies, length, device_key(like)
        message = self._device_messages.get(key)
        if message is None:
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
            name = self._names[layer] = f"the layer first used in exchange number {self.exchanges + 1}"
        return name

    def forget_names(self) -> None:
        """After a mismatch, where the ranks may have named different layers alike. On every rank."""
        self._names.clear()

    def free(self) -> None:
        """Give the duplicate back to MPI. Collective: every rank of the group must call."""
        self._freed = True
        if self.comm is not None:
            mpi()
            self.comm.Free()
            self.comm = self.link = None
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


_one_at_a_time = threading.RLock()
_numbers = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()
_world: Communicator | None = None
_keyval: int | None = None


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

        world = mpi().COMM_WORLD
        ranks: list[Any] = [None] * self.size
        all_gather_object(ranks, world.rank, group=self._group)
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


def _settings(MPI: Any) -> tuple[bool, str, Exception | None]:
    """What this rank brings along: debug mode, its transport, and what is wrong with its environment."""
    try:
        return config.debug(), transport.chosen(MPI)[0], None
    except (ValueError, TransportError) as error:
        return False, "host", error


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
    """
    parent = resolve(comm)

    def read() -> list[int]:
        chosen = sorted(int(index(rank)) for rank in ranks)
        if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= parent.size:
            raise ValueError
        return chosen

    chosen = _agree(parent, "ranks", ranks, read, f"distinct ranks from 0 to {parent.size - 1}, at least one")
    group = parent.comm.Split(0 if parent.rank in chosen else mpi().UNDEFINED, key=parent.rank)
    return None if group == mpi().COMM_NULL else Communicator(group)._adopt(group)


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
    """
    parent = resolve(comm)

    def read() -> int | None:
        size = None if group_size is None else int(index(group_size))
        if size is not None and (size < 1 or parent.size % size):
            raise ValueError
        return size

    size = _agree(parent, "group_size", group_size, read, f"a divisor of the {parent.size} ranks, or None")
    if size is None:
        comm = parent.comm.Split_type(mpi().COMM_TYPE_SHARED, key=parent.rank)
    else:
        comm = parent.comm.Split(parent.rank // size, key=parent.rank)
    return Communicator(comm)._adopt(comm)


def _agree(parent: Communicator, name: str, given: Any, read: Callable[[], Any], expected: str) -> Any:
    """What ``read`` makes of ``given``.

    Raises on every rank if it cannot on any, or the ranks differ: nobody is left waiting alone.
    """
    try:
        value, problem = read(), None
    except (TypeError, ValueError):
        value, problem = None, f"expected {expected}, got {given!r}"
    everyone = parent.ready().comm.allgather((value, problem))
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
