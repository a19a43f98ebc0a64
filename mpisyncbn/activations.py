"""The activations that a layer may end in, as users write them: a text, or a module of torch.nn."""

from __future__ import annotations

import math
from typing import TypeAlias

from torch import nn

from .errors import on_rank
from .kernels import NO_ACTIVATION, Activation, Kind

__all__ = ["HOOKS", "AnyActivation", "activation_of", "has_own_hooks", "name_of", "name_of_module"]

# "relu" or "leaky_relu(0.1)", for example, or a module of torch that computes the same, or None.
AnyActivation: TypeAlias = "str | nn.Module | None"

_BY_NAME = {  # with torch's defaults
    "relu": Activation(Kind.RELU),
    "leaky_relu": Activation(Kind.LEAKY_RELU, 0.01),
    "silu": Activation(Kind.SILU),
    "hardswish": Activation(Kind.HARDSWISH),
    "elu": Activation(Kind.ELU, 1.0),
    "gelu": Activation(Kind.GELU),
    "gelu(tanh)": Activation(Kind.GELU_TANH),
}
_NAMES = {activation.kind: name for name, activation in _BY_NAME.items()}
_PARAMETERS = {"leaky_relu": "negative_slope", "elu": "alpha"}  # as torch's modules name them
_BY_CLASS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.ELU: "elu",
    nn.GELU: "gelu",
}
_TIMM = {"Swish": "silu", "HardSwish": "hardswish", "GELU": "gelu", "GELUTanh": "gelu(tanh)"}
_BY_CLASS_NAME = {
    **{f"timm.layers.activations.{cls}": name for cls, name in _TIMM.items()},
    **{f"timm.layers.activations_me.{cls}Me": _TIMM[cls] for cls in ("Swish", "HardSwish")},
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def activation_of(activation: AnyActivation) -> Activation:
    """Return the Activation that the kernels take for a text or a module.

    Raises ValueError for another text, class or value, for a parameter that is not a finite number,
    and for a module that has hooks or a ``forward`` of its own, which a layer would not call.
    """
    if activation is None:
        return NO_ACTIVATION
    found = _of_text(activation) if isinstance(activation, str) else _of_module(activation)
    if found is None:
        raise ValueError(
            f"expected activation to be one of {', '.join(map(repr, _BY_NAME))}, a finite number in "
            f"parentheses behind {' or '.join(_PARAMETERS)}, a module of torch.nn without hooks that does "
            f"the same, or None, got {activation!r}{on_rank()}"
        )
    return found


def name_of(activation: AnyActivation) -> str | None:
    """The text of an activation, with its parameter in parentheses if it is not torch's default.

    Raises ValueError as ``activation_of`` does.
    """
    found = activation_of(activation)
    return None if found == NO_ACTIVATION else _text_of(found)


def name_of_module(module: nn.Module) -> str | None:
    """The text of the activation that a module computes; None if a layer cannot do all of it."""
    activation = _of_module(module)
    return None if activation is None else _text_of(activation)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run with its forward or backward."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def _text_of(activation: Activation) -> str:
    name = _NAMES[activation.kind]
    return name if activation == _BY_NAME[name] else f"{name}({activation.parameter})"


def _of_text(text: str) -> Activation | None:
    if text in _BY_NAME:
        return _BY_NAME[text]
    name, _, number = text.partition("(")
    if name not in _PARAMETERS or not number.endswith(")"):
        return None
    return _with_parameter(name, number[:-1])


def _of_module(module: nn.Module) -> Activation | None:
    cls = type(module)
    name = _BY_CLASS.get(cls) or _BY_CLASS_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    if name is None or "forward" in vars(module) or has_own_hooks(module):
        return None
    if name in _PARAMETERS:
        return _with_parameter(name, getattr(module, _PARAMETERS[name]))
    if cls is nn.GELU:
        name = {"none": "gelu", "tanh": "gelu(tanh)"}.get(str(module.approximate), "")
    return _BY_NAME.get(name)


def _with_parameter(name: str, number: str | float) -> Activation | None:
    try:
        parameter = float(number)
    except (TypeError, ValueError):
        return None
    return _BY_NAME[name]._replace(parameter=parameter) if math.isfinite(parameter) else None
