"""Conversion from BatchNorm to SyncBatchNorm and back, in place.

A conversion changes a layer's class and nothing else. Hooks, parameters, buffers, extra attributes,
parametrizations and all references to the layer survive, because it is the same object.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import NoReturn, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..activations import AnyActivation, activation_of, name_of
from ..arguments import check_memory_efficient, check_module, check_tensor, in_layer
from ..comm.communicator import Communicator
from ..comm.groups import AnyGroup, resolve
from ..comm.layer_names import give_up_key, new_key
from ..errors import on_rank
from . import tracing
from .checks import (
    check_name,
    derived_class,
    refuse_lost_activation,
    refuse_lost_forward,
    refuse_own_forward,
    refuse_replacement,
    refuse_scripted,
    refuse_taken_names,
    warn_of_others,
)
from .fusing import FusedActivation, FusedReLU, fuse, fused_layers, unfuse
from .mixed_class import rebuild
from .registry import Forward

__all__ = [
    "BatchNorm",
    "FusedActivation",
    "FusedReLU",
    "Synchronized",
    "convert_sync_batchnorm",
    "rebuild",
    "revert",
    "revert_sync_batchnorm",
    "set_process_group",
    "synchronized_layers",
]


class BatchNorm(tracing.Leaf, _BatchNorm):
    """Batch norm of this rank alone, for input of any dimension.

    A synchronized layer that was not converted from another class becomes this when it is reverted.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if not torch.jit.is_scripting():  # torch.jit.script cannot compile the checks
            check_tensor(input)
            if input.ndim < 2:
                raise ValueError(
                    f"expected at least 2D input, (N, C, *), got {input.ndim}D input"
                    f"{in_layer(getattr(self, 'layer_name', None))}: one sample alone is x[None]"
                )


