"""The activations that a layer may end in, by name: what users write, and what kernels take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from .errors import on_rank
from .kernels import NO_ACTIVATION, Activation, Kind, loaded_torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GivenActivation", "activation_of", "name_of"]

# A name such as "relu" or "leaky_relu(0.1)", or a module of torch.nn that stands for it.
GivenActivation: TypeAlias = "str | nn.Module | None"

_BY_NAME: dict[str | None, Activation] = {
    None: NO_ACTIVATION,
    "relu": Activation(Kind.RELU),
    "leaky_relu": Activation(Kind.LEAKY_RELU, 0.01),
    "silu": Activation(Kind.SILU),
    "hardswish": Activation(Kind.HARDSWISH),
    "elu": Activation(Kind.ELU, 1.0),
    "gelu": Activation(Kind.GELU),
    "gelu(tanh)": Activation(Kind.GELU_TANH),
}
_NAMES = [name for name in _BY_NAME if name]  # with torch's defaults
_TAKE_A_NUMBER = ("leaky_relu", "elu")


def activation_of(given: GivenActivation) -> Activation:
    """The activation that a name or a module stands for.

    Raises ValueError for another name, or a parameter that is not a finite number.
    """
    activation = _BY_NAME.get(given) if given is None or isinstance(given, str) else None
    return activation or _BY_NAME[name_of(given)]


def name_of(given: GivenActivation) -> str | None:
    """The name of an activation: its parameter stands in parentheses if it is not torch's default.

    Raises as ``activation_of`` does.
    """
    name, parameter = _parsed(given)
    if name in _TAKE_A_NUMBER and parameter is not None and math.isfinite(parameter):
        if parameter == _BY_NAME[name].parameter:
            return name
        full = f"{name}({parameter})"
        _BY_NAME[full] = Activation(_BY_NAME[name].kind, parameter)
        return full
    if name in _BY_NAME and parameter is None:
        return name
    raise ValueError(
        f"expected activation to be one of {', '.join(map(repr, _NAMES))}, a number in parentheses behind "
        f"{' or '.join(_TAKE_A_NUMBER)}, a module of torch.nn that does the same, or None, got "
        f"{given!r}{on_rank()}"
    )


def _parsed(given: GivenActivation) -> tuple[str | None, float | None]:
    """The name, and the number in parentheses or None. The name is "" if ``given`` is none of them."""
    if given is None:
        return None, None
    if isinstance(given, str):
        name, bracket, number = given.partition("(")
        if name not in _TAKE_A_NUMBER or not bracket:
            return given, None
        try:
            return (name, float(number[:-1])) if number.endswith(")") else ("", None)
        except ValueError:
            return "", None
    torch = loaded_torch()
    nn = torch and torch.nn
    if nn is None or "forward" in getattr(given, "__dict__", ()):
        return "", None
    if type(given) is nn.LeakyReLU:
        return "leaky_relu", float(vars(given)["negative_slope"])
    if type(given) is nn.ELU:
        return "elu", float(vars(given)["alpha"])
    if type(given) is nn.GELU:
        return ("gelu(tanh)" if given.approximate == "tanh" else "gelu"), None
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
    return names.get(type(given), ""), None
