"""How torch.distributed finds the other ranks: through MPI, without an address or a variable."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import parse_qs, urlencode, urlparse

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from .. import config
from ..comm import launcher
from ..comm.groups import subset
from ..comm.runtime import mpi, world_ranks
from ..comm.unreferenced import cure_for_many
from ..errors import MPISyncBNError, on_rank
from ..liveness import watchdog
from ..liveness.pending import keep_alive
from ..liveness.rank_status import RankStatus
from .store import LazyStore, shared_store
from .work import wait_until

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch._C._distributed_c10d import Store

__all__ = ["BACKEND", "create_comm", "forget", "lazy_store", "register", "use_comm", "world_comm"]

#: The name of the backend in torch.distributed: "mpi4py".
BACKEND = "mpi4py"

P = ParamSpec("P")
T = TypeVar("T")
Found = Iterator[tuple["Store", int, int]]  # a rendezvous of torch yields store, rank and size
_ARGUMENTS = "rank", "world_size"
_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_used_comm: MPI.Intracomm | None = None


def world_comm() -> MPI.Intracomm:
    """Return the communicator whose ranks are torch's: ``use_comm``'s, else MPI.COMM_WORLD."""
    world: MPI.Intracomm = mpi().COMM_WORLD  # mpi() raises if MPI cannot be used
    return world if _used_comm is None else _used_comm


@contextmanager
def use_comm(comm: MPI.Intracomm, timeout: timedelta) -> Iterator[None]:
    """Number torch's ranks as ``comm`` does, until ``forget`` or until the body fails.

    Collective: every rank of ``comm`` must enter.
    """
    global _used_comm
    forget()
    _used_comm = create_comm(comm, [], timeout)
    try:
        yield
    except BaseException:
        forget()
        raise


def forget() -> None:
    """Number torch's ranks as the world does again. Collective after ``use_comm``."""
    global _used_comm
    if _used_comm is not None:
        if not sys.modules["mpi4py.MPI"].Is_finalized():
            _used_comm.Free()
        _used_comm = None


def create_comm(comm: MPI.Intracomm, ranks: list[int], timeout: timedelta) -> MPI.Intracomm:
    """Return a new communicator of these ranks of ``comm``, in this order; of all if none is given.

    It ends the job if a rank does not come in time: see ``_first_message``.
    Collective: every rank of the new communicator must call, and no other.
    """
    with _first_message(comm, ranks, timeout):
        return subset(comm, ranks) if ranks else comm.Dup()


@contextmanager
def _first_message(comm: MPI.Intracomm, ranks: list[int], timeout: timedelta) -> Iterator[None]:
    """A context for the first message of a group: these ranks of ``comm``, or all if none is given.

    It ends the job, with a report, if a rank does not come within ``timeout``, or within
    ``MPISYNCBN_TIMEOUT`` seconds if that is set and ``timeout`` is torch's default.
    """
    name = "new_group" if ranks else "init_process_group"
    ranks = ranks or list(range(comm.size))
    status, seconds = RankStatus(ranks.index(comm.rank), len(ranks)), timeout.total_seconds()
    if timeout != default_pg_timeout:
        status.timeout_setting = "timeout="
    else:
        with suppress(ValueError):  # the group raises it on all ranks
            given = config.timeout()
            seconds = seconds if given is None else given
    try:
        with watchdog.first_message(status, world_ranks(comm, ranks), seconds, name):
            yield
    except mpi().Exception as error:
        raise MPISyncBNError(f"MPI failed in {name}{on_rank()}: {error}{cure_for_many()}") from error
    status.unregister()