class Synchronized(BatchNorm):
    """A layer with the attributes that conversion sets and reverting deletes."""

    communicator: Communicator | None = None  # the ranks to normalize over; None: the world
    _given: _Given | None = None  # the process_group, if it is another object than communicator
    activation: str | None = None  # its text; setting a module sets its text
    memory_efficient: bool = False  # whether the layer keeps its output in place of its input
    layer_name: str | None = None  # on all ranks: the name of the model, and the layer's own in it
    _key: str = "#"  # this process knows the layer by it while it has no name
    _converted_from: tuple[type[_BatchNorm], dict[str, object]] | None = None  # class, replaced attributes
    # The classes that a class of mixed_class.py is made of, and the registered forward.
    _made_of: tuple[type[Synchronized], type[_BatchNorm], Forward | None]

    @property
    def process_group(self) -> AnyGroup:
        """The group as it was given: of mpi4py or torch, a Communicator, or None for the world."""
        return self.communicator if self._given is None else self._given.process_group

    @process_group.setter
    def process_group(self, process_group: AnyGroup) -> None:
        # The Communicator is made at once, because the user may free the group that was given.
        communicator = None if process_group is None else resolve(process_group)
        for name in ("communicator", "_given"):
            vars(self).pop(name, None)
        if communicator is not None:
            self.communicator = communicator
            if process_group is not communicator:
                self._given = _Given(process_group, communicator)

    def _batch_norm(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: AnyActivation = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do ``forward``, but with ``activation`` if it is given. Registered forwards call this."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: object) -> None:
        if name == "process_group":
            object.__setattr__(self, name, value)  # nn.Module would keep some values itself
            return
        if name == "activation":
            value = name_of(value)  # type: ignore[arg-type]  # raises for other types
            if self.memory_efficient:
                check_memory_efficient(value, None, self.layer_name)
        if name == "memory_efficient":
            if not isinstance(value, bool):
                raise TypeError(f"expected memory_efficient to be True or False, got {value!r}{on_rank()}")
            if value:
                check_memory_efficient(self.activation, None, self.layer_name)
        if name == "layer_name":
            check_name(value, name, ": a synchronized layer has an attribute of that name; rename yours")
        if name == "qconfig" and value is not None:  # torch.ao.quantization marks what it will replace
            tracing.refuse("torch.ao.quantization", self.layer_name, "quantize")
        super().__setattr__(name, value)  # type: ignore[arg-type]  # it takes any attribute

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._key = new_key(self)  # copied or loaded, it is another layer

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        if not torch.compiler.is_compiling():
            refuse_replacement(sys._getframe(1), self.layer_name)
        return super().named_children()

    def _slow_forward(self, *args: object, **kwargs: object) -> object:
        # torch.jit.trace calls this in place of forward
        if self.training:
            tracing.refuse("torch.jit.trace", self.layer_name)
        return super()._slow_forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:  # called by torch.jit.script
        tracing.refuse("torch.jit.script", self.layer_name)


class _Given:
    """A process group as the user gave it. Copies of a layer share it: it cannot be copied."""

    def __init__(self, process_group: AnyGroup, communicator: Communicator | None = None) -> None:
        self.process_group, self.communicator = process_group, communicator

    def __deepcopy__(self, memo: dict[int, object]) -> _Given:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self.communicator is None:
            raise TypeError(
                f"cannot pickle a layer that had a process_group of torch before it was converted{on_rank()}:"
                " it exists only in this run. Save the state_dict instead of the module"
            )
        # A Communicator other than the world's refuses to be pickled, so this is the world. mpi4py
        # pickles its world by name; torch's cannot be pickled, and None stands for it.
        MPI = sys.modules.get("mpi4py.MPI")
        kept = self.process_group if MPI and isinstance(self.process_group, MPI.Comm) else None
        return _Given, (kept, self.communicator)


_CONVERSION_ATTRIBUTES = {  # names that torch's layers do not have
    name for name in vars(Synchronized).keys() - dir(_BatchNorm) if not name.startswith("__")
}
_rebuild = rebuild  # pickled models refer to it, and to rebuild, FusedActivation and FusedReLU here
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")  # where torch's wrappers hold the model


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: AnyGroup = None,
    *,
    name: str | None = None,
    fuse_relu: bool = False,
    fuse_activation: bool = False,
    memory_efficient: bool = False,
    to: type[Synchronized],
) -> nn.Module:
    """Convert the layers of a model, as ``SyncBatchNorm.convert_sync_batchnorm`` says.

    Each layer becomes an instance of ``to``, and stays one of its own class, such as BatchNorm2d.
    """
    check_module(module)
    check_name(name)
    if process_group is not None:
        resolve(process_group)  # before any layer is changed
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    plain = [(path, layer) for path, layer in layers if not isinstance(layer, Synchronized)]
    refuse_taken_names(plain, _CONVERSION_ATTRIBUTES)
    refuse_own_forward(plain)
    refuse_scripted(module)
    changed = [(path, layer) for path, layer in layers if _changes(layer, to)]
    classes = {layer: derived_class(to, _original(layer), path) for path, layer in changed}
    warn_of_others(module)
    model = _class_name(module) if name is None else name
    for path, layer in layers:
        if layer in classes:
            _convert(layer, classes[layer])
        synchronized = cast(Synchronized, layer)
        synchronized.process_group = process_group
        synchronized.layer_name = f"{model}: {path}" if path else name
    # A registered forward may do more after the normalization.
    own = {cast(Synchronized, layer) for _, layer in layers if type(layer).forward is to.forward}
    if fuse_relu or fuse_activation:
        fuse(module, own, only=None if fuse_activation else ("relu",))
    if memory_efficient:
        for synchronized in own:
            synchronized.memory_efficient = activation_of(synchronized.activation).can_be_undone
    return module


def _changes(layer: _BatchNorm, to: type[Synchronized]) -> bool:
    """Whether conversion to ``to`` changes the class of a layer."""
    if isinstance(layer, Synchronized):
        return layer._converted_from is not None and not isinstance(layer, to)
    return True


