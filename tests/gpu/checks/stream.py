"""Point 9 of scripts/gpu_check: captured graphs, late errors and times of the stream transport."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

import mpisyncbn
from benchmarks.peers import gloo
from benchmarks.timing import interleave
from mpisyncbn.comm.groups import resolve
from mpisyncbn.errors import CollectiveMismatchError, TransportError
from support.whole_batch import distance, whole_batch

from .context import Context
from .records import summary
from .reference import BARS, random
from .speed import TIMES_FASTER

_SHAPES = [(2, 64, 8, 8), (32, 256, 14, 14), (50, 2048, 7, 7)]
_REPLAYS = 100


def capture(context: Context) -> None:
    """Capture forward and backward in one CUDA graph, and replay it with new data. Collective."""
    layer = mpisyncbn.SyncBatchNorm(
        24, process_group=context.group("stream"), device=context.device, momentum=0.5
    )
    shape = (4 + context.rank, 24, 8, 8)
    x = torch.zeros(shape, device=context.device, requires_grad=True)
    dy = torch.zeros(shape, device=context.device)
    side = torch.cuda.Stream(context.device)

    def step() -> torch.Tensor:
        x.grad = layer.weight.grad = layer.bias.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    def fill(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = [random(shape, 100 * seed + 10 * each + context.rank, seed).float() for each in (1, 2)]
        with torch.no_grad():
            x.copy_(found[0])
            dy.copy_(found[1])
        return found[0], found[1]

    fill(0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    context.synchronize()
    before = layer.process_group.exchanges
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    counted = int(layer.num_batches_tracked.item())
    replays = 10 if context.quick else _REPLAYS
    worst = {"y": 0.0, "dx": 0.0, "dweight": 0.0}
    for seed in range(1, replays + 1):
        sent, gradient = fill(seed)
        graph.replay()
        context.synchronize()
        ones = torch.ones(24)
        expected = whole_batch(context.world, sent, gradient, ones, 0 * ones, layer.eps)
        dweight = sum(context.world.allgather(layer.weight.grad.cpu().double()))
        found = {
            "y": distance(y, expected.y),
            "dx": distance(x.grad, expected.dx, expected.dx_scale),
            "dweight": distance(dweight, expected.dweight, expected.sum_scale),
        }
        worst = {name: max(worst[name], found[name]) for name in worst}
    for name, error in worst.items():
        context.records.at_most(f"{replays} replays: {name}", error, BARS[torch.float32])
    replayed = int(layer.num_batches_tracked.item()) - counted
    context.records.holds("replays count batches", replayed == replays, str(replayed))
    sent_since = layer.process_group.exchanges - before
    context.records.holds("replays count exchanges", sent_since == 2 * replays, str(sent_since))
    fill(0)
    eager = layer(x)
    context.synchronize()
    context.records.holds("the layer works afterwards", bool(eager.isfinite().all()))
    layer.process_group.synchronize()


def compiled(context: Context) -> None:
    """Compare a network in the CUDA graphs of torch.compile with one in eager mode. Collective."""
    if os.environ.get("MPISYNCBN_STANDIN"):
        context.records.skip("torch.compile", "a stand-in has no memory pools for torch's CUDA graphs")
        return
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # an MPI rank should not start a pool of processes
    nets = [_network().to(context.device) for _ in range(2)]
    fast = torch.compile(nets[1], mode="reduce-overhead")
    worst = 0.0
    for step in range(6):  # the first warms up, the second records
        shape = (3 + context.rank, 5, 8, 8)
        x, dy = (random(shape, 100 * step + 10 * each + context.rank, step).float() for each in (1, 2))
        found = []
        for net, run in ((nets[0], nets[0]), (nets[1], fast)):
            net.zero_grad(set_to_none=True)
            leaf = context.there(x).requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            y = run(leaf)
            y.backward(context.there(dy))
            context.synchronize()
            found.append([each.clone() for each in (y, leaf.grad, net[0].weight.grad, net[2].running_var)])
        errors = [distance(other, plain.detach()) for plain, other in zip(*found, strict=True)]
        worst = max(worst, *errors)
    context.records.at_most("six steps: y, dx, dweight, running_var", worst, 1e-5)
    owned = resolve(None).stream.owned
    context.records.holds("the exchanges are in graphs", owned == 4, f"{owned} slots are owned by graphs")


def _network() -> torch.nn.Sequential:
    torch.manual_seed(1)
    layers = mpisyncbn.SyncBatchNorm(5), torch.nn.Conv2d(5, 5, 3, padding=1), mpisyncbn.SyncBatchNorm(5)
    return torch.nn.Sequential(*layers, torch.nn.ReLU())


def failures(context: Context) -> None:
    """Check that a mismatch raises late, on every rank, and no wrong result is used. Collective."""
    group = context.group("stream")
    layers = [
        mpisyncbn.SyncBatchNorm(8, process_group=group, device=context.device, eps=e) for e in (1e-5, 1e-3)
    ]
    x = random((4, 8, 5, 5), context.rank).float().to(context.device)
    layers[0](x)
    context.synchronize()
    mine = layers[1] if context.rank == 1 else layers[0]
    counts = int(mine.num_batches_tracked)
    y = mine(x)
    context.synchronize()
    raised = ""
    try:
        group.synchronize()
    except CollectiveMismatchError as error:
        raised = str(error)
    several = context.size > 1
    context.records.holds("y is NaN", bool(y.isnan().all()) == several)
    context.records.holds(
        "running statistics are as before", int(mine.num_batches_tracked) == counts + (not several)
    )
    context.records.holds("raised on every rank", ("eps 0.001" in raised) == several, raised)
    y = layers[0](x)
    context.synchronize()
    group.synchronize()
    context.records.holds("the next exchange is right", bool(y.isfinite().all()))


def times(context: Context) -> None:
    """Time forward and backward: each transport, a local layer, torch over gloo. Collective."""
    records = context.records
    kinds: dict[str, Callable[[int], Any]] = {}
    for transport in ("stream", "host", "device"):
        try:
            group = context.group(transport)
        except TransportError as error:
            records.skip(transport, summary(error))
            continue
        kinds[f"ours, {transport}"] = lambda channels, group=group: mpisyncbn.SyncBatchNorm(
            channels, process_group=group, device=context.device
        )
    kinds["local"] = lambda channels: torch.nn.BatchNorm2d(channels, device=context.device)
    with gloo():
        if context.size > 1:
            kinds["torch over gloo"] = lambda channels: torch.nn.SyncBatchNorm(
                channels, device=context.device
            )
        for shape in _SHAPES[:1] if context.quick else _SHAPES:
            calls = {
                name: context.synced(_steps(context, make(shape[1]), shape)) for name, make in kinds.items()
            }
            found = interleave(calls, 1.5, fewest=10)
            said = {n: f"{each['median'] / 10:.0f} ({each['minimum'] / 10:.0f})" for n, each in found.items()}
            records.figure(f"{shape}, ten steps, us of one, median (minimum)", said)
            if context.size > 1 and shape == _SHAPES[-1]:
                for name in filter(found.__contains__, ("ours, stream", "ours, host")):
                    faster = found["torch over gloo"]["median"] / found[name]["median"]
                    records.bar(
                        f"{name}: times faster than torch over gloo", faster, TIMES_FASTER, most=False
                    )


def _steps(context: Context, layer: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    x = torch.randn(shape, device=context.device, requires_grad=True)
    dy = torch.randn(shape, device=context.device)

    def steps() -> None:
        for _ in range(10):
            x.grad = layer.weight.grad = layer.bias.grad = None
            layer(x).backward(dy)

    return steps


def resnet(context: Context) -> None:
    """Time a step of a ResNet-50: two transports, local layers, torch over gloo. Collective."""
    try:
        import torchvision
    except Exception as error:  # it is not installed, or was built for another torch
        context.records.skip("ResNet-50", summary(error))
        return
    batch = 4 if context.quick else 16
    x = torch.randn(batch, 3, 224, 224, device=context.device).to(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, convert: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        model = convert(torchvision.models.resnet50()).to(context.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = context.synced(step)

    add("local", lambda model: model)
    for transport in ("stream", "host"):
        group = context.group(transport)
        add(f"ours, {transport}", lambda model, group=group: mpisyncbn.convert_sync_batchnorm(model, group))
    with gloo():
        if context.size > 1:
            add("torch over gloo", torch.nn.SyncBatchNorm.convert_sync_batchnorm)
        found = interleave(calls, 10.0, fewest=5, most=60)
    said = {n: f"{each['median'] / 1e3:.1f} ({each['minimum'] / 1e3:.1f})" for n, each in found.items()}
    context.records.figure(f"ResNet-50, batch {batch}, bfloat16 autocast, ms, median (minimum)", said)
