"""Checks before a conversion, which raise before anything is changed, and its warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..errors import on_rank
from .mixed_class import changes_forward, synchronized_class
from .registry import full_name, has_own_forward, registered_forward

if TYPE_CHECKING:
    from . import Synchronized

__all__ = [
    "check_name",
    "derived_class",
    "refuse_lost_activation",
    "refuse_lost_forward",
    "refuse_own_forward",
    "refuse_replacement",
    "refuse_scripted",
    "refuse_taken_names",
    "warn_of_others",
]
_CONVERTERS = ("convert_sync_batchnorm", "convert_syncbn_model")


def check_name(name: object, label: str = "name", cure: str = "") -> None:
    """Raise TypeError or ValueError for a bad name of a model or layer. It may be None."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"expected {label} to be a str or None, got {type(name).__name__}{on_rank()}{cure}")
    if name is not None and (not name or name.startswith("#")):
        raise ValueError(
            f"expected a {label}, not empty and not with a # first, got {name!r}{on_rank()}{cure}"
        )


def refuse_own_forward(layers: list[tuple[str, _BatchNorm]]) -> None:
    """Raise TypeError if layers have a ``forward`` of their own that is not registered."""
    lost = [(name, full_name(type(layer))) for name, layer in layers if _loses_forward(layer)]
    if lost:
        raise TypeError(
            f"cannot convert layers whose own forward() would be lost: {_by_reason(lost)}{on_rank()}. Say "
            "what it does with mpisyncbn.register_conversion, or rewrite such a layer to call a BatchNorm "
            "layer that it holds, or replace it before converting; no layer was changed"
        )


def derived_class(to: type[Synchronized], original: type[_BatchNorm], layer: str) -> type[Synchronized]:
    """The class for a layer of this name. Raises TypeError if none can be derived from its own."""
    try:
        return synchronized_class(to, original)
    except Exception as error:  # from an __init_subclass__ or a metaclass
        raise TypeError(
            f"cannot convert {_label_of(layer)}: no class can be derived from {to.__name__} and "
            f"{full_name(original)}: {error}{on_rank()}. Let that class take any subclass, or "
            "replace the layer before converting; no layer was changed"
        ) from error


def refuse_lost_activation(layers: dict[Synchronized, str], fused: Mapping[nn.Module, str]) -> None:
    """Raise TypeError if layers, given with names, have another activation than reverting restores.

    ``fused`` has the texts of the activations that it puts back.
    """
    lost = []
    for layer, name in layers.items():
        restored = fused.get(layer)
        if layer.activation != restored:
            instead = f", where reverting restores {restored}" if restored else ""
            lost.append(f"{_label_of(name)} ({layer.activation}{instead})")
    if lost:
        raise TypeError(
            f"cannot revert layers whose activation would be lost: {_abbreviated(lost)}{on_rank()}. Put a "
            "module that does it, such as nn.ReLU, behind each of them, in place of a FusedActivation, and "
            "set their activation to None; no layer was changed"
        )


def refuse_lost_forward(layers: dict[Synchronized, str]) -> None:
    """Raise TypeError if layers, given with names, have a ``forward`` that would be lost.

    A converted layer gets back the forward that it had.
    """
    lost = [
        (name, full_name(type(layer)))
        for layer, name in layers.items()
        if _is_replaced(layer) or (layer._converted_from is None and changes_forward(type(layer)))
    ]
    if lost:
        raise TypeError(
            f"cannot revert layers whose own forward() would be lost: {_by_reason(lost)}{on_rank()}. Put "
            "what it does in a module that holds a SyncBatchNorm, or replace the layer, before reverting; "
            "for a forward set on the layer alone, del layer.forward; no layer was changed"
        )


def _is_replaced(layer: Synchronized) -> bool:
    """Whether this layer has another forward than its class. Tools may have set it to the same."""
    own = vars(layer).get("forward")
    return own is not None and own != type(layer).forward.__get__(layer)


