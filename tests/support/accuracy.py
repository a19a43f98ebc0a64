"""The errors that the suite bounds, as figures: ``mpiexec -n 4 python tests/support/accuracy.py``.

Largest over channels and ranks, against batch norm of the gathered batch in float64 (in long double
for float64 input): variance relative, y and dx in units of their largest value.
"""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI

import mpisyncbn
from support.oracle import bits_equal_on_all_ranks, distance, oracle, shard
from support.ranks import WORLD

RATIOS = (0.0, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e6)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (4 + WORLD.rank, 16, 56, 56)


def float32(ratio: float, memory_format: torch.memory_format) -> list[float]:
    x, dy = (shard(SHAPE, seed, mean) for seed, mean in ((1, ratio), (2, 0.0)))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    layer = mpisyncbn.SyncBatchNorm(16, momentum=1.0, dtype=torch.float32)
    _, stats = mpisyncbn.functional.batch_norm_forward(x.detach())
    y = layer(x)
    y.backward(dy)
    expected = oracle(x, dy)
    errors = [
        ((stats.var - expected.var).abs() / expected.var).max().item(),
        distance(y.detach(), expected.y),
        distance(x.grad, expected.dx),
    ]
    return [WORLD.allreduce(error, op=MPI.MAX) for error in errors]


def float64(ratio: float) -> float:
    x = shard((40 + WORLD.rank, 4, 5), 1, ratio, torch.float64)
    _, stats = mpisyncbn.functional.batch_norm_forward(x)
    exact = np.concatenate(WORLD.allgather(x.numpy())).astype(np.longdouble).var(axis=(0, 2))
    return float(np.abs((stats.var.numpy() - exact) / exact).max())


def same_bits(steps: int) -> bool:
    layer = mpisyncbn.SyncBatchNorm(7)
    for step in range(steps):
        n = (step * 7 + WORLD.rank * 5) % 4 + (WORLD.rank == 0)
        layer(shard((n, 7, 3), step, float(step)))
    same = [bits_equal_on_all_ranks(v) for v in (layer.running_mean, layer.running_var)]
    return all(same)


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        f"{name:14} {ratio:8g}  " + "  ".join(f"{e:8.1e}" for e in float32(ratio, memory_format))
        for name, memory_format in FORMATS.items()
        for ratio in RATIOS
    ]
    wide, same = float64(1e6), same_bits(100)
    if WORLD.rank == 0:
        print(f"{WORLD.size} ranks, float32\n{'':14} mean/std  variance         y        dx")
        print("\n".join(rows))
        print(f"float64, mean/std 1e6: variance {wide:.1e}")
        verdict = "the same bits" if same else "different"
        print(f"running statistics after 100 uneven steps: {verdict} on all ranks")


if __name__ == "__main__":
    main()
