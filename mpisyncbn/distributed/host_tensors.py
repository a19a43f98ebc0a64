"""Tensors in host memory, where MPI reads and writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cat_bytes", "contiguous", "copy_back", "host_output_for", "to_cpu", "without_overlap"]


def to_cpu(values: Any) -> Tensor:
    """A tensor whose values may be read later, on any thread: of a device's, a copy in host memory."""
    if not isinstance(values, Tensor):
        raise TypeError(f"expected a tensor, got {type(values).__name__}")
    if values.layout is not torch.strided:
        raise TypeError(f"expected a dense tensor, got one of layout {values.layout}")
    return values.detach().cpu()


def contiguous(values: Tensor) -> Tensor:
    """The values of a tensor on the CPU, without gaps: itself where they are."""
    # detached anew: what was made in inference mode may not be changed outside of it
    return values.detach().resolve_conj().resolve_neg().contiguous()


def host_output_for(values: Tensor) -> Tensor:
    """Host memory without gaps for what ``values`` will be: its own where that is such."""
    own = to_cpu(values) if values.is_cpu else None
    if own is not None and own.is_contiguous():
        return own
    if values.layout is not torch.strided:
        raise TypeError(f"expected a dense tensor, got one of layout {values.layout}")
    return torch.empty(values.shape, dtype=values.dtype, device="cpu")


def copy_back(host: Tensor, values: Tensor) -> None:
    """Into ``values``, where they are not in ``host`` memory already."""
    if host.data_ptr() != values.data_ptr() or host.device != values.device:
        with torch.no_grad():
            values.detach().copy_(host.view(values.shape))
        if values.is_cuda:  # whoever waits may go on in another stream
            torch.cuda.current_stream(values.device).synchronize()


def cat_bytes(tensors: list[Tensor]) -> Tensor:
    """The bytes of several tensors one after the other."""
    return torch.cat([contiguous(each).view(-1).view(torch.uint8) for each in tensors])


def without_overlap(values: Tensor, out: Tensor | None) -> Tensor:
    """``values``, copied where they share memory with ``out``, as a shard does that is gathered in place.

    MPI forbids it: MPICH says so, others may send what they have just received.
    """
    if out is None or not (
        values.data_ptr() < out.data_ptr() + out.nbytes and out.data_ptr() < values.data_ptr() + values.nbytes
    ):
        return values
    return values.clone()
