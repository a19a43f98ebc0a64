"""update_bn gives the running statistics of all samples of all ranks, compared in float64."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import mpisyncbn
from mpisyncbn import Communicator, convert_sync_batchnorm, update_bn
from support.ranks import WORLD, error_of, no_exchange, several, together
from support.whole_batch import distance

PARTS = [3, 1, 0, 2]  # the number of batches of each rank; rank 2 has none


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.Conv2d(3, 4, 1)
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Dropout(0.0)).double()


def batches(rank: int) -> list[torch.Tensor]:
    """Return the batches of a rank, of different sizes, with a mean far from 0."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [2 + (rank + step) % 3 for step in range(PARTS[rank % 4])]
    return [
        torch.randn(size, 2, 6, 5, dtype=torch.float64, generator=generator) * (1 + step) + 1e3
        for step, size in enumerate(sizes)
    ]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("kind", ["synchronized", "local", "both", "averaged", "compiled"])
def test_it_is_that_of_all_samples(kind):
    plain = net()
    model: nn.Module = copy.deepcopy(plain)
    if kind in ("synchronized", "averaged", "compiled"):
        convert_sync_batchnorm(model)
    elif kind == "both":
        convert_sync_batchnorm(model[4])
    model[2].eval()
    wrapped = {"averaged": AveragedModel, "compiled": torch.compile}.get(kind, lambda model: model)(model)
    # Batches have labels, which are ignored, and come from a generator, which has no length.
    update_bn(((x, "labels") for x in batches(WORLD.rank)), wrapped)
    model = wrapped.module if kind == "averaged" else model
    seen = plain[0](torch.cat([x for rank in range(WORLD.size) for x in batches(rank)]))
    with together():
        first = model[1]
        assert distance(first.running_mean, seen.mean((0, 2, 3))) < 1e-14
        assert distance(first.running_var, seen.var((0, 2, 3))) < 1e-10
        assert first.num_batches_tracked == max(PARTS[: WORLD.size])
        assert [each.training for each in model] == [True, True, False, True, True, True]
        assert all(layer.track_running_stats for layer in (model[1], model[4]))
        assert not any(layer._forward_hooks for layer in (model[1], model[4]))
    others = WORLD.allgather({name: value.numpy() for name, value in state(model).items()})
    with together():
        assert all((others[0][name] == other[name]).all() for other in others for name in other)


@several
def test_the_second_layer_gets_the_input_it_has_in_training():
    """Synchronized layers normalize each step with the statistics of all ranks, as in training."""
    steps = [[torch.randn(2 + rank, 2, 6, 5).double() for rank in range(WORLD.size)] for _ in range(2)]
    steps = WORLD.bcast(steps)
    model, plain = convert_sync_batchnorm(net()), net()
    update_bn([step[WORLD.rank] for step in steps], model)
    seen = torch.cat([plain[:4](torch.cat(step)) for step in steps])
    with together():
        assert distance(model[4].running_mean, seen.mean((0, 2, 3))) < 1e-12
        assert distance(model[4].running_var, seen.var((0, 2, 3))) < 1e-12


@several
def test_groups_and_ddp():
    mpisyncbn.init_process_group()
    half = Communicator(WORLD.Split(WORLD.rank % 2))
    model = net()
    convert_sync_batchnorm(model[:3], half)
    convert_sync_batchnorm(model[4])
    update_bn(batches(WORLD.rank), DistributedDataParallel(model))
    ranks = range(WORLD.rank % 2, WORLD.size, 2)
    data = [x for rank in ranks for x in batches(rank)]
    torch.distributed.destroy_process_group()
    with together():
        if data:
            seen = net()[0](torch.cat(data))
            assert distance(model[1].running_mean, seen.mean((0, 2, 3))) < 1e-14
            assert distance(model[1].running_var, seen.var((0, 2, 3))) < 1e-10


class Keyed(nn.Sequential):
    def forward(self, batch):
        return super().forward(batch["x"])


def test_a_batch_is_any_input_of_the_model():
    model = convert_sync_batchnorm(Keyed(nn.BatchNorm1d(3)))
    x = torch.randn(4 + WORLD.rank, 3)
    update_bn([{"x": x}], model)
    whole = torch.cat(WORLD.allgather(x))
    with together():
        assert distance(model[0].running_mean, whole.mean(0)) < 1e-6


def test_nothing_is_changed_by_an_error_or_without_data():
    model = convert_sync_batchnorm(net())
    before = state(model)
    update_bn([], model)
    problem = error_of(lambda: update_bn([torch.zeros(2, 9, 6, 5).double()], model), RuntimeError)
    wrong = error_of(lambda: update_bn([], model.forward), TypeError)
    stays = error_of(lambda: update_bn([{"x": torch.zeros(2, 9, 6, 5)}], model, "cpu"), TypeError)
    update_bn([torch.zeros(1)], nn.Identity())
    with together():
        assert problem is not None
        assert "expected a torch.nn.Module, got method" in str(wrong)
        assert f"to move it to cpu, got dict (on rank {WORLD.rank} of {WORLD.size})" in str(stays)
        assert all(torch.equal(before[name], value) for name, value in state(model).items())
        assert model.training
        assert model[1].track_running_stats
        assert not model[1]._forward_hooks


