"""How torch.distributed finds the other ranks: through MPI, without an address or a variable."""

from __future__ import annotations

import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, urlencode, urlparse

import torch.distributed as dist

from . import config, launcher
from .communicator import mpi

__all__ = ["forget", "over", "register", "source"]

_GIVEN = "rank", "world_size"
_ALL = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_source: Any = None
_kept: list[Any] = []  # gloo on other ranks may want the store of rank 0 even while it ends


def source() -> Any:
    """The communicator whose ranks are torch's: that of ``over``, else the world."""
    world = mpi().COMM_WORLD  # or an error that says why MPI cannot be used
    return world if _source is None else _source


@contextmanager
def over(comm: Any) -> Iterator[None]:
    """Make a duplicate of ``comm`` the source, until ``forget``, if the body succeeds. Collective."""
    global _source
    forget()
    _source = comm.Dup()
    try:
        yield
    except BaseException:
        forget()
        raise


def forget() -> None:
    """Make the world the source. Collective, after ``over``."""
    global _source
    if _source is not None:
        if not sys.modules["mpi4py.MPI"].Is_finalized():
            _source.Free()
        _source = None


def register() -> None:
    """The address ``mpi4py://``; and ``env://``, torch's default, unless its variables are all set."""
    dist.register_rendezvous_handler("mpi4py", _over_mpi)
    handlers = import_module("torch.distributed.rendezvous")._rendezvous_handlers
    from_environment = handlers["env"]

    def env(url: str, *args: Any, **kwargs: Any) -> Any:
        variables, arguments = config.rendezvous_given(), _rank_and_size(url)
        if variables.keys() | {name.upper() for name in arguments} == _ALL:
            return from_environment(url, *args, **kwargs)
        forget()
        if source().size == 1:  # MPI may not know of the ranks that the variables speak of
            arguments = {name: int(variables.get(name.upper(), -1)) for name in _GIVEN} | arguments
        return _over_mpi(f"mpi4py://?{urlencode(arguments)}", *args, **kwargs)

    handlers["env"] = env


def _rank_and_size(url: str) -> dict[str, int]:
    """``rank`` and ``world_size``, where torch was given them."""
    given = {name: int(value[0]) for name, value in parse_qs(urlparse(url).query).items() if name in _GIVEN}
    return {name: value for name, value in given.items() if value != -1}


def _over_mpi(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Any, int, int]]:
    comm, given = source(), _rank_and_size(url)
    launcher.refuse_if_apart(mpi())
    if (given.get("rank", comm.rank), given.get("world_size", comm.size)) != (comm.rank, comm.size):
        raise ValueError(
            f"expected rank {comm.rank} of {comm.size}, as MPI counts, got {given}: leave rank and "
            "world_size, or RANK and WORLD_SIZE, out, or set MASTER_ADDR and MASTER_PORT too for ranks that "
            "MPI does not know"
        )
    store = _store(comm, timeout)
    _kept.append(store)
    yield store, comm.rank, comm.size
    raise RuntimeError("MPI cannot find other ranks than it has found")


def _store(comm: Any, timeout: timedelta) -> Any:
    """For groups of other backends, gloo and nccl: a TCPStore on rank 0. Ours needs none.

    Where rank 0 cannot be reached, every rank has a store of its own, which is of no use to others.
    Collective: every rank of ``comm`` must call.
    """

    def connect(host: str, port: int, is_master: bool) -> Any:
        patience = min(timeout, timedelta(seconds=60))
        return dist.TCPStore(host, port, comm.size, is_master, patience, wait_for_workers=False)

    one_host = len(set(comm.allgather(socket.gethostname()))) == 1
    store, problem = None, None
    try:
        store = connect("127.0.0.1", 0, True) if comm.rank == 0 else None
    except RuntimeError as error:
        problem = error
    address = comm.bcast(store and ("127.0.0.1" if one_host else socket.gethostname(), store.port))
    try:
        if address and comm.rank > 0:
            store = connect(address[0], address[1], False)
    except RuntimeError as error:
        problem = error
    problems = [
        f"rank {rank}: {what}" for rank, what in enumerate(comm.allgather(problem and str(problem))) if what
    ]
    if not problems:
        return store
    if comm.rank == 0:
        warnings.warn(
            "torch.distributed has no store that all ranks reach, so backends other than mpi4py cannot be "
            f"used: {problems[0]}",
            stacklevel=2,
        )
    return dist.HashStore()
