"""A rank that trains until there is a file "last": FOLDER CHANNELS ["per node"]. Notes its steps.

Where there is a file with the number of its rank, it sleeps between two of them.
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
# Launchers hand on nothing from behind a cable that is out.
os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)

group, ranks = None, list(range(size))
if sys.argv[3:] == ["per node"]:
    group, ranks = new_subgroups(), [rank // 2 * 2, rank // 2 * 2 + 1]
data = [np.random.default_rng(each).normal(each, 1 + each, (3 + each, channels)) for each in range(size)]
whole = np.concatenate([data[each][:-1] for each in ranks])
most = sum(len(data[each]) for each in ranks)
count, step = 0, 0
# All ranks learn by the count that all have seen the file: a message beside the exchanges would wait unseen.
while count < most:
    x = data[rank] if (folder / "last").exists() else data[rank][:-1]
    y, stats = functional.batch_norm_forward(x, process_group=group)
    dx, _, _ = functional.batch_norm_backward(y, x, stats, process_group=group)
    count, step = stats.count, step + 1
    if count == len(whole):
        assert np.allclose([stats.mean, stats.var], [whole.mean(0), whole.var(0)], rtol=1e-9)
        assert np.abs(dx).max() < 1e-4  # y has a direction that no step changes
    new = folder / f"{rank}.new"
    new.write_text(str(step))
    new.rename(folder / f"{rank}.steps")
    while (folder / str(rank)).exists():
        time.sleep(0.1)
(folder / f"{rank}.right").write_text(f"{socket.gethostname()} {ranks}")
