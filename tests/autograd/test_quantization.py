"""torch.ao.quantization and torchao quantize reverted models. Others must be reverted first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import mpisyncbn
from support.oracle import distance
from support.ranks import up_to_two

pytestmark = [up_to_two, pytest.mark.filterwarnings("ignore")]  # torch deprecates all of it
BACKEND = torch.backends.quantized.engine
X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def eager(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig(BACKEND)
    return quantization.prepare_qat(model)


def fused(model: nn.Module) -> nn.Module:
    return eager(quantization.fuse_modules_qat(model, ["0", "1", "2"]))


def after_training(model: nn.Module) -> nn.Module:
    model.eval().qconfig = quantization.get_default_qconfig(BACKEND)
    return quantization.prepare(model)


def fx(model: nn.Module) -> nn.Module:
    return quantize_fx.prepare_qat_fx(model, quantization.get_default_qat_qconfig_mapping(BACKEND), (X,))


def pt2e(model: nn.Module) -> nn.Module:
    prepare = pytest.importorskip(
        "torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed"
    )
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    settings = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    exported = torch.export.export(model, (X,)).module()
    return prepare.prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(settings))


SLOW = [pytest.param(each, marks=pytest.mark.full("torch traces the model")) for each in (fx, pt2e)]


@pytest.mark.parametrize("prepare", [eager, fused, after_training, *SLOW])
def test_a_reverted_model_is_quantized_as_one_that_was_never_converted(prepare) -> None:
    results = []
    for model in (net(), mpisyncbn.revert_sync_batchnorm(mpisyncbn.convert_sync_batchnorm(net()))):
        y = prepare(model)(X)
        y.sum().backward()
        results.append(y.detach())
    assert distance(*results) == 0.0


@pytest.mark.parametrize("prepare", [eager, after_training, fx])
def test_a_converted_model_says_revert_first(prepare) -> None:
    model = mpisyncbn.convert_sync_batchnorm(net())
    with pytest.raises(TypeError, match=r"quantization cannot quantize .*Sequential: 1.*[Rr]evert"):
        prepare(copy.deepcopy(model))
    linear = quantization.quantize_dynamic(model.eval(), {nn.Linear})  # it leaves other layers alone
    assert linear(X).shape == (4, 2)
    assert isinstance(linear[1], mpisyncbn.SyncBatchNorm)
