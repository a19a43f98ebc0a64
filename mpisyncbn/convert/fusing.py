"""Activations of a model that a synchronized layer applies in its own passes over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from itertools import pairwise

import torch.nn.modules.module as torchs
from torch import nn

from ..activations import HOOKS, activation_of, has_own_hooks, name_of_module
from . import tracing

__all__ = ["FusedActivation", "FusedReLU", "fuse", "fused_layers", "fusible_activation", "unfuse"]


class FusedActivation(tracing.Leaf, nn.Identity):
    """In place of an activation that the layer before it applies. Reverting puts it back."""

    __module__ = "mpisyncbn.convert"  # pickled models refer to it there

    def __init__(self, layer: nn.Module, replaced: nn.Module) -> None:
        super().__init__()
        # They are no submodules: the model has none there.
        vars(self).update(_layer=layer, _replaced=replaced, _activation=layer.activation)

    def __setstate__(self, state: dict[str, object]) -> None:
        if "_relu" in state:  # pickled when it was named FusedReLU
            state.update(_replaced=state.pop("_relu"), _activation="relu")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's is


FusedReLU = FusedActivation  # pickled models may refer to this name


def fusible_activation(module: nn.Module) -> str | None:
    """The text of a module's activation; None if a layer cannot apply it, or hooks see it."""
    return None if _are_global_hooks() else name_of_module(module)


def fuse(module: nn.Module, layers: Container[nn.Module], only: Container[str] | None = None) -> None:
    """Let ``layers`` apply the activation after them in an nn.Sequential, if hooks see neither.

    ``only`` has the texts of the activations that are taken; None takes all. A layer whose output
    then no longer tells its input ceases to be memory-efficient.
    """
    uses = Counter(id(each) for _, each in module.named_modules(remove_duplicate=False))
    for container in module.modules():
        if not _calls_one_after_the_other(container):
            continue
        for (_, layer), (name, follower) in pairwise(container._modules.items()):
            if layer is None or follower is None or layer not in layers or layer.activation:
                continue
            activation = fusible_activation(follower)
            if not activation or (only is not None and activation not in only):
                continue
            if uses[id(layer)] == 1 and not _has_hooks(layer):
                vars(layer)["activation"] = activation
                if layer.memory_efficient:
                    vars(layer)["memory_efficient"] = activation_of(activation).can_be_undone
                container._modules[name] = FusedActivation(layer, follower)


def fused_layers(module: nn.Module) -> dict[nn.Module, str]:
    """The layers in a module that took the activation which followed them, and its text."""
    fused = [vars(each) for each in module.modules() if isinstance(each, FusedActivation)]
    return {each["_layer"]: each["_activation"] for each in fused}


def unfuse(module: nn.Module) -> None:
    """Put back the activations that ``fuse`` took, in the children of ``module``."""
    for name, child in module._modules.items():
        if isinstance(child, FusedActivation):
            replaced: nn.Module = vars(child)["_replaced"]
            module._modules[name] = replaced.train(child.training)


def _calls_one_after_the_other(module: nn.Module) -> bool:
    """Whether a module is an nn.Sequential, or of a class derived from it that runs as it does."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks see a module run, its own or those of all modules."""
    return has_own_hooks(module) or _are_global_hooks()


def _are_global_hooks() -> bool:
    return any(getattr(torchs, f"_global{hooks}") for hooks in HOOKS)
