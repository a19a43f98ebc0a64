"""SyncBatchNorm, the layer as a torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import autograd, convert
from .activations import AnyActivation, name_of
from .arguments import (
    check_arguments,
    check_mask,
    check_memory_efficient,
    check_num_batches_tracked,
    check_residual,
)
from .autograd.evaluation import evaluate
from .batch_stats import NOT_TO_RECORD
from .comm.groups import AnyGroup
from .comm.layer_names import new_key
from .kernels import describe, has_float64
from .running_stats import record_batch

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(convert.Synchronized):
    r"""Batch normalization over the batch of all ranks of an MPI communicator.

    A drop-in for :class:`torch.nn.SyncBatchNorm`, with the same arguments, attributes and
    state_dict, for tensors on any device. docs/explanation/surprises.md says how it differs.

    Args:
        num_features: the number of channels C of an input of shape ``(N, C, *)``.
        eps: added to the variance, at least 0.
        momentum: weight of a batch in the running statistics, from 0 to 1: a number, or a 0-d
            tensor in host memory or on the layer's device; None: cumulative average.
        affine: if True, the layer has learnable per-channel weight and bias.
        track_running_stats: if True, keeps running statistics for evaluation; if False, batch
            statistics are used in evaluation too, then of this rank alone.
        process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, a
            process group of torch.distributed, or None for the world. It is an attribute, which may
            be set; ``communicator`` is the Communicator that stands for it, None for the world.
        device, dtype: of parameters and buffers.
        bias: if False, there is no bias even if ``affine``.
        activation: applied to the output, in the same passes over memory, forward and backward:
            "relu", "leaky_relu", "silu", "hardswish", "elu" or "gelu", with torch's defaults;
            "leaky_relu(0.1)", "elu(0.5)" or "gelu(tanh)"; a module of torch.nn that does the same,
            such as ``nn.LeakyReLU(0.1)``; or None. It is also an attribute, which may be set on a
            converted layer and holds the text. docs/guides/activations.md says how to choose.
        memory_efficient: if True, the layer keeps its output for the backward pass in place of its
            input. That saves memory if the next layer keeps its input anyway, as a convolution
            does. It is also an attribute. Such a layer takes no residual, and no activation but a
            leaky_relu with a slope above 0 (ValueError). It refuses create_graph (MPISyncBNError).
            See docs/guides/memory.md.

    Shape:
        - input: ``(N, C, *)``, at least 2-D; float32, float64, bfloat16 or float16. N may differ
          between ranks, and be 0.
        - residual, optional: like the input. It is added before the activation, in the same pass.
        - mask, optional, by keyword: boolean, of the input's shape but with one channel:
          ``(N, 1, *)``. Statistics and gradients are those of the values where it is true.
          Elsewhere the output is 0, and the input has no effect. It is for padded sequences and
          grids with holes: docs/guides/masks.md.
        - output: of the input's shape, dtype and memory format.

    Raises:
        ValueError: ``activation`` is another text or module, or has hooks or its own ``forward``.
        ValueError, TypeError: in forward, an argument is of the wrong shape, dtype or device.
        ValueError: in forward, on every rank, if the group has a single value per channel.
        CollectiveMismatchError: in forward or backward, on every rank, if the ranks were in
            different layers.
        MPISyncBNError: in forward, the group is the world, and torch.distributed or a launcher
            knows of more ranks.

    Building, copying, loading and evaluating a layer is not collective. Forward and backward
    while training are: every rank of the group must call them, in the same order of layers.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | Tensor | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: AnyGroup = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: AnyActivation = None,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:  # the base class of older torch, such as 2.11, has no such argument
            self.register_parameter("bias", None)
        self.activation = name_of(activation)
        self.memory_efficient = memory_efficient
        self.process_group = process_group
        self._key = new_key(self)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        return self._batch_norm(input, residual, None, mask)

    def _batch_norm(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: AnyActivation = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Do ``forward``, but with ``activation`` if it is given. Registered forwards call this."""
        activation = self.activation if activation is None else activation
        if self.memory_efficient:
            check_memory_efficient(activation, residual, self.layer_name)
        self._check_input_dim(input)
        if not self.training:
            parameters, running = (self.weight, self.bias), (self.running_mean, self.running_var)
            if not torch.jit.is_tracing():
                tensors, layer = (input, *parameters, *running), self.layer_name
                if torch.compiler.is_compiling() or isinstance(input, FakeTensor):
                    check_arguments(*tensors, eps=self.eps, layer=layer)
                else:
                    description = describe(*tensors) if input.is_cuda else None
                    autograd.check_tensors(*tensors, 0.0, self.eps, layer, description)
                check_residual(residual, input, layer)
                check_mask(mask, input, layer)
            # local: batch norm in evaluation needs no other rank
            return evaluate(input, *running, *parameters, self.eps, activation, residual, mask)
        running_mean = running_var = num_batches_tracked = None
        if self.track_running_stats:
            running_mean = _tensor(self, self._buffers, "running_mean")
            running_var = _tensor(self, self._buffers, "running_var")
            num_batches_tracked = _tensor(self, self._buffers, "num_batches_tracked")
            check_num_batches_tracked(num_batches_tracked)
        weight, bias = (_tensor(self, self._parameters, name) for name in ("weight", "bias"))
        y, stats, device_stats = autograd.batch_norm(
            input,
            *(running_mean, running_var, weight, bias),
            self.momentum,
            self.eps,
            self.communicator,
            self.layer_name or self._key,
            activation,
            residual,
            self.memory_efficient,
            mask,
            num_batches_tracked,
        )
        if running_mean is not None and stats is not NOT_TO_RECORD:
            momentum: float | Tensor | None = self.momentum
            if momentum is None:
                momentum = _cumulative_momentum(num_batches_tracked)
            record_batch(running_mean, running_var, num_batches_tracked, stats, momentum, device_stats)
        return y

    def extra_repr(self) -> str:
        more = {
            "process_group": self.communicator,
            "activation": self.activation,
            "memory_efficient": self.memory_efficient or None,
        }
        return super().extra_repr() + "".join(f", {k}={v!r}" for k, v in more.items() if v is not None)

    @classmethod
    def convert_sync_batchnorm(
        cls,
        module: nn.Module,
        process_group: AnyGroup = None,
        *,
        name: str | None = None,
        fuse_relu: bool = False,
        fuse_activation: bool = False,
        memory_efficient: bool = False,
    ) -> nn.Module:
        """Turn every ``BatchNorm*d`` of a model into a ``SyncBatchNorm``, in place.

        It also converts lazy layers and ``torch.nn.SyncBatchNorm``. The layers stay the same
        objects, with their hooks, parameters and attributes. Not collective.

        Args:
            module: a model, or a single layer.
            process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, a
                process group of torch.distributed, or None for the world. Layers that are
                synchronized already get it too.
            name: of the model, the same on every rank; None: the name of its class. Give models of
                one class different names: they tell apart the layers of two models in one exchange.
            fuse_activation: let each layer compute the ``nn.ReLU``, ``nn.LeakyReLU``, ``nn.SiLU``,
                ``nn.Hardswish``, ``nn.ELU`` or ``nn.GELU`` that follows it in an ``nn.Sequential``,
                in the same passes over memory, if neither has hooks and the layer stands nowhere
                else in the model. The layer itself then returns the output of the activation.
            fuse_relu: the same for ``nn.ReLU`` alone.
            memory_efficient: set that attribute on the layers, except on those with an activation
                that cannot be undone (a fused ReLU) or with another library's ``forward``.

        Returns:
            ``module`` itself.

        Raises:
            TypeError: some layer has a ``forward`` of its own, which would be lost, or a member of
                a name that a synchronized layer needs, such as ``activation``, or is of a class
                that takes no subclass, or is compiled by torch.jit. The message names it. No layer
                is changed then.
            TypeError, ValueError: ``name`` is not a str, is empty, or begins with ``#``.

        Warns:
            UserWarning: the model holds batch norms that are not torch's. They stay local.
        """
        return convert.convert_sync_batchnorm(
            module,
            process_group,
            name=name,
            fuse_relu=fuse_relu,
            fuse_activation=fuse_activation,
            memory_efficient=memory_efficient,
            to=cls,
        )


def _cumulative_momentum(num_batches_tracked: Tensor | None) -> float | Tensor:
    """The weight of the next batch in the average of all: a tensor, so the host need not wait."""
    if num_batches_tracked is None:
        return 0.0
    dtype = torch.float64 if has_float64(num_batches_tracked) else torch.float32
    return (num_batches_tracked + 1).to(dtype).reciprocal()


# nn.Module looks for an attribute everywhere else before it looks where it keeps its tensors.
def _tensor(layer: nn.Module, tensors: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """A layer's parameter or buffer, from its dict, or as an attribute if it is parametrized."""
    return tensors[name] if name in tensors else getattr(layer, name)
