"""Train on this rank until FOLDER has a file "last": ``train.py FOLDER CHANNELS ["per node"]``.

With "per node", the ranks of each node are a group. After each step the rank writes the number of
its steps to a file in FOLDER. While FOLDER has a file of the rank's name, it sleeps between steps.
"""

import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpisyncbn import functional, new_subgroups

folder, channels = Path(sys.argv[1]), int(sys.argv[2])
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
# A launcher cannot forward the output of a host whose cable is cut.
os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)

group, ranks = None, list(range(size))
if sys.argv[3:] == ["per node"]:
    group, ranks = new_subgroups(), [rank // 2 * 2, rank // 2 * 2 + 1]
data = [np.random.default_rng(each).normal(each, 1 + each, (3 + each, channels)) for each in range(size)]
whole = np.concatenate([data[each][:-1] for each in ranks])
most = sum(len(data[each]) for each in ranks)
count, step = 0, 0
# A rank that has seen the file takes one sample more. So the count tells all ranks of the group
# when all have seen it. The time limit of exchanges would not cover a message of the program's own.
while count < most:
    x = data[rank] if (folder / "last").exists() else data[rank][:-1]
    y, stats = functional.batch_norm_forward(x, process_group=group)
    dx, _, _ = functional.batch_norm_backward(y, x, stats, process_group=group)
    count, step = stats.count, step + 1
    if count == len(whole):
        assert np.allclose([stats.mean, stats.var], [whole.mean(0), whole.var(0)], rtol=1e-9)
        assert np.abs(dx).max() < 1e-4  # the gradient dy = y gives dx = 0, except for eps
    new = folder / f"{rank}.new"
    new.write_text(str(step))
    new.rename(folder / f"{rank}.steps")
    while (folder / str(rank)).exists():
        time.sleep(0.1)
(folder / f"{rank}.right").write_text(f"{socket.gethostname()} {ranks}")
