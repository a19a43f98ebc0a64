"""Communicators for process groups of mpi4py and torch, and new groups split from another."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from operator import index
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from ..errors import MPISyncBNError, on_rank
from . import launcher, unreferenced
from .communicator import Communicator, world
from .runtime import check_comm, mpi, type_name

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

__all__ = ["AnyGroup", "new_group", "new_subgroups", "resolve", "subset"]

AnyGroup: TypeAlias = "Communicator | MPI.Comm | ProcessGroup | None"  # None: the world
_T = TypeVar("_T")
_keyval: int | None = None


def resolve(process_group: AnyGroup, label: str = "process_group") -> Communicator:
    """Return the Communicator for ``process_group``: always the same one for the same group.

    Args:
        process_group: None (the world), a Communicator, an intra-communicator of mpi4py, or a
            process group of torch.distributed of any backend, whose ranks are in this MPI job.
        label: the name of the argument in errors.

    Raises:
        TypeError, ValueError: ``process_group`` is none of these, or does not contain this rank.
    """
    if process_group is None:
        return world()
    if isinstance(process_group, Communicator):
        return process_group
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and isinstance(process_group, torch_distributed.ProcessGroup):
        return _of_torch(cast("ProcessGroup", process_group))
    MPI = mpi()
    if not isinstance(process_group, MPI.Comm):
        raise TypeError(
            f"expected {label} to be an mpi4py communicator, an mpisyncbn.Communicator, a process group of "
            "torch.distributed that contains this rank, or None (the world), got "
            f"{type_name(process_group)}{on_rank()}: mpisyncbn.new_group(ranks) makes a group of some ranks"
        )
    check_comm(process_group)
    if process_group == MPI.COMM_WORLD:
        return world()
    return _of_mpi(process_group)


def _of_mpi(comm: MPI.Comm) -> Communicator:
    """The Communicator for a communicator of mpi4py.

    An MPI attribute of ``comm`` holds it, so MPI drops the two together. In a dictionary by handle,
    a later communicator with the same handle would find it.
    """
    global _keyval
    if _keyval is None:
        _keyval = mpi().Comm.Create_keyval()
    communicator = cast("Communicator | None", comm.Get_attr(_keyval))
    if communicator is None or communicator.freed:
        communicator = Communicator(comm)
        comm.Set_attr(_keyval, communicator)
    return communicator


class _OtherBackendCommunicator(Communicator):
    """The ranks of a torch process group of another backend, gloo or nccl."""

    def __init__(self, process_group: ProcessGroup) -> None:
        super().__init__(mpi().COMM_SELF)
        self._source, self._is_world = None, False
        self._process_group: ProcessGroup | None = process_group
        self.rank, self.size = process_group.rank(), process_group.size()

    def _create_comm(self) -> MPI.Intracomm:
        from torch.distributed import all_gather_object

        if self.size > 1:
            launcher.check_world_size(mpi())
        comm_world = mpi().COMM_WORLD
        ranks: list[int] = [-1] * self.size
        all_gather_object(ranks, comm_world.rank, group=self._process_group)
        if len(set(ranks)) < self.size:
            raise MPISyncBNError(
                f"expected a process group of ranks of one MPI job, got one of {self.size} that MPI knows as "
                f"ranks {ranks} of a world of {comm_world.size}{on_rank()}: start all of them with one "
                "mpiexec"
            )
        self._process_group = None  # torch may destroy it before this group ends
        return subset(comm_world, ranks)


_of_torch_groups: weakref.WeakKeyDictionary[ProcessGroup, Communicator] = weakref.WeakKeyDictionary()


def _of_torch(process_group: ProcessGroup) -> Communicator:
    """Return the Communicator for a process group of torch, of any backend."""
    ours = getattr(process_group, "communicator", None)  # groups of backend mpi4py have one
    if ours is not None:
        return ours
    communicator = _of_torch_groups.get(process_group)
    if communicator is None or communicator.freed:
        communicator = _of_torch_groups[process_group] = _OtherBackendCommunicator(process_group)
    return communicator


def subset(comm: MPI.Intracomm, ranks: list[int]) -> MPI.Intracomm:
    """Return a communicator of these ranks of ``comm``, in this order.

    Collective: every rank in ``ranks`` must call, and no other.
    """
    mpi_group = comm.Get_group().Incl(ranks)
    try:
        return comm.Create_group(mpi_group)
    finally:
        mpi_group.Free()


def new_group(ranks: Iterable[int], comm: AnyGroup = None) -> Communicator | None:
    """Make a group of some ranks of ``comm``.

    Collective: every rank of ``comm`` must call, inside the group or not, with the same ``ranks``.

    Args:
        ranks: ranks in ``comm``, each once. In the group they are in ascending order.
        comm: the communicator to choose from; None: the world.

    Returns:
        The group's Communicator; None on a rank outside it. None as a process_group means the
        world, so build layers of this group on its own ranks only.

    Raises:
        ValueError: on every rank, if ``ranks`` is empty, names a rank twice or one that does not
            exist, or differs between ranks.
        MPISyncBNError: ``comm`` is the world, and torch.distributed or a launcher knows of more
            ranks.
    """
    parent = resolve(comm, "comm")
    parent.check_world()

    def read() -> list[int]:
        chosen = sorted(int(index(rank)) for rank in ranks)
        if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= parent.size:
            raise ValueError
        return chosen

    chosen = _same_on_all_ranks(
        parent, "ranks", ranks, read, f"distinct ranks from 0 to {parent.size - 1}, at least one"
    )
    with parent.collective("making a new group"):
        own = parent.comm.Split(0 if parent.rank in chosen else mpi().UNDEFINED, key=parent.rank)
    return None if own == mpi().COMM_NULL else _child(cast("MPI.Intracomm", own))


def new_subgroups(group_size: int | None = None, comm: AnyGroup = None) -> Communicator:
    """Split ``comm`` into groups of consecutive ranks, and return the one this rank is in.

    Collective: every rank of ``comm`` must call, with the same ``group_size``.

    Args:
        group_size: ranks per group, a divisor of the size of ``comm``; None: one group per node
            (ranks that share memory).
        comm: the communicator to split; None: the world.

    Returns:
        The Communicator of the group that this rank is in. Ranks 0 to ``group_size - 1`` are the
        first group. They share a node only if the launcher fills one node after the other.

    Raises:
        ValueError: on every rank, if ``group_size`` does not divide the number of ranks, or differs
            between ranks.
        MPISyncBNError: ``comm`` is the world, and torch.distributed or a launcher knows of more
            ranks.
    """
    parent = resolve(comm, "comm")
    parent.check_world()

    def read() -> int | None:
        size = None if group_size is None else int(index(group_size))
        if size is not None and (size < 1 or parent.size % size):
            raise ValueError
        return size

    size = _same_on_all_ranks(
        parent, "group_size", group_size, read, f"a divisor of the {parent.size} ranks, or None"
    )
    with parent.collective("making new groups"):
        if size is None:
            own = parent.comm.Split_type(mpi().COMM_TYPE_SHARED, key=parent.rank)
        else:
            own = parent.comm.Split(parent.rank // size, key=parent.rank)
    return _child(cast("MPI.Intracomm", own))


def _child(comm: MPI.Intracomm) -> Communicator:
    """Return a Communicator that takes ``comm`` over, so no other object may use it. Collective."""
    child = Communicator(comm)
    with child._first_message():
        return child._take_over(comm)


def _same_on_all_ranks(
    parent: Communicator, name: str, given: object, read: Callable[[], _T], expected: str
) -> _T:
    """Return what ``read`` makes of the argument ``given``, if it is the same on all ranks.

    Raises ValueError on every rank if ``read`` raises on any, or if the ranks differ, so that no
    rank is left waiting. Collective: every rank of ``parent`` must call.
    """
    value: _T | None = None
    problem = None
    try:
        value = read()
    except Exception:  # of any type: the other ranks have to learn of it
        problem = f"expected {expected}, got {given!r}"
    comm = parent.ready().comm
    with parent.collective(f"agreeing on the {name} of a new group"):
        gathered = comm.allgather((value, problem, unreferenced.ids()))
    unreferenced.free_unreferenced(each[2] for each in gathered)  # MPI may have no room left
    for rank, (_, theirs, _) in enumerate(gathered):
        if theirs is not None:
            raise ValueError(f"{name}: {theirs} on rank {rank}")
    for rank, (theirs, *_) in enumerate(gathered):
        if theirs != value:
            raise ValueError(
                f"{name}: expected the same on every rank, got {theirs} on rank {rank} "
                f"and {value} on rank {parent.rank}"
            )
    return cast(_T, value)  # read, or this rank's problem was raised above
