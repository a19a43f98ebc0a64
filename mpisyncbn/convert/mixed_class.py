"""The classes of converted layers, derived from SyncBatchNorm and the layer's own class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..activations import AnyActivation, activation_of
from ..errors import on_rank
from ..kernels.activation import activate
from .registry import Forward, has_own_forward, registered_forward

if TYPE_CHECKING:
    from . import Synchronized

__all__ = ["changes_forward", "rebuild", "synchronized_class"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # these print as SyncBatchNorm alone


def synchronized_class(to: type[Synchronized], original: type[_BatchNorm]) -> type[Synchronized]:
    """The class that a layer of the class ``original`` is converted to."""
    # DistributedDataParallel refuses instances of torch's SyncBatchNorm on CPUs.
    return to if original is nn.SyncBatchNorm or original in to.__mro__ else _mixed(to, original)


def _mixed(to: type[Synchronized], original: type[_BatchNorm]) -> type[Synchronized]:
    """A class that behaves like ``original``, a BatchNorm, but normalizes as ``to`` does."""
    forward = registered_forward(original)
    bases = (to,) if forward and _adds_no_more_than_forward(original, nn.SyncBatchNorm) else (to, original)
    made_of = (to, original, forward)
    for cls in bases[-1].__subclasses__():  # Python drops classes there that are no longer used
        if vars(cls).get("_made_of") == made_of:
            return cast("type[Synchronized]", cls)
    members = {"__module__": original.__module__, "__reduce_ex__": _reduce_mixed, "_made_of": made_of}
    if forward is not None:
        batch_norm_of = _normalizer(to)
        members["forward"] = lambda self, *args, **kwargs: forward(self, batch_norm_of(self), *args, **kwargs)
    elif has_own_forward(original):
        raise TypeError(
            f"cannot make a synchronized {original.__module__}.{original.__qualname__}: its own forward() is "
            f"not registered{on_rank()}. Call mpisyncbn.register_conversion before loading, as the program "
            "that saved the model did"
        )
    if issubclass(original, LazyModuleMixin):
        members["initialize_parameters"] = lambda self, input, residual=None, *, mask=None: (
            original.initialize_parameters(self, input)
        )
        become: Any = original.cls_to_become
        members["cls_to_become"] = become and synchronized_class(to, become)
    for member in ("_check_input_dim", "reset_parameters"):
        own = getattr(original, member)
        if own.__module__ != _BatchNorm.__module__:  # it is not torch's
            members[member] = own
    name = f"{to.__name__}{original.__name__}"
    if original in _PLAIN:
        name, members["__module__"] = to.__name__, to.__module__
    return type(name, bases, members)


def _adds_no_more_than_forward(cls: type, base: type) -> bool:
    """Whether a class is derived from another one and has no members of its own but a forward."""
    own = {name for each in cls.__mro__ if each not in base.__mro__ for name in vars(each)}
    return issubclass(cls, base) and all(name == "forward" or name.startswith("__") for name in own)


def changes_forward(cls: type[Synchronized]) -> bool:
    """Whether a class has another forward than the class that normalizes for it."""
    owner: Any = next(base for base in cls.__mro__ if "_batch_norm" in vars(base))
    return cls.forward is not owner.forward


def _normalizer(to: type[Synchronized]) -> Callable[[Synchronized], Forward]:
    """Return a function of a layer, whose result a registered forward gets as its ``batch_norm``.

    That result normalizes as the class ``to`` does.
    """
    forward: Forward = to.forward
    if not changes_forward(to):
        return lambda layer: layer._batch_norm

    def by_forward(
        layer: Synchronized,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: AnyActivation = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        act = activation_of(activation)  # raises before anything is sent
        more = {} if mask is None else {"mask": mask}  # another library's forward may take none
        return activate(forward(layer, input, residual, **more), act)

    return lambda layer: partial(by_forward, layer)


def _reduce_mixed(layer: Synchronized, protocol: int) -> tuple[object, ...]:
    # The class was made at run time, so pickle cannot find it by name: it is made again.
    reduced = super(layer._made_of[0], layer).__reduce_ex__(protocol)
    return (rebuild, layer._made_of[:2], *reduced[2:])


def rebuild(to: type[Synchronized], original: type[_BatchNorm]) -> Synchronized:
    cls = _mixed(to, original)
    return cls.__new__(cls)


rebuild.__module__ = "mpisyncbn.convert"  # pickled models refer to it there
