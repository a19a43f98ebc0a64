"""Arguments of another kind or out of range: what is expected, what came, on which rank, and the cure."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch

import mpisyncbn
from mpisyncbn import MPISyncBNError, SyncBatchNorm, buffers, functional
from mpisyncbn.communicator import by_handle
from mpisyncbn.functional import BatchStats
from support.ranks import WORLD

HERE = f" (on rank {WORLD.rank} of {WORLD.size})"


def layer_with(**buffers: torch.Tensor) -> SyncBatchNorm:
    layer = SyncBatchNorm(3)
    layer._buffers.update(buffers)
    return layer


class LikeAnArray:
    """As those of xarray, JAX and others seem to be."""

    shape, ndim, dtype = (4, 3), 2, np.dtype("float32")


ROWS, STATS = torch.ones(4, 3), BatchStats(np.zeros(3), np.ones(3), np.ones(3), 4)
update = partial(functional.update_running_stats, np.zeros(3), np.ones(3))
OF_ANOTHER_KIND = {
    "an array for a layer": (
        lambda: SyncBatchNorm(3)(ROWS.numpy()),
        "expected input to be a torch tensor, got ndarray{}: for arrays there is mpisyncbn.functional",
    ),
    "nothing for a layer": (
        lambda: SyncBatchNorm(3)(None),
        "expected input to be a torch tensor, got NoneType{}",
    ),
    "an array for the function": (
        lambda: mpisyncbn.sync_batch_norm(ROWS.numpy(), None, None),
        "expected input to be a torch tensor, got ndarray{}",
    ),
    "a list for an array": (
        lambda: functional.batch_norm_forward([[1.0]]),
        "expected input to be an array, got list{}",
    ),
    "an array of another library": (
        lambda: functional.batch_norm_forward(LikeAnArray()),
        f"expected input to be an array of NumPy, CuPy or torch, got {__name__}.LikeAnArray{{}}: convert it",
    ),
    "a vector of another library": (
        lambda: functional.batch_norm_forward(ROWS.numpy(), LikeAnArray()),
        f"expected weight to be an array of NumPy, CuPy or torch, got {__name__}.LikeAnArray{{}}: convert it",
    ),
    "a list for a vector": (
        lambda: functional.batch_norm_forward(ROWS.numpy(), [1.0] * 3),
        "expected weight to be ndarray like the input, got list{}",
    ),
    "sparse input": (
        lambda: SyncBatchNorm(3)(ROWS.to_sparse()),
        "expected input to be a dense tensor, got one of layout torch.sparse_coo{}: convert it first",
    ),
    "sparse residual": (
        lambda: SyncBatchNorm(3)(ROWS, ROWS.to_sparse()),
        "expected residual to be a dense tensor, got one of layout torch.sparse_coo{}",
    ),
    "sparse statistics": (
        lambda: layer_with(running_mean=torch.zeros(3).to_sparse())(ROWS),
        "expected running_mean to be a dense tensor, got one of layout torch.sparse_coo{}",
    ),
    "a count of truths": (
        lambda: layer_with(num_batches_tracked=torch.tensor(False))(ROWS),
        "expected num_batches_tracked to be a tensor of whole numbers, got torch.bool{}",
    ),
    "no gradient": (
        lambda: functional.batch_norm_backward(None, ROWS, STATS),
        "expected dy to be Tensor like the input, got NoneType{}",
    ),
    "no statistics": (
        lambda: functional.batch_norm_backward(ROWS, ROWS, STATS[:3]),
        "expected stats to be the BatchStats that batch_norm_forward returned, got tuple{}",
    ),
    "a list in the statistics": (
        lambda: update(STATS._replace(var=[1.0] * 3), 0.1),
        "expected stats.var to be ndarray like stats.mean, got list{}",
    ),
    "statistics of a device for arrays": (
        lambda: update(STATS._replace(mean=torch.ones(3, device="meta")), 0.1),
        "expected stats.mean to be ndarray like the other arguments, got Tensor{}",
    ),
    "statistics of whole numbers": (
        lambda: update(STATS._replace(var=np.ones(3, int)), 0.1),
        "expected stats.var of dtype float64, got int64{}",
    ),
    "a count that is not whole": (
        lambda: update(STATS._replace(count=4.0), 0.1),
        "expected stats.count to be a whole number, got float{}",
    ),
    "a count of truths in the statistics": (
        lambda: update(STATS._replace(count=np.array(True)), 0.1),
        "expected stats.count to be a whole number, got bool{}",
    ),
    "a count of another kind": (
        lambda: update(STATS._replace(count=torch.tensor(4)), 0.1),
        "expected stats.count to be ndarray like stats.mean, got Tensor{}",
    ),
    "a momentum for each channel": (
        lambda: update(STATS, np.ones(3)),
        "expected momentum from 0 to 1, or a 0-d tensor, got ndarray{}",
    ),
    "a momentum of whole numbers": (
        lambda: update(STATS, np.array(1)),
        "expected momentum to be floating point, got int64{}",
    ),
    "no running statistics": (
        lambda: functional.update_running_stats(None, None, STATS, 0.1),
        "expected running_mean to be an array, got NoneType{}",
    ),
    "no module": (lambda: mpisyncbn.convert_sync_batchnorm(ROWS), "expected a torch.nn.Module, got Tensor{}"),
    "no module to revert": (
        lambda: mpisyncbn.revert_sync_batchnorm(ROWS),
        "expected a torch.nn.Module, got Tensor{}",
    ),
    "no module for a group": (
        lambda: mpisyncbn.set_process_group(ROWS, None),
        "expected a torch.nn.Module, got Tensor{}",
    ),
    "a view of memory": (
        lambda: functional.batch_norm_forward(memoryview(b"")),
        "expected input to be an array, got memoryview{}",
    ),
    "a word for eps": (
        lambda: functional.batch_norm_forward(ROWS, eps="1"),
        "expected eps to be finite and at least 0, got str{}",
    ),
    "no momentum for the function": (
        lambda: mpisyncbn.sync_batch_norm(ROWS, None, None, momentum=None),
        "expected momentum to be a number, got None{}",
    ),
    "an array for a weight": (
        lambda: mpisyncbn.sync_batch_norm(ROWS, None, None, np.ones(3, "f4")),
        "expected weight to be Tensor like the input",
    ),
    "an array for a bias": (
        lambda: mpisyncbn.sync_batch_norm(ROWS, None, None, None, np.ones(3, "f4")),
        "expected bias to be Tensor like the input",
    ),
    "no reduction": (lambda: buffers.name_of("SUM of squares"), "as the reduction, got another"),
    "a list for a message": (lambda: buffers.staged([1.0]), "expected a tensor, got list"),
    "a sparse message": (
        lambda: buffers.staged(torch.eye(2).to_sparse()),
        "expected a dense tensor, got one of layout torch.sparse_coo",
    ),
}
OUT_OF_RANGE = {
    "no statistics in evaluation": (
        lambda: mpisyncbn.sync_batch_norm(ROWS, None, None, training=False),
        "expected running_mean and running_var in evaluation, got neither{}: hand them over, or",
    ),
    "a negative count": (
        lambda: update(STATS._replace(count=-1), 0.1),
        "expected stats.count to be at least 0, got -1{}",
    ),
    # Native code tells these from None by more than their address, which neither has.
    **{
        f"{name} of length 0": (
            lambda name=name: mpisyncbn.sync_batch_norm(ROWS, None, None, **{name: torch.ones(0)}),
            f"expected {name} of shape (3,)",
        )
        for name in ("weight", "bias")
    },
    **{
        f"momentum {momentum}": (
            lambda momentum=momentum: update(STATS, momentum),
            f"expected momentum from 0 to 1, or a 0-d tensor, got {momentum}{{}}",
        )
        for momentum in (-0.1, 1.5, float("nan"))
    },
}


@pytest.mark.parametrize("case", [*OF_ANOTHER_KIND, *OUT_OF_RANGE])
def test_what_is_of_another_kind_or_out_of_range(case):
    call, words = {**OF_ANOTHER_KIND, **OUT_OF_RANGE}[case]
    with pytest.raises(
        TypeError if case in OF_ANOTHER_KIND else ValueError, match=re.escape(words.format(HERE))
    ):
        call()


def test_a_communicator_that_is_gone():
    with pytest.raises(MPISyncBNError, match="the Communicator of a compiled graph is gone"):
        by_handle("of nobody")


MASKED = "got a masked one, MaskedArray{}: leave those samples out, or fill them first, .filled()"
MATRIX = "got a matrix{}: convert it first, numpy.asarray()"
X2 = ROWS.numpy()
# where an array of the user comes in, and how it is called there
PLACES = {
    "input": lambda one: functional.batch_norm_forward(one(X2)),
    "weight": lambda one: functional.batch_norm_forward(X2, one(X2[0])),
    "bias": lambda one: functional.batch_norm_forward(X2, None, one(X2[0])),
    "dy": lambda one: functional.batch_norm_backward(one(X2), X2, STATS),
    "input ": lambda one: functional.batch_norm_backward(X2, one(X2), STATS),
    "weight ": lambda one: functional.batch_norm_backward(X2, X2, STATS, one(X2[0])),
    "stats.mean": lambda one: functional.batch_norm_backward(X2, X2, STATS._replace(mean=one(STATS.mean))),
    "stats.invstd": lambda one: functional.batch_norm_backward(
        X2, X2, STATS._replace(invstd=one(STATS.mean))
    ),
    "stats.var": lambda one: update(STATS._replace(var=one(STATS.var)), 0.1),
    "stats.count": lambda one: update(STATS._replace(count=one(np.array(4))), 0.1),
    "running_mean": lambda one: functional.update_running_stats(one(np.zeros(3)), np.ones(3), STATS, 0.1),
    "running_var": lambda one: functional.update_running_stats(np.zeros(3), one(np.ones(3)), STATS, 0.1),
    "momentum": lambda one: update(STATS, one(np.array(0.1))),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    ("one", "words", "place"),
    # a matrix has two dimensions: it is refused for that where a number is expected
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


NESTED = "nested tensor{}: hand over its .values(), or .to_padded_tensor(value); what pads it counts"
ODD_TENSORS = {
    "jagged": (lambda one: torch.nested.nested_tensor([one, one], layout=torch.jagged), NESTED),
    "nested": (lambda one: torch.nested.nested_tensor([one, one]), NESTED),
    "quantized": (
        lambda one: torch.quantize_per_tensor(one, 1.0, 0, torch.quint8),
        "quantized tensor{}: convert it first, .dequantize()",
    ),
    "wrapper": (
        Wrapper,
        f"{__name__}.Wrapper, which has no memory of its own{{}}: hand over a tensor that holds",
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
        "dy": lambda: functional.batch_norm_backward(make(ROWS), ROWS, STATS),
    }.items():
        with pytest.raises(
            TypeError, match=re.escape(f"expected {place} to be a plain tensor, got a {words}".format(HERE))
        ):
            call()


@pytest.mark.parametrize("training", [True, False])
def test_which_tensor_has_which_dtype(training):
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
        functional.batch_norm_forward(X2, np.ones(3))
