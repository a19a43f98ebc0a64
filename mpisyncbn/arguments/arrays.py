"""Checks of the kinds of arrays: kernels must read their values, and sums must be plain sums."""

from __future__ import annotations

import sys

import numpy as np

from ..errors import on_rank
from ..kernels import Array, loaded_torch

__all__ = ["COUNTING", "FLOATING", "check_array", "check_kind", "dtype_name", "on_device"]

FLOATING = ("float16", "bfloat16", "float32", "float64")
COUNTING = ("int8", "int16", "int32", "int64", "uint8", *FLOATING)

_COUNTS = "counts in the statistics"
# The names of tensor classes that hold their values in other tensors, and the cure.
_WRAPPERS = {
    "DTensor": "pass the part of this rank, .to_local(), or all of it, .full_tensor()",
    "MaskedTensor": "leave those samples out, or fill them first, .to_tensor(value); what fills them "
    f"{_COUNTS}",
    "nested tensor": f"pass its .values(), or .to_padded_tensor(value); what pads it {_COUNTS}",
    "quantized tensor": "convert it first, .dequantize()",
}


def check_array(label: str, value: Array) -> None:
    """Check that ``value`` is an array whose values are in memory, with or without strides."""
    if not hasattr(value, "ndim") or not hasattr(value, "dtype"):
        raise TypeError(
            f"expected {label} to be an array, got {type(value).__name__}{on_rank()}: convert it first, "
            "numpy.asarray() or torch.tensor()"
        )
    if hasattr(value, "is_cpu"):
        _check_tensor(label, value)
    elif isinstance(value, np.ndarray):
        _check_numpy(label, value)
    elif not isinstance(value, getattr(sys.modules.get("cupy"), "ndarray", ())):
        # Arrays of other libraries have other methods, and their values may be elsewhere.
        raise TypeError(
            f"expected {label} to be an array of NumPy, CuPy or torch, got {type(value).__module__}."
            f"{type(value).__qualname__}{on_rank()}: convert it first, numpy.asarray()"
        )


def check_kind(label: str, value: Array, whose: str, like: Array) -> None:
    """Check that ``value`` is an array, and one of torch exactly if ``like`` is."""
    if not hasattr(value, "ndim") or hasattr(value, "is_cpu") != hasattr(like, "is_cpu"):
        raise TypeError(
            f"expected {label} to be {type(like).__name__} like {whose}, got {type(value).__name__}"
            f"{on_rank()}: convert it first"
        )
    check_array(label, value)


def _check_numpy(label: str, value: Array) -> None:
    """Refuse subclasses of NumPy arrays that mean something else by ``sum`` or ``*``."""
    if hasattr(type(value), "mask"):  # numpy.ma's, and those of other libraries
        raise TypeError(
            f"expected {label} to be a plain array, got a masked one, {type(value).__name__}{on_rank()}: "
            f"leave those samples out, or fill them first, .filled(); what fills them {_COUNTS}"
        )
    if isinstance(value, np.matrix):
        raise TypeError(
            f"expected {label} to be a plain array, got a matrix{on_rank()}: convert it first, "
            "numpy.asarray()"
        )


def _check_tensor(label: str, value: Array) -> None:
    kind = type(value).__name__
    kind = "nested tensor" if value.is_nested else "quantized tensor" if value.is_quantized else kind
    if kind in _WRAPPERS:
        raise TypeError(f"expected {label} to be a plain tensor, got a {kind}{on_rank()}: {_WRAPPERS[kind]}")
    if value.layout is not loaded_torch().strided:
        raise TypeError(
            f"expected {label} to be a dense tensor, got one of layout {value.layout}{on_rank()}: "
            "convert it first, .to_dense()"
        )
    if not _has_values(value):
        raise TypeError(
            f"expected {label} to be a plain tensor, got a {type(value).__module__}.{kind}, which has no "
            f"memory of its own{on_rank()}: pass a tensor that holds its values"
        )


def _has_values(value: Array) -> bool:
    """Whether a tensor, or a copy of it, has its values in memory."""
    torch = loaded_torch()
    cls = type(value)
    if cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or torch.compiler.is_compiling():
        return True
    if value.is_meta or cls.__module__.startswith("torch._subclasses"):  # shapes alone, on purpose
        return True
    try:
        return value.numel() == 0 or value.data_ptr() != 0 or type(value[:1].clone()) is torch.Tensor
    except RuntimeError:  # "cannot access data pointer of Tensor that doesn't have storage"
        return False


def dtype_name(dtype: object) -> str:
    """``float32`` for ``torch.float32`` and ``numpy.dtype("float32")`` alike."""
    return str(dtype).rpartition(".")[2]


def on_device(array: Array) -> str:
    """The end of words for an array: `` on cuda:0``, or empty for NumPy's."""
    return "" if isinstance(array, np.ndarray) else f" on {array.device}"
