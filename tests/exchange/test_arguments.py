"""A bad argument raises an error that names the rank. Nothing is sent or changed before."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, functional
from support.ranks import WORLD, several

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
    """Return a SyncBatchNorm of 3 channels. Options but eps and momentum are set as attributes."""
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
    """Return an entry of BAD: functions that must raise ``error`` with ``words``, and arguments."""
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
    got = f"got 1, with input of shape {tuple(x.shape)}{HERE}"
    with pytest.raises(ValueError, match=f"{ONE}, {re.escape(got)}"):
        call(x, None)
    assert torch.equal(C, torch.ones(3)), "the running statistics of by_function"


@several
@pytest.mark.parametrize("call", [by_function, by_array, numpy_too, lambda x, _: SyncBatchNorm(3)(x)])
def test_one_value_per_channel_and_rank_is_enough(call):
    call(torch.full((1, 3), float(RANK)), None)


def test_vectors_that_are_copied_before_they_are_read():
    """A vector may have its negative bit set, have no memory, or be unaligned."""
    x, odd = torch.ones(4, 3) + torch.arange(4.0)[:, None], torch.ones(3)
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
        f"on cpu{where}: convert or expand": (X, X[:1]),
    }
    alone = torch.ones(1 if RANK == 0 else 0, 3)
    for training in (True, False):
        bn.train(training)
        for words, inputs in cases.items():
            with pytest.raises(ValueError, match=re.escape(words)):
                bn(*inputs)
    got = f"got 1, with input of shape {tuple(alone.shape)}{where}"
    with pytest.raises(ValueError, match=re.escape(got)):
        bn.train()(alone)
    bn.eps = -1.0
    with pytest.raises(ValueError, match=re.escape(f"got -1.0{where}")):
        bn(X)


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
