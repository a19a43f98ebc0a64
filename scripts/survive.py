"""Continue training after ranks are lost, with those that are left and the same global batch.

    scripts/survive
    scripts/survive --kill-rank 1 3 --kill-step 4 9 --at forward gradients

The first command kills rank 2 in the backward pass of step 6. The second kills rank 1 in step 4 and
rank 3 in step 9. The script needs a fault-tolerant MPI: Open MPI 5, with ``mpiexec --with-ft
ulfm``. ``train`` and ``Run.recover`` show what a program needs to continue. At the end the
survivors check that parameters, momentum and running statistics are those of one process with
torch's own BatchNorm and the same batches, that all survivors have the same bits, and that the loss
kept falling. Exit status: 0 if all of that holds, else 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn

WORLD = MPI.COMM_WORLD
MOMENTS = ("before", "forward", "backward", "gradients", "recovery")
BATCH = 30  # samples of a step, over all ranks
LOST = {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED}
# Ten times the error of rounding in 20 steps. A step too many, or one without a sample, makes a far
# larger one.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def train(run: Run, steps: int) -> None:
    """Make ``steps`` steps, with fewer ranks after a loss. Collective: all ranks must call."""
    lost = False
    while True:
        try:
            if lost:
                run.recover()
            while run.step < steps:
                run.advance()
        except (MPI.Exception, mpisyncbn.MPISyncBNError) as error:
            if not is_loss(error):
                raise
            run.caught(error)
            run.comm.Revoke()  # ranks that still wait in it get an error and come here too
        # Some ranks may have made the last step, and others not. All end, or go on, together.
        if agree(run.comm, run.step == steps):
            return
        lost = True


def is_loss(error: BaseException) -> bool:
    """Whether an error of MPI, or the cause of a layer's error, says that a rank was lost."""
    cause = error if isinstance(error, MPI.Exception) else error.__cause__
    return isinstance(cause, MPI.Exception) and cause.Get_error_class() in LOST


def agree(comm: MPI.Intracomm, done: bool) -> bool:
    """Whether all ranks are done and alive. All living ranks get the same answer.

    It works on a revoked ``comm``.
    """
    try:
        return bool(comm.Agree(done))
    except MPI.Exception:  # raised on every rank if one is gone and not all knew it
        return False


class Kill(NamedTuple):
    rank: int  # in the world
    step: int
    moment: str


