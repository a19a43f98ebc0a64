"""Layers under torch.fx, which takes each as one step of a model; torch.jit is refused."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from ..errors import on_rank

__all__ = ["Leaf", "refuse"]

_call_module = nn.Module._call_impl  # a call by super() takes longer


class Leaf(nn.Module):
    """A module that torch.fx does not trace into, as it does not trace into modules of torch.nn."""

    def _call_impl(self, *args: object, **kwargs: object) -> object:
        # This is not done in forward, because hooks must not run while a model is traced.
        if kwargs or len(args) != 1 or args[0].__class__ is not Tensor:  # the usual call needs no loop
            for value in (*args, *kwargs.values()):
                if isinstance(value, Proxy) and isinstance(value.tracer, Tracer):
                    target = value.tracer.path_of_module(self)
                    return value.tracer.create_proxy("call_module", target, args, kwargs)
        return _call_module(self, *args, **kwargs)


def refuse(tool: str, layer: str | None, verb: str = "compile") -> NoReturn:
    """Raise TypeError: a tool such as torch.jit.trace cannot compile a synchronized layer."""
    raise TypeError(
        f"{tool} cannot {verb} what a synchronized layer sends to other ranks"
        f"{f': {layer}' if layer else ''}{on_rank()}. Revert the model or a copy of it first, "
        "mpisyncbn.revert_sync_batchnorm(copy.deepcopy(model))"
    )
