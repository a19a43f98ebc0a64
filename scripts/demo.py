"""Train on sharded digits three ways: in one process, with local and with synchronized batch norm.

    mpiexec -n 4 python scripts/demo.py

The data are the handwritten digits of scikit-learn (1797 images of 8 x 8), divided as they might be
on a cluster's disks: rank r holds the digits d with d % size == r. All three runs start from one
network and see the same samples at each step: the global batch is the batches of all ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset
from tqdm import tqdm

import mpisyncbn
from outputs import output

ONE_PROCESS, LOCAL, SYNCHRONIZED = "one process", "local BatchNorm", "SyncBatchNorm"
LAST = 20  # losses are shown as means over so many steps: the loss of a single step is noisy


class Run(NamedTuple):
    """A trained model, and the loss of the global batch at each step."""

    model: nn.Module
    losses: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo. Rank 0 prints and writes the files. Collective: every rank must call."""
    args = parse(argv)
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)  # the ranks share the cores already
    train_set, test_set = load(getattr(torch, args.dtype), args.seed)
    runs = compare(train_set, comm, args.steps, args.batch, args.lr, args.seed, progress=True)
    if comm.rank > 0:
        return
    rows = {name: summary(run, runs[ONE_PROCESS], test_set) for name, run in runs.items()}
    print(table(rows, comm.size, len(test_set)))
    if args.json:
        losses = {name: run.losses.tolist() for name, run in runs.items()}
        report = {"ranks": comm.size, "options": vars(args), "summary": rows, "losses": losses}
        args.json.write_text(json.dumps(report, default=str))
    if args.plot:
        plot({name: run.losses for name, run in runs.items()}, comm.size, args.plot)
        print(f"loss curves: {args.plot}")


def compare(
    data: TensorDataset,
    comm: MPI.Intracomm,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: bool = False,
) -> dict[str, Run]:
    """Train the same network on the same samples three ways.

    Args:
        data: images and labels, the same on every rank.
        batch: samples per rank and step.
        progress: whether rank 0 shows a progress bar.

    Returns:
        The runs by name. The losses are those of the global batches, the same on every rank. The
        models are this rank's: the running statistics of local batch norm differ between ranks.

    Collective: every rank of ``comm`` must call.
    """
    torch.manual_seed(seed)
    network = make_network().to(data.tensors[0].dtype)
    samples = draw(data.tensors[1].numpy(), comm.size, steps, batch, seed)
    mine, everyone = samples[:, comm.rank], samples.reshape(steps, -1)
    ways = {
        # Every rank trains this one. If only rank 0 did, the others would wait, and spin.
        ONE_PROCESS: (network, everyone, MPI.COMM_SELF),
        LOCAL: (deepcopy(network), mine, comm),
        SYNCHRONIZED: (mpisyncbn.convert_sync_batchnorm(deepcopy(network), comm), mine, comm),
    }
    runs = {}
    for name, (model, batches, group) in ways.items():
        bar = tqdm(batches, f"{name:{len(LOCAL)}}", unit="step", disable=not progress or comm.rank > 0)
        losses = train(model, data, bar, group, lr)
        runs[name] = Run(model, comm.bcast(losses))  # rounding may differ between unlike nodes: take rank 0's
    return runs


def train(
    model: nn.Module, data: TensorDataset, batches: Iterable[np.ndarray], comm: MPI.Intracomm, lr: float
) -> np.ndarray:
    """Train on ``batches``, indices into ``data``; return the global batch's loss at each step.

    Collective: every rank of ``comm`` must call, with batches of one size.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    model.train()
    for index in batches:
        images, labels = data[index]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, comm)
        optimizer.step()
        losses.append(loss.item())
    return average(np.array(losses), comm)


def average_gradients(model: nn.Module, comm: MPI.Intracomm) -> None:
    """Replace each gradient by its mean over ranks: data parallelism in plain MPI.

    If all batches have one size, this is the gradient of the global batch.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = parameters_to_vector(gradients)
    average(flat.numpy(), comm)  # the array is a view of flat
    vector_to_parameters(flat, gradients)


def average(values: np.ndarray, comm: MPI.Intracomm) -> np.ndarray:
    """Replace ``values`` by their mean over ranks, and return them."""
    comm.Allreduce(MPI.IN_PLACE, values)
    values /= comm.size
    return values


