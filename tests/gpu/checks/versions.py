"""Point 1 of scripts/gpu_check: the installed versions, and the transport with this MPI."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from unittest import mock

from .context import Context
from .records import summary


def report(context: Context) -> None:
    """Check the output of ``python -m mpisyncbn --json``. Collective."""
    printed = io.StringIO()
    device = context.device  # imports torch, as a program does
    with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", ["mpisyncbn", "--json"]):
        runpy.run_module("mpisyncbn", run_name="__main__")
    if context.rank == 0:
        facts = json.loads(printed.getvalue())
        facts["mpi"]["library"] = facts["mpi"]["library"].split(",")[0]  # the rest says who built it
        context.records.holds("prints its facts", {"versions", "mpi", "transport", "kernels"} <= set(facts))
        for topic in ("mpi", "transport", "kernels", "exchange"):
            context.records.figure(topic, facts[topic])
    else:
        context.records.holds("prints nothing", not printed.getvalue())
    context.records.figure("device of rank 0", str(device))


def transport(context: Context, asked: str) -> None:
    """Check that a layer uses the transport asked for, or raises. Collective."""
    import torch

    import mpisyncbn
    from mpisyncbn.comm import runtime, transport
    from mpisyncbn.errors import TransportError
    from support.whole_batch import distance, whole_batch

    from .reference import BARS, random

    records = context.records
    with mock.patch.dict(os.environ, {"MPISYNCBN_TRANSPORT": "auto"}):
        choice, reason = transport.chosen(runtime.mpi())
    aware = choice == "device"
    records.figure("MPI takes pointers to device memory", f"{'yes' if aware else 'no'}: {reason}")
    group = mpisyncbn.Communicator()
    layer = mpisyncbn.SyncBatchNorm(5, process_group=group, device=context.device)
    x, dy = (random((3 + context.rank, 5, 4, 4), 10 * seed + context.rank).float() for seed in (1, 2))
    there = context.there(x).requires_grad_()
    error = None
    try:
        y = layer(there)
        y.backward(context.there(dy))
        context.synchronize()
    except TransportError as refusal:
        error = refusal
    refused = context.world.allgather(error is not None)
    if asked == "device" and not aware:
        records.holds("refused on every rank", all(refused), summary(error) if error else "accepted")
        return
    expected = whole_batch(context.world, x, dy, torch.ones(5), torch.zeros(5), layer.eps)
    records.holds("accepted on every rank", not any(refused), "" if error is None else summary(error))
    if error is None:
        records.figure("transport", group.transport)
        wanted = "device" if aware and asked != "host" else "host"
        records.holds(f"it is {wanted}", group.transport == wanted, group.transport)
        records.at_most("y", distance(y, expected.y), BARS[x.dtype])
        records.at_most("dx", distance(there.grad, expected.dx, expected.dx_scale), BARS[x.dtype])
    group.free()
