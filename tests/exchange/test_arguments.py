"""Every bad argument: what is said, on which rank, before anything is sent, and nothing is changed."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, TransportError, functional
from mpisyncbn.functional import BatchStats
from support.jobs import run_alone
from support.ranks import WORLD

RANK, SIZE = WORLD.rank, WORLD.size
HERE = f" (on rank {RANK} of {SIZE})"
FLOAT32 = "of dtype float32, the same for all"
X = torch.zeros(4, 3, 2)
C, C4, WIDE, META = (
    torch.ones(3),
    torch.ones(4),
    torch.ones(3, dtype=torch.float64),
    torch.ones(3, device="meta"),
)


def layer(group, *, training=True, **options):
    """A SyncBatchNorm that has these values, however they were put there."""
    module = SyncBatchNorm(
        3, eps=options.pop("eps", 1e-5), momentum=options.pop("momentum", 0.1), process_group=group
    )
    for name, value in options.items():
        setattr(module, name, value if value is None or "running" in name else nn.Parameter(value))
    return module.train(training)


def by_module(x, group, training=True, **options):
    module = layer(group, training=training, **options)
    before = {key: value.clone() for key, value in module.state_dict().items() if not value.is_meta}
    try:
        module(x)
    finally:
        after = module.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def by_function(x, group, training=True, running_mean=C, running_var=C, **options):
    mpisyncbn.sync_batch_norm(x, running_mean, running_var, training=training, process_group=group, **options)


def by_array(x, group, **options):
    functional.batch_norm_forward(x, process_group=group, **options)


def numpy_too(x, group, **options):
    by_array(
        x.numpy(), group, **{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    )


EVERYWHERE = (by_module, by_function, by_array, numpy_too)
TORCH = (by_module, by_function, by_array)
RUNNING = (by_module, by_function)


def bad(calls, words, error=ValueError, x=X, **options):
    """Who complains about an input and options, with which error and words."""
    return calls, words, error, x, options


BAD = {
    "1D": bad(EVERYWHERE, "expected at least 2D input, (N, C, *), got 1D input", x=X[0, :, 0]),
    "0D": bad(EVERYWHERE, "expected at least 2D input, (N, C, *), got 0D input", x=X[0, 0, 0]),
    "no channels": bad(
        EVERYWHERE, "expected a non-zero number of input channels, got shape (4, 0, 2)", x=X[:, :0]
    ),
    "5 channels": bad(
        RUNNING, "of shape (5,), one value per channel of the input (4, 5)", x=torch.zeros(4, 5)
    ),
    "wide weight": bad(EVERYWHERE, f"weight {FLOAT32}, got float64", TypeError, weight=WIDE),
    "wide bias": bad(EVERYWHERE, f"bias {FLOAT32}, got float64", TypeError, weight=C, bias=WIDE),
    "wide running_var": bad(RUNNING, f"running_var {FLOAT32}, got float64", TypeError, running_var=WIDE),
    "half weight": bad(TORCH, f"weight {FLOAT32}, got float16", TypeError, weight=C.half()),
    "wide for half": bad(TORCH, "of dtype bfloat16 or float32,", TypeError, X.bfloat16(), weight=WIDE),
    "no running_var": bad(
        RUNNING, "running_mean and running_var both or neither, got no running_var", running_var=None
    ),
    "no running_mean": bad(
        RUNNING, "running_mean and running_var both or neither, got no running_mean", running_mean=None
    ),
}
for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
    words = f"expected input of dtype float16, bfloat16, float32, float64, got {str(dtype)[6:]}"
    BAD[str(dtype)] = bad(EVERYWHERE, words, TypeError, X.to(dtype))
for name in ("weight", "bias", "running_mean", "running_var"):
    calls = RUNNING if "running" in name else TORCH
    words = f"expected {name} of shape (3,), one value per channel of the input (4, 3, 2), got (4,)"
    BAD[f"{name} of another length"] = bad(calls, words, **{name: C4})
    words = f"expected {name} on the input's device, cpu, got meta"
    BAD[f"{name} on another device"] = bad(calls, words, **{name: META})
for eps in (-1e-5, float("nan"), float("inf")):
    BAD[f"eps {eps}"] = bad(EVERYWHERE, f"expected eps to be finite and at least 0, got {eps}", eps=eps)
for momentum in (-0.1, 1.1, 2, float("nan")):
    words = f"expected momentum from 0 to 1, or None, got {momentum}"
    BAD[f"momentum {momentum}"] = bad(RUNNING, words, momentum=momentum)


for momentum in (torch.tensor(1.5), torch.tensor(-0.1)):
    words = f"expected momentum from 0 to 1, or None, got {momentum:.1f}"
    BAD[str(momentum)] = bad(RUNNING, words, momentum=momentum)
BAD["momentum with gradient"] = bad(
    RUNNING,
    "expected momentum without a gradient, got a tensor that requires one",
    TypeError,
    momentum=torch.tensor(0.1, requires_grad=True),
)
BAD["momentum on another device"] = bad(
    RUNNING,
    "expected momentum in host memory, got a tensor on meta",
    momentum=torch.tensor(0.1, device="meta"),
)
BAD["momentum of one dimension"] = bad(
    RUNNING, "expected momentum from 0 to 1, or None, got Tensor", TypeError, momentum=torch.ones(1)
)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, row in BAD.items() for call in row[0]])
def test_a_bad_argument(name, call):
    _, words, error, x, options = BAD[name]
    group = Communicator()
    modes = [True, False] if call in RUNNING and not {"eps", "momentum"} & set(options) else [True]
    for training in modes:
        mode = {} if training else {"training": False}
        with pytest.raises(error, match=re.escape(words) + ".*" + re.escape(HERE)):
            call(x, group, **mode, **options)
    assert group.comm is None, "nothing was sent"


def test_the_backward_of_something_else():
    x = np.ones((4, 3))
    _, stats = functional.batch_norm_forward(x)
    for dy, got in ((x[:2], "(2, 3) float64"), (x.astype("f"), "(4, 3) float32")):
        with pytest.raises(
            ValueError, match=re.escape(f"expected dy like x, (4, 3) float64, got {got}{HERE}")
        ):
            functional.batch_norm_backward(dy, x, stats)


ONE = "expected more than 1 value per channel over the whole group when training"


@pytest.mark.parametrize("call", EVERYWHERE)
def test_one_value_per_channel_in_the_whole_group(call):
    x = torch.ones(1 if RANK == SIZE - 1 else 0, 3)
    with pytest.raises(
        ValueError, match=rf"{ONE}, got input of shape {re.escape(str(tuple(x.shape)) + HERE)}"
    ):
        call(x, None)


def test_one_value_per_channel_in_a_batch_of_a_function_changes_nothing():
    running = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=ONE):
        by_function(
            torch.zeros(1 if RANK == 0 else 0, 3), None, running_mean=running[0], running_var=running[1]
        )
    assert torch.equal(torch.stack(running), torch.ones(2, 3))


@pytest.mark.skipif(SIZE < 2, reason="needs two values on two ranks")
@pytest.mark.parametrize("call", [by_function, by_array, numpy_too, lambda x, _: SyncBatchNorm(3)(x)])
def test_one_value_per_channel_and_rank_is_enough(call):
    call(torch.full((1, 3), float(RANK)), None)


def freed():
    comm = WORLD.Dup()
    comm.Free()
    return comm


NULL = "expected a communicator that contains this rank, got MPI.COMM_NULL"
GROUPS = {
    "COMM_NULL": (lambda: MPI.COMM_NULL, ValueError, NULL),
    "freed": (freed, ValueError, NULL),
    "without this rank": (lambda: WORLD.Split(MPI.UNDEFINED), ValueError, NULL),
    "object": (object, TypeError, "expected process_group to be an mpi4py communicator"),
    "a torch object": (lambda: torch.ones(2), TypeError, "or None (the world), got torch.Tensor"),
    "ranks": (lambda: [0, 1], TypeError, "or None (the world), got builtins.list"),
    "MPI.Group": (lambda: WORLD.group, TypeError, "or None (the world), got mpi4py.MPI.Group"),
}
USERS = {
    "SyncBatchNorm": lambda group: SyncBatchNorm(3, process_group=group),
    "convert": lambda group: mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group),
    "sync_batch_norm": lambda group: by_function(X, group),
    "functional": lambda group: numpy_too(X, group),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", GROUPS)
def test_a_bad_process_group(name, user):
    make, error, words = GROUPS[name]
    group = make()
    with pytest.raises(error, match=re.escape(words) + ".*" + re.escape(HERE)):
        USERS[user](group)


@pytest.mark.parametrize("name", ["COMM_NULL", "freed", "object"])
def test_a_communicator_of_a_bad_communicator(name):
    make, error, _ = GROUPS[name]
    words = NULL if error is ValueError else "expected an mpi4py communicator, got builtins.object"
    with pytest.raises(error, match=re.escape(words + HERE)):
        Communicator(make())


@pytest.mark.skipif(SIZE < 2, reason="an inter-communicator is between ranks")
@pytest.mark.parametrize("user", USERS)
def test_an_inter_communicator(user):
    side = RANK % 2
    inter = WORLD.Split(side).Create_intercomm(0, WORLD, 1 - side)
    words = f"expected an intra-communicator, got an inter-communicator{HERE}: merge it first"
    with pytest.raises(ValueError, match=re.escape(words)):
        USERS[user](inter)


def test_no_layer_is_converted_to_a_bad_group():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="expected process_group"):
        mpisyncbn.convert_sync_batchnorm(model, "world")
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("everywhere", [True, False], ids=["on every rank", "on one rank"])
@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        (
            "TRANSPORT",
            "device",
            TransportError,
            "MPISYNCBN_TRANSPORT=device asks for .*, or set the variable to auto",
        ),
        (
            "TRANSPORT",
            "gpu",
            ValueError,
            "MPISYNCBN_TRANSPORT must be one of auto, host, device, got 'gpu' .*: correct",
        ),
        (
            "DEBUG",
            "yes",
            ValueError,
            "MPISYNCBN_DEBUG must be one of 0, 1, got 'yes' .*: correct or unset it",
        ),
    ],
)
def test_a_bad_variable_is_an_error_on_every_rank(variable, value, error, words, everywhere, monkeypatch):
    if everywhere or RANK == SIZE - 1:
        monkeypatch.setenv(f"MPISYNCBN_{variable}", value)
    group = Communicator()
    module = SyncBatchNorm(3, process_group=group)
    caught = []
    for _ in range(2):
        try:
            module(X)
        except error as problem:
            caught.append(str(problem))
    monkeypatch.undo()
    y = module(X)
    assert len(caught) == 2
    for message in caught:
        assert re.match(words, message)
        assert f"on rank {0 if everywhere else SIZE - 1} of {SIZE}" in message
    assert y.shape == X.shape


@pytest.mark.parametrize(
    ("variable", "value"), [("TRANSPORT", "HOST"), ("TRANSPORT", " auto "), ("DEBUG", "")]
)
def test_a_variable_is_read_kindly(variable, value, monkeypatch):
    monkeypatch.setenv(f"MPISYNCBN_{variable}", value)
    numpy_too(X, Communicator())


TRY = """
import numpy, mpi4py, mpisyncbn
{before}
for call in (
    lambda: mpisyncbn.functional.batch_norm_forward(numpy.ones((2, 3))),
    lambda: mpisyncbn.Communicator(),
    lambda: mpisyncbn.new_subgroups(),
):
    try:
        call()
    except mpisyncbn.MPISyncBNError as error:
        print(error)
    else:
        print("no error")
{after}
"""
FINALIZED = "MPI is already finalized: synchronized batch norm needs it running; call MPI.Finalize() later"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "mpi4py.rc.initialize = False",
            "from mpi4py import MPI; MPI.Init_thread(MPI.THREAD_MULTIPLE); call(); MPI.Finalize()",
            "MPI is not initialized (mpi4py.rc.initialize is off): call MPI.Init_thread(MPI.THREAD_MULTIPLE)",
        ),
        ("from mpi4py import MPI; MPI.Finalize()", "", FINALIZED),
        ("mpisyncbn.new_subgroups(); from mpi4py import MPI; MPI.Finalize()", "", FINALIZED),
        (
            "mpi4py.rc.thread_level = 'funneled'",
            "",
            f"MPI provides thread level {MPI.THREAD_FUNNELED}, expected at least MPI.THREAD_SERIALIZED "
            f"({MPI.THREAD_SERIALIZED}), because autograd may run backward on another thread "
            "(on rank 0 of 1): ask for it with mpi4py.rc.thread_level",
        ),
    ],
    ids=["not initialized", "finalized", "finalized after use", "threads"],
)
def test_mpi_that_is_not_ready(before, after, words):
    output = run_alone(TRY.format(before=before, after=after))
    lines = output.strip().splitlines()
    assert len(lines) == 3, output
    for line in lines:
        assert line.startswith(words)


def test_arrays_of_another_kind_than_the_input():
    x = torch.ones(4, 3)
    for vectors in ((np.ones(3, "f4"), None), (None, np.ones(3, "f4"))):
        with pytest.raises(TypeError, match=r"expected (weight|bias) to be Tensor like the input"):
            mpisyncbn.sync_batch_norm(x, None, None, *vectors)


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
        lambda: update(STATS._replace(mean=META), 0.1),
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
}


@pytest.mark.parametrize("case", OF_ANOTHER_KIND)
def test_what_is_of_another_kind(case):
    call, words = OF_ANOTHER_KIND[case]
    with pytest.raises(TypeError, match=re.escape(words.format(HERE))):
        call()


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


def test_vectors_that_are_copied_before_they_are_read():
    """A sign that is yet to be changed, zeros without memory, values at odd addresses."""
    x, odd = ROWS + torch.arange(4.0)[:, None], torch.ones(3)
    for weight in (torch._neg_view(odd), torch._efficientzerotensor(3)):
        y = mpisyncbn.sync_batch_norm(x, None, None, weight)
        assert torch.equal(y, mpisyncbn.sync_batch_norm(x, None, None, weight.clone()))
    weight = np.frombuffer(b"\0" + np.arange(3.0, dtype="f4").tobytes(), np.uint8)[1:].view("f4")
    assert not weight.flags.aligned
    y, _ = functional.batch_norm_forward(x.numpy(), weight)
    assert np.array_equal(y, functional.batch_norm_forward(x.numpy(), weight.copy())[0])


def test_a_converted_layer_is_named():
    net = nn.Sequential(nn.Identity(), nn.ModuleDict({"bn": nn.BatchNorm1d(3)}))
    mpisyncbn.convert_sync_batchnorm(net)
    bn = net[1]["bn"]
    where = f" in layer Sequential: 1.bn{HERE}"
    cases = {
        f"of the input (4, 5), got (3,){where}: an input is (N, C, *), with": (torch.ones(4, 5),),
        f"got 1D input{where}: one sample": (torch.ones(3),),
        f"on cpu{where}: convert or expand": (ROWS, ROWS[:1]),
    }
    alone = torch.ones(1 if RANK == 0 else 0, 3)
    for training in (True, False):
        bn.train(training)
        for words, inputs in cases.items():
            with pytest.raises(ValueError, match=re.escape(words)):
                bn(*inputs)
    with pytest.raises(ValueError, match=re.escape(f"got input of shape {tuple(alone.shape)}{where}")):
        bn.train()(alone)


def test_evaluation_by_a_function_without_statistics():
    words = f"expected running_mean and running_var in evaluation, got neither{HERE}: hand them over, or"
    with pytest.raises(ValueError, match=re.escape(words)):
        mpisyncbn.sync_batch_norm(ROWS, None, None, training=False)


def test_a_negative_count():
    with pytest.raises(ValueError, match=re.escape(f"expected stats.count to be at least 0, got -1{HERE}")):
        update(STATS._replace(count=-1), 0.1)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_out_of_range(momentum):
    words = f"expected momentum from 0 to 1, or a 0-d tensor, got {momentum}{HERE}"
    with pytest.raises(ValueError, match=re.escape(words)):
        update(STATS, momentum)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_vector_of_length_0_is_not_none(name):
    """Native code tells them apart by more than their address, which neither has."""
    with pytest.raises(ValueError, match=re.escape(f"expected {name} of shape (3,)")):
        mpisyncbn.sync_batch_norm(ROWS, None, None, **{name: torch.ones(0)})


def test_more_dimensions_than_anybody_has():
    x = torch.randn([4, 3] + [1] * 80, generator=torch.Generator().manual_seed(0))
    y = mpisyncbn.sync_batch_norm(x, None, None)
    assert torch.allclose(y.flatten(1), mpisyncbn.sync_batch_norm(x.flatten(1), None, None), atol=1e-6)


def test_running_statistics_that_torch_would_not_change():
    x = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        mpisyncbn.sync_batch_norm(x, torch.zeros(3, requires_grad=True), torch.ones(3))
    with torch.inference_mode():
        running_mean, running_var = torch.zeros(3), torch.ones(3)
        mpisyncbn.sync_batch_norm(x, running_mean, running_var)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        mpisyncbn.sync_batch_norm(x, running_mean, running_var)
    running_var = torch.ones(3)
    before = running_var._version
    mpisyncbn.sync_batch_norm(x, torch.zeros(3), running_var)
    assert running_var._version > before
