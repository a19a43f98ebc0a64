"""Odd arguments: values that are almost the tensor, array or number that a function expects."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from support.ranks import WORLD

Odd = dict[str, Callable[[], Any]]


class OfTensor(Tensor):
    pass


class OfArray(np.ndarray):
    pass


def tensors(good: Tensor) -> Odd:
    """Values that are almost a tensor like ``good``."""
    longer = (*good.shape, 2)
    with torch.inference_mode():
        inference = good.clone()
    odd: Odd = {
        "requires grad": lambda: good.clone().requires_grad_(),
        "of a graph": lambda: good.clone().requires_grad_() * 1,
        "inference": lambda: inference,
        "parameter": lambda: nn.Parameter(good.clone()),
        "subclass": lambda: good.clone().as_subclass(OfTensor),
        "meta": lambda: good.to("meta"),
        "sparse": lambda: good.to_sparse(),
        "sparse rows": lambda: good.reshape(len(good), -1).to_sparse_csr(),
        "transposed": lambda: good.clone().movedim(0, -1),
        "strided": lambda: good.repeat_interleave(2, -1)[..., ::2],
        "overlapping": lambda: good[:1].expand(good.shape),
        "one value for all": lambda: good.flatten()[0].clone().expand(good.shape),
        "conjugate": lambda: good.to(torch.complex64).conj(),
        "negative": lambda: good.to(torch.complex64).conj().imag,
        "0-d": lambda: torch.tensor(1.0),
        "1-d": lambda: good.flatten()[:1].clone(),
        "longer": lambda: good.repeat(*[1] * (good.ndim - 1), 2),
        "more dimensions": lambda: good.unsqueeze(-1).expand(longer).clone(),
        "no batch": lambda: good[:0].clone(),
        "nothing": lambda: good[..., :0].clone(),
        "NaN": lambda: good * math.nan,
        "infinite": lambda: good + math.inf,
        "huge": lambda: good.new_full(good.shape, torch.finfo(good.dtype).max),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        odd[str(dtype)] = lambda dtype=dtype: good.to(dtype)
    if torch.backends.mkldnn.is_available():
        odd["mkldnn"] = lambda: good.float().to_mkldnn()
    odd["torch.float8"] = lambda: good.to(torch.float8_e4m3fn)
    return odd


def arrays(good: np.ndarray) -> Odd:
    """Values that are almost an array like ``good``."""
    records = np.dtype([("a", "f4"), ("b", "f4")])

    def readonly() -> np.ndarray:
        values = good.copy()
        values.flags.writeable = False
        return values

    odd: Odd = {
        "read-only": readonly,
        "broadcast": lambda: np.broadcast_to(good[:1], good.shape),
        "reversed": lambda: good[::-1],
        "transposed": lambda: np.moveaxis(good.copy(), 0, -1),
        "Fortran": lambda: np.asfortranarray(good),
        "unaligned": lambda: np.frombuffer(b"x" + good.tobytes(), good.dtype, offset=1).reshape(good.shape),
        "subclass": lambda: good.copy().view(OfArray),
        "masked": lambda: np.ma.masked_array(good.copy(), good > 1),
        "matrix": lambda: np.asmatrix(good.reshape(len(good), -1)),
        "objects": lambda: good.astype(object),
        "words": lambda: good.astype(str),
        "bytes": lambda: good.astype("S8"),
        "dates": lambda: good.astype(int).astype("M8[s]"),
        "records": lambda: np.zeros(good.shape, records),
        "0-d": lambda: np.array(1.0, good.dtype),
        "scalar": lambda: np.float32(1.0),
        "longer": lambda: np.concatenate((good, good)),
        "more dimensions": lambda: np.stack((good, good), -1),
        "no batch": lambda: good[:0],
        "nothing": lambda: good[..., :0],
        "NaN": lambda: good * math.nan,
        "huge": lambda: np.full_like(good, np.finfo(good.dtype).max),
    }
    for code in (">f4", ">f8", "f2", "g", "i8", "u1", "?", "c8"):
        odd[f"dtype {code}"] = lambda code=code: good.astype(code)
    return odd


def objects() -> Odd:
    freed = WORLD.Dup()
    freed.Free()
    return {
        "None": lambda: None,
        "object": object,
        "class": lambda: Tensor,
        "function": lambda: len,
        "word": lambda: "relu or what",
        "bytes": lambda: b"x",
        "list": lambda: [1.0, 2.0, 3.0],
        "nested list": lambda: [[1.0, 2.0, 3.0]] * 4,
        "dict": lambda: {"a": 1},
        "iterator": lambda: iter([0]),
        "ellipsis": lambda: ...,
        "freed communicator": lambda: freed,
        "no communicator": lambda: MPI.COMM_NULL,
        "MPI group": lambda: WORLD.group,
        "MPI datatype": lambda: MPI.DOUBLE,
        "module": lambda: nn.Linear(3, 3),
    }


def activations() -> Odd:
    """Texts and modules that are almost an activation, or are one in an unusual form."""
    texts = (
        *("", "relu(1)", "ReLU", " relu", "silu(", "gelu(none)", "leaky_relu()", "leaky_relu(0.1", "elu(x)"),
        *("elu(nan)", "elu(inf)", "elu(1e400)", "elu(0.5))", "elu( .5 )", "leaky_relu(-0.0)", "elu(1_0)"),
    )
    odd: Odd = {repr(text): lambda text=text: text for text in texts}
    hooked, replaced, derived = nn.ReLU(), nn.ReLU(), type("Derived", (nn.ReLU,), {})
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    modules = (
        *(nn.ReLU6(), nn.Identity(), nn.CELU(), nn.PReLU(), nn.RReLU(), nn.Sequential(nn.ReLU()), derived()),
        *(nn.GELU("what"), nn.LeakyReLU("slope"), nn.ELU([1.0]), nn.ELU(float("inf"))),  # type: ignore[arg-type]
    )
    odd |= {str(module): lambda module=module: module for module in modules}
    return odd | {
        "hooked": lambda: hooked,
        "replaced": lambda: replaced,
        "a class": lambda: nn.ReLU,
        "a function": lambda: nn.functional.relu,
    }


def numbers() -> Odd:
    values = (
        *(0, 1, -1, 2**70, -0.0, 1e-45, 0.5, 1.5, -0.5, 1e300, math.nan, math.inf, -math.inf, True, 1j),
        *(np.float32(0.5), np.float64(math.nan), np.int8(-3), np.bool_(True), np.array(0.5), np.ones(3)),
        *(torch.tensor(0.5), torch.tensor(math.nan), torch.ones(3)),
        *(Fraction(1, 3), timedelta(seconds=1), "0.1"),
    )
    return {repr(value): lambda value=value: copy.copy(value) for value in values}
