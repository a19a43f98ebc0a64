"""The argument of every check: ranks, a device, the kernels to try, and a file for its findings."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

from .records import Records


class Context:
    def __init__(self, kind: str, quick: bool, alone: bool) -> None:
        self.kind, self.quick, self.alone = kind, quick, alone
        self.rank, self.size = (0, 1) if alone else (self.world.rank, self.world.size)
        self.records = Records(Path(f"rank-{self.rank}.jsonl"))

    @cached_property
    def world(self) -> Any:
        from mpi4py import MPI

        return MPI.COMM_WORLD

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    @cached_property
    def device(self) -> Any:
        """The device of this rank. A GPU is also made torch's current device."""
        import torch

        torch.set_num_threads(1)
        if not self.on_gpu:
            return torch.device("cpu")
        device = torch.device("cuda", self.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def group(self, transport: str) -> Any:
        """Return a group with a transport. Raises TransportError if it has another. Collective."""
        import mpisyncbn

        with mock.patch.dict(os.environ, {"MPISYNCBN_TRANSPORT": transport}):
            found = mpisyncbn.Communicator().ready()
        if found.transport != transport:
            raise mpisyncbn.TransportError(f"expected the {transport} transport, got {found.transport}")
        return found

    def synchronize(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def synced(self, call: Callable[[], Any]) -> Callable[[], None]:
        """Return a function that calls ``call`` and waits until the device has finished."""

        def whole() -> None:
            call()
            self.synchronize()

        return whole

    def there(self, values: Any) -> Any:
        """Return a copy on the device with the same strides and the same place in a cache line."""
        import torch

        once = values
        for dim, stride in enumerate(values.stride()):
            once = once.narrow(dim, 0, min(values.shape[dim], 1)) if stride == 0 else once
        begin = values.storage_offset() % 64
        length = sum((size - 1) * stride for size, stride in zip(once.shape, once.stride(), strict=True)) + 1
        memory = torch.empty(begin + max(length, 1), dtype=values.dtype, device=self.device)
        there = memory.as_strided(once.shape, once.stride(), begin).copy_(once)
        return there.detach().expand(values.shape)

    def served_by(self, kernels: str) -> Any:
        """Return a context in which this module of mpisyncbn.kernels serves the GPU.

        On a CPU the usual kernels are used. Raises ImportError if the module cannot be imported.
        """
        return _serving(importlib.import_module(f"mpisyncbn.kernels.{kernels}") if self.on_gpu else None)


@contextmanager
def _serving(module: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for place in ("autograd.fused", "functional"):
            served = importlib.import_module(f"mpisyncbn.{place}")
            # On a CPU the patch changes nothing, but it fails if the function was renamed.
            instead = (
                {"wraps": served.kernels_for} if module is None else {"side_effect": partial(_masked, module)}
            )
            stack.enter_context(mock.patch.object(served, "kernels_for", **instead))
        enqueued = importlib.import_module("mpisyncbn.autograd.enqueued")
        if module is not None and not module.__name__.endswith(".cuda"):  # under stream these come first
            stack.enter_context(mock.patch.object(enqueued, "compiled_programs", return_value=None))
        yield


def _masked(module: Any, x: Any, mask: Any = None) -> Any:
    """Return ``module``; with a mask, the kernels for masks, which serve every GPU."""
    from mpisyncbn.kernels import kernels_for

    return module if mask is None else kernels_for(x, mask)
