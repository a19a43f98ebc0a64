"""The context that forward and backward of one call of a layer share: group, name, statistics."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from ..batch_stats import BatchStats
from ..comm.communicator import Communicator
from ..fingerprint import LayerCall
from ..kernels import Activation

if TYPE_CHECKING:
    from ..kernels.protocol import Running
    from .enqueued import Enqueued

__all__ = ["FunctionContext", "LayerContext", "is_recomputing", "layer_call"]

FunctionContext: TypeAlias = Any  # torch's FunctionCtx, to which a forward adds attributes of its own
Result = TypeVar("Result")


class LayerContext:
    """The group, name and statistics of one call of a layer, which forward and backward share."""

    __slots__ = (
        "activation",
        "channels",
        "description",
        "device_stats",
        "dtype",
        "enqueued",
        "eps",
        "group",
        "keeps_output",
        "name",
        "running",
        "stats",
    )

    def __init__(
        self,
        group: Communicator,
        name: str,
        channels: int,
        dtype: str,
        eps: float,
        activation: Activation,
        memory_efficient: bool = False,
    ) -> None:
        self.group, self.name, self.channels, self.dtype, self.eps = group, name, channels, dtype, eps
        self.activation = activation
        self.keeps_output = memory_efficient  # whether the output is kept in place of the input
        self.running: Running | None = None  # running statistics that a forward pass may update itself
        self.description: Hashable | None = None  # identifies the tensors: see kernels.describe
        self.enqueued: Enqueued | None = None  # set if the host did not wait for the forward
        self.stats: BatchStats  # on the host
        self.device_stats: BatchStats  # on the input's device

    def call(self, direction: str) -> LayerCall:
        """The call that is compared between the ranks."""
        return layer_call(self.name, direction, self.channels, self.dtype, self.eps)

    def bind(self, function: Callable[..., Result], direction: str) -> Callable[..., Result]:
        """A function of exchange.py, bound to the group and this call: it takes only the values."""
        return partial(function, self.group, self.call(direction))


@lru_cache(maxsize=4096)  # making a LayerCall takes ten times as long
def layer_call(layer: str, direction: str, channels: int, dtype: str, eps: float) -> LayerCall:
    """The call of a layer that is compared between the ranks."""
    return LayerCall(layer, direction, channels, dtype, float(eps))  # 0 on one rank is 0.0 on another


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass.

    Activation checkpointing repeats it there, and the batch must not enter the running statistics
    twice (pytorch#96136).
    """
    return torch._C._current_graph_task_id() != -1