def refuse_taken_names(layers: list[tuple[str, _BatchNorm]], needed: Set[str]) -> None:
    """Raise TypeError for layers with members of the names that a synchronized layer needs.

    Reverting restores the exceptions: a name that a tool gave the layer, and torch's process group.
    """
    taken = []
    for path, layer in layers:
        restored = {"layer_name", "process_group"} if isinstance(layer, nn.SyncBatchNorm) else {"layer_name"}
        # A lazy layer becomes one of another class.
        members = {*dir(layer), *dir(getattr(layer, "cls_to_become", None))} - (vars(layer).keys() & restored)
        taken += [(path, name) for name in sorted(needed & members)]
    if taken:
        raise TypeError(
            f"cannot convert layers whose own members would be hidden: {_by_reason(taken)}{on_rank()}. "
            "A synchronized layer has attributes of these names; rename yours; no layer was changed"
        )


def _loses_forward(layer: nn.Module) -> bool:
    classes = [type(layer), getattr(layer, "cls_to_become", None)]  # a lazy layer becomes another
    return "forward" in vars(layer) or any(
        cls is not None and has_own_forward(cls) and registered_forward(cls) is None for cls in classes
    )


def refuse_scripted(module: nn.Module) -> None:
    """Raise TypeError if torch.jit has compiled a batch norm in the model."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name:
            raise TypeError(
                f"cannot convert {_label_of(name)}: it is compiled by torch.jit{on_rank()}. "
                "Convert the model before compiling it; no layer was changed"
            )


def refuse_replacement(caller: FrameType, layer: str | None) -> None:
    """Raise TypeError if ``caller``, which asks a layer for its children, is another converter.

    A converter of torch, timm or apex takes any ``_BatchNorm`` for a local one, makes a layer of
    its own from it, and asks for the children last.
    """
    library = caller.f_globals.get("__name__", "").partition(".")[0]
    if caller.f_code.co_name in _CONVERTERS and library in ("torch", "timm", "apex"):
        by = " (sync_batchnorm=True of Lightning's Trainer makes it)" if library == "torch" else ""
        raise TypeError(
            f"{library}'s {caller.f_code.co_name} would replace a layer that mpisyncbn synchronizes"
            f"{f', {layer},' if layer else ''} by one that does not use MPI{on_rank()}: leave that call{by} "
            "out, or revert the model first, mpisyncbn.revert_sync_batchnorm(model)"
        )


def warn_of_others(module: nn.Module) -> None:
    """Warn of batch norms in the model that are not torch's: they stay local to each rank."""
    others = []
    for name, each in module.named_modules():
        cls = parametrize.type_before_parametrizations(each)
        named = [kind.__name__ for kind in cls.__mro__]
        # Its own tensors only: a wrapper may show those of a layer in it, which is converted.
        own = {
            **vars(each),
            **dict(each.named_parameters(recurse=False)),
            **dict(each.named_buffers(recurse=False)),
        }
        if (
            isinstance(own.get("running_mean"), torch.Tensor)
            and any("BatchNorm" in kind for kind in named)
            and not any("Frozen" in kind for kind in named)  # these use no batch statistics
            and not isinstance(each, _BatchNorm)
        ):
            others.append(f"{_label_of(name)} ({cls.__module__}.{cls.__qualname__})")
    if others:
        warnings.warn(
            "layers that are no BatchNorm of torch's stay local to each rank: "
            f"{', '.join(others)}{on_rank()}. Replace them, or let them call mpisyncbn.sync_batch_norm",
            stacklevel=4,
        )


def _by_reason(layers: list[tuple[str, str]]) -> str:
    """For each reason, the name of one layer, and how many more there are."""
    names: dict[str, list[str]] = {}
    for name, reason in layers:
        names.setdefault(reason, []).append(_label_of(name))
    return ", ".join(f"{_abbreviated(some)} ({reason})" for reason, some in names.items())


def _abbreviated(names: list[str]) -> str:
    """The first name, and how many more there are: a model may have hundreds."""
    return names[0] if len(names) == 1 else f"{names[0]}, and {len(names) - 1} more"


def _label_of(name: str) -> str:
    """The words of an error for the module with this name; it is empty for the model itself."""
    return name or "the module itself"
