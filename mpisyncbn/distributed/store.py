"""The store of torch.distributed, by which the ranks of other backends find each other.

Backend mpi4py needs no store, and torch's TCPStore accepts every connection. So a store is opened
only when gloo, nccl or the program itself uses it. It listens on the loopback interface if the
ranks share a machine, else on the interface by which rank 0 reaches the others.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from .. import config
from ..errors import on_rank
from ..torch_versions import STORE_BY_LIBUV

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["LazyStore", "shared_store"]


class LazyStore(dist.Store):
    """A TCPStore that rank 0 of ``comm`` opens when it first uses it; other ranks wait for that.

    Collective: every rank of ``comm`` must construct it. Its methods are not collective.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        super().__init__()
        self._rank, self._timeout = comm.rank, timeout
        self._lock = threading.Lock()
        self._store: dist.Store | None = None
        self._socket = -1  # on rank 0 a socket that is bound to the port, but does not listen yet
        self._address = self._share_address(comm)

    def _share_address(self, comm: MPI.Intracomm) -> tuple[str, int] | str:
        """Return rank 0's address and port on every rank, or why it has none. Collective."""
        machines = comm.allgather(config.machine())
        found: tuple[str, int] | str = ""
        if comm.rank == 0:
            try:
                address, family = _address_among(machines)
                with socket.socket(family, socket.SOCK_STREAM) as bound:
                    bound.bind((address, 0))
                    found = bound.getsockname()[:2]
                    self._socket = bound.detach()
            except (OSError, ValueError) as error:  # ValueError: for an invalid hostname
                found = f"rank 0 on {machines[0][0]} has no address for the other ranks: {error}"
        return comm.bcast(found)

    def opened(self) -> dist.Store:
        """Return the TCPStore, opened or connected at the first call. May raise RuntimeError."""
        with self._lock:
            if self._store is None:
                if isinstance(self._address, str):
                    raise RuntimeError(f"torch.distributed has no store: {self._address}{on_rank()}")
                connect_timeout = min(self._timeout, timedelta(seconds=60))
                listening = None if self._rank > 0 else self._socket
                self._socket = -1  # now it belongs to the store
                self._store = dist.TCPStore(
                    *self._address,
                    None,
                    self._rank == 0,
                    connect_timeout,
                    False,
                    master_listen_fd=listening,
                    use_libuv=STORE_BY_LIBUV,
                )
                self._store.set_timeout(self._timeout)
            return self._store

    def close(self) -> None:
        """Close the port. Later use is an error."""
        with self._lock:
            if self._socket >= 0:
                os.close(self._socket)
            self._socket, self._store, self._address = -1, None, "its process group was destroyed"

    def become(self, store: dist.Store) -> None:
        """Close the port, and forward to ``store`` from now on."""
        self.close()
        with self._lock:
            self._store = store

    def __del__(self) -> None:
        self.close()

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        super().set_timeout(timeout)
        if self._store is not None:
            self._store.set_timeout(timeout)


def _forward(name: str) -> Callable[..., object]:
    """Return a method that calls the one of this name of the opened store."""
    return lambda self, *args: getattr(self.opened(), name)(*args)


for _name in (
    *("set", "get", "add", "check", "wait", "append", "compare_set", "delete_key", "num_keys"),
    *("multi_get", "multi_set", "has_extended_api", "list_keys", "clone"),
):
    setattr(LazyStore, _name, _forward(_name))
for _cpp, _python in ("deleteKey", "delete_key"), ("getNumKeys", "num_keys"):  # as torch's C++ calls them
    setattr(LazyStore, _cpp, _forward(_python))


def shared_store(comm: MPI.Intracomm, timeout: timedelta) -> dist.Store:
    """Return a TCPStore for the ranks of ``comm`` alone; when torch drops it, its port closes.

    Raises RuntimeError on every rank if some ranks cannot reach it.
    Collective: every rank of ``comm`` must call.
    """
    if comm.size == 1:
        return dist.HashStore()
    late, problem = LazyStore(comm, timeout), None
    try:
        store = late.opened()
    except RuntimeError as error:
        problem = str(error)
    for rank, what in enumerate(comm.allgather(problem)):
        if what is not None:
            raise RuntimeError(f"expected a store that all {comm.size} ranks reach; rank {rank}: {what}")
    return store


def _address_among(machines: list[tuple[str, str]]) -> tuple[str, socket.AddressFamily]:
    """Return the address of this machine, the first of ``machines``, on its route to the others.

    It looks up the route to the first of the others only. Raises OSError if there is none.
    """
    others = [name for name, boot in machines if (name, boot) != machines[0]]
    if not others:
        return "127.0.0.1", socket.AF_INET
    if machines[0][0] in others:
        raise OSError(f"another machine has the name {machines[0][0]} too")
    problem = OSError(f"no route to {others[0]}")
    for family, kind, protocol, _, address in socket.getaddrinfo(others[0], 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as route:
            try:
                route.connect(address)  # UDP: it sends nothing, and chooses the interface
                return route.getsockname()[0], family
            except OSError as error:
                problem = error
    raise problem
