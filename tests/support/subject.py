"""A layer, or the functions for tensors or arrays, and float64 results of a step."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, functional
from mpisyncbn.comm.groups import resolve
from support.activations import TORCHS, far_from_kinks
from support.oracle import distance

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}
KINK = 0.02  # an input this near to a jump of an activation's derivative may be rounded across it


class Whole(NamedTuple):
    """Batch norm of a group's whole batch in float64, and this rank's part of it."""

    found: list[Tensor]  # y, its gradients by x, weight, bias, residual, those of sum(dx * v) by x, dy
    scales: list[Tensor]  # the scales of their errors
    z: Tensor  # the input of the activation
    mean: Tensor
    unbiased: Tensor
    count: int

    def check(self, found: list[Tensor | None], tolerance: float) -> None:
        for i, actual in enumerate(found):
            if actual is not None:
                assert distance(actual, self.found[i], self.scales[i]) < tolerance * (1 if i < 5 else 10), i


def autograd_oracle(subject: Subject, comm: MPI.Comm, *mine: Tensor) -> Whole:
    """The results of one step for x, dy, v and residual in ``mine``, by autograd in float64.

    It has what the closed form in whole_batch.py lacks: second derivatives, a residual, an
    activation, and gradients of each rank's own loss. Collective: every rank of ``comm`` must call.
    """
    layer = subject.layer
    parts = comm.allgather([values.detach().double() for values in mine])
    x, dy, v, residual = (torch.cat(each).requires_grad_() for each in zip(*parts, strict=True))
    dims, view = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    # A row of parameters for each rank: their gradients are those of its own loss.
    sizes = torch.tensor([len(part[0]) for part in parts])
    owner = torch.arange(len(parts)).repeat_interleave(sizes)
    ones = torch.ones(len(parts), layer.num_features).double()
    rows = [
        (ones * default if given is None else ones * given.detach()).requires_grad_()
        for given, default in ((layer.weight, 1.0), (layer.bias, 0.0))
    ]
    weight, bias = (row[owner].reshape(len(x), len(ones[0]), *view[2:]) for row in rows)
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / max(count, 1)
    xmu = x - mean.view(view)
    var = xmu.square().sum(dims) / max(count, 1)
    invstd = (var + layer.eps).rsqrt()
    z = xmu * invstd.view(view) * weight + bias + residual
    y, far = TORCHS[layer.activation](z), far_from_kinks(z, layer.activation, KINK)
    gradients = torch.autograd.grad(y, (x, *rows, residual), dy * far, create_graph=True)
    second = torch.autograd.grad((gradients[0] * v).sum(), (x, dy), allow_unused=True)
    second = [torch.zeros_like(x) if each is None else each for each in second]
    start = int(sizes[: comm.rank].sum())
    part = slice(start, start + int(sizes[comm.rank]))
    found = [y[part], gradients[0][part], *(each[comm.rank] for each in gradients[1:3]), gradients[3][part]]
    slope = 5 * rows[0].abs().max() * invstd.max()  # the scale of the derivative of dx by dy
    values = torch.tensor(3.0 * y[part].numel() / len(mean) + 1)
    scales = [1 + y.abs(), slope, values, values, torch.tensor(5.0), 5 * slope * invstd.max(), slope]
    found += [each[part] for each in second]
    return Whole(
        found, scales, z[part].detach(), mean.detach(), var.detach() * (count / max(count - 1, 1)), count
    )


class Subject:
    """A layer, or the functions for tensors or arrays with a layer's parameters and buffers."""

    def __init__(self, kind: str, channels: int, group: Communicator, options: dict[str, Any]) -> None:
        self.kind, self.group = kind, group
        dtype = DTYPES[options["dtype"]]
        if kind == "numpy" and dtype == torch.bfloat16:
            dtype = torch.float32
        names = ("eps", "momentum", "affine", "track_running_stats", "bias")
        self.layer = SyncBatchNorm(
            channels, process_group=group, dtype=dtype, **{name: options[name] for name in names}
        )
        if kind != "numpy":
            self.layer.activation = options["activation"]
        self.momentum = self.layer.momentum
        if kind != "layer" and self.momentum is None:
            self.momentum = 0.1
        for parameter, start in zip(self.layer.parameters(), (0.5, -0.5), strict=False):
            with torch.no_grad():
                parameter.copy_(torch.linspace(start, start + 1.5, channels))
        self.dtype = dtype

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.layer.state_dict().items()}

    def differentiate(
        self, x: Tensor, dy: Tensor, v: Tensor, residual: Tensor | None, twice: bool
    ) -> list[Tensor | None]:
        """``y`` and its gradients; if ``twice``, also those of ``sum(dx * v)`` by x and dy."""
        layer = self.layer
        inputs = [x, layer.weight, layer.bias, residual]
        x, dy = x.requires_grad_(), dy.requires_grad_(twice)
        wanted = [each for each in inputs if each is not None]
        if residual is not None:
            residual.requires_grad_()
        y = self.forward(x, residual)
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=twice))
        found = [None if each is None else next(gradients) for each in inputs]
        if twice:
            by_x, by_dy = torch.autograd.grad((found[0] * v).sum(), (x, dy))
            found += [by_x, by_dy * (dy != 0)]  # dy is 0 near a kink
        return [y, *found]

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        if self.kind == "layer":
            return layer(x) if residual is None else layer(x, residual)
        return mpisyncbn.sync_batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            momentum=self.momentum,
            eps=layer.eps,
            process_group=self.group,
            activation=layer.activation,
            residual=residual,
        )

    def arrays(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """``y`` and gradients by functional.py, on NumPy arrays that share the layer's memory."""
        layer = self.layer
        weight, bias = (
            None if each is None else each.detach().numpy() for each in (layer.weight, layer.bias)
        )
        options = {"process_group": self.group}
        y, stats = functional.batch_norm_forward(x.numpy(), weight, bias, eps=layer.eps, **options)
        dx, dweight, dbias = functional.batch_norm_backward(dy.numpy(), x.numpy(), stats, weight, **options)
        if layer.running_mean is not None:
            functional.update_running_stats(
                layer.running_mean.numpy(), layer.running_var.numpy(), stats, self.momentum
            )
        return [torch.from_numpy(each) for each in (y, dx, dweight, dbias)]

    def check_state(self, before: dict[str, Tensor], after: dict[str, Tensor], batch: Whole) -> None:
        enters = batch.count > 1
        batches = after.pop("num_batches_tracked", None)
        if batches is not None:
            assert batches == before["num_batches_tracked"] + (enters and self.kind == "layer")
            momentum = 1 / (before["num_batches_tracked"].item() + 1)
        for name, new in (("running_mean", batch.mean), ("running_var", batch.unbiased)):
            if name in after and enters:
                old = before.pop(name).double()
                weight = momentum if self.momentum is None else self.momentum
                scale = torch.maximum(old.abs().max(), new.abs().max()).clamp_min(1e-3)
                assert distance(after.pop(name), old + weight * (new - old), scale) < TOLERANCE[self.dtype]
        assert all(torch.equal(before[key], value) for key, value in after.items())

    def replace(self, how: str) -> None:
        old = self.layer
        if how == "deepcopy":
            self.layer = copy.deepcopy(old)
        elif how == "state_dict":  # by way of torch's own layer
            flags = old.affine, old.track_running_stats, None, None, self.dtype
            theirs = nn.SyncBatchNorm(old.num_features, old.eps, old.momentum, *flags)
            if old.bias is None:  # by hand: the argument is newer than torch 2.11
                theirs.bias = None
            theirs.load_state_dict(old.state_dict())
            self.layer = copy.deepcopy(old)
            self.layer.reset_parameters()
            self.layer.load_state_dict(theirs.state_dict())
        else:
            activation, old.activation = old.activation, None
            model = mpisyncbn.revert_sync_batchnorm(nn.Sequential(old))
            assert not isinstance(old, SyncBatchNorm)
            mpisyncbn.convert_sync_batchnorm(model, self.group)
            assert type(old) is SyncBatchNorm
            old.activation = activation
        assert resolve(self.layer.process_group) is resolve(self.group)
