"""Tensors in host memory, where MPI reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "cat_bytes",
    "contiguous",
    "copy_back",
    "host_output_for",
    "prepare_outputs",
    "to_cpu",
    "without_overlap",
]


def to_cpu(values: Tensor) -> Tensor:
    """Return a detached tensor on the CPU with these values, which any thread may read later.

    It shares the memory of ``values`` if these are on the CPU; else it is a copy.
    Raises TypeError for anything but a dense tensor.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"expected a tensor, got {type(values).__name__}")
    _check_dense(values)
    return values.detach().cpu()


def contiguous(values: Tensor) -> Tensor:
    """Return ``values`` as a contiguous tensor, with the same memory if they are contiguous."""
    # detached anew: a tensor made in inference mode may not be changed outside of it
    return values.detach().resolve_conj().resolve_neg().contiguous()


def host_output_for(values: Tensor) -> Tensor:
    """Return a contiguous tensor on the CPU, in which a result for ``values`` may be written.

    It shares the memory of ``values`` if these are on the CPU and contiguous, and no conjugate or
    negative of what is in memory; else it is new, and ``copy_back`` has to follow. Raises TypeError
    for a tensor that is not dense.
    """
    _check_dense(values)
    if values.is_cpu and values.is_contiguous() and not values.is_conj() and not values.is_neg():
        return values.detach()
    return torch.empty(values.shape, dtype=values.dtype, device="cpu")


def prepare_outputs(values: object) -> None:
    """Check that results can be written to tensors, in lists of any depth, from any thread.

    Another thread, in a stream of its own, may copy a result into CUDA tensors after that.
    Raises TypeError for a tensor that is not dense, ValueError for one whose values share memory.
    """
    if not isinstance(values, Tensor):
        for each in cast(Sequence[object], values):
            prepare_outputs(each)
        return
    _check_dense(values)
    expanded = [size > 1 and stride == 0 for size, stride in zip(values.shape, values.stride(), strict=True)]
    if values.numel() and any(expanded):
        raise ValueError(
            "expected an output whose values each have memory, got an expanded tensor of shape "
            f"{tuple(values.shape)}: pass its .contiguous()"
        )
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()


def copy_back(host: Tensor, values: Tensor) -> None:
    """Copy ``host`` into ``values``, unless both share their memory."""
    if host.data_ptr() != values.data_ptr() or host.device != values.device:
        with torch.no_grad():
            values.detach().copy_(host.view(values.shape))
        if values.is_cuda:  # a thread that waits for the result may read it in another stream
            torch.cuda.current_stream(values.device).synchronize()


def cat_bytes(tensors: list[Tensor]) -> Tensor:
    """Return the bytes of tensors of one dtype, one after the other, as a new tensor of uint8."""
    # A contiguous tensor of one value or none may have any stride, and then has no view as bytes.
    return torch.cat([contiguous(each).view(-1) for each in tensors]).view(torch.uint8)


def without_overlap(values: Tensor, out: Tensor | None) -> Tensor:
    """Return ``values``, or a copy if they share memory with ``out``.

    They do if a program gathers into a tensor that contains its own shard. MPI forbids that: MPICH
    raises an error, other libraries may send data that they have just received.
    """
    if out is None or not (
        values.data_ptr() < out.data_ptr() + out.nbytes and out.data_ptr() < values.data_ptr() + values.nbytes
    ):
        return values
    return values.clone()


def _check_dense(values: Tensor) -> None:
    if values.layout is not torch.strided:
        raise TypeError(f"expected a dense tensor, got one of layout {values.layout}")
    if values.numel() and not values.data_ptr():
        raise TypeError(
            f"expected a tensor with memory of its own, got a {type(values).__name__}: pass the tensor that "
            "holds its values, such as .to_local() or .full_tensor() of a DTensor"
        )
