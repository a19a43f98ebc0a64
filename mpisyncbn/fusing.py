"""Activations that a synchronized layer applies in its own passes over memory."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch.nn.modules.module as torchs
from torch import nn

from . import tracing

__all__ = ["FusedReLU", "fuse", "fused_layers", "fusible_activation", "unfuse"]

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class FusedReLU(tracing.Leaf, nn.Identity):
    """Stands for a ReLU that the layer before it applies. Reverting puts the ReLU back."""

    def __init__(self, layer: nn.Module, relu: nn.Module) -> None:
        super().__init__()
        vars(self).update(_layer=layer, _relu=relu)  # not submodules: the model has none there


def fusible_activation(module: nn.Module) -> str | None:
    """The name of the activation that a module is, if a layer can apply it and no hooks see it."""
    if type(module) is not nn.ReLU or "forward" in vars(module) or _has_hooks(module):
        return None
    return "relu"


def fuse(module: nn.Module, layers: set[nn.Module]) -> None:
    """Let ``layers`` apply the activation that follows them in an nn.Sequential, if hooks see neither."""
    uses = Counter(id(each) for _, each in module.named_modules(remove_duplicate=False))
    for container in module.modules():
        if type(container) is not nn.Sequential:
            continue
        for (_, layer), (name, follower) in pairwise(container._modules.items()):
            if layer is None or follower is None or layer not in layers:
                continue
            activation = fusible_activation(follower)
            if activation and uses[id(layer)] == 1 and not _has_hooks(layer):
                vars(layer)["activation"] = activation
                container._modules[name] = FusedReLU(layer, follower)


def fused_layers(module: nn.Module) -> set[nn.Module]:
    """The layers in a module that apply the activation which followed them."""
    return {vars(each)["_layer"] for each in module.modules() if isinstance(each, FusedReLU)}


def unfuse(module: nn.Module) -> None:
    """Put back the activations that ``fuse`` took, in the children of ``module``."""
    for name, child in module._modules.items():
        if isinstance(child, FusedReLU):
            module._modules[name] = vars(child)["_relu"]


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks see a module run, its own or those of all modules."""
    return any(getattr(module, f"_{hooks}") or getattr(torchs, f"_global_{hooks}") for hooks in _HOOKS)
