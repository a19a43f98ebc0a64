"""Streams of the CUDA stand-in, to test the transport ``stream`` if torch is built without CUDA.

Memory that the driver has allocated is device memory, which nobody may read before the stream is
synchronized. Other memory is host memory that is not pinned, so a copy from or to it waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpisyncbn import Communicator
from mpisyncbn.kernels import link, native
from support import device, standin_driver
from support.ranks import WORLD
from support.standin_driver import Driver

needs_standin = pytest.mark.skipif(
    standin_driver.missing() is not None or native() is None,
    reason=standin_driver.missing() or "the native code was not built",
)


class StreamDevice(device.SlowDevice):
    """A device whose current stream is ``stream``, a stream of the stand-in's driver.

    ``waits``: whether the host waits for the result of each exchange, as it must if torch reads it.
    """

    def __init__(self, driver: Driver, waits: bool) -> None:
        super().__init__(lazy_uploads=False)
        self.driver, self.waits_for_results = driver, waits
        self.stream = driver.stream()
        self._arena, self._left = 0, 0  # memory in reserve: a capture forbids allocation

    def device_and_stream(self) -> tuple[int, int]:
        return 0, self.stream

    def addresses(self, vectors: Sequence[Tensor]) -> tuple[list[int], Sequence[Tensor]]:
        kept = [vector.detach().double().contiguous() for vector in vectors]
        return [vector.data_ptr() for vector in kept], kept

    def empty(self, length: int) -> tuple[Tensor, int]:
        vector = torch.empty(length, dtype=torch.float64) if self.waits_for_results else self.memory(length)
        return vector.fill_(torch.nan), vector.data_ptr()

    def memory(self, length: int) -> Tensor:
        """A float64 vector in device memory that is never freed, with a gap to the next one."""
        size = 8 * (length + 8)
        if self._left < size:
            self._left = max(size, 1 << 20)
            self._arena = self.driver.memory(self._left)
        address = self._arena
        self._arena, self._left = address + size, self._left - size
        return torch.frombuffer((ctypes.c_double * length).from_address(address), dtype=torch.float64)

    def put(self, values: Any) -> Tensor:
        """Return a copy of values in device memory, made at once and not in stream order."""
        values = torch.as_tensor(values, dtype=torch.float64)
        return self.memory(values.numel()).view(values.shape).copy_(values)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy values in the order of the current stream."""
        self.driver.cuMemcpyAsync(to.data_ptr(), source.data_ptr(), 8 * source.numel(), self.stream)

    def synchronize(self) -> None:
        self.driver.cuStreamSynchronize(self.stream)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """A context in which another stream is the current one."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


def library() -> Path:
    """The path of the compiled library, the same on all ranks. Collective."""
    return WORLD.bcast(standin_driver.library() if WORLD.rank == 0 else None)


def pretend_stream(
    monkeypatch: pytest.MonkeyPatch, *, waits: bool = False, path: Path | None = None
) -> StreamDevice:
    """Make mpisyncbn treat CPU tensors as a device's, with the transport ``stream``. Collective."""
    slow = StreamDevice(Driver(path or library()), waits)
    monkeypatch.setattr(device, "SlowDevice", lambda lazy_uploads: slow)
    device.pretend(monkeypatch)
    monkeypatch.setattr(link, "CUDA_DRIVER", str(slow.driver.path))
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "stream")
    return slow


def stream_group() -> Communicator:
    """A group of all ranks that has the stream transport. Collective."""
    group = Communicator().ready()
    assert group.transport == "stream"
    assert group.stream is not None
    return group
