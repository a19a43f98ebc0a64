"""Convert, compare and revert one small model of each family that has a batch norm.

    mpiexec -n 2 python tests/integrations/model_families.py [MODELS]     a Markdown table on rank 0
    python tests/integrations/model_families.py --list                    timm's part of models.txt

A family is a module of timm.models, or of torchvision.models. ``--list`` builds every model of
timm's registry on the meta device, and takes the smallest for each class of batch norm of a family.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision_on_cpu
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mpisyncbn
from support.whole_batch import distance

torchvision_on_cpu.allow()  # timm imports torchvision
import timm  # noqa: E402

MODELS = (Path(__file__).parent / "models.txt").read_text().split()


class Comparison(NamedTuple):
    model: str
    layers: int  # batch norms
    fused: int  # batch norms with a fused activation
    distance: float  # the largest, relative, of outputs, gradients and running statistics
    restored: bool  # every module has its exact class again


def compare(name: str, **options: bool) -> Comparison:
    """Compare a converted model on uneven parts of a batch with the original on the whole batch.

    Both make a forward and a backward pass. ``options`` are those of ``convert_sync_batchnorm``.
    Collective over the world.
    """
    from support.ranks import MPI, WORLD

    torch.manual_seed(0)
    model = _build(name).double()
    _without_chance(model)
    size = _size(model)
    whole = copy.deepcopy(model.train())
    classes = [type(module) for module in model.modules()]
    mpisyncbn.convert_sync_batchnorm(model, **options)
    parts = [3 + rank % 2 for rank in range(WORLD.size)]
    images = torch.randn(sum(parts), 3, size, size, dtype=torch.float64)
    start = sum(parts[: WORLD.rank])
    mine = slice(start, start + parts[WORLD.rank])
    target = torch.randn(sum(parts), 7, dtype=torch.float64)
    y, expected = _logits(model(images[mine])), _logits(whole(images))
    ((y - target[mine]) ** 2).sum().backward()
    ((expected - target) ** 2).sum().backward()
    gradients = [
        (torch.from_numpy(WORLD.allreduce(ours.grad.contiguous().numpy())), theirs.grad)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True)
        if theirs.grad is not None
    ]
    buffers = list(zip(model.buffers(), whole.buffers(), strict=True))
    most = max(map(_distance, ([(y, expected[mine])], gradients, buffers)))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    fused = sum(module.activation is not None for module in norms)
    mpisyncbn.revert_sync_batchnorm(model)
    restored = [type(module) for module in model.modules()] == classes
    return Comparison(name, len(norms), fused, WORLD.allreduce(most, MPI.MAX), restored)


def _without_chance(model: nn.Module) -> None:
    """Turn off dropout: ranks would draw other random numbers for it than one process."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _build(name: str) -> nn.Module:
    library, _, model = name.rpartition("/")
    if not library:
        return timm.create_model(name, pretrained=False, num_classes=7)
    import torchvision

    # GoogLeNet and Inception take minutes to initialize. torchvision's own scripts skip that.
    more = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    if model.startswith("lraspp"):
        more = {"weights_backbone": None}
    return torchvision.models.get_model(model, weights=None, num_classes=7, **more)


def _logits(output: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    """The output of a model's main head, without those of auxiliary heads."""
    if isinstance(output, dict):
        return output["out"].mean((2, 3))
    return output if isinstance(output, Tensor) else output[0]


def _distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of a pair of tensors, relative to the largest value of the second one.

    That value counts as at least a thousandth of the largest of all pairs: a mean may be a sum that
    cancels to 0.
    """
    largest = [(a, b, b.abs().max().item()) for a, b in pairs if b.numel() and b.is_floating_point()]
    least = max((size for *_, size in largest), default=1.0) / 1e3
    return max((distance(a, b, max(size, least)) for a, b, size in largest), default=0.0)


def _size(model: nn.Module) -> int:
    """Return the smallest of a few image widths that the model takes, else its default."""
    trial = copy.deepcopy(model).train()
    for size in (96, 128, 224):
        with torch.no_grad(), contextlib.suppress(AssertionError, RuntimeError, ValueError):
            trial(torch.zeros(2, 3, size, size, dtype=torch.float64))
            return size
    return getattr(model, "default_cfg", {"input_size": [299]})["input_size"][-1]


def smallest() -> Iterator[str]:
    """Yield the names of timm's models for models.txt."""
    for family in timm.list_modules():
        found: dict[str, tuple[int, str]] = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            size = sum(parameter.numel() for parameter in model.parameters())
            for cls in {type(m).__qualname__ for m in model.modules() if isinstance(m, _BatchNorm)}:
                found[cls] = min(found.get(cls, (size, name)), (size, name))
        yield from sorted({name for _, name in found.values()})


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    if sys.argv[1:] == ["--list"]:
        print(*smallest(), sep="\n")
        sys.exit()
    torch.set_num_threads(1)
    rows = []
    for each in sys.argv[1:] or MODELS:
        rows.append(compare(each))
        if mpisyncbn.Communicator().rank == 0:
            print(
                f"| {each} | {rows[-1].layers} | {rows[-1].distance:.1e} | {rows[-1].restored} |", flush=True
            )
