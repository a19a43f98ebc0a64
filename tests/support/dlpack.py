"""The kernels for CuPy, on arrays of NumPy's in place of CuPy's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.kernels import cuda


class LikeCuPy(np.ndarray):
    """In host memory, with a device all the same."""

    device: Any = nullcontext()
    device.id = 0


@contextmanager
def dlpack_kernels(
    monkeypatch: pytest.MonkeyPatch, pointer: int = 0
) -> Iterator[tuple[ModuleType, list[Any]]]:
    """kernels/dlpack.py over Triton's interpreter, and the streams that it makes current."""
    streams: list[Any] = []
    current = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=pointer))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=np.from_dlpack, cuda=current))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda given: given)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    monkeypatch.delitem(sys.modules, "mpisyncbn.kernels.dlpack", raising=False)
    dlpack = importlib.import_module("mpisyncbn.kernels.dlpack")
    monkeypatch.setattr(dlpack, "cuda_kernels_for", lambda device: (cuda.module, "Triton"))
    try:
        yield dlpack, streams
    finally:
        del sys.modules["mpisyncbn.kernels.dlpack"]  # what it imported was not CuPy
