"""Layers on a GPU, real or emulated (support/device.py), by all kernels and two transports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpisyncbn
from mpisyncbn.comm import runtime, staging, transport
from mpisyncbn.errors import CollectiveMismatchError, MPISyncBNError
from mpisyncbn.kernels import Kind, aten_cuda, generic, masked
from support import masks
from support.device import DEVICE, GPU, cuda, needs_gpu, needs_triton, pretend, there
from support.jobs import run_alone
from support.oracle import bits_equal_on_all_ranks, distance, local_batch, oracle, shard
from support.ranks import WORLD, no_exchange, together

pytestmark = pytest.mark.usefixtures("device")
KERNELS = [
    pytest.param(cuda, id="cuda", marks=needs_triton),
    pytest.param(aten_cuda, id="aten_cuda"),
    pytest.param(generic, id="generic"),
]
at_length = pytest.mark.full("a compiler, for half a minute")
AWARE = not GPU or transport.chosen(runtime.mpi())[0] == "device"
TRANSPORTS = [
    "host",
    pytest.param(
        "device", marks=pytest.mark.skipif(not AWARE, reason="MPI takes no pointers to a GPU's memory")
    ),
]


@pytest.fixture
def device(monkeypatch):
    """The stand-in for a GPU; None if there is a GPU."""
    return None if GPU else pretend(monkeypatch)


@pytest.fixture
def kernels(request, monkeypatch):
    """The module that serves tensors on the device."""
    for module in ("autograd.fused", "functional"):
        monkeypatch.setattr(f"mpisyncbn.{module}.kernels_for", lambda x, mask=None: request.param)
    return request.param


@pytest.fixture
def group(request, monkeypatch):
    """A group that uses the transport with which the test is parametrized."""
    monkeypatch.setattr("mpisyncbn.comm.transport.chosen", lambda MPI: (request.param, "the test says so"))
    return mpisyncbn.Communicator()


def trained(layer: Any, steps: int, **options: Any) -> list[Any]:
    """Return the errors of ``y`` and ``dx`` in each step, against the whole batch in float64."""
    errors = []
    for step in range(steps):
        shape = (local_batch(), layer.num_features, 4, 5)
        x, dy = (shard(shape, seed + step, mean, **options) for seed, mean in ((1, 5.0), (50, 0.5)))
        far = there(x).requires_grad_()
        y = layer(far)
        y.backward(there(dy))
        weight, bias = (None if p is None else p.detach().cpu() for p in (layer.weight, layer.bias))
        expected = oracle(x, dy, weight, bias)
        errors += [distance(y.detach().cpu(), expected.y), distance(far.grad.cpu(), expected.dx)]
        with together():
            assert y.device == DEVICE
            assert y.dtype == x.dtype
    return errors


def reference(steps: int, **options: Any) -> Any:
    """Return the state of a layer in host memory after the same steps as those of ``trained``."""
    layer = mpisyncbn.SyncBatchNorm(3, **options)
    for step in range(steps):
        layer(shard((local_batch(), 3, 4, 5), 1 + step, 5.0, options.get("dtype") or torch.float32))
    return layer.state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"dtype": torch.float64}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_against_the_whole_batch(kernels, group, options, request, monkeypatch):
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, device=DEVICE, **options)
    errors = trained(layer, 2, dtype=options.get("dtype") or torch.float32)
    same = [bits_equal_on_all_ranks(v.cpu()) for v in (layer.running_mean, layer.running_var)]
    state = {name: value.cpu() for name, value in layer.state_dict().items()}
    used = group.transport
    monkeypatch.undo()
    expected = reference(2, **options)
    with together():
        assert max(errors) < (1e-11 if options.get("dtype") else 1e-5)
        assert all(same)
        assert used == request.node.callspec.params["group"]
        for name, value in expected.items():
            assert distance(state[name], value) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_half_precision(kernels, dtype):
    layer = mpisyncbn.SyncBatchNorm(3, device=DEVICE)
    errors = trained(layer, 1, dtype=dtype)
    with together():
        assert max(errors) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_empty_batches(kernels, group):
    """A rank may have an empty batch. If all ranks do, the running statistics do not change."""
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, device=DEVICE)
    n = 0 if WORLD.rank == 0 and WORLD.size > 1 else 3
    x, dy = shard((n, 3, 4), 1, 2.0), shard((n, 3, 4), 2)
    far = there(x).requires_grad_()
    y = layer(far)
    y.backward(there(dy))
    before = layer.running_var.clone(), int(layer.num_batches_tracked)
    layer(there(torch.zeros(0, 3, 4))).sum().backward()
    expected = oracle(x, dy)
    with together():
        assert distance(y.detach().cpu(), expected.y) < 1e-5
        assert distance(far.grad.cpu(), expected.dx) < 1e-5
        assert torch.equal(layer.running_var, before[0])
        assert int(layer.num_batches_tracked) == before[1] == 1


@pytest.mark.parametrize("kernels", KERNELS[2:], indirect=True)
def test_a_memory_efficient_layer_keeps_its_input(kernels):
    """A memory_efficient layer on a device keeps its input: else the host would wait."""
    layer = mpisyncbn.SyncBatchNorm(3, device=DEVICE, memory_efficient=True)
    x = there(shard((local_batch(), 3, 4, 5), 1)).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
    with together():
        assert y.grad_fn.kept_channels is None
        assert second.isfinite().all()


@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
def test_a_mask(group, monkeypatch):
    """A layer with a mask has the results of a float64 layer in host memory with that mask."""
    monkeypatch.setattr(
        "mpisyncbn.autograd.fused.kernels_for",
        lambda x, mask=None: generic if mask is None else masked.with_mask(masked, mask),
    )
    options = {"process_group": group, "activation": "leaky_relu"}
    x, _, dy, mask = masks.data((3, 4, 5), torch.float32)
    far = there(x).requires_grad_()
    layer = mpisyncbn.SyncBatchNorm(3, device=DEVICE, **options)
    y = layer(far, mask=there(mask))
    y.backward(there(dy))
    monkeypatch.undo()
    near, wide = (
        x.detach().double().requires_grad_(),
        mpisyncbn.SyncBatchNorm(3, dtype=torch.float64, **options),
    )
    expected = wide(near, mask=mask)
    expected.backward(dy.double())
    with together():
        assert y.device == DEVICE
        assert masks.is_0_elsewhere(y.cpu(), mask)
        assert distance(y.detach().cpu(), expected.detach()) < 1e-5
        assert distance(far.grad.cpu(), near.grad) < 1e-5
        assert distance(layer.running_var.cpu(), wide.running_var) < 1e-6


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_fused(kernels):
    layer = mpisyncbn.SyncBatchNorm(3, device=DEVICE, activation="relu")
    plain = mpisyncbn.SyncBatchNorm(3, device=DEVICE)
    x, dy, residual = (
        shard((local_batch(), 3, 4, 5), seed, mean) for seed, mean in ((1, 5.0), (2, 0), (3, 0))
    )
    found = []
    for each, finish in ((layer, False), (plain, True)):
        for r in (None, residual):
            leaves = [there(v.clone()).requires_grad_() for v in (x, residual)]
            if finish:
                y = each(leaves[0])
                y = torch.relu(y if r is None else y + leaves[1])
            else:
                y = each(leaves[0], None if r is None else leaves[1])
            y.backward(there(dy))
            found.append([v.cpu() for v in (y.detach(), leaves[0].grad, leaves[1].grad) if v is not None])
    with together():
        for fused, parts in zip(found[:2], found[2:], strict=True):
            assert len(fused) == len(parts)
            for a, b in zip(fused, parts, strict=True):
                assert distance(a, b) < 1e-5


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
def test_waits_of_each_exchange(group, device, monkeypatch):
    """The host waits for the device only in an exchange: once, or twice with ``device``."""
    monkeypatch.setattr("mpisyncbn.autograd.fused.kernels_for", lambda x, mask=None: generic)
    per_exchange = {"host": 1, "device": 2}[group.ready().transport]  # two: for MPI, and for the result
    for options in ({}, {"momentum": None}, {"track_running_stats": False}):
        layer = mpisyncbn.SyncBatchNorm(3, process_group=group, device=DEVICE, **options)
        for n in (local_batch(), 0 if WORLD.rank else 3):
            x = there(shard((n, 3, 4), 1)).requires_grad_()
            dy = torch.ones_like(x)
            layer(x).backward(dy)
            counts = []
            with no_other_wait(device is None):
                y = layer(x)
                counts.append(device and device.waits)
                y.backward(dy)
                counts.append(device and device.waits)
                y = layer(x)
                counts.append(device and device.waits)
            with together():
                assert device is None or np.diff(counts).tolist() == [per_exchange] * 2


@contextmanager
def no_other_wait(gpu: bool) -> Iterator[None]:
    """A context in which torch raises, on a GPU, if the host waits for anything but an event."""
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
def test_ranks_in_different_calls(group, monkeypatch):
    monkeypatch.setattr("mpisyncbn.autograd.fused.kernels_for", lambda x, mask=None: generic)
    first, second = (mpisyncbn.SyncBatchNorm(3, process_group=group, device=DEVICE) for _ in range(2))
    x = there(shard((local_batch(), 3, 4), 1))
    first(x), second(x)
    before = first.running_mean.clone()
    problem = None
    try:
        (first if WORLD.rank == 0 else second)(x)
    except CollectiveMismatchError as error:
        problem = error
    with together():
        assert (problem is not None) == (WORLD.size > 1)
        assert WORLD.size == 1 or torch.equal(first.running_mean, before)


def test_all_ranks_use_the_device_or_none(monkeypatch):
    where = "device" if WORLD.rank == 0 else "host"
    monkeypatch.setattr("mpisyncbn.comm.transport.chosen", lambda MPI: (where, "the test says so"))
    group = mpisyncbn.Communicator().ready()
    with together():
        assert group.transport == ("device" if WORLD.size == 1 else "host")


@pytest.mark.skipif(GPU, reason="with a GPU, scripts/gpu_check captures a graph")
def test_nothing_is_copied_while_a_graph_is_captured(device):
    device.is_capturing = True
    vector = torch.zeros(3, dtype=torch.float64)
    message = staging.DeviceMessage(MPI, 1, 6, vector)
    for copied in (
        lambda: staging.staging_for(vector).to_host([vector]),
        lambda: message.pack(np.ones(3), [vector]),
    ):
        with pytest.raises(MPISyncBNError, match="cannot be captured in a CUDA graph"):
            copied()


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
def test_a_cuda_graph_is_refused(group):
    x = there(shard((local_batch(), 3, 4), 1))
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, device=DEVICE)
    layer(x)  # the first use makes buffers, which must not be captured
    problem = None
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
    except MPISyncBNError as error:
        problem = error
    with together():
        assert "cannot be captured in a CUDA graph" in str(problem)


@needs_gpu
def test_buffers_outlive_inference_mode():
    """Buffers made in inference mode can be written to later, unlike other tensors made in it."""
    layer = mpisyncbn.SyncBatchNorm(700, device=DEVICE, track_running_stats=False)
    x = shard((local_batch(), 700, 4), 1)
    staging.staging_for(there(x))._buffers[:] = [None] * len(staging.staging_for(there(x))._buffers)
    with torch.inference_mode():
        inferred = layer(there(x)).cpu()
    trained = layer(there(x).requires_grad_())
    trained.sum().backward()
    with together():
        assert torch.equal(inferred, trained.detach().cpu())


def test_a_wait_left_out_is_found_out(device, monkeypatch):
    """The tests above can fail: without the wait, the host reads values from before the copy."""
    if device is None:
        pytest.skip("scripts/gpu_check does it with long kernels")
    monkeypatch.setattr("mpisyncbn.autograd.fused.kernels_for", lambda x, mask=None: generic)
    monkeypatch.setattr("support.device.SlowDevice.wait_for", lambda *_: None)
    layer = mpisyncbn.SyncBatchNorm(3, device=DEVICE, track_running_stats=False)
    y = layer(shard((local_batch(), 3, 4), 1))
    with together():
        assert y.isnan().all()


def test_buffers_are_not_used_too_early(device):
    """A buffer is not used again before its copy is done, even if nothing else waits in between."""
    if device is None:
        pytest.skip("on a GPU nothing can be held up so exactly")
    device.lazy_uploads = True
    stage, another = staging.staging_for(torch.zeros(1)), object()
    sent, got = [np.arange(4.0) + step for step in range(100)], []
    for values in sent:
        got.append(stage.to_device([values, -values]))
        stage.wait_for(another)  # a wait for another stream frees none of these
    device.run()
    for values, (first, second) in zip(sent, got, strict=True):
        assert first.tolist() == values.tolist()
        assert second.tolist() == (-values).tolist()
    # This test can fail: without the waits, values are wrong.
    device.wait_for = lambda stream: None
    got = [stage.to_device([values])[0] for values in sent]
    device.run()
    assert [vector.tolist() for vector in got] != [values.tolist() for values in sent]


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functional(kernels, dtype, monkeypatch):
    """Statistics are tensors on the device, and running statistics are updated there."""
    x, dy = shard((local_batch(), 3, 4), 1, 5.0, dtype), shard((local_batch(), 3, 4), 2, 0.0, dtype)
    far = there(x)
    y, stats = mpisyncbn.functional.batch_norm_forward(far)
    dx, dweight, dbias = mpisyncbn.functional.batch_norm_backward(there(dy), far, stats)
    running = [torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)]
    updated = mpisyncbn.functional.update_running_stats(*running, stats, 0.5)
    bad = stats._replace(mean=stats.mean * torch.nan)
    kept = [v.clone() for v in running]
    refused = mpisyncbn.functional.update_running_stats(*running, bad, 0.5)
    expected = oracle(x, dy)
    everywhere = [torch.from_numpy(WORLD.allreduce(v.double().cpu().numpy())) for v in (dweight, dbias)]
    with together():
        bar = 1e-11 if dtype == torch.float64 else 1e-5
        assert all(vector.device == DEVICE for vector in (*stats[:3], dweight, dbias))
        assert distance(y.cpu(), expected.y) < bar
        assert distance(dx.cpu(), expected.dx) < bar
        assert distance(everywhere[0], expected.dweight, expected.dweight.abs() + 1) < bar * 10
        assert distance(everywhere[1], expected.dbias, expected.dbias.abs() + 1) < bar * 10
        assert bool(updated)
        assert not bool(refused)
        assert all(torch.equal(a, b) for a, b in zip(running, kept, strict=True))
        unbiased = expected.var * expected.count / (expected.count - 1)
        assert distance(running[0].cpu(), expected.mean / 2) < 1e-6
        assert distance(running[1].cpu(), (1 + unbiased) / 2) < 1e-6


def test_no_two_threads_take_turns_at_one_buffer():
    like = torch.zeros(1, device=DEVICE)
    stages = []
    thread = threading.Thread(target=lambda: stages.append(staging.staging_for(like)))
    thread.start()
    thread.join()
    assert staging.staging_for(like) is staging.staging_for(like)
    assert stages[0] is not staging.staging_for(like)


@pytest.mark.parametrize("group", TRANSPORTS, indirect=True)
def test_messages_go_with_their_group(group):
    """A group has a buffer for each length, number and device; none after it is freed."""
    group.ready()
    like = torch.zeros(1, device=DEVICE)
    messages = [group.device_message(*key, like) for key in ((1, 5), (1, 7), (2, 5), (1, 5))]
    elsewhere = SimpleNamespace(device="another", is_cuda=like.is_cuda, detach=None)
    if not GPU:
        messages.append(group.device_message(1, 5, elsewhere))
    group.free()
    assert messages[0] is messages[3]
    assert len(set(messages)) == len(messages) - 1
    assert not group._device_messages


def test_derivatives_of_derivatives(monkeypatch):
    monkeypatch.setattr("mpisyncbn.autograd.fused.kernels_for", lambda x, mask=None: generic)
    x = there(shard((local_batch(), 3, 4), 1, 1.0, torch.float64))

    def second(data):
        layer = mpisyncbn.SyncBatchNorm(3, device=data.device, dtype=torch.float64)
        data = data.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(data).pow(3).sum(), data, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), data)[0].cpu()

    found = second(x)
    monkeypatch.undo()  # tensors in host memory no longer count as on a device
    expected = second(x.cpu())
    with together():
        assert distance(found, expected) < 1e-10


# No activation, and the one that needs the most registers.
FEW = [Kind.NONE, Kind.GELU]


@needs_triton
@no_exchange
@pytest.mark.parametrize(
    ("architecture", "shapes", "dtypes", "kinds"),
    [
        (90, ["split"], ["bfloat16"], [*Kind]),
        pytest.param(80, ["channels_last"], ["bfloat16"], [*Kind], marks=at_length),
        pytest.param(
            90, ["contiguous", "channels_last"], ["float64", "float32", "bfloat16"], FEW, marks=at_length
        ),
        pytest.param(90, ["split", "14x14", "7x7", "odd", "three"], ["float32"], FEW, marks=at_length),
    ],
    ids=str,
)
def test_loops_compile_for_a_gpu_that_is_not_there(architecture, shapes, dtypes, kinds, tmp_path):
    """The Triton kernels spill almost no registers, and read 16 bytes at a time if possible."""
    out = run_alone(
        f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
from support import compile_loops
compile_loops.main([{architecture}], {shapes}, {dtypes}, {[*map(int, kinds)]})
"""
    )
    lines = [line.split() for line in out.splitlines()]
    each = 4 + 3 * len(kinds) + 3  # three for each kind; the others do not depend on the kinds
    assert len(lines) == len(dtypes) * len(shapes) * each
    for line in lines:
        _, dtype, shape, kernel, *rest = line
        figures = dict(zip(rest[::2], map(int, rest[1::2]), strict=True))
        assert figures["stack"] <= 32, line
        wide = dtype == "float32" and shape not in ("7x7", "odd", "three")
        if kernel == "moments" and (wide or shape in ("contiguous", "channels_last")):
            assert figures["of_16_bytes"] == figures["loads"], line
