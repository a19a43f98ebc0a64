"""The store of torch.distributed, by which the ranks of other backends find each other.

Backend mpi4py needs none, and torch's TCPStore takes anybody who connects. So none is made until gloo, nccl
or the program itself wants one, and it listens on the loopback interface, if the ranks share a host, else on
the interface by which rank 0 reaches the others.
"""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import on_rank

__all__ = ["LateStore", "shared_store"]


class LateStore(dist.Store):
    """A TCPStore that rank 0 of ``comm`` opens when it uses this first; other ranks wait for that.

    Collective: every rank of ``comm`` must make one. Using it is not.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__()
        self._rank, self._timeout = comm.rank, timeout
        self._lock = threading.Lock()
        self._store: Any = None
        self._socket = -1  # of rank 0, bound to the port, and closed to the world until somebody listens
        self._address = self._share_address(comm)

    def _share_address(self, comm: Any) -> tuple[str, int] | str:
        """Host and port, or why there is none. Collective."""
        hostnames = comm.allgather(socket.gethostname())
        found: Any = None
        if comm.rank == 0:
            try:
                address, family = _address_among(hostnames)
                with socket.socket(family, socket.SOCK_STREAM) as bound:
                    bound.bind((address, 0))
                    found = bound.getsockname()[:2]
                    self._socket = bound.detach()
            except (OSError, ValueError) as error:  # the latter for names that are none
                found = f"rank 0 on {hostnames[0]} has no address for the other ranks: {error}"
        return comm.bcast(found)

    def opened(self) -> Any:
        """The TCPStore itself."""
        with self._lock:
            if self._store is None:
                if isinstance(self._address, str):
                    raise RuntimeError(f"torch.distributed has no store: {self._address}{on_rank()}")
                connect_timeout = min(self._timeout, timedelta(seconds=60))
                listening = None if self._rank > 0 else self._socket
                self._socket = -1  # now it belongs to the store
                self._store = dist.TCPStore(
                    *self._address, None, self._rank == 0, connect_timeout, False, master_listen_fd=listening
                )
                self._store.set_timeout(self._timeout)
            return self._store

    def close(self) -> None:
        """Give the port back. Later use is an error."""
        with self._lock:
            if self._socket >= 0:
                os.close(self._socket)
            self._socket, self._store, self._address = -1, None, "its process group was destroyed"

    def become(self, store: Any) -> None:
        """Be another store from now on, and give the port back."""
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


def _forward(name: str) -> Any:
    return lambda self, *args: getattr(self.opened(), name)(*args)


for _name in (
    *("set", "get", "add", "check", "wait", "append", "compare_set", "delete_key", "num_keys"),
    *("multi_get", "multi_set", "has_extended_api", "list_keys", "clone"),
):
    setattr(LateStore, _name, _forward(_name))
for _cpp, _python in ("deleteKey", "delete_key"), ("getNumKeys", "num_keys"):  # as torch's C++ calls them
    setattr(LateStore, _cpp, _forward(_python))


def shared_store(comm: Any, timeout: timedelta) -> Any:
    """A TCPStore of the ranks of ``comm`` alone; its port is closed when torch drops it.

    Raises RuntimeError on every rank, where some cannot reach it. Collective.
    """
    if comm.size == 1:
        return dist.HashStore()
    late, problem = LateStore(comm, timeout), None
    try:
        store = late.opened()
    except RuntimeError as error:
        problem = str(error)
    for rank, what in enumerate(comm.allgather(problem)):
        if what is not None:
            raise RuntimeError(f"expected a store that all {comm.size} ranks reach; rank {rank}: {what}")
    return store


def _address_among(hostnames: list[str]) -> tuple[str, socket.AddressFamily]:
    """An address of this host that all ``hostnames`` can reach. OSError where there is none."""
    others = [host for host in hostnames if host != hostnames[0]]
    if not others:
        return "127.0.0.1", socket.AF_INET
    problem = OSError(f"no route to {others[0]}")
    for family, kind, protocol, _, address in socket.getaddrinfo(others[0], 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as route:
            try:
                route.connect(address)  # which sends nothing, and chooses the interface
                return route.getsockname()[0], family
            except OSError as error:
                problem = error
    raise problem
