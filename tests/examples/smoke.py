"""Compare one training step with the whole batch, at any number of ranks, even more than cores.

It is not part of the suite: ``mpiexec -n 32 python tests/examples/smoke.py``. The exit status is 1
if any rank is wrong.
"""

from __future__ import annotations

import sys

import torch

import mpisyncbn
from support.oracle import bits_equal_on_all_ranks, distance, oracle, shard
from support.ranks import WORLD


def main() -> int:
    torch.set_num_threads(1)
    layer = mpisyncbn.SyncBatchNorm(4)
    half = mpisyncbn.SyncBatchNorm(4, process_group=mpisyncbn.new_subgroups(max(1, WORLD.size // 2)))
    n = WORLD.rank % 3  # a third of the ranks have an empty batch
    x, dy = shard((n, 4, 5), 1, 3.0).requires_grad_(), shard((n, 4, 5), 2)
    y = layer(x)
    y.backward(dy)
    expected = oracle(x, dy)
    half(x.detach())
    same = [bits_equal_on_all_ranks(v) for v in (layer.running_mean, layer.running_var)]
    bits_equal_on_all_ranks(half.running_var, half.process_group.comm)
    right = all(same) and distance(y.detach(), expected.y) < 1e-5 and distance(x.grad, expected.dx) < 1e-5
    verdicts = WORLD.allgather(right)
    if WORLD.rank == 0:
        print(f"{WORLD.size} ranks: {sum(verdicts)} right, {len(verdicts) - sum(verdicts)} wrong")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
