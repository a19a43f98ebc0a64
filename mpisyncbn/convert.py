"""From BatchNorm to SyncBatchNorm and back, in place, so that everything attached to a layer stays on it.

A conversion changes a layer's class and nothing else: hooks, parameters, buffers, extra
attributes, parametrizations and every reference to the layer survive, because it is the same object.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .communicator import resolve
from .errors import on_rank

__all__ = ["BatchNorm", "Synchronized", "convert_sync_batchnorm", "revert_sync_batchnorm"]

# Their behaviour is all in forward, so nothing is lost with their class.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNorm(_BatchNorm):
    """Batch norm of this rank alone for input of any dimension: what reverting makes of a layer
    that was never anything but synchronized."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input, (N, C, *), got {input.ndim}D input{on_rank()}")


class Synchronized(BatchNorm):
    """What conversion writes on a layer, and reverting takes off again."""

    process_group: Any = None
    layer_name: str | None = None  # its qualified name in the converted model
    _converted_from: tuple[type, dict[str, Any]] | None = None  # class, and attributes that were replaced


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None, *, to: type[Synchronized]) -> nn.Module:
    """Turn every ``BatchNorm*d`` (also lazy ones, and ``torch.nn.SyncBatchNorm``) of a model into ``to``.

    Args:
        module: a model, or a single layer.
        process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, or None
            for the world. Layers that are synchronized already get it too.
        to: the class of the new layers.

    Returns:
        ``module`` itself, its layers changed in place.

    Raises:
        TypeError: some layer, named in the message, has a ``forward`` of its own, which would be
            lost. No layer is changed then.

    Not collective.
    """
    group = None if process_group is None else resolve(process_group)
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    _refuse_own_forward(layers)
    _refuse_scripted(module)
    for name, layer in layers:
        if not isinstance(layer, Synchronized):
            original = type(layer)
            replaced = {"process_group": vars(layer)["process_group"]} if "process_group" in vars(layer) else {}
            layer.__class__ = to if original in _KNOWN or original is BatchNorm else _mixed(to, original)
            layer._converted_from = (original, replaced)
        layer.process_group = group
        layer.layer_name = name or None
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Undo ``convert_sync_batchnorm``: every synchronized layer gets back the exact class it had.

    A layer that never was another becomes a ``BatchNorm`` for input of any dimension.

    Args:
        module: a model, or a single layer.

    Returns:
        ``module`` itself, its layers changed in place. Not collective.
    """
    for layer in module.modules():
        if isinstance(layer, Synchronized):
            original, replaced = layer._converted_from or (BatchNorm, {})
            layer.__class__ = _class_before(layer, original)
            for name in ("process_group", "layer_name", "_converted_from"):
                vars(layer).pop(name, None)
            vars(layer).update(replaced)
    return module


def _refuse_own_forward(layers: list[tuple[str, Any]]) -> None:
    known = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
    lost = [
        f"{name or 'the module itself'} ({type(layer).__module__}.{type(layer).__qualname__})"
        for name, layer in layers
        if not isinstance(layer, Synchronized) and (type(layer).forward not in known or "forward" in vars(layer))
    ]
    if lost:
        raise TypeError(
            f"cannot convert layers whose own forward() would be lost: {', '.join(lost)}{on_rank()}. Rewrite such a "
            "layer to call a BatchNorm layer that it holds, or replace it before converting; no layer was changed"
        )


def _refuse_scripted(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name:
            raise TypeError(f"cannot convert {name or 'the module'}: it is compiled by torch.jit; convert before that")


@lru_cache(maxsize=None)
def _mixed(to: type, original: type) -> type:
    """A class that behaves like ``original``, a subclass of some BatchNorm, but has the forward of ``to``."""
    members: dict[str, Any] = {"__reduce_ex__": _reduce_mixed, "__module__": original.__module__, "_mixed": (to, original)}
    if issubclass(original, LazyModuleMixin):
        members["cls_to_become"] = to
    return type(f"{to.__name__}{original.__name__}", (to, original), members)


def _reduce_mixed(layer: Any, protocol: Any) -> tuple[Any, ...]:
    # The class was made at run time, so pickle cannot find it by name: it is made again.
    _, _, *state = super(layer._mixed[0], layer).__reduce_ex__(protocol)
    return (_rebuild, layer._mixed, *state)


def _rebuild(to: type, original: type) -> Any:
    return _mixed(to, original).__new__(_mixed(to, original))


def _class_before(layer: Any, original: type) -> type:
    current = type(layer)
    if issubclass(original, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        original = original.cls_to_become  # has seen its first input in the meantime
    if parametrize.is_parametrized(layer) and getattr(current, "_mixed", None) is None:
        # parametrized after it was converted: the properties move to the original class
        members = {k: v for k, v in vars(current).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        return type(f"Parametrized{original.__name__}", (original,), members)
    return original
