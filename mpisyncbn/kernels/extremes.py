"""Channels whose values are beyond what float32 can compute with: once more, in float64.

The square of 1e-23 is 0 in float32, or has lost its digits; that of 1e23 is infinite. What the loops found
tells which channels may have suffered, and costs nothing to look at. These are copied, as float64, and go
through the same verb again. Float64 input has no such help: its statistics travel as float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import loaded_torch

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]

# Of a variance, and of a product of dy and x - mean: in between, sums in float32 hold their digits.
_LEAST, _MOST = 2.0**-100, 2.0**100
# Of invstd, by which a gradient is multiplied three times.
_SMALL, _LARGE = 2.0**-30, 2.0**30
_FLOAT = 2.0**127


def local_moments(verb: Any, x: Any, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
    """Mend ``mean`` and ``m2``, found by ``verb``. An ``m2`` of 0 says that the channel is constant."""
    with np.errstate(all="ignore"):
        chosen = np.flatnonzero(~((m2 >= count * _LEAST) & (m2 <= count * _MOST)) & (m2 != 0))
    if len(chosen):
        _, found, m2[chosen] = verb(_wide(x, chosen))
        mean[chosen] = found.sum(0)


def normalize(verb: Any, y: Any, x: Any, mean: Any, invstd: Any, weight: Any, bias: Any, *more: Any) -> Any:
    """Mend ``y``. ``more``: the residual, and whether there is a ReLU."""
    chosen = _beyond(invstd, weight)
    if len(chosen):
        vectors = [_some(each, chosen) for each in (mean, invstd, weight, bias)]
        residual, *relu = more
        _put(y, chosen, verb(_wide(x, chosen), *vectors, _wide(residual, chosen), *relu))
    return y


def backward_reduce(verb: Any, sums: np.ndarray, dy: Any, x: Any, mean: Any, invstd: Any, gate: Any) -> None:
    """Mend ``sums``, of dy and of dy * (x - mean)."""
    values = np.prod(x.shape) / x.shape[1]
    with np.errstate(all="ignore"):
        none = (sums == 0).all(0) & _is_ordinary(invstd)
        fine = (np.abs(sums[1]) >= values * _LEAST) & np.isfinite(sums[1])
    chosen = np.flatnonzero(~(none | fine))
    if len(chosen):
        some = mean[chosen], invstd[chosen], _gate(gate, chosen)
        sums[:, chosen] = verb(_wide(dy, chosen), _wide(x, chosen), *some)[:2]


def backward_elementwise(
    verb: Any, dx: Any, dz: Any, x: Any, mean: Any, invstd: Any, weight: Any, means: Any, gate: Any
) -> Any:
    """Mend ``dx``. ``means``: of dy, and of dy * (x - mean)."""
    chosen = _beyond(invstd, weight, means[1])
    if len(chosen):
        vectors = [_some(each, chosen) for each in (mean, invstd, weight, *means)]
        _put(dx, chosen, verb(_wide(dz, chosen), _wide(x, chosen), *vectors, _gate(gate, chosen)))
    return dx


def _is_ordinary(invstd: np.ndarray) -> np.ndarray:
    return (invstd == 0) | ~((invstd < _SMALL) | (invstd > _LARGE))


def _beyond(invstd: np.ndarray, weight: Any, mean_dy_xmu: Any = 0.0) -> np.ndarray:
    """Channels whose numbers, or what comes of them, may be beyond float32. cpu.cpp knows the same rule."""
    with np.errstate(all="ignore"):
        scale = invstd if weight is None else invstd * np.asarray(_double(weight))
        slope = np.where(np.isfinite(mean_dy_xmu), scale * (invstd * (invstd * mean_dy_xmu)), 0.0)
        largest = np.maximum(np.abs(scale), np.abs(slope))
        return np.flatnonzero(~_is_ordinary(invstd) | (largest >= _FLOAT))


def _double(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.detach().double()


def _wide(x: Any, chosen: np.ndarray) -> Any:
    if x is None:
        return None
    if isinstance(x, np.ndarray):
        return _aligned(np.take(np.asarray(x), chosen, 1))
    return _double(x[:, loaded_torch().from_numpy(chosen)])


def _aligned(x: np.ndarray) -> np.ndarray:
    """A float64 copy at a multiple of 64 bytes, as torch has it: the order of sums begins there."""
    memory = np.empty(x.size + 7)
    start = -memory.ctypes.data // 8 % 8
    copy = memory[start : start + x.size].reshape(x.shape)
    copy[...] = x
    return copy


def _some(vector: Any, chosen: np.ndarray) -> Any:
    return None if vector is None else _double(vector)[chosen]


def _gate(gate: Any, chosen: np.ndarray) -> Any:
    if gate is None:
        return None
    return type(gate)(_some(gate.weight, chosen), _some(gate.bias, chosen), _wide(gate.y, chosen))


def _put(out: Any, chosen: np.ndarray, values: Any) -> None:
    if isinstance(out, np.ndarray):
        out[:, chosen] = values
    else:
        out[:, loaded_torch().from_numpy(chosen)] = values.to(out.dtype)
