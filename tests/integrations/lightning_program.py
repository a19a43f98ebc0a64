"""Train with both of Lightning's packages and with Fabric, over the ranks of this job.

    python lightning_program.py FOLDER        each rank writes its results to FOLDER

test_lightning.py compares the results. A job of one rank trains torch's layers on the whole batch
of two ranks, with one of the packages and with Fabric.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torchvision_on_cpu
from mpi4py import MPI
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mpisyncbn

torchvision_on_cpu.allow()
RANKS = 2
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
TOTAL = sum(rank + 2 for rank in range(RANKS))  # samples of a batch of all ranks
Batch = tuple[Tensor, Tensor]


def batches(seed: int) -> DataLoader[Batch]:
    """Return five uneven batches: rank r has r + 2 samples of each."""
    torch.manual_seed(seed)
    mine = slice(None) if SIZE == 1 else slice(2 * RANK, 2 * RANK + 2 + RANK)
    whole = [(torch.randn(TOTAL, 3, 8, 8) + i, torch.randint(10, (TOTAL,))) for i in range(5)]
    return DataLoader([(x[mine], labels[mine]) for x, labels in whole], batch_size=None)


def net_of(package: ModuleType) -> Any:
    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            norm, linear = nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), linear)
            self.seen: list[object] = []

        def loss(self, batch: Batch, name: str) -> Tensor:
            x, labels = batch
            total = nn.functional.cross_entropy(self.layers(x), labels, reduction="sum")
            loss = total / TOTAL * SIZE  # the mean over ranks is the mean over samples
            self.log(name, loss, sync_dist=True, on_step=False, on_epoch=True, batch_size=1)
            return loss

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            layer = self.layers[1]
            self.seen = [getattr(layer, name, None) for name in ("layer_name", "activation", "process_group")]
            return self.loss(batch, "train_loss")

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.loss(batch, "val_loss")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Net()


def fit(package: ModuleType, net: Any, epochs: int, folder: Path, checkpoint: str | None = None) -> Any:
    group = MPI.COMM_WORLD.Dup() if SIZE > 1 else None
    several = {
        "plugins": [mpisyncbn.lightning.LayerSync(group, name="net", fuse_relu=True)],
        "sync_batchnorm": True,
        "strategy": "ddp",
        "devices": SIZE,
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = package.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        use_distributed_sampler=False,
        default_root_dir=folder,
        **quiet,
        **(several if SIZE > 1 else {}),
    )
    trainer.fit(net, batches(1), batches(2), ckpt_path=checkpoint)
    if group is not None:
        assert net.seen == ["net: layers.1", "relu", group], net.seen
    return trainer


def findings(package: ModuleType, folder: Path) -> dict[str, Any]:
    """Fit for two epochs, and for a third from their checkpoint. Return both results."""
    net, resumed = net_of(package), net_of(package)
    kinds = [type(layer) for layer in net.layers]
    trainer = fit(package, net, 2, folder)
    checkpoint = MPI.COMM_WORLD.bcast(trainer.checkpoint_callback.best_model_path)
    metrics = {name: value.double() for name, value in trainer.callback_metrics.items()}
    validated = trainer.validate(net, batches(3), verbose=False)[0]
    again = fit(package, resumed, 3, folder, checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {
        "net": net.state_dict(),
        "saved": saved,
        "metrics": metrics,
        "validated": {name: torch.tensor(value) for name, value in validated.items()},
        "resumed": resumed.state_dict(),
        "metrics of the third": {name: value.double() for name, value in again.callback_metrics.items()},
        "plain": [type(layer) for each in (net, resumed) for layer in each.layers] == kinds * 2,
    }


def with_fabric() -> dict[str, Tensor]:
    """Train for five steps with Lightning's Fabric, and return the state of the model."""
    fabric = importlib.import_module("lightning.fabric").Fabric(
        accelerator="cpu", devices=SIZE, strategy="ddp" if SIZE > 1 else "auto"
    )
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))
    if SIZE > 1:
        mpisyncbn.convert_sync_batchnorm(net)
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for x, labels in batches(1):
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(wrapped(x), labels, reduction="sum")
        fabric.backward(total / TOTAL * SIZE)
        optimizer.step()
    return net.state_dict()


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    names = ["lightning.pytorch", "pytorch_lightning"] if SIZE > 1 else ["lightning.pytorch"]
    found: dict[str, Any] = {name: findings(importlib.import_module(name), folder / name) for name in names}
    found |= {"fabric": with_fabric(), "backend": dist.is_initialized() and dist.get_backend()}
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
