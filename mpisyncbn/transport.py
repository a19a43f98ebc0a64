"""Where the message buffer lives, and how vectors get into it and out again.

Only ``host`` exists so far: the message is a NumPy buffer in host memory, and vectors that live
on a device are copied there and back. The copy to the host waits for the device's current stream.
"""

from __future__ import annotations

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
            "MPISYNCBN_TRANSPORT=device asks for messages in device memory through a CUDA-aware MPI, which this "
            f"version does not have{on_rank()}: unset it, or set it to host or auto"
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


def blend(running: Any, batch: np.ndarray, momentum: Any) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` in place, computed in float64."""
    if isinstance(running, np.ndarray):
        running += momentum * (batch - running)
        return
    new = from_host(batch, running)
    if hasattr(running, "copy_"):
        # copy_ counts as a modification, so autograd notices if backward still needed the old values
        old = running.detach().double()
        running.detach().copy_(old + momentum * (new - old))
    else:
        running[...] = running + momentum * (new - running)
