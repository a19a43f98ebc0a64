"""Fast tests of mpisyncbn.lightning.LayerSync without Lightning. See test_lightning.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mpisyncbn
from support.models import kinds, network
from support.ranks import WORLD, several

PACKAGES = "lightning.pytorch", "pytorch_lightning"
LAYER_SYNC = """
from abc import ABC, abstractmethod
class LayerSync(ABC):
    @abstractmethod
    def apply(self, model): ...
    @abstractmethod
    def revert(self, model): ...
class TorchSyncBatchNorm(LayerSync): ...
"""


@pytest.fixture
def packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """Imitations of Lightning's packages, as if the program had imported them.

    The fixture's parameter names the packages; by default it makes both.
    """
    made = []
    for package in PACKAGES:
        name = f"{package}.plugins.layer_sync"
        monkeypatch.delitem(sys.modules, name, raising=False)
        if package in getattr(request, "param", PACKAGES):
            made.append(module := ModuleType(name))
            exec(LAYER_SYNC, vars(module))
            monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture(autouse=True)
def destroyed() -> Iterator[None]:
    """Destroy the process group that LayerSync has made, if any, after the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("packages", [PACKAGES, PACKAGES[:1], PACKAGES[1:]], indirect=True)
def test_a_plugin_to_each_package_that_is_imported(packages: list[ModuleType]) -> None:
    plugin = mpisyncbn.lightning.LayerSync()
    assert packages
    for package in packages:
        assert isinstance(plugin, package.LayerSync)
        assert isinstance(plugin, package.TorchSyncBatchNorm), "allowed beside sync_batchnorm=True"


def test_a_class_that_a_configuration_file_may_name(packages: list[ModuleType]) -> None:
    """LightningCLI imports the class, and asks if it is a plugin before it makes an instance."""
    cls = importlib.reload(mpisyncbn.lightning).LayerSync
    assert all(issubclass(cls, package.LayerSync) for package in packages)


@pytest.mark.parametrize("packages", [()], indirect=True)
def test_without_lightning(packages: list[ModuleType]) -> None:
    with pytest.raises(ImportError, match=r"neither of lightning.pytorch, pytorch_lightning has been import"):
        mpisyncbn.lightning.LayerSync()
    assert not dist.is_initialized()


@pytest.mark.parametrize("option", ["fuse_relu", "fuse_activation"])
def test_there_and_back(option: str, packages: list[ModuleType]) -> None:
    net, given = network(), mpisyncbn.Communicator()
    before = kinds(net)
    plugin = mpisyncbn.lightning.LayerSync(given, name="net", memory_efficient=True, **{option: True})
    assert plugin.apply(net) is net
    layers = [layer for layer in net.modules() if isinstance(layer, mpisyncbn.SyncBatchNorm)]
    assert [layer.layer_name for layer in layers] == ["net: 0", "net: 1.1", "net: 2.1", "net: 4"]
    assert [layer.process_group for layer in layers] == [given] * 4
    assert [layer.activation for layer in layers] == [None, "relu", "relu", None]
    assert [layer.memory_efficient for layer in layers] == [True, False, False, True]
    assert plugin.revert(net) is net
    assert kinds(net) == before


def test_layers_of_the_models_own_stay(packages: list[ModuleType]) -> None:
    own = mpisyncbn.SyncBatchNorm(3, activation="leaky_relu(0.1)", memory_efficient=True)
    plugin, model = mpisyncbn.lightning.LayerSync(), nn.Sequential(nn.BatchNorm1d(3), own)
    plugin.apply(model)
    assert type(model[0]) is not nn.BatchNorm1d
    plugin.revert(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, mpisyncbn.SyncBatchNorm]
    assert (own.activation, own.memory_efficient) == ("leaky_relu(0.1)", True)


def test_the_backend(packages: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        mpisyncbn.lightning.LayerSync()
    assert not dist.is_initialized(), "NCCL's part, and Lightning's choice"
    for _ in range(2):  # the second plugin takes the group that exists
        mpisyncbn.lightning.LayerSync()
        assert dist.is_initialized() == (WORLD.size > 1)
    if WORLD.size > 1:
        assert (dist.get_backend(), dist.get_rank()) == ("mpi4py", WORLD.rank)


@several
def test_a_group_of_the_programs_own_stays(packages: list[ModuleType]) -> None:
    dist.init_process_group("gloo")
    mpisyncbn.lightning.LayerSync()
    assert dist.get_backend() == "gloo"


def test_the_refusal_of_torchs_layers_names_lightning() -> None:
    net = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match=r"\(sync_batchnorm=True of Lightning's Trainer makes it\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
