"""Memory and streams of a device, by torch or by CuPy, for staging.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..kernels import Array, loaded_torch

__all__ = ["Device", "Stream", "Streams", "streams_of"]

Device: TypeAlias = Any  # a torch.device, or a Device of CuPy
Stream: TypeAlias = Any  # a stream of torch or CuPy


class Streams(Protocol):
    """The operations of one device that staging needs. Only ``wait_for`` waits for the device."""

    def device_context(self) -> AbstractContextManager[object]:
        """A context in which the device is the current one."""

    def device_and_stream(self) -> tuple[int, int]:
        """The device and its current stream, as numbers for CUDA's driver."""

    def addresses(self, vectors: Sequence[Array]) -> tuple[list[int], Sequence[Array]]:
        """The addresses of vectors as contiguous float64 memory, and the arrays that own it."""

    def empty(self, length: int) -> tuple[Array, int]:
        """A float64 vector on the device, and its address."""

    def concatenate(self, vectors: Sequence[Array], out: Array) -> None:
        """Write vectors on the device one after the other to ``out``."""

    def pinned(self, length: int) -> tuple[Array, np.ndarray]:
        """Pinned host memory for ``length`` float64 values, and its NumPy view."""

    def current_stream(self) -> Stream:
        """The current stream: the same object each time, as long as some code has it."""

    def wait_for(self, stream: Stream) -> None:
        """Wait for a stream."""

    def download(self, vectors: Sequence[Array], memory: Array) -> None:
        """Copy vectors on the device one after the other to pinned memory."""

    def upload(self, memory: Array, rows: int) -> Sequence[Array]:
        """Copy pinned memory to the device, as ``rows`` vectors of one length."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured in a graph."""


def streams_of(array: Array) -> Streams | None:
    """The streams of an array's device; None for a device without pinned memory."""
    if getattr(array, "is_cuda", False):
        return TorchStreams(array.device)
    return None if hasattr(array, "detach") else CuPyStreams(array.device)


class TorchStreams:
    """The streams of a CUDA or ROCm device, for tensors of torch."""

    def __init__(self, device: Device) -> None:
        self.torch, self.device = loaded_torch(), device
        self._streams: dict[int, Stream] = {}
        self._event = self.torch.cuda.Event()

    def device_context(self) -> AbstractContextManager[object]:
        if self.torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return self.torch.cuda.device(self.device)

    def device_and_stream(self) -> tuple[int, int]:
        index = self.device.index
        return index, self.torch._C._cuda_getCurrentRawStream(index)

    def addresses(self, vectors: Sequence[Array]) -> tuple[list[int], Sequence[Array]]:
        kept = [vector.detach().double().contiguous() for vector in vectors]
        return [vector.data_ptr() for vector in kept], kept

    def empty(self, length: int) -> tuple[Array, int]:
        with self.torch.inference_mode(False):  # else nothing may write to it outside inference mode
            vector = self.torch.empty(length, dtype=self.torch.float64, device=self.device)
        return vector, vector.data_ptr()

    def concatenate(self, vectors: Sequence[Array], out: Array) -> None:
        self.torch.cat(tuple(vectors), out=out)

    def pinned(self, length: int) -> tuple[Array, np.ndarray]:
        with self.torch.inference_mode(False):
            memory = self.torch.empty(length, dtype=self.torch.float64, device="cpu", pin_memory=True)
        return memory, memory.numpy()

    def current_stream(self) -> Stream:
        # torch finds the key of the current stream ten times as fast as it makes an object for it
        key = self.torch._C._cuda_getCurrentStream(self.device.index)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self.torch.cuda.current_stream(self.device)
        return stream

    def wait_for(self, stream: Stream) -> None:
        # by an event, because torch.cuda.set_sync_debug_mode would make a layer raise an error
        self._event.record(stream)
        self._event.synchronize()

    def download(self, vectors: Sequence[Array], memory: Array) -> None:
        matrix = vectors[0]._base
        if matrix is not None and _are_rows(vectors, matrix):  # as kernels return them: one copy is enough
            memory.copy_(matrix.detach().view(-1), non_blocking=True)
            return
        lengths = [vector.shape[0] for vector in vectors]
        for vector, part in zip(vectors, memory.split(lengths), strict=True):
            part.copy_(vector.detach(), non_blocking=True)

    def upload(self, memory: Array, rows: int) -> Sequence[Array]:
        return memory.view(rows, -1).to(self.device, non_blocking=True).unbind()

    def capturing(self) -> bool:
        with self.device_context():
            return self.torch.cuda.is_current_stream_capturing()


def _are_rows(vectors: Sequence[Array], matrix: Array) -> bool:
    """Whether the vectors are all the rows, in order, of a matrix without gaps."""
    length = vectors[0].shape[0]
    if matrix.numel() != len(vectors) * length or not matrix.is_contiguous():
        return False
    begin = matrix.storage_offset()
    for vector in vectors:
        if vector._base is not matrix or vector.storage_offset() != begin or vector.shape[0] != length:
            return False
        begin += length
    return vectors[0].dtype == matrix.dtype and vectors[0].stride(0) == 1


class CuPyStreams:
    """The current stream of a device, for arrays of CuPy."""

    def __init__(self, device: Device) -> None:
        import cupy
        import cupyx

        self.cupy, self.empty_pinned, self.device = cupy, cupyx.empty_pinned, device

    def device_context(self) -> AbstractContextManager[object]:
        return self.device

    def device_and_stream(self) -> tuple[int, int]:
        return self.device.id, self.current_stream().ptr

    def addresses(self, vectors: Sequence[Array]) -> tuple[list[int], Sequence[Array]]:
        with self.device:
            kept = [self.cupy.ascontiguousarray(vector, "float64") for vector in vectors]
        return [vector.data.ptr for vector in kept], kept

    def empty(self, length: int) -> tuple[Array, int]:
        with self.device:
            vector = self.cupy.empty(length)
        return vector, vector.data.ptr

    def concatenate(self, vectors: Sequence[Array], out: Array) -> None:
        with self.device:
            self.cupy.concatenate(tuple(vectors), out=out)

    def pinned(self, length: int) -> tuple[Array, np.ndarray]:
        memory = self.empty_pinned(length)
        return memory, memory

    def current_stream(self) -> Stream:
        with self.device:
            return self.cupy.cuda.get_current_stream()

    def wait_for(self, stream: Stream) -> None:
        stream.synchronize()

    def download(self, vectors: Sequence[Array], memory: Array) -> None:
        begin = 0
        with self.device:
            for vector in vectors:
                end = begin + len(vector)
                self.cupy.ascontiguousarray(vector, "float64").get(out=memory[begin:end], blocking=False)
                begin = end

    def upload(self, memory: Array, rows: int) -> Sequence[Array]:
        with self.device:
            matrix = self.cupy.empty((rows, len(memory) // rows))
            matrix.set(memory.reshape(matrix.shape))
            return list(matrix)

    def capturing(self) -> bool:
        with self.device:
            return self.cupy.cuda.get_current_stream().is_capturing()
