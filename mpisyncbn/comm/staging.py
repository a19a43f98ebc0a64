"""Between a device and the host: the one place where a layer waits for a device.

Vectors travel by way of pinned buffers. Copying to the host waits once, for all vectors together. Copying to
the device waits for nothing: the buffer is not used again before an event says that the copy is done.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..errors import MPISyncBNError, on_rank
from ..kernels import loaded_torch

__all__ = ["DeviceMessage", "Stage", "device_key", "device_of", "stage_of"]

_SLOTS = 8  # more copies than one step of a layer has under way


class _Torch:
    """What staging needs of a CUDA (or ROCm) device, for tensors of torch."""

    def __init__(self, device: Any) -> None:
        self.torch, self.device = loaded_torch(), device
        self._streams: dict[Any, Any] = {}

    def current(self) -> Any:
        if self.torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return self.torch.cuda.device(self.device)

    def empty(self, length: int) -> tuple[Any, int]:
        with self.torch.inference_mode(False):  # which would not let it be written to when it is over
            vector = self.torch.empty(length, dtype=self.torch.float64, device=self.device)
        return vector, vector.data_ptr()

    def join(self, vectors: Sequence[Any], out: Any) -> None:
        self.torch.cat(tuple(vectors), out=out)

    def pinned(self, length: int) -> tuple[Any, np.ndarray]:
        with self.torch.inference_mode(False):
            memory = self.torch.empty(length, dtype=self.torch.float64, device="cpu", pin_memory=True)
        return memory, memory.numpy()

    def event(self) -> Any:
        return self.torch.cuda.Event()

    def record(self, event: Any) -> None:
        # an object for the current stream takes torch ten times as long to make as to know which it is
        key = self.torch._C._cuda_getCurrentStream(self.device.index)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self.torch.cuda.current_stream(self.device)
        event.record(stream)

    def download(self, vectors: Sequence[Any], memory: Any) -> None:
        matrix = vectors[0]._base
        if matrix is not None and _are_rows(vectors, matrix):  # as kernels return them: in one copy
            memory.copy_(matrix.detach().view(-1), non_blocking=True)
            return
        lengths = [vector.shape[0] for vector in vectors]
        for vector, part in zip(vectors, memory.split(lengths), strict=True):
            part.copy_(vector.detach(), non_blocking=True)

    def upload(self, memory: Any, rows: int) -> Sequence[Any]:
        return memory.view(rows, -1).to(self.device, non_blocking=True).unbind()

    def capturing(self) -> bool:
        with self.current():
            return self.torch.cuda.is_current_stream_capturing()


def _are_rows(vectors: Sequence[Any], matrix: Any) -> bool:
    """Whether these are all rows of a matrix without gaps, one below the other."""
    length = vectors[0].shape[0]
    if matrix.numel() != len(vectors) * length or not matrix.is_contiguous():
        return False
    begin = matrix.storage_offset()
    for vector in vectors:
        if vector._base is not matrix or vector.storage_offset() != begin or vector.shape[0] != length:
            return False
        begin += length
    return vectors[0].dtype == matrix.dtype and vectors[0].stride(0) == 1


class _CuPy:
    """The same for arrays of CuPy, on its current stream."""

    def __init__(self, device: Any) -> None:
        import cupy
        import cupyx

        self.cupy, self.empty_pinned, self.device = cupy, cupyx.empty_pinned, device

    def current(self) -> Any:
        return self.device

    def empty(self, length: int) -> tuple[Any, int]:
        with self.device:
            vector = self.cupy.empty(length)
        return vector, vector.data.ptr

    def join(self, vectors: Sequence[Any], out: Any) -> None:
        with self.device:
            self.cupy.concatenate(tuple(vectors), out=out)

    def pinned(self, length: int) -> tuple[Any, np.ndarray]:
        memory = self.empty_pinned(length)
        return memory, memory

    def event(self) -> Any:
        with self.device:
            return self.cupy.cuda.Event(disable_timing=True)

    def record(self, event: Any) -> None:
        with self.device:
            event.record(self.cupy.cuda.get_current_stream())

    def download(self, vectors: Sequence[Any], memory: Any) -> None:
        begin = 0
        with self.device:
            for vector in vectors:
                end = begin + len(vector)
                self.cupy.ascontiguousarray(vector, "float64").get(out=memory[begin:end], blocking=False)
                begin = end

    def upload(self, memory: Any, rows: int) -> Sequence[Any]:
        with self.device:
            matrix = self.cupy.empty((rows, len(memory) // rows))
            matrix.set(memory.reshape(matrix.shape))
            return list(matrix)

    def capturing(self) -> bool:
        with self.device:
            return self.cupy.cuda.get_current_stream().is_capturing()


class Stage:
    """The pinned buffers of one device and one thread, used in turn."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._slots: list[_Slot | None] = [None] * _SLOTS
        self._turn = 0

    def to_host(self, vectors: Sequence[Any]) -> list[np.ndarray]:
        """Float64 NumPy vectors with the values of vectors on the device: one wait for all.

        Views of a buffer: use them before the next few copies of this thread.
        """
        _refuse_capture(self.driver)
        lengths = [vector.shape[0] for vector in vectors]
        memory, array, event = self._slot(sum(lengths))
        self.driver.download(vectors, memory)
        self.driver.record(event)
        event.synchronize()
        found, begin = [], 0
        for length in lengths:
            found.append(array[begin : begin + length])
            begin += length
        return found

    def to_device(self, vectors: Sequence[np.ndarray]) -> Sequence[Any]:
        """Vectors of one length as rows of one float64 array on the device, without waiting for it."""
        memory, array, event = self._slot(len(vectors) * len(vectors[0]))
        np.concatenate(vectors, out=array)
        uploaded = self.driver.upload(memory, len(vectors))
        self.driver.record(event)
        return uploaded

    def _slot(self, length: int) -> tuple[Any, np.ndarray, Any]:
        """The next buffer, once the copies that use it are done: memory, its NumPy view, and their event."""
        self._turn = (self._turn + 1) % _SLOTS
        slot = self._slots[self._turn]
        if slot is None:
            slot = self._slots[self._turn] = _Slot(self.driver)
        slot.event.synchronize()
        return *slot.part(length), slot.event


