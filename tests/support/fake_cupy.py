"""A stand-in, without a GPU, for the part of CuPy that mpisyncbn uses, on memory of mock_cuda.c.

Arrays have device pointers. Host code that dereferences one dies of a segmentation fault, so tests
see how MPI uses them. The stand-in refuses what CuPy refuses: mixing with NumPy arrays, implicit
conversion, ``get`` and ``set`` with another dtype or shape, a Device as a dictionary key.

There is one stream. Asynchronous operations of CuPy (copies of pinned memory, ``concatenate`` into
an array) are done when the program waits for them or computes. Until then their result is NaN.

``python fake_cupy.py FOLDER`` builds mock_cuda.c as a library in FOLDER, and prints its path.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

COMPILER = shlex.split(os.environ.get("CC", "cc"))
SHARED = os.environ.get("I_MPI_OFFLOAD_CUDA_LIBRARY")  # the copy of the library that MPI loads

_cuda: Any = None
_queue: deque[Callable[[], None]] = deque()
_pinned: dict[int, int] = {}  # the bytes of each pinned buffer, by its address
_LAYOUT = {"dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides"}
_COMPARISONS = {np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal}


@contextmanager
def installed(folder: Path) -> Iterator[ModuleType]:
    """A context in which ``import cupy`` gives this module.

    Its library is the one that MPI loads, or else is built in ``folder``.
    """
    global _cuda
    if _cuda is None:
        _cuda = ctypes.CDLL(SHARED or str(build(folder)))
        word = ctypes.c_size_t
        _cuda.cuMemcpyHtoD_v2.argtypes = _cuda.cuMemcpyDtoH_v2.argtypes = [word] * 3
        _cuda.cuMemAlloc_v2.argtypes = [ctypes.POINTER(word), word]
        _cuda.cuMemFree_v2.argtypes = [word]
    ours = {"cupy": sys.modules[__name__], "cupyx": SimpleNamespace(empty_pinned=empty_pinned)}
    theirs = {name: sys.modules.get(name) for name in ours}
    sys.modules.update(ours)
    try:
        yield ours["cupy"]
    finally:
        for name, module in theirs.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def build(folder: Path) -> Path:
    library, source = Path(folder, "libcuda.so.1"), Path(__file__).with_name("mock_cuda.c")
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([*COMPILER, *options, "-o", library, source], check=True)
    return library


def calls(entry_point: str) -> int:
    """How often an entry point of the driver library has been called."""
    return ctypes.c_long.in_dll(_cuda, f"calls_{entry_point}").value


def _run() -> None:
    while _queue:
        _queue.popleft()()


class _Memory:
    """An allocation on the device, and a host buffer of the same size to read and fill it."""

    def __init__(self, nbytes: int) -> None:
        self.bytes, pointer = np.full(nbytes, 255, np.uint8), ctypes.c_size_t()  # NaN, until it is written to
        if nbytes:
            _check(_cuda.cuMemAlloc_v2(pointer, nbytes))
            weakref.finalize(self, _cuda.cuMemFree_v2, pointer.value).atexit = False
        self.ptr = pointer.value
        self.upload()

    def upload(self) -> None:
        if self.ptr:
            _check(_cuda.cuMemcpyHtoD_v2(self.ptr, self.bytes.ctypes.data, self.bytes.nbytes))

    def download(self) -> None:
        if self.ptr:
            _check(_cuda.cuMemcpyDtoH_v2(self.bytes.ctypes.data, self.ptr, self.bytes.nbytes))


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"mock_cuda: CUresult {result}")


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device. ``layout`` is the view of ``memory.bytes`` for its host copy."""

    def __init__(self, memory: _Memory, layout: np.ndarray) -> None:
        self._memory, self._layout = memory, layout

    def __getattr__(self, name: str) -> object:
        if name in _LAYOUT:
            return getattr(self._layout, name)
        raise AttributeError(f"no attribute {name} in fake_cupy.ndarray")

    @property
    def data(self) -> SimpleNamespace:
        offset = self._layout.ctypes.data - self._memory.bytes.ctypes.data
        return SimpleNamespace(ptr=self._memory.ptr + offset if self._memory.ptr else 0)

    @property
    def device(self) -> Device:
        return Device(0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        where = {"data": (self.data.ptr, False), "strides": self.strides, "version": 3}
        return {"shape": self.shape, "typestr": self.dtype.str, **where}

    def _now(self) -> np.ndarray:
        """The values as they are now, before the rest of the queue has run."""
        self._memory.download()
        return self._layout

    def _values(self) -> np.ndarray:
        _run()
        return self._now()

    def _assign(self, values: np.ndarray) -> None:
        self._now()[...] = values
        self._memory.upload()

    def _view(self, layout: np.ndarray) -> ndarray:
        if layout.size and not np.may_share_memory(layout, self._memory.bytes):
            raise NotImplementedError("only views")
        return ndarray(self._memory, layout)

    def __getitem__(self, key: object) -> ndarray:
        found = self._layout[key]
        return self._view(
            found if isinstance(found, np.ndarray) else self._layout[(*np.atleast_1d(key), ...)]
        )

    def __setitem__(self, key: object, value: object) -> None:
        if not isinstance(value, ndarray) and np.ndim(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        value = value._values().copy() if isinstance(value, ndarray) else value
        _run()
        self[key]._assign(value)

    def reshape(self, *shape: int | tuple[int, ...]) -> ndarray:
        return self._view(self._layout.reshape(*shape))

    def ravel(self) -> ndarray:
        return self._view(self._layout.reshape(-1))

    def astype(self, dtype: DTypeLike, copy: bool = True) -> ndarray:
        return self if self.dtype == dtype and not copy else _computed(np.ndarray.astype, self, dtype)

    sum, mean, max = (
        lambda self, *args, _of=function, **options: _computed(_of, self, *args, **options)
        for function in (np.sum, np.mean, np.max)
    )

    def get(
        self, stream: object = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        out = np.empty(self.shape, self.dtype, order) if out is None else self._checked(out)
        if out.dtype.kind == "f":
            out.fill(np.nan)
        _queue.append(lambda: np.copyto(out, self._now()))
        if blocking or not _is_pinned(out):
            _run()
        return out

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        source = self._checked(arr) if _is_pinned(arr) else self._checked(arr).copy()
        _queue.append(lambda: self._assign(source))

    def _checked(self, host: object) -> np.ndarray:
        if not isinstance(host, np.ndarray) or host.dtype != self.dtype:
            raise TypeError(f"expected a numpy.ndarray of {self.dtype}, for there is no conversion")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch: {host.shape} and {self.shape}")
        return host

    def item(self) -> float:
        return self._values().item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __len__(self) -> int:
        return len(self._layout)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: object, **options: object) -> object:
        if method != "__call__" or "out" in options:  # mpisyncbn uses nothing else
            return NotImplemented
        if ufunc in _COMPARISONS:  # as CuPy does: NumPy scalars may arrive as 0-d arrays
            inputs = tuple(v.item() if isinstance(v, np.ndarray) and v.ndim == 0 else v for v in inputs)
        return _computed(ufunc, *inputs, **options)

    def __array_function__(self, func: Callable, types: object, args: tuple, kwargs: dict) -> object:
        ours = globals().get(func.__name__)
        return NotImplemented if ours is None else ours(*args, **kwargs)


def _computed(function: Callable[..., object], *args: object, **options: object) -> ndarray:
    _run()
    with np.errstate(all="ignore"):
        return asarray(np.asarray(function(*map(_host, args), **options)))


def _host(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_host, value))
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value._now() if isinstance(value, ndarray) else value


def empty(shape: int | tuple[int, ...], dtype: DTypeLike = float) -> ndarray:
    memory = _Memory(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return ndarray(memory, np.ndarray(shape, dtype, memory.bytes))


def zeros(shape: int | tuple[int, ...], dtype: DTypeLike = float) -> ndarray:
    return asarray(np.zeros(shape, dtype))


def asarray(values: object, dtype: DTypeLike | None = None) -> ndarray:
    if isinstance(values, ndarray):
        return values if dtype is None else values.astype(dtype, copy=False)
    values = np.asarray(values, dtype)
    array = empty(values.shape, values.dtype)
    array._assign(values)
    return array


def ascontiguousarray(a: ndarray, dtype: DTypeLike | None = None) -> ndarray:
    return a if a.flags.c_contiguous and dtype in (None, a.dtype) else _computed(np.array, a, dtype)


def where(condition: object, x: object, y: object) -> ndarray:
    return _computed(np.where, condition, x, y)


def stack(arrays: Sequence[ndarray], axis: int = 0) -> ndarray:
    return _computed(np.stack, _only_ours(arrays), axis)


def concatenate(arrays: Sequence[ndarray], axis: int = 0, out: ndarray | None = None) -> ndarray:
    if out is None:
        return _computed(np.concatenate, _only_ours(arrays), axis)
    if out.shape != np.concatenate([each._layout for each in _only_ours(arrays)], axis).shape:
        raise ValueError("Output array is the wrong shape")
    _run()
    out._assign(np.full(out.shape, np.nan))
    _queue.append(lambda: out._assign(np.concatenate([each._now() for each in arrays], axis)))
    return out


def _only_ours(arrays: Sequence[ndarray]) -> Sequence[ndarray]:
    if not all(isinstance(each, ndarray) for each in arrays):
        raise TypeError("Only cupy arrays can be concatenated")
    return arrays


def empty_pinned(shape: int | tuple[int, ...], dtype: DTypeLike = float) -> np.ndarray:
    memory = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 255, np.uint8)
    _pinned[memory.ctypes.data] = memory.nbytes
    weakref.finalize(memory, _pinned.pop, memory.ctypes.data).atexit = False
    return np.ndarray(shape, dtype, memory)


def _is_pinned(array: np.ndarray) -> bool:
    address = array.ctypes.data
    return any(begin <= address < begin + nbytes for begin, nbytes in _pinned.items())


class Device:
    def __init__(self, device: int = 0) -> None:
        self.id = device

    def __eq__(self, other: object) -> bool:  # it removes __hash__, as in CuPy
        return isinstance(other, Device) and other.id == self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Stream:
    """The null stream. Any other stream would share its queue."""

    ptr = 0

    def synchronize(self) -> None:
        _run()

    def is_capturing(self) -> bool:
        return False


_null = Stream()
cuda = SimpleNamespace(Device=Device, Stream=Stream, get_current_stream=lambda: _null)

if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
