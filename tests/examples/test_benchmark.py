"""Tests of scripts/benchmark.py: its peers compute what this package does, its arithmetic is right.

They do not check times.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmark
import mpisyncbn
import pictures
from benchmarks import (
    cases,
    exchanges,
    layers,
    memory,
    model,
    native,
    peers,
    resnet,
    scaling,
    summary,
    timing,
)
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD, together


@pytest.mark.parametrize("quick", [False, True])
def test_cases(quick: bool) -> None:
    for table in (cases.LAYERS, cases.TINY, cases.RELU, cases.MASKED):
        chosen = list(cases.cases(table, quick))
        assert {case.dtype for case in chosen} == {"float32", "bfloat16"}
        assert {case.format for case in chosen} == {"contiguous", "channels_last"}
        assert len(set(chosen)) == len(chosen)
        assert all(case.format == "contiguous" or len(case.shape) in (4, 5) for case in chosen)
    assert all(case.bytes >= cases.LARGE_VERB_BYTES for case in cases.verb_cases(quick))
    # all families but the tiny ones have cases of 6 MB in float32
    large = {case.family for case in cases.cases(cases.LAYERS, quick) if case.values >= cases.LARGE_VALUES}
    assert large == {"ResNet-50", "segmentation", "3-D U-Net", "1-D"}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_data_is_laid_out_as_the_case_says(shape: tuple[int, ...], dtype: str) -> None:
    for memory_format in cases.FORMATS:
        x, dy = layers.data(cases.Case("test", shape, dtype, memory_format))
        assert x.requires_grad
        assert x.stride() == dy.stride()
        assert x.dtype == getattr(torch, dtype)
        channels_last = memory_format == "channels_last"
        assert x.movedim(1, -1).is_contiguous() == channels_last
        assert x.is_contiguous() != channels_last


@pytest.mark.parametrize(("wire", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_gather_and_merge(wire: str, tolerance: float) -> None:
    x = shard((local_batch(), 5, 7), mean=3.0, dtype=torch.float64)
    mean = x.mean((0, 2))
    m2 = (x - mean[:, None]).square().sum((0, 2))

    total, merged, var = exchanges.gather_and_merge(WORLD, x.numel() // 5, mean, m2, wire)
    expected = oracle(x, x)

    with together():
        assert total == expected.count
        assert distance(torch.from_numpy(merged), expected.mean) < tolerance
        assert distance(torch.from_numpy(var), expected.var) < tolerance


def test_every_exchange_says_the_same() -> None:
    x = shard((local_batch(), 5, 7), mean=3.0)
    group = mpisyncbn.Communicator().ready()
    said = {name: once() for name, once in exchanges.exchanges(group, x).items()}
    group.free()

    with together():
        count, mean, var = said["merge_moments"]
        for name in cases.GATHERS:
            assert said[name][0] == count
            np.testing.assert_allclose(said[name][1], mean, rtol=1e-5)
            np.testing.assert_allclose(said[name][2], var, rtol=1e-5)


def test_naive_layer() -> None:
    """The naive layer is right if all ranks have batches of one size, else it is wrong."""
    x, dy = shard((3, 5, 4, 4), mean=0.5), shard((3, 5, 4, 4), seed=1)
    x.requires_grad_()
    layer = peers.NaiveSyncBatchNorm(5)
    with peers.gloo():
        y = layer(x)
        y.backward(dy)
    expected = oracle(x, dy)

    with together():
        assert distance(y, expected.y) < 1e-5
        assert distance(x.grad, expected.dx) < 1e-5
        assert distance(layer.running_mean, 0.1 * expected.mean) < 1e-5


def test_the_loop_in_c_sums() -> None:
    loaded, reason = native.library()
    if loaded is None:
        pytest.skip(reason)
    message = np.arange(4.0)
    code = loaded.allreduce_loop(native.pointer(WORLD), native.buffer(message), 4, 2)

    with together():
        assert code == 0
        np.testing.assert_array_equal(message, np.arange(4.0) * WORLD.size**2)


def test_copies() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for call in peers.copies(x).values():
        call()
    target = peers.copies(x)["copy_"]()
    assert torch.equal(target, x)
    assert target.stride() == x.stride()


def test_peers_take_turns_and_ranks_agree() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    figures = timing.interleave(calls, 0.0, reset=lambda: order.append("-"), warm=1, fewest=3)

    everyone = WORLD.allgather(figures)
    with together():
        assert order == ["a", "-", "b", "-"] * 4
        assert everyone == [figures] * WORLD.size
        assert all(0 < figures[name]["minimum"] <= figures[name]["median"] for name in "ab")


def test_copy_fraction() -> None:
    times = {"copy_": 4.0, "memmove": 3.0, "kernel": 2.0}
    figures = {name: {"median": 2 * time, "minimum": time} for name, time in times.items()}
    # a copy moves two tensors in time 3, the kernel one tensor in time 2
    assert timing.copy_fraction(figures, "kernel", 1) == {"median": 0.75, "minimum": 0.75}


def test_resnet() -> None:
    net = resnet.resnet50()
    norms = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert sum(parameter.numel() for parameter in net.parameters()) == 25_557_032  # as in torchvision
    assert sorted(layer.num_features for layer in norms) == sorted(model.RESNET50)
    assert len(norms) == 53


def test_models_do_the_same_step() -> None:
    """All models make the same training step.

    All ranks have the same images, so each rank's batch has the statistics of the whole batch.
    """
    torch.manual_seed(0)
    blocks = resnet.Bottleneck(3, 4, 2), resnet.Bottleneck(16, 4, 1)
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    local = torch.nn.Sequential(*blocks, *head)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    others = [
        mpisyncbn.convert_sync_batchnorm(copy.deepcopy(local)),
        mpisyncbn.convert_sync_batchnorm(copy.deepcopy(local), fuse_relu=True),
        resnet.waiting(copy.deepcopy(local)),
    ]
    for net in (local, *others):
        resnet.training_step(net, images, labels)()

    with together():
        for net in others:
            for (name, expected), actual in zip(local.named_parameters(), net.parameters(), strict=True):
                assert distance(actual, expected) < 1e-4, name


def test_model_by_hand() -> None:
    # over 8 ranks an all-reduce takes three messages: 3 us with no bytes, 9 us with 2,000 bytes
    network = model.fit(8, 3.0, 9.0, size=2000, least=0)
    assert network == pytest.approx((1.0, 0.001))
    # recursive doubling takes 3 + 2.4 us, Rabenseifner 6 + 1.4; ten times the bytes 3 + 24, 6 + 14
    assert model.fastest(model.allreduce_costs(8, 800), network) == pytest.approx(5.4)
    assert model.fastest(model.allreduce_costs(8, 8000), network) == pytest.approx(20.0)
    # a layer of 10 channels all-reduces 184 bytes twice, or all-gathers 84 bytes and all-reduces 80
    step = model.step_ms(8, network, [10])
    assert step["ours"] == pytest.approx(2 * (3 + 3 * 0.184) / 1000)
    assert step["all-gather"] == pytest.approx((3 + 7 * 0.084 + 3 + 3 * 0.080) / 1000)


def row(value: float, peer: str = "local", **changes: Any) -> dict[str, Any]:
    found = {"family": "f", "shape": [8, 64, 56, 56], "dtype": "float32", "format": "contiguous"}
    found |= {"values": 1_605_632, "bytes": 6_422_528, "us": {}, "ranks": 1, "threads": 2}
    return found | {"ours to": {peer: {"median": value, "minimum": value / 2}}} | changes


def exchange_row(channels: int, **us: float) -> dict[str, Any]:
    times = {name: {"median": us["ours"], "minimum": us["ours"]} for name in (*cases.WHOLE, cases.BARE)}
    floor = {cases.FLOOR: {"median": us["floor"], "minimum": us["floor"]}}
    return {"channels": channels, "us": times | floor, "left out": {}}


LAYERS = [
    row(0.5),
    row(0.8),
    row(1.1, format="channels_last"),
    row(9.0, values=802_816),  # too small to count
]
EXCHANGES = [
    exchange_row(1, ours=1.0, floor=0.75),
    exchange_row(64, ours=2.0, floor=1.0),
    exchange_row(512, ours=6.0, floor=4.0),
]


APART = cases.SEPARATE
KEPT = {"torch": 300, "torch, in-place": 200, "plain": 200, "ours": 100}


@pytest.mark.parametrize(
    ("section", "rows", "medians", "met"),
    [
        ("layer", LAYERS, [math.sqrt(0.4), 1.1, 1.1], [True, False, False] + [None] * 4),
        ("threads", LAYERS, [math.sqrt(0.4), 1.1, 1.1], [True, False, False] + [None] * 4),
        ("exchange", EXCHANGES, [1.0, 1.5] * 3, [False] * 6),  # a difference in us, then a ratio
        # here the bar is the least allowed value; the value is the inverse of the row's ratio
        ("peers", [row(0.125, "naive over gloo")], [8.0, 8.0], [True, True, None, None]),
        ("relu", [row(0.5, "ours, then relu")], [0.5, 0.5], [True, True]),
        ("activations", [row(0.5, APART), row(0.8, APART)], [0.8], [False]),
        ("memory", [row(1.2, "plain", kept=KEPT)], [1 / 3, 0.5, 0.5, 1.2], [True, True, True, False]),
        ("reductions", [row(0.5, "gloo", family="all_reduce", bytes=4000)], [2.0], [False]),
    ],
)
def test_summary(
    section: str, rows: list[dict[str, Any]], medians: list[float], met: list[bool | None]
) -> None:
    """Medians are compared with bars. A bar is neither met nor missed if nothing was measured."""
    lines = summary.summarize({section: rows})
    assert [line.value["median"] for line in lines if line.value] == pytest.approx(medians)
    assert [line.met for line in lines] == met


def test_bytes_kept() -> None:
    """torch keeps the outputs of convolution, norm and activation for the backward pass.

    The memory-efficient layer, "ours", keeps only the last of them.
    """
    case = cases.Case("test", (2, 3, 4, 5, 6), "float32", "contiguous")
    kept = {name: memory.bytes_kept(norm, case) for name, norm in memory.norms(3).items()}
    statistics = 4 * 4 * 3  # torch's layer also keeps mean, invstd and the running statistics

    with together():
        assert kept["ours"] == case.bytes
        assert kept["plain"] == 2 * case.bytes
        assert 2 * case.bytes < kept["torch, in-place"] <= 2 * case.bytes + statistics
        assert 3 * case.bytes < kept["torch"] <= 3 * case.bytes + statistics


def test_summary_in_words() -> None:
    lines = [str(line) for line in summary.summarize({"layer": LAYERS})]
    assert "1.10 (0.55)" in lines[2]
    assert lines[2].endswith("MISSED")
    assert "not measured" in lines[3]
    without = {"channels": 1, "us": {}, "left out": {cases.FLOOR: "no mpicc"}}
    assert ["no mpicc" in str(line) for line in summary.summarize({"exchange": [without]})] == [True]
    (first, *_) = summary.summarize({"threads": LAYERS})
    assert first.what.startswith("1 rank with 2 threads, layer over local, 6 MB and more, float32")


def test_threads_are_a_run_of_their_own() -> None:
    assert "threads" not in benchmark.parse([]).only
    assert benchmark.parse(["--threads", "2"]).only == ["threads"]
    assert benchmark.parse(["--threads", "2", "--only", "tiny"]).only == ["tiny"]


def test_environment_keeps_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")
    monkeypatch.delenv("PRTE_MCA_hwloc_default_binding_policy", raising=False)
    variables = scaling.environment()
    assert variables["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert variables["PRTE_MCA_hwloc_default_binding_policy"] == "none"


def test_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--only", "layer,speed"])
    assert "got speed" in capsys.readouterr().err


def test_a_run_and_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "TINY", [("tiny", (2, 64, 8, 8), True)])
    monkeypatch.setattr(layers, "interleave", lambda *args, **kw: timing.interleave(args[0], 0.0, warm=1))
    report = tmp_path / "cpu-report.json"
    threads = torch.get_num_threads()
    benchmark.main(["--quick", "--only", "tiny", "--default-allocator", "--json", str(report)])
    torch.set_num_threads(threads)

    printed = capsys.readouterr().out
    with together():
        if WORLD.rank > 0:
            assert printed == ""
            assert not list(tmp_path.iterdir())
            return
        assert "tiny (2, 64, 8, 8) float32 channels_last:" in printed
        written = json.loads(report.read_text())
        assert len(written["sections"]["tiny"]) == 4
        assert written["environment"]["ranks"] == WORLD.size
        assert [line["bar"] for line in written["summary"]] == [2.5, 2.5]

        pictures.main(["--results", str(tmp_path), "--to", str(tmp_path / "drawn")])
        assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
            "architecture.svg",
            "benchmark.md",
            "layers.svg",
        }
        assert "| (2, 64, 8, 8) | bfloat16, contiguous |" in (tmp_path / "drawn" / "benchmark.md").read_text()
