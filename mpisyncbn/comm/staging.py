"""Copies between a device and the host. A layer without a mask waits for a GPU only here.

Vectors are copied through pinned buffers. A copy to the host waits once, for all its vectors. A
copy to the device does not wait: its buffer is free after the next wait for the same stream.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import cast

import numpy as np

from ..errors import MPISyncBNError, on_rank
from ..kernels import Array
from .streams import Device, Stream, Streams, streams_of

__all__ = ["DeviceMessage", "StagingBuffers", "device_key", "device_of", "staging_for"]

_BUFFERS = 8  # more than the copies that one step of a layer has in flight


class StagingBuffers:
    """The pinned buffers of one device and one thread, used in turn."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._buffers = [_Buffer(streams) for _ in range(_BUFFERS)]
        self._turn = 0

    def to_host(self, vectors: Sequence[Array]) -> list[np.ndarray]:
        """Copy vectors on the device to float64 NumPy vectors, with one wait for all.

        These are views of a buffer, which one of the next copies of this thread overwrites.
        """
        _refuse_capture(self.streams)
        lengths = [vector.shape[0] for vector in vectors]
        memory, array = self._next().part(sum(lengths))
        self.streams.download(vectors, memory)
        self.wait_for(self.streams.current_stream())
        found, begin = [], 0
        for length in lengths:
            found.append(array[begin : begin + length])
            begin += length
        return found

    def to_device(self, vectors: Sequence[np.ndarray]) -> Sequence[Array]:
        """Copy vectors of one length to rows of a float64 array on the device, without waiting."""
        buffer = self._next()
        memory, array = buffer.part(len(vectors) * len(vectors[0]))
        np.concatenate(vectors, out=array)
        buffer.read_by = self.streams.current_stream()
        return self.streams.upload(memory, len(vectors))

    def _next(self) -> _Buffer:
        """The next buffer. If it may still be copied to the device, wait for that."""
        self._turn = (self._turn + 1) % _BUFFERS
        buffer = self._buffers[self._turn]
        if buffer.read_by is not None:
            self.wait_for(buffer.read_by)
        return buffer

    def wait_for(self, stream: Stream) -> None:
        """Wait for a stream. The buffers that are copied in its order are free then."""
        self.streams.wait_for(stream)
        for buffer in self._buffers:
            if buffer.read_by is stream:
                buffer.read_by = None


class _Buffer:
    """A pinned buffer that grows, and the stream in whose order it is copied to the device."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.read_by: Stream | None = None  # None: that copy is done
        self._size = 0
        self._parts: dict[int, tuple[Array, np.ndarray]] = {}

    def part(self, length: int) -> tuple[Array, np.ndarray]:
        """The first ``length`` values of the buffer, as memory and as a NumPy view.

        Views are kept, because layers ask for the same few lengths again and again.
        """
        part = self._parts.get(length)
        if part is None:
            if length > self._size:
                self._size = max(512, 1 << (length - 1).bit_length())
                self._parts = {self._size: self._streams.pinned(self._size)}
            memory, array = self._parts[self._size]
            part = self._parts[length] = memory[:length], array[:length]
        return part


class DeviceMessage:
    """A buffer for float64 messages in device memory, for a CUDA-aware MPI."""

    def __init__(self, MPI: ModuleType, copies: int, length: int, like: Array) -> None:
        staging = staging_for(like)
        if staging is None:
            raise MPISyncBNError(f"expected CUDA or ROCm memory, got an array on {like.device}{on_rank()}")
        self.values, pointer = staging.streams.empty(copies * length)
        # MPI's count is that of one message, also if the buffer holds one of each rank
        self.buffer = [MPI.memory.fromaddress(pointer, 8 * copies * length), length, MPI.DOUBLE]

    def pack(self, header: np.ndarray, vectors: Sequence[Array]) -> None:
        """Write ``header`` and vectors of the device to the buffer, and wait until that is done.

        It waits because MPI knows nothing of streams.
        """
        staging = cast(StagingBuffers, staging_for(self.values))
        _refuse_capture(staging.streams)
        staging.streams.concatenate((*staging.to_device([header]), *vectors), self.values)
        staging.wait_for(staging.streams.current_stream())


def _refuse_capture(streams: Streams) -> None:
    if streams.capturing():
        raise MPISyncBNError(
            "a synchronized batch norm cannot be captured in a CUDA graph, because the host takes part in "
            f"its exchange at every training step{on_rank()}: leave it out of what is captured, or set "
            "MPISYNCBN_TRANSPORT=stream, with which it can, unless in join or with MPISYNCBN_DEBUG=1"
        )


def device_key(array: Array) -> Device:
    """The device of an array as a key of a dictionary. CuPy's Device cannot be one."""
    return getattr(array.device, "id", array.device)


def device_of(array: Array) -> AbstractContextManager[object]:
    """A context in which the device of an array is the current one."""
    return cast(StagingBuffers, staging_for(array)).streams.device_context()


_of_thread = threading.local()  # no two threads share a buffer


def staging_for(array: Array) -> StagingBuffers | None:
    """This thread's buffers for the device of an array; None for a device without pinned memory."""
    key, buffers = device_key(array), _of_thread.__dict__
    found = buffers.get(key)
    if found is None:
        streams = streams_of(array)
        if streams is None:
            return None
        found = buffers[key] = StagingBuffers(streams)
    return found
