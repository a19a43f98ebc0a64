"""Train a small residual network on digits, with SyncBatchNorm and DistributedDataParallel.

    mpiexec -n 4 python scripts/train.py
    mpiexec -n 4 python scripts/train.py --ddp gloo         # or nccl, for the gradients
    mpiexec -n 4 python scripts/train.py --checkpoint run.pt --stop-after 2
    mpiexec -n 4 python scripts/train.py --checkpoint run.pt --resume

Every backend finds its ranks through MPI, without an address. The ranks divide each batch.
DataLoader's worker processes shift the images at random. Each epoch ends with a line on rank 0 and
with a checkpoint, from which --resume continues as if nothing had happened. At the same number of
ranks the results have the same bits if MPI adds in one order: Open MPI and MPICH do, and Intel MPI
does with I_MPI_CBWR=1, which this script sets. At other numbers they agree up to rounding.

With --checkpoint, SIGUSR1 on any rank (Slurm sends it before the time limit) lets all ranks finish
their step, write a checkpoint in mid-epoch, and leave. scripts/slurm/train.sbatch requeues the job.

Exit status: 0 at the end of the run, or of --stop-after; 75 (EX_TEMPFAIL: try again) after SIGUSR1,
when --resume continues from the checkpoint. Any other status is an error; the checkpoint is then
the last one before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import mpisyncbn
import mpisyncbn.distributed  # registers the backend mpi4py; MPI itself starts with the process group
from outputs import output

TRY_AGAIN = 75
# Without this, the order of Intel MPI's long sums depends on the processor and on buffers. It reads
# the variable when it starts.
os.environ.setdefault("I_MPI_CBWR", "1")
_signalled = threading.Event()


class Interrupted(Exception):
    """Some rank received SIGUSR1.

    Every rank raises this after the same step, with a checkpoint written.
    """


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """scikit-learn's 8 x 8 images of digits.

    The last 360 are for tests. The others, for training, are shifted by up to a pixel.
    """

    def __init__(self, train: bool, seed: int, dtype: torch.dtype) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        kept = slice(None, -360) if train else slice(-360, None)
        self.images = torch.tensor(digits.images[kept], dtype=dtype)[:, None] / 16
        self.labels = torch.tensor(digits.target[kept])
        self.train, self.seed, self.epoch = train, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch, which may be empty."""
        images = self.images[indices]
        if self.train:
            for image, index in zip(images, indices, strict=True):
                image.copy_(image.roll(self.shift(index), (1, 2)))
        return images, self.labels[indices]

    def shift(self, index: int) -> list[int]:
        """The shift of an image, which depends on the seed, the epoch and the sample alone.

        It is the same in each worker process of each rank.
        """
        generator = torch.Generator().manual_seed((self.seed * 1000 + self.epoch) * len(self) + index)
        return torch.randint(-1, 2, (2,), generator=generator).tolist()


class Shares(Sampler[list[int]]):
    """This rank's share of each batch of an epoch, from batch ``start`` on.

    Unlike those of DistributedSampler, the batches do not depend on the number of ranks. So a
    rank's share may be smaller than another's, or empty.
    """

    def __init__(self, samples: int, batch: int, seed: int, start: int = 0) -> None:
        self.samples, self.batch, self.seed, self.start = samples, batch, seed, start
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed)).tolist()
        for begin in range(self.start * self.batch, self.samples, self.batch):
            yield order[begin : begin + self.batch][self.rank :: self.size]


