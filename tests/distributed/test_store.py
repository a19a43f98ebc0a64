"""Ports that torch.distributed opens, and the store behind them."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mpisyncbn
import mpisyncbn.distributed
from mpisyncbn.distributed import store
from support.ranks import WORLD, error_of, several, together

RANK, SIZE = WORLD.rank, WORLD.size
LISTENING = "0A"  # state of a socket in /proc/net/tcp
pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux lists its sockets there")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def ports() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd)]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for name, family in ("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6):
        lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        for _, local, _, state, *rest in map(str.split, lines):
            if state == LISTENING and rest[5] in inodes:
                address, port = local.split(":")
                words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)))
    return found


def _is_there(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")  # os.listdir's own descriptor is closed by now


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend mpi4py opens no ports. gloo's are at one address, and are closed after the end.

    MPI's own ports do not count. The address is the loopback address if all ranks are on one host,
    another address if they are not, and never a wildcard.
    """
    hosts = set(WORLD.allgather(socket.gethostname()))
    before = ports()
    seen: dict[str, set[tuple[str, int]]] = {}
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    layer = mpisyncbn.SyncBatchNorm(2, process_group=dist.new_group())
    layer(torch.randn(RANK + 2, 2))
    dist.all_reduce(torch.ones(1), async_op=True).wait()
    seen["mpi4py"] = ports() - before
    group, x = dist.new_group(backend="gloo"), torch.ones(1)
    dist.all_reduce(x, group=group)
    seen["gloo"] = ports() - before
    dist.destroy_process_group()
    del group
    gc.collect()
    seen["destroyed"] = ports() - before
    monkeypatch.setenv("TORCH_DIST_INIT_BARRIER", "1")  # torch then has a barrier in the store
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    dist.all_reduce(x)
    seen["gloo alone"] = ports() - before
    dist.destroy_process_group()
    gc.collect()
    seen["destroyed again"] = ports() - before

    with together():
        assert x == SIZE**2
        for name in "mpi4py", "destroyed", "destroyed again":
            assert seen[name] == set(), name
        for name in "gloo", "gloo alone":
            addresses = {address for address, _ in seen[name]}
            assert len(addresses) == 1
            assert (addresses == {"127.0.0.1"}) == (len(hosts) == 1)
            assert not addresses & {"0.0.0.0", "::"}


@several
def test_groups_of_other_backends_without_rank_0() -> None:
    """Only the ranks of a group make its store, so ranks outside of it need not take part."""
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    last, x = list(range(1, SIZE)), torch.ones(1)
    group = dist.new_group(last, backend="gloo")
    local = dist.new_group(last, backend="cpu:gloo", use_local_synchronization=True) if RANK else None
    if RANK:
        dist.all_reduce(x, group=group)
        dist.all_reduce(x, group=local)
    with together():
        assert x == ((SIZE - 1) ** 2 if RANK else 1)


def test_the_store_of_the_default_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default group has a store, for programs that use it and for torch's barrier."""
    monkeypatch.setenv("TORCH_DIST_INIT_BARRIER", "1")
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    kept = dist.distributed_c10d._get_default_store()
    kept.set(f"of {RANK}", str(RANK))
    names = [f"of {rank}" for rank in range(SIZE)]
    kept.wait(names, timedelta(seconds=30))
    found = [kept.get(name) for name in names], kept.multi_get(names), kept.check(names)
    kept.multi_set([f"one {RANK}", f"two {RANK}"], ["1", "2"])
    kept.append(f"one {RANK}", "3")
    replaced = kept.get(f"one {RANK}"), kept.compare_set(f"two {RANK}", "2", "4")
    counts = kept.add(f"count {RANK}", 2), kept.delete_key(f"one {RANK}"), kept.num_keys()
    cloned = (kept.clone() if hasattr(kept, "clone") else kept).get(f"two {RANK}")  # not in torch 2.6
    group = dist.new_group()
    dist.all_reduce(x := torch.ones(1), group=group)
    dist.destroy_process_group()

    with together():
        assert found[0] == found[1] == [str(rank).encode() for rank in range(SIZE)]
        assert found[2]
        assert replaced == (b"13", b"4")
        assert counts[:2] == (2, True)
        assert counts[2] > 0
        assert cloned == b"4"
        assert x == SIZE
        if SIZE > 1:
            with pytest.raises(RuntimeError, match="no store: its process group was destroyed"):
                kept.get("of 0")


@several
def test_a_rank_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(_: Any) -> Any:
        raise OSError("no route to elsewhere")

    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    monkeypatch.setattr(store, "_address_among", no_address)
    error = error_of(lambda: dist.new_group(backend="gloo"), RuntimeError)
    dist.all_reduce(x := torch.ones(1))  # backend mpi4py needs no address
    with together():
        assert f"expected a store that all {SIZE} ranks reach" in str(error)
        assert "no address for the other ranks: no route to elsewhere" in str(error)
        assert x == SIZE


def test_addresses() -> None:
    """Ranks of one host use the loopback interface, others the one that leads to other hosts."""
    with together():
        assert store._address_among([("here", "a boot")] * 2)[0] == "127.0.0.1"
        assert store._address_among([("here", "a boot"), ("::1", "another")]) == ("::1", socket.AF_INET6)
        assert store._address_among([("here", "a boot"), ("127.0.0.3", "another")])[0].startswith("127.")
        with pytest.raises(OSError, match=r".+"):
            store._address_among([("here", "a boot"), ("255.255.255.255", "another")])
