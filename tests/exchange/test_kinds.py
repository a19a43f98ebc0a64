"""Errors for arguments of a wrong kind or range: the expected and the given one, the rank."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch

import mpisyncbn
from mpisyncbn import MPISyncBNError, SyncBatchNorm, functional, sync_batch_norm
from mpisyncbn.batch_stats import BatchStats
from mpisyncbn.comm.communicator import by_graph_key
from mpisyncbn.distributed import host_tensors, mpi_collectives
from support.ranks import WORLD, up_to_two

pytestmark = up_to_two
HERE = f" (on rank {WORLD.rank} of {WORLD.size})"


def layer_with(**buffers: torch.Tensor) -> SyncBatchNorm:
    layer = SyncBatchNorm(3)
    layer._buffers.update(buffers)
    return layer


class LikeAnArray:
    """An object that looks like an array, as those of xarray, JAX and others do."""

    shape, ndim, dtype = (4, 3), 2, np.dtype("float32")


ROWS, STATS = torch.ones(4, 3), BatchStats(np.zeros(3), np.ones(3), np.ones(3), 4)
update = partial(functional.update_running_stats, np.zeros(3), np.ones(3))
X2 = ROWS.numpy()
forward, backward = functional.batch_norm_forward, functional.batch_norm_backward
OF_ANOTHER_KIND = [
    (
        lambda: SyncBatchNorm(3)(X2),
        "input to be a torch tensor, got ndarray{}: for arrays there is mpisyncbn.functional",
    ),
    (lambda: SyncBatchNorm(3)(None), "input to be a torch tensor, got NoneType{}"),
    (lambda: sync_batch_norm(X2, None, None), "input to be a torch tensor, got ndarray{}"),
    (lambda: forward([[1.0]]), "input to be an array, got list{}"),
    (
        lambda: forward(LikeAnArray()),
        f"input to be an array of NumPy, CuPy or torch, got {__name__}.LikeAnArray{{}}: convert it",
    ),
    (
        lambda: forward(X2, LikeAnArray()),
        f"weight to be an array of NumPy, CuPy or torch, got {__name__}.LikeAnArray{{}}: convert it",
    ),
    (lambda: forward(X2, [1.0] * 3), "weight to be ndarray like the input, got list{}"),
    (
        lambda: SyncBatchNorm(3)(ROWS.to_sparse()),
        "input to be a dense tensor, got one of layout torch.sparse_coo{}: convert it first",
    ),
    (
        lambda: SyncBatchNorm(3)(ROWS, ROWS.to_sparse()),
        "residual to be a dense tensor, got one of layout torch.sparse_coo{}",
    ),
    (
        lambda: layer_with(running_mean=torch.zeros(3).to_sparse())(ROWS),
        "running_mean to be a dense tensor, got one of layout torch.sparse_coo{}",
    ),
    (
        lambda: layer_with(num_batches_tracked=torch.tensor(False))(ROWS),
        "num_batches_tracked to be a tensor of whole numbers, got torch.bool{}",
    ),
    (lambda: backward(None, ROWS, STATS), "dy to be Tensor like the input, got NoneType{}"),
    (
        lambda: backward(ROWS, ROWS, STATS[:3]),
        "stats to be the BatchStats that batch_norm_forward returned, got tuple{}",
    ),
    (
        lambda: update(STATS._replace(var=[1.0] * 3), 0.1),
        "stats.var to be ndarray like stats.mean, got list{}",
    ),
    (
        lambda: update(STATS._replace(mean=torch.ones(3, device="meta")), 0.1),
        "stats.mean to be ndarray like the other arguments, got Tensor{}",
    ),
    (lambda: update(STATS._replace(var=np.ones(3, int)), 0.1), "stats.var of dtype float64, got int64{}"),
    (lambda: update(STATS._replace(count=4.0), 0.1), "stats.count to be a whole number, got float{}"),
    (
        lambda: update(STATS._replace(count=np.array(True)), 0.1),
        "stats.count to be a whole number, got bool{}",
    ),
    (
        lambda: update(STATS._replace(count=torch.tensor(4)), 0.1),
        "stats.count to be ndarray like stats.mean, got Tensor{}",
    ),
    (lambda: update(STATS, np.ones(3)), "momentum from 0 to 1, or a 0-d tensor, got ndarray{}"),
    (lambda: update(STATS, np.array(1)), "momentum to be floating point, got int64{}"),
    (
        lambda: functional.update_running_stats(None, None, STATS, 0.1),
        "running_mean to be an array, got NoneType{}",
    ),
    (lambda: mpisyncbn.convert_sync_batchnorm(ROWS), "a torch.nn.Module, got Tensor{}"),
    (lambda: mpisyncbn.revert_sync_batchnorm(ROWS), "a torch.nn.Module, got Tensor{}"),
    (lambda: mpisyncbn.set_process_group(ROWS, None), "a torch.nn.Module, got Tensor{}"),
    (lambda: forward(memoryview(b"")), "input to be an array, got memoryview{}"),
    (lambda: forward(ROWS, eps="1"), "eps to be finite and at least 0, got str{}"),
    (lambda: sync_batch_norm(ROWS, None, None, momentum=None), "momentum to be a number, got None{}"),
    (lambda: sync_batch_norm(ROWS, None, None, np.ones(3, "f4")), "weight to be Tensor like the input"),
    (lambda: sync_batch_norm(ROWS, None, None, None, np.ones(3, "f4")), "bias to be Tensor like the input"),
    (
        lambda: mpi_collectives.reduce_op_name("SUM of squares"),
        f"one of {', '.join(mpi_collectives._OPERATIONS)} as the reduction, got SUM of squares",
    ),
    (lambda: host_tensors.to_cpu([1.0]), "a tensor, got list"),
    (
        lambda: host_tensors.to_cpu(torch.eye(2).to_sparse()),
        "a dense tensor, got one of layout torch.sparse",
    ),
]
OUT_OF_RANGE = [
    (
        lambda: sync_batch_norm(ROWS, None, None, training=False),
        "running_mean and running_var in evaluation, got neither{}: pass them, or",
    ),
    (lambda: update(STATS._replace(count=-1), 0.1), "stats.count to be at least 0, got -1{}"),
    # These have no address, and neither has None: native code must tell them apart in another way.
    (lambda: sync_batch_norm(ROWS, None, None, torch.ones(0)), "weight of shape (3,)"),
    (lambda: sync_batch_norm(ROWS, None, None, None, torch.ones(0)), "bias of shape (3,)"),
    (lambda: update(STATS, -0.1), "momentum from 0 to 1, or a 0-d tensor, got -0.1{}"),
    (lambda: update(STATS, 1.5), "momentum from 0 to 1, or a 0-d tensor, got 1.5{}"),
    (lambda: update(STATS, float("nan")), "momentum from 0 to 1, or a 0-d tensor, got nan{}"),
]


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [(TypeError, *row) for row in OF_ANOTHER_KIND] + [(ValueError, *row) for row in OUT_OF_RANGE],
)
def test_values_of_the_wrong_type_or_out_of_range(error, call, words):
    with pytest.raises(error, match=re.escape(f"expected {words.format(HERE)}")):
        call()


def test_a_communicator_that_is_gone():
    with pytest.raises(MPISyncBNError, match="the Communicator of a compiled graph is gone"):
        by_graph_key("of nobody")


MASKED = "got a masked one, MaskedArray{}: leave those samples out, or fill them first, .filled()"
MATRIX = "got a matrix{}: convert it first, numpy.asarray()"
# arguments that take an array of the user, and a call for each; a space makes a key unique
PLACES = {
    "input": lambda one: forward(one(X2)),
    "weight": lambda one: forward(X2, one(X2[0])),
    "bias": lambda one: forward(X2, None, one(X2[0])),
    "dy": lambda one: backward(one(X2), X2, STATS),
    "input ": lambda one: backward(X2, one(X2), STATS),
    "weight ": lambda one: backward(X2, X2, STATS, one(X2[0])),
    "stats.mean": lambda one: backward(X2, X2, STATS._replace(mean=one(STATS.mean))),
    "stats.invstd": lambda one: backward(X2, X2, STATS._replace(invstd=one(STATS.mean))),
    "stats.var": lambda one: update(STATS._replace(var=one(STATS.var)), 0.1),
    "stats.count": lambda one: update(STATS._replace(count=one(np.array(4))), 0.1),
    "running_mean": lambda one: functional.update_running_stats(one(np.zeros(3)), np.ones(3), STATS, 0.1),
    "running_var": lambda one: functional.update_running_stats(np.zeros(3), one(np.ones(3)), STATS, 0.1),
    "momentum": lambda one: update(STATS, one(np.array(0.1))),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    ("one", "words", "place"),
    # a matrix has two dimensions: if a number is expected, another error refuses it
    [(np.ma.array, MASKED, place) for place in PLACES]
    + [(np.matrix, MATRIX, place) for place in PLACES if place not in ("stats.count", "momentum")],
)
def test_arrays_whose_operators_mean_something_else(one, words, place):
    expected = f"expected {place.strip()} to be a plain array, {words.format(HERE)}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        PLACES[place](one)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize("place", ["input", "residual", "weight", "running_mean", "num_batches_tracked"])
def test_masked_tensors(place):
    def one(tensor):
        return torch.masked.masked_tensor(tensor, tensor < 2)

    words = (
        f"expected {place} to be a plain tensor, got a MaskedTensor{HERE}: leave those samples out, or fill"
    )
    inputs = {"input": (one(ROWS),), "residual": (ROWS, one(ROWS))}.get(place, (ROWS,))
    layer = SyncBatchNorm(3)
    if place == "weight":
        del layer.weight
        layer.weight = one(torch.ones(3))
    elif len(inputs) == 1 and place != "input":
        setattr(layer, place, one(getattr(layer, place).clone()))
    for training in (True, False):
        if training or place != "num_batches_tracked":
            with pytest.raises(TypeError, match=re.escape(words)):
                layer.train(training)(*inputs)


class Wrapper(torch.Tensor):
    """A tensor that holds its values in another, as torchao's and others do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, strides=held.stride())

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        found = function(*(each.held if isinstance(each, cls) else each for each in args), **(kwargs or {}))
        return cls(found) if isinstance(found, torch.Tensor) else found