class Run:
    """A model in training, and the ranks that train it."""

    def __init__(self, dtype: torch.dtype, kills: list[Kill]) -> None:
        self.kills, self.dtype, self.step = kills, dtype, 0
        self.comm: Any = WORLD.Dup()
        self.members = list(range(WORLD.size))  # their ranks in the world
        net = network(dtype)
        between = net[3]  # the convolution between the two batch norms
        between.register_forward_pre_hook(lambda *_: self.moment("forward"))
        between.register_full_backward_pre_hook(lambda *_: self.moment("backward"))
        self.net = mpisyncbn.convert_sync_batchnorm(net, self.comm)
        self.optimizer = sgd(self.net)
        self.losses: list[float] = []
        self.kept: dict[int, Any] = {}
        self.keep()
        self.failed_at = 0.0

    def advance(self) -> None:
        """Make one step.

        Its loss is the mean over the batch of all ranks, however samples are divided.
        """
        self.moment("before")
        images, labels = shard(*batch(self.step, self.dtype), self.comm.rank, self.comm.size)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(images), labels, reduction="sum") / BATCH
        loss.backward()
        self.losses[self.step :] = [self.sum_gradients(loss.detach())]
        self.optimizer.step()
        self.step += 1
        self.keep()
        if self.failed_at:
            say(f"first step after {1000 * (time.perf_counter() - self.failed_at):.0f} ms")
            self.failed_at = 0.0

    def sum_gradients(self, loss: Tensor) -> float:
        parameters = list(self.net.parameters())
        flat = torch.cat([*(cast(Tensor, each.grad).flatten() for each in parameters), loss[None]])
        op = MPI.SUM
        if self.ends("gradients"):
            # MPI calls this between receiving and sending, so the rank ends within the collective.
            op = MPI.Op.Create(lambda *_: self.moment("gradients"), commute=True)
        self.comm.Allreduce(MPI.IN_PLACE, flat.numpy(), op)
        self.moment("gradients")  # MPI need not call op on every rank: of three, one adds nothing up
        totals = flat[:-1].split([each.numel() for each in parameters])
        for each, total in zip(parameters, totals, strict=True):
            each.grad = total.view_as(each)
        return flat[-1].item()

    def recover(self) -> None:
        """Go on without the lost ranks, from the last step that all survivors have made.

        If another rank is lost meanwhile, this raises an error as a step does.
        """
        before = self.members
        self.comm = self.comm.Shrink()
        found = self.comm.allgather((WORLD.rank, self.step))
        self.members = [rank for rank, _ in found]
        ahead = self.step - min(step for _, step in found)
        self.restore(self.step - ahead)
        mpisyncbn.set_process_group(self.net, self.comm)
        gone = sorted(set(before) - set(self.members))
        say(f"without {gone}, {self.comm.size} ranks go on with step {self.step}" + ", made again" * ahead)
        self.moment("recovery")

    def keep(self) -> None:
        """Keep the state after this step, and that after the step before.

        No rank is ever more than one step ahead of another.
        """
        self.kept[self.step] = copy.deepcopy((self.net.state_dict(), self.optimizer.state_dict()))
        self.kept.pop(self.step - 2, None)

    def restore(self, step: int) -> None:
        """Load the state after ``step`` steps.

        This is needed even if no step is taken back: the step that failed may have changed running
        statistics.
        """
        net, optimizer = copy.deepcopy(self.kept[step])
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict(optimizer)
        self.step = step

    def caught(self, error: BaseException) -> None:
        self.failed_at = self.failed_at or time.perf_counter()
        cause = error if isinstance(error, MPI.Exception) else error.__cause__
        say(f"step {self.step}: {type(error).__name__}, {cause}")

    def ends(self, moment: str) -> bool:
        return Kill(WORLD.rank, self.step, moment) in self.kills

    def moment(self, moment: str) -> None:
        if self.ends(moment):
            os.kill(os.getpid(), signal.SIGKILL)


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(dtype)


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of ten patterns with noise, and the pattern of each image."""
    patterns = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(10, (BATCH,), generator=generator)
    images = patterns[labels] + torch.randn(BATCH, 3, 8, 8, generator=generator)
    return images.to(dtype), labels


def shard(images: Tensor, labels: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """The part of a batch for one of ``size`` ranks. Higher ranks get more samples."""
    first, last = (BATCH * r * (r + 1) // (size * (size + 1)) for r in (rank, rank + 1))
    return images[first:last], labels[first:last]


def one_process(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """State and losses of one process with whole batches, in float64, without this package."""
    net = network(torch.float64)
    optimizer = sgd(net)
    losses = []
    for step in range(steps):
        images, labels = batch(step, torch.float64)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return state_of(net, optimizer), losses


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    momentum = {
        f"{name}.momentum": optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in net.named_parameters()
    }
    return {**net.state_dict(), **momentum}


def checks(run: Run, steps: int, first_kill: int) -> Iterator[tuple[str, bool]]:
    """Yield each condition in words, and whether it holds on this rank.

    Collective: every survivor must call.
    """
    mine = state_of(run.net, run.optimizer)
    bits = b"".join(each.detach().numpy().tobytes() for each in mine.values())
    everyone = run.comm.allgather(bits)
    theirs, losses = one_process(steps)
    apart = {name: distance(mine[name], expected) for name, expected in theirs.items()}
    most = max(apart, key=lambda name: apart[name])
    curve = [abs(one - other) for one, other in zip(run.losses, losses, strict=False)]
    limit = TOLERANCE[str(run.dtype).removeprefix("torch.")]
    first, then, last = run.losses[0], run.losses[first_kill], run.losses[-1]
    yield f"{len(run.losses)} of {steps} steps made", len(run.losses) == run.step == steps
    yield f"{len(set(everyone))} state in all {run.comm.size} ranks, bit for bit", len(set(everyone)) == 1
    text = f"state {apart[most]:.1e} from one process, most in {most}, at most {limit:.0e}"
    yield text, all(each <= limit for each in apart.values())
    yield (
        f"losses {max(curve):.1e} from one process, at most {limit:.0e}",
        all(each <= limit for each in curve),
    )
    yield (
        f"loss {first:.3f} at first, {then:.3f} when a rank was lost, {last:.3f} at last",
        last < then < first,
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def say(text: str) -> None:
    print(f"rank {WORLD.rank}: {text}", flush=True)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[Kill]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kill-rank", type=int, nargs="+", default=[2], help="world ranks to kill")
    parser.add_argument(
        "--kill-step", type=int, nargs="+", default=[6], help="steps, counted from 0, in which to kill them"
    )
    parser.add_argument("--at", choices=MOMENTS, nargs="+", default=["backward"], help="where in the step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    options = parser.parse_args(arguments)
    if not len(options.kill_rank) == len(options.kill_step) == len(options.at) < WORLD.size:
        parser.error(f"expected as many ranks as steps and moments, and fewer than {WORLD.size}")
    if not 0 < min(options.kill_step) <= max(options.kill_step) < options.steps:
        parser.error(f"expected --kill-step from 1 to {options.steps - 1}, got {options.kill_step}")
    kills = zip(options.kill_rank, options.kill_step, options.at, strict=True)
    return options, [Kill(*each) for each in kills]


def main(arguments: list[str] | None = None) -> int:
    options, kills = parse(arguments)
    run = Run(getattr(torch, options.dtype), kills)
    train(run, options.steps)
    found = list(checks(run, options.steps, min(options.kill_step)))
    verdicts = run.comm.allgather([ok for _, ok in found])
    right = [all(each) for each in zip(*verdicts, strict=True)]
    survivors = set(range(WORLD.size)) - set(options.kill_rank)
    right.append(survivors == set(run.members))
    found.append((f"ranks {run.members} survived", right[-1]))
    if run.comm.rank == 0:
        for (text, _), ok in zip(found, right, strict=True):
            print("ok    " if ok else "WRONG ", text, flush=True)
    return 0 if all(right) else 1


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        WORLD.Abort(1)
    sys.stdout.flush()
    # This avoids MPI_Finalize: if ranks miss, Open MPI 5.0 sometimes waits for ever in it.
    os._exit(status)