def _original(layer: _BatchNorm) -> type[_BatchNorm]:
    """The class of a layer; of a synchronized one, the class that it gets back."""
    if not isinstance(layer, Synchronized):
        return type(layer).__bases__[-1] if _is_wrapped(layer) else type(layer)
    original, _ = layer._converted_from or (BatchNorm, {})
    if issubclass(original, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        original = cast(type[_BatchNorm], original.cls_to_become)  # it has seen its first input since
    return original


def _convert(layer: _BatchNorm, cls: type[Synchronized]) -> None:
    """Change the class of a layer to ``cls``."""
    if isinstance(layer, Synchronized):
        _revert(layer)  # converted to another class before
    original = _original(layer)
    replaced = {key: vars(layer).pop(key) for key in _CONVERSION_ATTRIBUTES if key in vars(layer)}
    if replaced.get("process_group") is not None:  # torch.nn.SyncBatchNorm's
        replaced["process_group"] = _Given(replaced["process_group"])
    _change_class(layer, cls)
    layer = cast(Synchronized, layer)
    layer._converted_from = (original, replaced)
    layer._key = new_key(layer)


def set_process_group(module: nn.Module, process_group: AnyGroup) -> None:
    """Let all synchronized layers of a model normalize over other ranks from now on.

    Args:
        module: a model, or a single layer.
        process_group: an mpi4py communicator, such as one that was shrunk after the loss of a rank,
            a Communicator, a process group of torch.distributed, or None for the world.

    Raises:
        TypeError, ValueError: ``module`` is no module, or ``process_group`` none of these, or
            without this rank. No layer is changed then.

    Not collective.
    """
    check_module(module)
    if process_group is not None:
        resolve(process_group)  # before any layer is changed
    for layer in synchronized_layers(module):
        layer.process_group = process_group


def synchronized_layers(module: nn.Module) -> list[Synchronized]:
    """The synchronized layers of a model, each once, in their order."""
    return [layer for layer in module.modules() if isinstance(layer, Synchronized)]


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Undo ``convert_sync_batchnorm``: every synchronized layer gets back the exact class it had.

    A layer that never had another class becomes a ``BatchNorm`` for input of any dimension. The
    modules that ``fuse_activation`` and ``fuse_relu`` took are put back in their places.

    Args:
        module: a model, or a single layer.

    Returns:
        ``module`` itself, its layers changed in place. Not collective.

    Raises:
        TypeError: a layer, named in the message, has an activation or a ``forward`` of its own
            that would be lost. No layer is changed then.
    """
    check_module(module)
    return revert(module, ())


def revert(module: nn.Module, kept: Collection[nn.Module]) -> nn.Module:
    """Do ``revert_sync_batchnorm`` for all layers but the ``kept`` ones."""
    synchronized = {
        layer: name
        for name, layer in module.named_modules()
        if isinstance(layer, Synchronized) and layer not in kept
    }
    refuse_lost_activation(synchronized, fused_layers(module))
    refuse_lost_forward(synchronized)
    for layer in module.modules():
        if layer in synchronized:
            vars(layer).pop("forward", None)  # that of its class, or there was an error
            _revert(layer)
        unfuse(layer)
    return module


def _class_name(model: nn.Module) -> str:
    """The name of a model's class; for a wrapper, as in ``DistributedDataParallel(Generator)``."""
    own = parametrize.type_before_parametrizations(model).__name__
    if len(model._modules) == 1:
        ((name, inner),) = model._modules.items()
        if name in _WRAPPED and inner is not None:
            return f"{own}({_class_name(inner)})"
    return own


def _revert(layer: Synchronized) -> None:
    _, replaced = layer._converted_from or (BatchNorm, {})
    give_up_key(layer)
    _change_class(layer, _original(layer))
    for key in _CONVERSION_ATTRIBUTES:
        vars(layer).pop(key, None)
    for key, value in replaced.items():
        vars(layer)[key] = value.process_group if isinstance(value, _Given) else value


def _change_class(layer: nn.Module, cls: type) -> None:
    if _is_wrapped(layer):  # by a class that must stay the outermost one
        wrapper = type(layer)
        *more, wrapped = wrapper.__bases__
        name = wrapper.__name__.removesuffix(wrapped.__name__) + cls.__name__
        cls = type(name, (*more, cls), dict(vars(wrapper)))
    layer.__class__ = cls


def _is_wrapped(layer: nn.Module) -> bool:
    """Whether the class of a layer is one that torch has derived from the layer's own.

    torch makes a class for each parametrized layer, with its tensors as properties, and goes back
    to the base of that class to remove them. ``fully_shard`` makes one with the methods of FSDP.
    """
    return parametrize.is_parametrized(layer) or type(layer).__module__.startswith("torch.distributed.")
