"""The activations of timm equal torch's, and those in timm's batch norms are fused."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
import torchvision_on_cpu

from mpisyncbn import activations, convert_sync_batchnorm
from support.activations import TORCHS
from support.models import C
from support.ranks import WORLD, no_exchange, together, up_to_two
from support.whole_batch import distance

pytestmark = [
    pytest.mark.full,
    up_to_two,
    pytest.mark.skipif(
        find_spec("timm") is None, reason="timm is not installed: pip install -e '.[integrations]'"
    ),
]


@pytest.fixture(autouse=True)
def torchvision():
    torchvision_on_cpu.allow()  # timm imports it


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "hard_swish", "leaky_relu", "elu", "relu"])
def test_layers_of_timm_are_fused(act, monkeypatch):
    from timm.layers import create_act
    from timm.layers.norm_act import BatchNormAct2d

    layer = BatchNormAct2d(C, act_layer=create_act.get_act_layer(act))
    torch.manual_seed(0)
    whole, mine = torch.randn(WORLD.size * 2, C, 2, 2), slice(2 * WORLD.rank, 2 * WORLD.rank + 2)
    expected = copy.deepcopy(layer)(whole)[mine]
    convert_sync_batchnorm(layer)
    monkeypatch.setattr(type(layer.act), "forward", None)  # a call would be an error
    y = layer(whole[mine])
    with together():
        assert distance(y, expected) < 1e-5


@no_exchange
@pytest.mark.parametrize("cls", [*activations._TIMM, "SwishMe", "HardSwishMe"])
def test_activations_of_timm_are_torchs(cls):
    from timm.layers import activations as plain
    from timm.layers import activations_me

    module = getattr(activations_me if cls.endswith("Me") else plain, cls)()
    torchs = TORCHS[activations.name_of_module(module)]
    z = torch.linspace(-8, 8, 4096, dtype=torch.float64)
    results = []
    for function in (module, torchs):
        leaf = z.clone().requires_grad_()
        y = function(leaf)
        y.backward(torch.cos(z))
        results += [y.detach(), leaf.grad]
    assert torch.allclose(results[0], results[2], rtol=0, atol=1e-14)
    assert torch.allclose(results[1], results[3], rtol=0, atol=1e-14)
