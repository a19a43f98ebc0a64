"""A synchronized model works with tools that scale its loss, save it and export it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import mpisyncbn
from mpisyncbn import convert_sync_batchnorm, revert_sync_batchnorm
from support.activations import ACTIVATIONS, TORCHS
from support.ranks import WORLD, no_exchange, together


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def trained(model: nn.Module) -> nn.Module:
    model(torch.randn(2 + WORLD.rank, 2, 6, 6)).square().mean().backward()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_scaled_loss_gives_the_same_step():
    """With GradScaler the gradients are finite, and the step is the same as without scaling."""
    models = [convert_sync_batchnorm(net()) for _ in range(2)]
    x = torch.randn(3 + WORLD.rank, 2, 6, 6, generator=torch.Generator().manual_seed(WORLD.rank))
    for model, enabled in zip(models, (True, False), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    with together():
        for scaled, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.allclose(scaled, plain, rtol=1e-5, atol=1e-7)


def test_distributed_checkpoint(tmp_path):
    """torch.distributed.checkpoint works with backend mpi4py: all ranks use one directory."""
    mpisyncbn.init_process_group()
    path = WORLD.bcast(str(tmp_path))
    model, other = trained(convert_sync_batchnorm(net())), convert_sync_batchnorm(net())
    dcp.save({"model": model.state_dict()}, checkpoint_id=path)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=path)
    other.load_state_dict(state["model"])
    torch.distributed.destroy_process_group()
    with together():
        assert other[1].num_batches_tracked == 1
        assert same(model, other)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = trained(convert_sync_batchnorm(net())), net()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))  # a plain model takes it as well
    with together():
        assert same(model, other)


@no_exchange
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's exporter gives it
def test_onnx():
    """In evaluation, a model with fused activations exports to the graph of the reverted one."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *net()[1:3])
    for activation in ACTIVATIONS:
        model.extend([nn.BatchNorm2d(3), TORCHS[activation]])
    model = trained(convert_sync_batchnorm(model, fuse_activation=True)).eval()
    x = torch.randn(2, 2, 6, 6)
    graphs = []
    for each in (model, revert_sync_batchnorm(copy.deepcopy(model))):
        exported = torch.onnx.export(each, (x,), dynamo=True, verbose=False)
        graphs.append(
            [
                node.op_type
                for node in onnx.load(io.BytesIO(exported.model_proto.SerializeToString())).graph.node
            ]
        )
    assert graphs[0] == graphs[1]
    assert graphs[0]
