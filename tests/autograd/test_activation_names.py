"""``activation`` of layers and functions: a text, or a torch.nn module that does the same."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from mpisyncbn import SyncBatchNorm, activations, sync_batch_norm
from mpisyncbn.comm.groups import resolve
from mpisyncbn.kernels import Activation, Kind
from support.activations import ACTIVATIONS, TORCHS
from support.odd_values import activations as odd_activations
from support.oracle import local_batch, shard
from support.ranks import no_exchange, together, up_to_two
from support.versions import compiles

# Values that users give, the activations that they stand for, and the texts of these.
GIVEN = [
    *((text, activations.activation_of(module), text) for text, module in TORCHS.items() if text),
    *((module, activations.activation_of(text), text) for text, module in TORCHS.items() if text),
    ("leaky_relu(0.01)", Activation(Kind.LEAKY_RELU, 0.01), "leaky_relu"),
    ("leaky_relu(1)", Activation(Kind.LEAKY_RELU, 1.0), "leaky_relu(1.0)"),
    ("elu( .5 )", Activation(Kind.ELU, 0.5), "elu(0.5)"),
    ("elu(1e-3)", Activation(Kind.ELU, 0.001), "elu(0.001)"),
    (nn.ReLU(inplace=True), Activation(Kind.RELU), "relu"),
    (nn.LeakyReLU(2, inplace=True), Activation(Kind.LEAKY_RELU, 2.0), "leaky_relu(2.0)"),
    (nn.GELU(approximate="none"), Activation(Kind.GELU), "gelu"),
]
ODD = {key: make for key, make in odd_activations().items() if key not in map(repr, activations._BY_NAME)}
ACCEPTED = ("'elu( .5 )'", "'leaky_relu(-0.0)'", "'elu(1_0)'")  # float() reads these numbers


@no_exchange
@pytest.mark.parametrize(("given", "activation", "text"), GIVEN, ids=str)
def test_constructor_attribute_and_function_take_the_same_values(given, activation, text):
    """The constructor, the attribute and the function take the same values.

    A module that is given does not become a submodule of the layer.
    """
    built, layer = SyncBatchNorm(3, activation=given), SyncBatchNorm(3)
    layer.activation = given
    for each in (built, layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert each.activation == text
        assert activations.activation_of(each.activation) == activation
        assert list(each.modules()) == [each]
        assert list(each.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
        assert f"activation={text!r}" in repr(each)
    layer.activation = None
    assert "activation" not in repr(layer)
    x = shard((4, 3), 1)
    y = sync_batch_norm(x, None, None, activation=given, process_group=resolve(None))
    assert torch.equal(y, built(x))


@pytest.mark.parametrize("name", [each for each in ODD if each not in ACCEPTED])
@pytest.mark.parametrize("training", [True, False])
def test_another_value_is_an_error_before_anything_is_sent(name, training):
    group, x, layer = resolve(None), shard((local_batch(), 3), 1), SyncBatchNorm(3).train(training)
    before = group.exchanges
    words = (
        r"expected activation to be one of 'relu', .*'gelu\(tanh\)', a finite number in parentheses .* got "
    )
    with pytest.raises(ValueError, match=words):
        layer.activation = ODD[name]()
    with pytest.raises(ValueError, match=words):
        SyncBatchNorm(3, activation=ODD[name]())
    with pytest.raises(ValueError, match=words):
        layer._batch_norm(x, activation=ODD[name]())
    with pytest.raises(ValueError, match=words):
        sync_batch_norm(x, layer.running_mean, layer.running_var, training=training, activation=ODD[name]())
    with together():
        assert group.exchanges == before
        assert layer.activation is None
        assert layer.num_batches_tracked == 0


@no_exchange
def test_a_parameter_that_changes_at_each_step_leaves_nothing():
    def size():
        return sum(len(value) for value in vars(activations).values() if isinstance(value, dict))

    before, x = size(), shard((4, 3), 1)
    for step in range(5):
        sync_batch_norm(x, None, None, activation=nn.LeakyReLU(0.1 + step / 100))
        SyncBatchNorm(3, activation=f"elu({0.1 + step / 100})")
    assert size() == before


@compiles
@up_to_two
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns about itself
def test_texts_and_modules_are_compiled_in_one_graph_without_a_warning():
    given = [ACTIVATIONS[3], nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.SiLU(inplace=True)]
    x = shard((local_batch(), 3), 1)

    def function(x):
        return [sync_batch_norm(x, None, None, activation=each) for each in given]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    expected = function(x)
    with together():
        assert not [each for each in caught if each.category is not DeprecationWarning], caught
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results, expected, strict=True))