NESTED = "nested tensor{}: pass its .values(), or .to_padded_tensor(value); what pads it counts"
ODD_TENSORS = {
    "jagged": (lambda one: torch.nested.nested_tensor([one, one], layout=torch.jagged), NESTED),
    "nested": (lambda one: torch.nested.nested_tensor([one, one]), NESTED),
    "quantized": (
        lambda one: torch.quantize_per_tensor(one, 1.0, 0, torch.quint8),
        "quantized tensor{}: convert it first, .dequantize()",
    ),
    "wrapper": (
        Wrapper,
        f"{__name__}.Wrapper, which has no memory of its own{{}}: pass a tensor that holds",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_that_is_not_plain_is_named(kind, training):
    make, words = ODD_TENSORS[kind]
    module = SyncBatchNorm(3).train(training)
    odd = SyncBatchNorm(3).train(training)
    del odd.weight
    odd.weight = make(torch.ones(3))
    for place, call in {
        "input": lambda: module(make(ROWS)),
        "residual": lambda: module(ROWS, make(ROWS)),
        "weight": lambda: odd(ROWS),
        "dy": lambda: backward(make(ROWS), ROWS, STATS),
    }.items():
        with pytest.raises(
            TypeError, match=re.escape(f"expected {place} to be a plain tensor, got a {words}".format(HERE))
        ):
            call()


@pytest.mark.parametrize("training", [True, False])
def test_the_error_lists_the_dtype_of_each_tensor(training):
    module = SyncBatchNorm(3).to(torch.bfloat16).train(training)
    module.running_mean, module.running_var = torch.zeros(3), torch.ones(3)
    said = (
        f"expected running_mean of dtype bfloat16, the same for all, got float32{HERE}. They are: input "
        "bfloat16, weight bfloat16, bias bfloat16, running_mean float32, running_var float32. Convert the "
        "module, or the arrays, with .to(torch.bfloat16) or .to(torch.float32)"
    )
    with pytest.raises(TypeError, match=re.escape(said)):
        module(ROWS.bfloat16())
    with pytest.raises(
        TypeError, match=re.escape("float64. Convert the module, or the arrays, with .astype('float32')")
    ):
        forward(X2, np.ones(3))
