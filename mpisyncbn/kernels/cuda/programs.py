"""The compiled kernels of a layer's two directions, for native code to start in one call each.

A program is made once for each kind of input. It holds compiled kernels with their sizes; the
pointers of a call are numbered by ``Forward`` and ``Backward``. See enqueued.py for its use.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction

from ..activation import NO_ACTIVATION, Activation
from ..cpu import Launches
from ..layout import dense, with_strides_of
from ..protocol import Running
from . import _constants, _device_of, _elements, _planned, elementwise, moments, plans, running_stats, sums
from .plans import Plan

__all__ = ["Backward", "Forward", "Program", "backward_program", "forward_program"]

_VALUE, _MESSAGE = -1, -2  # places of arguments that are not pointers of a call: see _cpu.pyi
_MASK_64 = (1 << 64) - 1

Given = tuple[int, tuple[int, ...], int, int, list[tuple[int, int]]]  # a kernel, as Launches takes it


class Forward(IntEnum):
    """The places of the pointers of a forward call."""

    X = 0
    Y = 1
    WEIGHT = 2
    BIAS = 3
    RESIDUAL = 4
    PARTIALS = 5
    MEAN = 6
    VAR = 7
    INVSTD = 8
    MORE = 9  # count, count / (count - 1), and whether running statistics may take the batch
    RUNNING_MEAN = 10
    RUNNING_VAR = 11
    NUM_BATCHES_TRACKED = 12


class Backward(IntEnum):
    """The places of the pointers of a backward call."""

    DY = 0
    X = 1
    Y = 2
    RESIDUAL = 3
    DZ = 4
    MEAN = 5
    INVSTD = 6
    WEIGHT = 7
    BIAS = 8
    PARTIALS = 9
    SUMS = 10
    DX = 11
    MEAN_DY = 12
    MEAN_DY_XMU = 13
    DWEIGHT = 14
    DBIAS = 15


class Program(NamedTuple):
    """The kernels before and after the exchange, and the room that partial results need."""

    before: Launches
    after: Launches
    partials: int  # float64 values of memory


_programs: dict[Hashable, Program | None] = {}


def forward_program(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    running: Running | None,
    description: Hashable,
) -> Program | None:
    """The kernels of a forward pass, and of the update of running statistics.

    ``description`` is that of x, the vectors, the residual and the running statistics, even if
    these are not updated here. Returns None if ``x`` is empty, or if the kernels cannot read a
    tensor as it is, so that it has to be copied.
    """
    key = description, activation, None if running is None else running.momentum
    try:
        return _programs[key]
    except KeyError:
        readable = _are_readable(x, (x, residual), (weight, bias))
        with _device_of(x):
            made = _make_forward(x, residual, weight, bias, activation, running) if readable else None
        return _keep(key, made)


def backward_program(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation,
    parameters: tuple[torch.dtype | None, torch.dtype | None],
    description: Hashable,
) -> Program | None:
    """The kernels of a backward pass, which store ``dz`` if ``y`` or the residual is given.

    ``parameters`` are the dtypes of the gradients of weight and bias, None for one that is not
    needed. ``description`` is that of the tensors. Returns None as ``forward_program`` does.
    """
    key = description, activation, parameters
    try:
        return _programs[key]
    except KeyError:
        readable = _are_readable(x, (x, dy, y, residual), (weight, bias))
        tensors = x, dy, y, residual, weight, bias
        with _device_of(x):
            made = _make_backward(*tensors, activation, parameters) if readable else None
        return _keep(key, made)


def _keep(key: Hashable, made: Program | None) -> Program | None:
    if len(_programs) >= 4096:  # a model has fewer: the shapes of its data have come and gone
        _programs.clear()
    return _programs.setdefault(key, made)


def _are_readable(x: Tensor, like_x: Sequence[Tensor | None], vectors: Sequence[Tensor | None]) -> bool:
    same = x.numel() > 0 and dense(x) is x
    for each in like_x:
        same = same and (each is None or with_strides_of(x, each) is each)
    return same and all(each is None or (each.is_contiguous() and not each.is_neg()) for each in vectors)


def _make_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation,
    running: Running | None,
) -> Program:
    at, plan, vector = Forward, _planned(x)[1], _vector_of(x)
    partials = vector if plan.shares > 1 else None
    pointers = [(x, at.X), (partials, at.PARTIALS), (vector, _MESSAGE)]
    before = [_given(moments.moments, plan, pointers, {"ONE": plan.one})]
    if partials is not None:
        merge = plans.plan_merge(plan.shares, x.shape[1])
        constants = {"SPLIT_MEAN": x.dtype == torch.float64}
        before.append(_given(moments.merge_moments, merge, pointers[1:], constants))
    vectors = [(vector, at.MEAN), (vector, at.INVSTD), (weight, at.WEIGHT), (bias, at.BIAS)]
    tensors = [(x, at.X), (residual, at.RESIDUAL), (x.new_empty(1), at.Y), *vectors]
    after = [_given(elementwise.normalize, _elements(x), tensors, _constants(activation))]
    if running is not None:
        plan_running = plans.plan_running_stats(x.shape[1], running.momentum)
        pointers = [
            (running.mean, at.RUNNING_MEAN),
            (running.var, at.RUNNING_VAR),
            (running.num_batches_tracked, at.NUM_BATCHES_TRACKED),
            (vector, at.MEAN),
            (vector[x.shape[1] % 2 :], at.VAR),  # it lies C values after an aligned address
            (vector[1:], at.MORE),
        ]
        after.append(_given(running_stats.record_enqueued, plan_running, pointers, {}))
    return Program(
        Launches(before), Launches(after), 4 * plan.shares * x.shape[1] if partials is not None else 0
    )


def _make_backward(
    x: Tensor,
    dy: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation,
    parameters: tuple[torch.dtype | None, torch.dtype | None],
) -> Program:
    at, plan, vector = Backward, _planned(x)[1], _vector_of(x)
    stores_dz = y is not None or residual is not None
    dz = x.new_empty(1) if stores_dz else None
    statistics = [(vector, at.MEAN), (vector, at.INVSTD), (weight, at.WEIGHT)]
    partials = vector if plan.shares > 1 else None
    tensors = [(dy, at.DY), (x, at.X), (y, at.Y), (residual, at.RESIDUAL), (dz, at.DZ), *statistics]
    tensors += [(bias, at.BIAS), (partials, at.PARTIALS), (vector, at.SUMS)]
    before = [_given(sums.backward_sums, plan, tensors, _constants(activation))]
    if partials is not None:
        merge = plans.plan_merge(plan.shares, 2 * x.shape[1])
        before.append(_given(sums.merge_sums, merge, [(vector, at.PARTIALS), (vector, at.SUMS)], {}))
    again = NO_ACTIVATION if stores_dz else activation
    tensors = [(dy if dz is None else dz, at.DY if dz is None else at.DZ), (x, at.X), (x.new_empty(1), at.DX)]
    tensors += [*statistics, (None if stores_dz else bias, at.BIAS)]
    tensors += [(vector, at.MEAN_DY), (vector[x.shape[1] % 2 :], at.MEAN_DY_XMU)]
    after = [_given(elementwise.backward_elementwise, _elements(x), tensors, _constants(again))]
    dweight, dbias = (None if dtype is None else x.new_empty(1, dtype=dtype) for dtype in parameters)
    if dweight is not None or dbias is not None:
        pointers = [(vector, at.SUMS), (vector, at.INVSTD), (dweight, at.DWEIGHT), (dbias, at.DBIAS)]
        after.append(_given(sums.parameter_gradients, plans.plan_vector(x.shape[1]), pointers, {}))
    return Program(
        Launches(before), Launches(after), 2 * plan.shares * x.shape[1] if partials is not None else 0
    )


def _vector_of(x: Tensor) -> Tensor:
    """A float64 vector of two values, from which the compiler learns dtype and alignment."""
    return x.new_empty(2, dtype=torch.float64)


def _given(
    kernel: JITFunction, plan: Plan, pointers: Sequence[tuple[Tensor | None, int]], constants: dict[str, Any]
) -> Given:
    """Compile a kernel for Launches. The tensors of ``pointers`` give dtypes and alignments."""
    tensors = [tensor for tensor, _ in pointers]
    compiled: Any = kernel.warmup(*tensors, *plan.sizes, grid=plan.grid, **plan.options, **constants)
    compiled.run  # noqa: B018  (loads it)
    values = [*((place, 0) for _, place in pointers), *((_VALUE, size & _MASK_64) for size in plan.sizes)]
    signature = compiled.src.signature
    arguments = [
        (int(place), value)
        for name, (place, value) in zip(kernel.arg_names, values, strict=False)
        if signature[name] != "constexpr"
    ]
    # Triton appends pointers to scratch memory, which these kernels do not use.
    entry = re.search(r"\.entry[^(]*\(([^)]*)\)", compiled.asm["ptx"])
    parameters = entry[1].count(".param") if entry else len(arguments)
    if len(arguments) > parameters:  # this Triton leaves out others than its signature says
        raise RuntimeError(f"{compiled.name} has {parameters} parameters for {len(arguments)} arguments")
    arguments += [(_VALUE, 0)] * (parameters - len(arguments))
    metadata = compiled.metadata
    return compiled.function, plan.grid, 32 * metadata.num_warps, metadata.shared, arguments
