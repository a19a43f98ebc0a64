"""Run the kernels for CuPy arrays on NumPy arrays, without CuPy."""

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
    """A NumPy array with the attribute ``device`` of a CuPy array."""

    device: Any = nullcontext()
    device.id = 0


def _from_dlpack(tensor: Any) -> np.ndarray:
    array = np.from_dlpack(tensor)
    return array if array.flags.writeable else array.copy()  # NumPy 1.26 and torch 2.6: read-only


@contextmanager
def dlpack_kernels(
    monkeypatch: pytest.MonkeyPatch, pointer: int = 0
) -> Iterator[tuple[ModuleType, list[Any]]]:
    """Import kernels/dlpack.py with a stand-in for CuPy and with Triton's interpreter.

    ``pointer`` is that of CuPy's current stream. Yields the module, and a list that grows by each
    stream that the module makes current in torch.
    """
    streams: list[Any] = []
    current = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=pointer))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=_from_dlpack, cuda=current))
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
        del sys.modules["mpisyncbn.kernels.dlpack"]  # it has imported the stand-in