def make_network() -> nn.Module:
    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        # SiLU, since at ReLU's kink rounding changes the gradient, and two runs drift apart.
        return [convolution, nn.BatchNorm2d(out), nn.SiLU()]

    features = [*block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def load(dtype: torch.dtype, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return four fifths of the digits for training, and the others for the test.

    The images are ``(N, 1, 8, 8)``, with values from 0 to 1.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    images = [torch.as_tensor(part, dtype=dtype).unsqueeze(1) / 16 for part in split[:2]]
    labels = [torch.as_tensor(part) for part in split[2:]]
    return TensorDataset(images[0], labels[0]), TensorDataset(images[1], labels[1])


def draw(labels: np.ndarray, size: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Draw each rank's samples from its shard. Return indices, ``(steps, size, batch)``.

    Raises:
        ValueError: there are more ranks than kinds of digits.
    """
    columns = []
    for rank in range(size):
        shard = np.flatnonzero(labels % size == rank)
        if len(shard) == 0:
            raise ValueError(f"rank {rank} holds no digit: expected at most 10 ranks, got {size}")
        generator = np.random.default_rng((seed, rank))
        epochs = -(-steps * batch // len(shard))
        order = np.concatenate([generator.permutation(shard) for _ in range(epochs)])
        columns.append(order[: steps * batch].reshape(steps, batch))
    return np.stack(columns, axis=1)


def summary(run: Run, one_process: Run, test_set: TensorDataset) -> dict[str, float]:
    images, labels = test_set.tensors
    run.model.eval()
    with torch.no_grad():
        correct = run.model(images).argmax(1) == labels
    return {
        "test accuracy": correct.double().mean().item(),
        "final loss": run.losses[-LAST:].mean(),
        "largest distance": distance(run.losses, one_process.losses),
    }


def distance(losses: np.ndarray, others: np.ndarray) -> float:
    """The largest distance over all steps."""
    return float(np.abs(losses - others).max())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on sharded digits three ways.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--batch", type=int, default=4, help="samples per rank and step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="dtype of data and network"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and network")
    parser.add_argument(
        "--plot", type=output, metavar="PATH", default="demo.png", help="file of the picture; empty for none"
    )
    parser.add_argument("--json", type=output, metavar="PATH", help="also write all results to this file")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch) < 1:
        parser.error(f"--steps and --batch must be at least 1, got {args.steps} and {args.batch}")
    return args


def table(rows: dict[str, dict[str, float]], size: int, tests: int) -> str:
    lines = [f"\n{'':{len(LOCAL)}}  test accuracy  final loss  largest distance"]
    for name, row in rows.items():
        far = "" if name == ONE_PROCESS else f"{row['largest distance']:.1e}"
        accuracy = f"{row['test accuracy']:.1%}"
        lines.append(f"{name:{len(LOCAL)}}  {accuracy:>13}  {row['final loss']:10.4f}  {far:>16}")
    return (
        "\n".join(lines)
        + f"""

{sharding(size)}
test accuracy: {tests} images, rank 0's model with its running statistics, as a checkpoint would hold it
final loss: training loss, mean of the last {LAST} steps
largest distance: of the loss curve from that of one process, over all steps
"""
    )


def plot(losses: dict[str, np.ndarray], size: int, path: Path) -> None:
    """Draw the three loss curves. Each point is the mean of the last steps."""
    from benchmarks import style

    away = {name: distance(curve, losses[ONE_PROCESS]) for name, curve in losses.items()}
    mantissa, exponent = f"{away[SYNCHRONIZED]:.0e}".split("e")
    closest = rf"{mantissa} \times 10^{{{int(exponent)}}}"
    styles = {  # drawn in this order: ours is thin and lies on the one-process curve
        ONE_PROCESS: (style.WHOLE_BATCH, 8, f"{ONE_PROCESS}, the whole batch"),
        SYNCHRONIZED: (style.OURS, 1.6, f"{SYNCHRONIZED}, largest distance ${closest}$"),
        LOCAL: (style.LOCAL, 2, f"{LOCAL}, largest distance {away[LOCAL]:.1f}"),
    }
    figure = style.figure(4.2)
    axes = figure.add_subplot()
    for name, (color, width, label) in styles.items():
        raw = losses[name]
        steps = np.arange(1, len(raw) + 1)
        recent = [raw[max(0, step - LAST) : step].mean() for step in steps]
        axes.plot(steps, recent, color=color, linewidth=width, label=label, solid_capstyle="round")
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    title = rf"On {ranks}, {SYNCHRONIZED} follows one process to $\mathbf{{{closest}}}$"
    axes.set_title(title, pad=22, fontsize=12)
    axes.annotate(
        sharding(size), (0, 1), (0, 8), "axes fraction", textcoords="offset points", color=style.GREY
    )
    axes.set_yscale("log")
    axes.set_xlim(1, len(losses[ONE_PROCESS]) + 1)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of the last {LAST} steps")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    style.save(figure, path)


def sharding(size: int) -> str:
    return f"handwritten digits, sharded by class: rank r holds the digits d with d % {size} == r"


if __name__ == "__main__":
    main()
