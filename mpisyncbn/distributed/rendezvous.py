"""How torch.distributed finds the other ranks: through MPI, without an address or a variable."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, urlencode, urlparse

import torch.distributed as dist

from .. import config, fingerprint
from ..comm import launcher
from ..comm.communicator import mpi, subset
from .store import LateStore, shared_store
from .work import wait_until

__all__ = ["forget", "late_store", "register", "use_comm", "world_comm"]

_GIVEN = "rank", "world_size"
_ALL = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_used_comm: Any = None


def world_comm() -> Any:
    """The communicator whose ranks are torch's: that of ``use_comm``, else the world."""
    world = mpi().COMM_WORLD  # or an error that says why MPI cannot be used
    return world if _used_comm is None else _used_comm


@contextmanager
def use_comm(comm: Any) -> Iterator[None]:
    """Make a duplicate of ``comm`` the source, until ``forget``, if the body succeeds. Collective."""
    global _used_comm
    forget()
    _used_comm = comm.Dup()
    try:
        yield
    except BaseException:
        forget()
        raise


def forget() -> None:
    """Make the world the source. Collective, after ``use_comm``."""
    global _used_comm
    if _used_comm is not None:
        if not sys.modules["mpi4py.MPI"].Is_finalized():
            _used_comm.Free()
        _used_comm = None


def register(backend: str) -> None:
    """The address ``mpi4py://``; and ``env://``, torch's default, unless its variables are all set.

    Groups of backends other than ``backend``, which is ours, get a store when torch makes them.
    """
    torchs: Any = import_module("torch.distributed.distributed_c10d")
    torchs._new_process_group_helper = _with_stores(torchs._new_process_group_helper, backend)
    dist.register_rendezvous_handler("mpi4py", _rendezvous_over_mpi)
    handlers = import_module("torch.distributed.rendezvous")._rendezvous_handlers
    from_environment = handlers["env"]

    def env(url: str, *args: Any, **kwargs: Any) -> Any:
        variables, arguments = config.rendezvous_given(), _rank_and_size(url)
        if variables.keys() | {name.upper() for name in arguments} == _ALL:
            return from_environment(url, *args, **kwargs)
        forget()
        if world_comm().size == 1:  # MPI may not know of the ranks that the variables speak of
            arguments = {name: int(variables.get(name.upper(), -1)) for name in _GIVEN} | arguments
        return _rendezvous_over_mpi(f"mpi4py://?{urlencode(arguments)}", *args, **kwargs)

    handlers["env"] = env


def _with_stores(make: Any, ours: str) -> Any:
    """Torch's own way to make a group, on each of its ranks, with a store of the group for other backends."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_with_store(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given, ranks = call.arguments, call.arguments["global_ranks_in_group"]
        late = late_store(given["store"])
        if (
            late is None
            or (ranks and world_comm().rank not in ranks)
            or _backends(given["backend"]) == {ours}
        ):
            return make(*args, **kwargs)
        comm, timeout = subset(world_comm(), list(ranks) or list(range(world_comm().size))), given["timeout"]
        store = shared_store(comm, timeout)
        given["store"] = dist.PrefixStore("default_pg", store)
        if not ranks:
            late.become(store)  # torch may meet once more in the one that it was given
        group = make(*call.args, **call.kwargs)
        # The first rank has the store, and must not end while others still look for something in it.
        barrier = comm.Ibarrier()
        if wait_until(barrier.Test, timeout.total_seconds()):
            comm.Free()
        else:
            fingerprint.abandon(barrier)
        return group

    return make_with_store


def _backends(given: Any) -> set[str]:
    """Those that torch would make for the devices of a group."""
    config: Any = import_module("torch.distributed.distributed_c10d").BackendConfig(given)
    return set(config.get_device_backend_map().values())


def late_store(store: Any) -> LateStore | None:
    """The LateStore under torch's prefixes, if it is one."""
    under = getattr(store, "_underlying_non_prefix_store", store)
    return under if isinstance(under, LateStore) else None


def _rank_and_size(url: str) -> dict[str, int]:
    """``rank`` and ``world_size``, where torch was given them."""
    given = {name: int(value[0]) for name, value in parse_qs(urlparse(url).query).items() if name in _GIVEN}
    return {name: value for name, value in given.items() if value != -1}


def _rendezvous_over_mpi(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Any, int, int]]:
    comm, given = world_comm(), _rank_and_size(url)
    launcher.refuse_if_apart(mpi())
    if (given.get("rank", comm.rank), given.get("world_size", comm.size)) != (comm.rank, comm.size):
        raise ValueError(
            f"expected rank {comm.rank} of {comm.size}, as MPI counts, got {given}: leave rank and "
            "world_size, or RANK and WORLD_SIZE, out, or set MASTER_ADDR and MASTER_PORT too for ranks that "
            "MPI does not know"
        )
    store = LateStore(comm, timeout) if comm.size > 1 else dist.HashStore()
    yield store, comm.rank, comm.size  # and this frame keeps it until the group does
    raise RuntimeError("MPI cannot find other ranks than it has found")
