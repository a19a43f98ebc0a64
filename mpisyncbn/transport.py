"""Where the message buffer lives, and how vectors get into it and out again.

Only ``host`` exists so far: the message is a NumPy buffer in host memory, and vectors that live
on a device are copied there and back. The copy to the host waits for the device's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import config
from .errors import TransportError, on_rank

__all__ = ["blend", "chosen", "from_host", "near", "to_host"]


def chosen() -> tuple[str, str]:
    """The transport in use and the reason why.

    Raises TransportError where MPISYNCBN_TRANSPORT forces one that is not available.
    """
    if config.transport() == "device":
        raise TransportError(
            "MPISYNCBN_TRANSPORT=device asks for messages in device memory through a CUDA-aware MPI, which "
            f"this version does not have{on_rank()}: unset it, or set it to host or auto"
        )
    forced = config.transport() == "host"
    return "host", "MPISYNCBN_TRANSPORT=host" if forced else "the only transport of this version"


def to_host(vector: Any) -> np.ndarray:
    """A float64 NumPy vector with the values of any array."""
    if isinstance(vector, np.ndarray):
        return vector
    if hasattr(vector, "detach"):  # torch
        return vector.detach().to("cpu").double().numpy()
    return vector.get()  # CuPy


def from_host(values: np.ndarray, like: Any) -> Any:
    """``values`` as the kind of array that ``like`` is, on its device."""
    if isinstance(like, np.ndarray):
        return values
    if hasattr(like, "detach"):
        import torch

        return torch.from_numpy(values).to(like.device)
    import cupy

    return cupy.asarray(values)


def near(vector: Any, x: Any) -> Any:
    """``vector`` as the kernels for ``x`` want it: NumPy for data in host memory, else on its device."""
    host_memory = getattr(getattr(x, "device", "cpu"), "type", "cpu") == "cpu" and not hasattr(x, "get")
    return to_host(vector) if host_memory else vector


def blend(running: Sequence[Any], batch: Sequence[np.ndarray], momentum: Any) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` in place, for each."""
    for old, new in zip(running, batch, strict=True):
        if isinstance(old, np.ndarray):
            old += momentum * (new - old)
        elif not hasattr(old, "copy_"):  # CuPy
            old[...] = old + momentum * (from_host(new, old) - old)
        elif old.is_cpu and old.dtype.itemsize >= 4:
            shared = old.detach().numpy()
            shared += float(momentum) * (new - shared)
        else:
            wide = old.detach().double()
            old.detach().copy_(wide + momentum * (from_host(new, old) - wide))
    _count_as_modified(running)


def _count_as_modified(arrays: Sequence[Any]) -> None:
    """Let autograd notice if a backward pass still needed the old values."""
    if hasattr(arrays[0], "copy_"):
        from torch.autograd.graph import increment_version

        increment_version(arrays)
