"""Train a small residual network on handwritten digits: SyncBatchNorm, DistributedDataParallel and MPI alone.

    mpiexec -n 4 python scripts/train.py
    mpiexec -n 4 python scripts/train.py --ddp gloo         # or nccl: the gradients by another way
    mpiexec -n 4 python scripts/train.py --checkpoint run.pt --stop-after 2
    mpiexec -n 4 python scripts/train.py --checkpoint run.pt --resume

Every backend finds its ranks through MPI: there is no address to give. Ranks share the data with
DistributedSampler; images are shifted at random by DataLoader's worker processes. Each epoch ends with a line
on rank 0, and with a checkpoint, from which --resume goes on as if nothing had happened, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import mpisyncbn
import mpisyncbn.distributed  # registers the backend mpi4py; MPI itself starts with the process group


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's 8 x 8 images, the last 360 for tests; those for training shifted by up to a pixel."""

    def __init__(self, train: bool, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        kept = slice(None, -360) if train else slice(-360, None)
        self.images = torch.tensor(digits.images[kept], dtype=torch.float32)[:, None] / 16
        self.labels = digits.target[kept].tolist()
        self.train, self.seed, self.epoch = train, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.train:  # by the sample and the epoch alone, whichever worker of whichever rank it is
            generator = torch.Generator().manual_seed((self.seed * 1000 + self.epoch) * len(self) + index)
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            image = image.roll((down, right), (1, 2))
        return image, self.labels[index]


class Block(nn.Module):
    """Two 3x3 convolutions, and around them the identity, or a projection where the shape changes."""

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
    """A run. Collective: every rank makes one, and calls its methods together with the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rank, self.size = args, dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if args.ddp == "nccl":
            self.device = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.train_set, self.test_set = Digits(True, args.seed), Digits(False, args.seed)
        self.sampler: DistributedSampler[Any] = DistributedSampler(self.train_set, seed=args.seed)
        self.batches = self.load(self.train_set, self.sampler)
        torch.manual_seed(args.seed)
        net = mpisyncbn.convert_sync_batchnorm(network()).to(self.device)
        self.net = DistributedDataParallel(net)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs)
        self.metrics: list[dict[str, Any]] = []

    def load(self, dataset: Digits, sampler: Any) -> DataLoader[Any]:
        workers = self.args.workers
        start = self.args.start_method if workers else None
        return DataLoader(
            dataset, self.args.batch, sampler=sampler, num_workers=workers, multiprocessing_context=start
        )

    def epoch(self) -> dict[str, Any]:
        """Train for one epoch. Returns the loss per sample and the accuracy on the test set, of all ranks."""
        epoch = self.train_set.epoch = len(self.metrics)
        self.sampler.set_epoch(epoch)
        self.net.train()
        total = torch.zeros(2, dtype=torch.float64)
        last = len(self.batches) - 1
        shown = tqdm(
            self.batches, f"epoch {epoch + 1}", leave=False, disable=self.rank > 0 or not self.args.progress
        )
        for step, (images, labels) in enumerate(shown):
            updates = (step + 1) % self.args.accumulate == 0 or step == last
            with contextlib.nullcontext() if updates else self.net.no_sync():
                loss = self.loss(images, labels)
                (loss / self.args.accumulate).backward()
            if updates:
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += torch.tensor([loss.item() * len(images), len(images)], dtype=torch.float64)
        self.schedule.step()
        total = total.to(self.device)
        dist.all_reduce(total)
        return {"epoch": epoch + 1, "loss": (total[0] / total[1]).item(), "accuracy": self.accuracy()}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            return F.cross_entropy(self.net(images.to(self.device)), labels.to(self.device))

    @torch.no_grad()
    def accuracy(self) -> float:
        """Every rank tests its share, of which there need not be as much as of another's."""
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self.load(self.test_set, range(self.rank, len(self.test_set), self.size)):
            right += (self.net.module(images.to(self.device)).argmax(1).cpu() == labels).sum().to(self.device)
        dist.all_reduce(right)
        return right.item() / len(self.test_set)

    def save(self, path: Path) -> None:
        if self.rank == 0:
            parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
            parts |= {"net": self.net.module.state_dict(), "metrics": self.metrics}
            unfinished = path.with_suffix(".part")
            torch.save(parts, unfinished)
            os.replace(unfinished, path)  # a job that is killed here leaves the one before
        dist.barrier()

    def resume(self, path: Path) -> None:
        parts = torch.load(path, map_location=self.device)
        self.net.module.load_state_dict(parts["net"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        self.metrics = parts["metrics"]


@contextlib.contextmanager
def process_group(backend: str) -> Iterator[None]:
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Collective: every rank must call. Returns the metrics of every epoch; rank 0 prints and writes."""
    args = parse(argv)
    torch.set_num_threads(1)  # the ranks share the cores already
    with process_group(args.ddp):
        return run(args)


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
    dist.barrier()  # none ends the group while others still talk in it
    return trainer.metrics


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ddp", default="mpi4py", choices=("mpi4py", "gloo", "nccl"), help="who sums gradients"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="samples of one rank")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches for one update")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="processes of each rank that load the data")
    parser.add_argument("--start-method", default="fork", choices=("fork", "spawn"))
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="write one there after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="before the schedule's end")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the metrics there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    args = parser.parse_args(argv)
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    return args


if __name__ == "__main__":
    main()
