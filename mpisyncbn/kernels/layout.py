"""Layouts of torch tensors in memory: without gaps, and with channels outermost or innermost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_of", "dense", "rows", "with_strides_of"]


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy, without gaps and with channels outermost or innermost in each sample."""
    x = x.resolve_neg()
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    x = x.clone(memory_format=torch.preserve_format)
    return x if x.movedim(1, -1).is_contiguous() else x.contiguous()


def with_strides_of(x: Tensor, values: Tensor) -> Tensor:
    """``values``, or a copy, with the strides of ``x``, which is of the same shape and dense."""
    values = values.resolve_neg()
    same = values.stride() == x.stride() or (values.is_contiguous() and x.is_contiguous())
    return values if same else torch.empty_like(x, dtype=values.dtype).copy_(values)


def rows(x: Tensor) -> Tensor:
    """A view of shape ``(*, C)`` of a dense tensor whose channels lie side by side."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def channels_of(matrix: Tensor, x: Tensor) -> Tensor:
    """A view in the shape of ``x`` of a matrix of shape ``(*, C)``. It undoes ``rows``."""
    return matrix.view(x.movedim(1, -1).shape).movedim(-1, 1)
