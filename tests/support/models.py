"""Models with batch norms of every kind, and functions that compare models."""

from __future__ import annotations

import io
import pickle

import torch
from torch import nn
from torch.nn.utils import parametrize

from mpisyncbn import SyncBatchNorm
from support.oracle import local_batch, shard

C = 3


class Named(nn.BatchNorm2d):
    """A subclass that adds to a BatchNorm but leaves its forward alone."""

    _version = 7

    def __init__(self, title="a title"):
        super().__init__(C)
        self.title = title

    def shout(self):
        return self.title.upper()

    def extra_repr(self):
        return f"{self.title}, {super().extra_repr()}"


class NamedSync(nn.SyncBatchNorm):
    pass


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def network():
    def block(bn):
        return nn.Sequential(nn.Conv2d(C, C, 1, bias=False), bn, nn.ReLU())

    first, last = nn.BatchNorm2d(C), nn.BatchNorm1d(C)
    return nn.Sequential(first, block(nn.BatchNorm2d(C)), block(Named()), nn.Flatten(2), last)


def data(ndim=4, dtype=torch.float32):
    return shard((local_batch(), C, *(4, 3, 2)[: ndim - 2]), mean=0.5, dtype=dtype).requires_grad_()


def randomize(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def contents(module):
    """The ids of all attributes and tensors of a module. An optimizer depends on them."""
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in module.modules()]
    return attributes, [(k, id(v)) for k, v in module.state_dict(keep_vars=True).items()]


def kinds(module):
    return [parametrize.type_before_parametrizations(m) for m in module.modules()]


def layers(module):
    return [m for m in module.modules() if isinstance(m, SyncBatchNorm)]


def step(module, x):
    """The results of a training step: output, gradients and buffers."""
    y = module(x)
    gradients = torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])
    return [y, *gradients, *(b.clone() for b in module.buffers())]


def equal(actual, expected):
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def close(actual, expected, tolerance):
    pairs = zip(actual, expected, strict=True)
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)


def through_torch(module):
    torch.save(module, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def through_pickle(module, protocol=pickle.HIGHEST_PROTOCOL):
    return pickle.loads(pickle.dumps(module, protocol))
