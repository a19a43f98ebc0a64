"""Between a device and the host: the one place where a layer waits for a device.

Vectors travel by way of pinned buffers. Copying to the host waits once, for all vectors together. Copying to
the device waits for nothing: the buffer is not used again before an event says that the copy is done.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import MPISyncBNError, on_rank
from .kernels import loaded_torch

__all__ = ["DeviceMessage", "Stage", "device_key", "device_of", "stage_of"]

_SLOTS = 8  # more copies than one step of a layer has under way


class _Torch:
    """What staging needs of a CUDA (or ROCm) device, for tensors of torch."""

    def __init__(self, device: Any) -> None:
        self.torch, self.device = loaded_torch(), device

    def current(self) -> Any:
        return self.torch.cuda.device(self.device)

    def empty(self, length: int) -> tuple[Any, int]:
        vector = self.torch.empty(length, dtype=self.torch.float64, device=self.device)
        return vector, vector.data_ptr()

    def join(self, vectors: Sequence[Any], out: Any) -> None:
        self.torch.cat(tuple(vectors), out=out)

    def pinned(self, length: int) -> tuple[Any, np.ndarray]:
        memory = self.torch.empty(length, dtype=self.torch.float64, device="cpu", pin_memory=True)
        return memory, memory.numpy()

    def event(self) -> Any:
        return self.torch.cuda.Event()

    def record(self, event: Any) -> None:
        event.record(self.torch.cuda.current_stream(self.device))

    def download(self, vector: Any, memory: Any) -> None:
        memory.copy_(vector.detach(), non_blocking=True)

    def upload(self, memory: Any, dtype: str) -> Any:
        return memory.view(getattr(self.torch, dtype)).to(self.device, non_blocking=True)

    def capturing(self) -> bool:
        with self.current():
            return self.torch.cuda.is_current_stream_capturing()


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

    def download(self, vector: Any, memory: Any) -> None:
        with self.device:
            self.cupy.ascontiguousarray(vector, "float64").get(out=memory, blocking=False)

    def upload(self, memory: Any, dtype: str) -> Any:
        memory = memory.view(dtype)
        with self.device:
            vector = self.cupy.empty(memory.shape, dtype)
            vector.set(memory)
            return vector

    def capturing(self) -> bool:
        with self.device:
            return self.cupy.cuda.get_current_stream().is_capturing()


class Stage:
    """The pinned buffers of one device and one thread, used in turn."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._slots: list[Any] = [None] * _SLOTS
        self._turn = 0

    def to_host(self, vectors: Sequence[Any]) -> list[np.ndarray]:
        """Float64 NumPy vectors with the values of vectors on the device: one wait for all.

        Views of a buffer: use them before the next few copies of this thread.
        """
        _refuse_capture(self.driver)
        lengths = [len(vector) for vector in vectors]
        memory, array, event = self._slot(sum(lengths))
        begin, found = 0, []
        for vector, length in zip(vectors, lengths, strict=True):
            self.driver.download(vector, memory[begin : begin + length])
            found.append(array[begin : begin + length])
            begin += length
        self.driver.record(event)
        event.synchronize()
        return found

    def to_device(self, vectors: Sequence[np.ndarray], dtype: str = "float64") -> list[Any]:
        """Vectors of one length as rows of one array on the device, without waiting for it."""
        rows, length = len(vectors), len(vectors[0])
        words = -(-rows * length * np.dtype(dtype).itemsize // 8)
        memory, array, event = self._slot(words)
        staged = array[:words].view(dtype)[: rows * length].reshape(rows, length)
        for row, vector in zip(staged, vectors, strict=True):
            row[...] = vector
        uploaded = self.driver.upload(memory[:words], dtype)[: rows * length].reshape(rows, length)
        self.driver.record(event)
        return list(uploaded)

    def _slot(self, length: int) -> Any:
        """The next buffer, once the copies that use it are done: memory, its NumPy view, and their event."""
        self._turn = (self._turn + 1) % _SLOTS
        slot = self._slots[self._turn]
        if slot is not None:
            slot[2].synchronize()
        if slot is None or len(slot[1]) < length:
            size = max(512, 1 << (length - 1).bit_length())
            event = self.driver.event() if slot is None else slot[2]
            slot = self._slots[self._turn] = (*self.driver.pinned(size), event)
        return slot


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
