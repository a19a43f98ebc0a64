"""Batch norms of other libraries with a forward of their own, which a conversion keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, overload

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import on_rank
from .fusing import fusible_activation

__all__ = ["Forward", "full_name", "has_own_forward", "register_conversion", "registered_forward"]

# A forward takes the layer, its synchronized batch norm, and the arguments of the layer.
Forward: TypeAlias = Callable[..., Tensor]

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@overload
def register_conversion(cls: type[nn.Module] | str) -> Callable[[Forward], Forward]: ...
@overload
def register_conversion(cls: type[nn.Module] | str, forward: Forward) -> Forward: ...
def register_conversion(
    cls: type[nn.Module] | str, forward: Forward | None = None
) -> Forward | Callable[[Forward], Forward]:
    """Teach ``convert_sync_batchnorm`` a batch norm that has a forward of its own.

    Example::

        @mpisyncbn.register_conversion(NormAct)
        def forward(layer, batch_norm, x):
            return layer.act(batch_norm(x))

    Args:
        cls: the class or, so that its library need not be imported, its full name as the refusal of
            a conversion prints it, such as "timm.layers.norm_act.BatchNormAct2d". Subclasses that
            inherit its forward are converted too.
        forward: what a converted layer does in place of the forward of ``cls``. It takes the layer,
            a function, and the arguments of the layer. The function normalizes with the statistics
            of all ranks: ``batch_norm(x, residual=None, activation=None, mask=None)``, as
            ``SyncBatchNorm`` does. Every rank must call that function the same number of times.

    Returns:
        ``forward`` itself or, without one, a decorator for it. Not collective.

    Raises:
        TypeError: ``cls`` is neither a name nor a subclass of torch's batch norms, or ``forward``
            is not callable.
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, _BatchNorm)):
        raise TypeError(
            f"expected a subclass of torch's batch norms or its full name, got {cls!r}{on_rank()}: other "
            "layers call mpisyncbn.sync_batch_norm"
        )

    def register(forward: Forward) -> Forward:
        if not callable(forward):
            raise TypeError(f"expected forward to be callable, got {type(forward).__name__}{on_rank()}")
        # The last one wins, by class or by name.
        for other in list(_forwards):
            if full_name(other) == full_name(cls) and str in (type(other), type(cls)):
                del _forwards[other]
        _forwards[cls] = forward
        return forward

    return register if forward is None else register(forward)


def has_own_forward(cls: type | None) -> bool:
    """Whether a class has a forward that is not torch's."""
    return getattr(cls, "forward", None) not in (None, *_TORCH_FORWARDS)


def registered_forward(cls: type) -> Forward | None:
    """The forward registered for a class, or for the class that it inherits its own from."""
    for base in cls.__mro__:
        forward = _forwards.get(base) or _forwards.get(full_name(base))
        if forward is not None or "forward" in vars(base):
            return forward
    return None


def full_name(cls: type | str) -> str:
    """The name of a class with its module; a text stays as it is."""
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def drop_and_act(layer: nn.Module, batch_norm: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of timm's layers: batch norm, then a module named drop, then one named act."""
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    if act is not None and (drop is None or type(drop) is nn.Identity):
        activation = fusible_activation(act)
        if activation is not None:
            return batch_norm(x, activation=activation)
    y = batch_norm(x)
    for module in (drop, act):
        if module is not None:
            y = module(y)
    return y


_forwards: dict[type | str, Forward] = {
    f"timm.{place}.norm_act.{name}": drop_and_act
    for place in ("layers", "models.layers")  # the second one before timm 0.8
    for name in ("BatchNormAct2d", "SyncBatchNormAct")
}
