"""Kernels for a device, called like those for host memory, and stand-ins for a device.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest.py), on tensors in host
memory, and torch's operations for SyncBatchNorm, which exist for CUDA only, are emulated slowly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from mpisyncbn.kernels import ActivationContext
from support.batch_norm_operations import EMULATED
from support.ranks import WORLD

F = TypeVar("F", bound=Callable[..., object])
cuda: Any
try:
    import triton

    from mpisyncbn.kernels import cuda
except ImportError:
    cuda = None

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", WORLD.rank % torch.cuda.device_count()) if GPU else torch.device("cpu")


def needs_gpu(test: F) -> F:
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="torch finds no GPU")(test))


# The package does not use an older one, whose interpreter fails with NumPy 2.4.
needs_triton = pytest.mark.skipif(
    cuda is None or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="Triton 3.3 or newer is not installed",
)


class OnDevice:
    """The four kernels of a module, on data in host memory that is copied to a device and back."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def local_moments(self, x: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
        count, mean, m2 = self.module.local_moments(there(x))
        return count, mean.cpu().numpy(), m2.cpu().numpy()

    def normalize(self, *arguments: object) -> Tensor:
        return self.module.normalize(*map(there, arguments)).cpu()

    def backward_reduce(self, *arguments: object) -> tuple[np.ndarray, np.ndarray, Tensor]:
        sum_dy, sum_dy_xmu, dz = self.module.backward_reduce(*map(there, arguments))
        return sum_dy.cpu().numpy(), sum_dy_xmu.cpu().numpy(), dz.cpu()

    def backward_elementwise(self, *arguments: object) -> Tensor:
        return self.module.backward_elementwise(*map(there, arguments)).cpu()


def there(value: object) -> object:
    """Return ``value`` on the device. A tensor keeps its strides if none of them is 0."""
    if isinstance(value, ActivationContext):
        activation, *arrays = value
        return ActivationContext(activation, *map(there, arrays))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(DEVICE)
    if not isinstance(value, Tensor) or not GPU:
        return value
    if 0 in value.stride():
        return value.to(DEVICE)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)


if not GPU:
    _cuda_alone = torch.library.Library("aten", "IMPL")
    for _name, _function in EMULATED.items():
        _cuda_alone.impl(_name, _function, "CPU")


class SlowDevice:
    """A stand-in for the ``Streams`` of a device (comm/streams.py), with tensors in host memory.

    A copy is done when the program waits for its stream; a read before that finds NaN.
    Uploads are done at once unless ``lazy_uploads`` is true.
    """

    def __init__(self, lazy_uploads: bool = True) -> None:
        self.queue: list[Callable[[], object]] = []
        self.waits = 0
        self.lazy_uploads = lazy_uploads
        self.is_capturing = False

    def device_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pinned(self, length: int) -> tuple[Tensor, np.ndarray]:
        memory = torch.full((length,), torch.nan, dtype=torch.float64)
        return memory, memory.numpy()

    def empty(self, length: int) -> tuple[Tensor, int]:
        vector = torch.full((length,), torch.nan, dtype=torch.float64)
        return vector, vector.data_ptr()

    def concatenate(self, vectors: Sequence[Tensor], out: Tensor) -> None:
        out.fill_(torch.nan)
        self.queue.append(lambda: torch.cat(tuple(vectors), out=out))

    def current_stream(self) -> object:
        return self.queue

    def wait_for(self, stream: object) -> None:
        if stream is self.queue and self.queue:
            self.waits += 1
            self.run()

    def download(self, vectors: Sequence[Tensor], memory: Tensor) -> None:
        memory.fill_(torch.nan)
        values = torch.cat(tuple(vectors)).detach()  # later work on the stream must not change them
        self.queue.append(lambda: memory.copy_(values))

    def upload(self, memory: Tensor, rows: int) -> Sequence[Tensor]:
        source = memory.view(rows, -1)
        matrix = torch.full_like(source, torch.nan)
        self.queue.append(lambda: matrix.copy_(source))
        if not self.lazy_uploads:
            self.run()
        return matrix.unbind()

    def capturing(self) -> bool:
        return self.is_capturing

    def run(self) -> None:
        while self.queue:
            self.queue.pop(0)()


def pretend(monkeypatch: pytest.MonkeyPatch) -> SlowDevice:
    """Make mpisyncbn treat tensors in host memory as tensors of the device that is returned."""
    slow = SlowDevice(lazy_uploads=False)  # torch reads an upload without waiting
    monkeypatch.setattr("mpisyncbn.comm.staging._of_thread", threading.local())
    monkeypatch.setattr("mpisyncbn.comm.transport.on_host", lambda array: isinstance(array, np.ndarray))
    monkeypatch.setattr("mpisyncbn.comm.staging.streams_of", lambda array: slow)
    return slow