class _Slot:
    """A pinned buffer that grows, and the event behind what was last copied from or to it."""

    def __init__(self, driver: Any) -> None:
        self._driver, self.event = driver, driver.event()
        self._size = 0
        self._parts: dict[int, tuple[Any, np.ndarray]] = {}

    def part(self, length: int) -> tuple[Any, np.ndarray]:
        """Its first values, as memory and as an array. Layers ask for few lengths again and again."""
        part = self._parts.get(length)
        if part is None:
            if length > self._size:
                self._size = max(512, 1 << (length - 1).bit_length())
                self._parts = {self._size: self._driver.pinned(self._size)}
            memory, array = self._parts[self._size]
            part = self._parts[length] = memory[:length], array[:length]
        return part


class DeviceMessage:
    """Float64 messages in device memory, which stays there as long as its group, for a CUDA-aware MPI."""

    def __init__(self, MPI: Any, copies: int, length: int, like: Any) -> None:
        stage = stage_of(like)
        if stage is None:
            raise MPISyncBNError(f"expected CUDA or ROCm memory, got an array on {like.device}{on_rank()}")
        self.values, pointer = stage.driver.empty(copies * length)
        self._packed = stage.driver.event()
        # the count is that of one rank's message
        self.buffer = [MPI.memory.fromaddress(pointer, 8 * copies * length), length, MPI.DOUBLE]

    def pack(self, header: np.ndarray, vectors: Sequence[Any]) -> None:
        """Fill it. When this returns all of it is there for MPI, which knows nothing of streams."""
        stage: Any = stage_of(self.values)
        _refuse_capture(stage.driver)
        stage.driver.join((*stage.to_device([header]), *vectors), self.values)
        stage.driver.record(self._packed)
        self._packed.synchronize()


def _refuse_capture(driver: Any) -> None:
    if driver.capturing():
        raise MPISyncBNError(
            "a synchronized batch norm cannot be captured in a CUDA graph, because the host takes part in "
            f"its exchange at every training step{on_rank()}: leave it out of what is captured"
        )


def device_key(array: Any) -> Any:
    """Its device, as a key of a dictionary: CuPy's own cannot be one."""
    return getattr(array.device, "id", array.device)


def device_of(array: Any) -> Any:
    """A context in which its device is the current one."""
    stage: Any = stage_of(array)
    return stage.driver.current()


_of_thread = threading.local()  # so that no two threads take turns at one buffer


def stage_of(like: Any) -> Stage | None:
    """The Stage of this thread for the device of an array; None where nothing is pinned for such."""
    key, stages = device_key(like), _of_thread.__dict__
    stage = stages.get(key)
    if stage is None:
        driver = _driver_of(like, like.device)
        if driver is None:
            return None
        stage = stages[key] = Stage(driver)
    return stage


def _driver_of(like: Any, device: Any) -> Any:
    if getattr(like, "is_cuda", False):
        return _Torch(device)
    return None if hasattr(like, "detach") else _CuPy(device)