def test_a_bar_only_if_tqdm_is_there(monkeypatch):
    seen = []

    class Bar:
        @staticmethod
        def tqdm(loader, **options):
            seen.append(options["disable"])
            return loader

    for module, expected in ((Bar, [True if WORLD.rank else None]), (None, [])):
        monkeypatch.setitem(sys.modules, "tqdm.auto", module)
        update_bn(batches(WORLD.rank), net())
        with together():
            assert seen == expected
        seen.clear()


@several
def test_a_call_of_another_model_is_an_error_on_every_rank():
    model = nn.BatchNorm1d(3 + (WORLD.rank == 1))
    error = error_of(lambda: update_bn([], model), mpisyncbn.CollectiveMismatchError)
    with together():
        assert "rank 1 on" in str(error)
        assert "statistics of update_bn for layers of 4 channels (4 channels" in str(error)


class Before(nn.BatchNorm2d):
    """A layer that applies ReLU before it normalizes, and overwrites its input afterwards."""

    def forward(self, x):
        y = super().forward(x.relu())
        x.zero_()
        return y


class Merged(nn.Sequential):
    """A model whose train() keeps the first batch norm in evaluation, and sets an attribute."""

    merged = True

    def train(self, mode=True):
        super().train(mode)
        self.merged = not mode
        self[0].eval()
        return self


@pytest.mark.parametrize("synchronized", [True, False])
def test_the_normalized_values_count_and_not_the_input(synchronized):
    layer = Before(2).double()
    mpisyncbn.register_conversion(Before, lambda layer, batch_norm, x: batch_norm(x.relu()))
    if synchronized:
        convert_sync_batchnorm(layer)
    seen = torch.cat([x for rank in range(WORLD.size) for x in batches(rank)]).sub(1e3).relu()
    update_bn([x - 1e3 for x in batches(WORLD.rank)], layer)
    with together():
        assert distance(layer.running_mean, seen.mean((0, 2, 3))) < 1e-10


def test_modes_are_those_that_the_model_would_have():
    frozen = convert_sync_batchnorm(nn.BatchNorm2d(2).double(), name="frozen")
    model = Merged(frozen, nn.BatchNorm2d(2).double()).eval()
    update_bn(batches(WORLD.rank), model)
    modes = model.training, model.merged, [layer.training for layer in model]
    with together():
        assert modes == (False, True, [False, False])
        assert torch.equal(frozen.running_mean, torch.zeros(2).double())
        assert model[1].num_batches_tracked == max(PARTS[: WORLD.size])


@several
def test_ranks_without_batches_in_ddp_and_without_names():
    mpisyncbn.init_process_group()
    model = nn.Sequential(nn.Conv2d(2, 3, 1), mpisyncbn.SyncBatchNorm(3)).double()
    averaged = AveragedModel(DistributedDataParallel(model))
    for turn in range(2):  # in the second turn, all ranks know the layer by one name
        update_bn(batches(3) if WORLD.rank == turn else [], averaged)
    seen = model[0](torch.cat(batches(3)))
    torch.distributed.destroy_process_group()
    with together():
        assert distance(averaged.module.module[1].running_mean, seen.mean((0, 2, 3))) < 1e-12
        assert averaged.module.require_forward_param_sync


@no_exchange
def test_torchs_own_synchronized_layers_are_refused():
    with pytest.raises(TypeError, match=r"no layer of torch.nn.SyncBatchNorm .*convert the model first"):
        update_bn([], nn.SyncBatchNorm(3))


class Direct(nn.Sequential):
    """A model that calls torch.batch_norm itself, before its layer."""

    def forward(self, x):
        return super().forward(torch.batch_norm(x, None, None, None, None, True, 0.0, 1e-5, False))


def test_a_model_that_calls_the_operation_of_torch():
    model = Direct(nn.BatchNorm2d(2).double())
    update_bn(batches(WORLD.rank), model)
    with together():
        assert model[0].running_mean.abs().max() < 1e-6
        assert model[0].num_batches_tracked == max(PARTS[: WORLD.size])


def test_values_that_are_not_finite_leave_a_layer_as_it_is():
    model = mpisyncbn.convert_sync_batchnorm(net())
    before, data = state(model), [torch.full((2, 2, 6, 5), float("nan"), dtype=torch.float64)]
    with pytest.warns(RuntimeWarning) as seen:
        update_bn(data, model)
    names = [str(each.message).split("'")[1] for each in seen]
    with together():
        assert names == ["1", "4"]
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