class Block(nn.Module):
    """Two 3x3 convolutions, with a skip connection around them.

    The skip connection is the identity, or a projection if the shape changes.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.skip = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.skip(x))


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class Trainer:
    """A training run. Collective: all ranks make one, and call its methods together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rank, self.size = args, dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if args.ddp == "nccl":  # a launcher may show each rank only one GPU
            self.device = torch.device("cuda", mpisyncbn.local_rank() % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        dtype = torch.float64 if args.float64 else torch.float32
        self.train_set, self.test_set = Digits(True, args.seed, dtype), Digits(False, args.seed, dtype)
        torch.manual_seed(args.seed)
        net = mpisyncbn.convert_sync_batchnorm(network()).to(self.device, dtype)
        self.net = DistributedDataParallel(net)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs)
        self.metrics: list[dict[str, Any]] = []
        self.batch = args.batch * self.size  # samples of all ranks; a checkpoint keeps this number
        self.step, self.total = 0, 0.0  # batches of this epoch so far, and the sum of their samples' losses

    def batches(self) -> DataLoader[Any]:
        """Return a loader of the remaining batches of the epoch."""
        epoch = self.train_set.epoch = len(self.metrics)
        return DataLoader(
            self.train_set,
            batch_size=None,
            sampler=Shares(len(self.train_set), self.batch, self.args.seed + epoch, self.step),
            num_workers=self.args.workers,
            multiprocessing_context=self.args.start_method if self.args.workers else None,
            worker_init_fn=ignore_signal,
        )

    def epoch(self) -> dict[str, Any]:
        """Train to the end of the epoch. Return loss per sample and accuracy on the test set.

        Raises Interrupted, on all ranks or on none.
        """
        self.net.train()
        batches, samples, epoch = self.batches(), len(self.train_set), len(self.metrics) + 1
        last = self.step + len(batches)
        together = self.args.accumulate * self.batch  # samples of each update except the last of an epoch
        hidden = self.rank > 0 or not self.args.progress
        for images, labels in tqdm(batches, f"epoch {epoch}", leave=False, disable=hidden):
            count = min(together, samples - self.step // self.args.accumulate * together)
            self.step += 1
            updates = self.step % self.args.accumulate == 0 or self.step == last
            with contextlib.nullcontext() if updates else self.net.no_sync():
                loss = self.loss(images, labels)
                # This tells all ranks of a signal to any, beside the backward pass.
                told = torch.tensor([0, _signalled.is_set()], dtype=torch.float64, device=self.device)
                told[0] = loss.detach()
                telling = dist.all_reduce(told, async_op=True)
                (loss * self.size / count).backward()  # DistributedDataParallel divides by the size
            if updates:
                self.optimizer.step()
                self.optimizer.zero_grad()
            telling.wait()
            self.total += told[0].item()
            if told[1] and updates:
                self.save(self.args.checkpoint)
                raise Interrupted
        self.schedule.step()
        found = {"epoch": epoch, "loss": self.total / samples, "accuracy": self.accuracy()}
        self.step, self.total = 0, 0.0
        return found

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, summed over this rank's samples. Ranks may have more or fewer."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            outputs = self.net(images.to(self.device))
            return F.cross_entropy(outputs, labels.to(self.device), reduction="sum")

    @torch.no_grad()
    def accuracy(self) -> float:
        self.net.eval()
        images, labels = self.test_set[list(range(self.rank, len(self.test_set), self.size))]
        right = (self.net.module(images.to(self.device)).argmax(1) == labels.to(self.device)).sum()
        dist.all_reduce(right)
        return right.item() / len(self.test_set)

    def save(self, path: Path) -> None:
        if self.rank == 0:
            parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
            parts |= {name: getattr(self, name) for name in ("metrics", "batch", "step", "total")}
            parts["net"] = self.net.module.state_dict()
            unfinished = path.with_suffix(".part")
            torch.save(parts, unfinished)
            os.replace(unfinished, path)  # a job killed before this keeps the previous checkpoint
        dist.barrier()

    def resume(self, path: Path) -> None:
        parts = torch.load(path, map_location=self.device)
        self.net.module.load_state_dict(parts["net"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        for name in ("metrics", "batch", "step", "total"):
            setattr(self, name, parts[name])


def ignore_signal(worker: int) -> None:
    """Ignore SIGUSR1 in a worker process: Slurm sends it to these too, and they would die of it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, and return the metrics of every epoch. Rank 0 prints and writes. Raises Interrupted.

    Collective: every rank must call.
    """
    args = parse(argv)
    torch.set_num_threads(1)  # the ranks share the cores already
    if args.checkpoint:
        signal.signal(signal.SIGUSR1, lambda *_: _signalled.set())
    dist.init_process_group(args.ddp)
    try:
        return run(args)
    finally:
        dist.destroy_process_group()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    trainer = Trainer(args)
    if args.resume:
        trainer.resume(args.checkpoint)
    while len(trainer.metrics) < min(args.epochs, args.stop_after or args.epochs):
        found = trainer.epoch()
        trainer.metrics.append(found)
        if trainer.rank == 0:
            print("epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.1%}".format(**found), flush=True)
        if args.checkpoint:
            trainer.save(args.checkpoint)
    if args.json and trainer.rank == 0:
        report = {"ranks": trainer.size, "options": vars(args), "epochs": trainer.metrics}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    dist.barrier()  # no rank ends the group while others still use it
    return trainer.metrics


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ddp", default="mpi4py", choices=("mpi4py", "gloo", "nccl"), help="backend that sums gradients"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="samples of one rank; --resume keeps the global batch",
    )
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches for each update")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--float64", action="store_true", help="compute in float64")
    parser.add_argument("--workers", type=int, default=1, help="processes of each rank that load the data")
    parser.add_argument("--start-method", default="fork", choices=("fork", "spawn"))
    parser.add_argument(
        "--checkpoint", type=output, metavar="PATH", help="file to write after every epoch, and at SIGUSR1"
    )
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="last epoch of this run")
    parser.add_argument("--json", type=output, metavar="PATH", help="write the metrics to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    args = parser.parse_args(argv)
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    return args


if __name__ == "__main__":
    try:
        main()
    except Interrupted:
        from mpi4py import MPI

        MPI.Finalize()  # or mpisyncbn would take this for a failed rank, and abort the job
        sys.exit(TRY_AGAIN)
