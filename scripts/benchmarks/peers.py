"""The code that ours is measured against, written for this benchmark as plainly as users would."""

from __future__ import annotations

import ctypes
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

WORLD = MPI.COMM_WORLD


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks by torch.distributed. Its gradient is summed over all ranks too."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class NaiveSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The layer that users write for CPUs, for which torch has none.

    The variance is E[x**2] - E[x]**2, and autograd computes the gradients. Every rank must have a
    batch of the same size. The layer works inside ``with gloo():``.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        x = input.float()
        dims = (0, *range(2, x.ndim))
        view = (1, -1) + (1,) * (x.ndim - 2)
        moments = torch.cat([x.mean(dims), (x * x).mean(dims)])
        mean, square = (_SumOverRanks.apply(moments) / dist.get_world_size()).chunk(2)
        var = square - mean * mean
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_var += self.momentum * (var - self.running_var)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale.view(view) + shift.view(view)).to(input.dtype)


@contextmanager
def gloo() -> Iterator[None]:
    """A context manager: torch.distributed uses gloo among the ranks of this job until it ends.

    Collective: every rank must call.
    """
    one_node = len(set(WORLD.allgather(socket.gethostname()))) == 1
    host = WORLD.bcast("127.0.0.1" if one_node else socket.gethostname())
    store = dist.TCPStore(host, 0, WORLD.size, True, wait_for_workers=False) if WORLD.rank == 0 else None
    port = WORLD.bcast(store.port if store else None)
    if store is None:
        store = dist.TCPStore(host, port, WORLD.size, False)
    dist.init_process_group("gloo", store=store, rank=WORLD.rank, world_size=WORLD.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        WORLD.Barrier()  # rank 0 holds the store, so it must not leave first


def compiled(layer: nn.Module, run: Callable[[nn.Module], object]) -> tuple[nn.Module | None, str]:
    """Compile ``layer`` by a first ``run``. Return it and "", or None and the reason.

    If it fails on one rank, all ranks return None. Collective: every rank must call.
    """
    reason = "" if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    fast = None
    if not reason:
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1  # a rank should not start a pool of processes
        torch._dynamo.reset()  # torch limits how often one code object is compiled: start anew
        try:
            fast = torch.compile(layer, dynamic=False)
            run(fast)
        except Exception as error:  # a compiler may raise anything
            reason = f"torch.compile fails: {type(error).__name__}"
    reasons = [why for why in WORLD.allgather(reason) if why]
    return (None, reasons[0]) if reasons else (fast, "")


def copies(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return two functions that copy ``x``, dense in any format, into existing memory."""
    source = x.detach()
    target = torch.empty_like(source)
    arguments = target.data_ptr(), source.data_ptr(), source.numel() * source.element_size()
    # A default argument keeps the target alive as long as its address is in use.
    return {
        "copy_": lambda: target.copy_(source),
        "memmove": lambda _keep=(target, source): ctypes.memmove(*arguments),
    }