def register() -> None:
    """Register how torch finds the ranks, and give groups of other backends a store.

    The address ``mpi4py://`` goes by MPI, and so does ``env://``, torch's default, unless all of
    its variables are set. Groups of other backends get a store when torch makes them.
    """
    c10d: Any = import_module("torch.distributed.distributed_c10d")
    c10d._new_process_group_helper = _with_stores(c10d._new_process_group_helper)
    dist.register_rendezvous_handler("mpi4py", _find_by_mpi)
    handlers = import_module("torch.distributed.rendezvous")._rendezvous_handlers
    find_by_variables = handlers["env"]

    def find(url: str, timeout: timedelta = default_pg_timeout, **options: object) -> Found:
        variables, arguments = config.rendezvous_given(), _rank_and_size(url)
        if variables.keys() | {name.upper() for name in arguments} == _VARIABLES:
            return find_by_variables(url, timeout, **options)
        forget()
        if world_comm().size == 1:  # the variables may speak of ranks that MPI does not know
            arguments = {name: int(variables.get(name.upper(), -1)) for name in _ARGUMENTS} | arguments
        return _find_by_mpi(f"mpi4py://?{urlencode(arguments)}", timeout)

    handlers["env"] = find


def _with_stores(make: Callable[P, T]) -> Callable[P, T]:
    """Wrap torch's function that makes a group, so that groups of other backends get a store."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_with_store(*args: P.args, **kwargs: P.kwargs) -> T:
        call = signature.bind(*args, **kwargs)
        given, ranks = call.arguments, call.arguments["global_ranks_in_group"]
        late = lazy_store(given["store"])
        if late is None or not _needs_store(given["backend"], ranks):
            return make(*args, **kwargs)
        world, timeout = world_comm(), given["timeout"]
        comm = create_comm(world, list(ranks), timeout)
        store = shared_store(comm, timeout)
        given["store"] = dist.PrefixStore("default_pg", store)
        if not ranks:
            late.become(store)  # torch may use the store that it was given once more
        made = make(*call.args, **call.kwargs)
        # The first rank has the store, and must not end while others still read in it.
        barrier = comm.Ibarrier()
        if wait_until(barrier.Test, timeout.total_seconds()):
            comm.Free()
        else:
            keep_alive(barrier)
        return made

    return make_with_store


def _needs_store(backend: str | None, ranks: list[int]) -> bool:
    """Whether this rank is in the group, and torch makes another backend than ours for it."""
    if ranks and world_comm().rank not in ranks:
        return False
    backend_config: Any = import_module("torch.distributed.distributed_c10d").BackendConfig(backend)
    return set(backend_config.get_device_backend_map().values()) != {BACKEND}


def lazy_store(store: Store | None) -> LazyStore | None:
    """Return the LazyStore under torch's prefixes; None if the store is of another kind."""
    under = getattr(store, "_underlying_non_prefix_store", store)
    return under if isinstance(under, LazyStore) else None


def _rank_and_size(url: str) -> dict[str, int]:
    """Return ``rank`` and ``world_size`` from the URL, each only if torch was given it."""
    query = parse_qs(urlparse(url).query)
    given = {name: int(value[0]) for name, value in query.items() if name in _ARGUMENTS}
    return {name: value for name, value in given.items() if value != -1}


def _find_by_mpi(url: str, timeout: timedelta = default_pg_timeout, **_: object) -> Found:
    """Yield a store, and rank and size as MPI counts them. Raise ValueError if the URL has others.

    Collective: every rank of the world must call.
    """
    comm, given = world_comm(), _rank_and_size(url)
    launcher.check_world_size(mpi())
    if (given.get("rank", comm.rank), given.get("world_size", comm.size)) != (comm.rank, comm.size):
        raise ValueError(
            f"expected rank {comm.rank} of {comm.size}, as MPI counts, got {given}: leave rank and "
            "world_size, or RANK and WORLD_SIZE, out, or set MASTER_ADDR and MASTER_PORT too for ranks that "
            "MPI does not know"
        )
    with _first_message(comm, [], timeout):
        store = LazyStore(comm, timeout) if comm.size > 1 else dist.HashStore()
    yield store, comm.rank, comm.size  # this generator keeps the store alive until the group does
    raise RuntimeError("MPI cannot find other ranks than it has found")
