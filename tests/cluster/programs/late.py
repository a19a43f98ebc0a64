"""Begin the first exchange on every rank except rank 3, which sleeps: ``late.py FOLDER``."""

import os
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpisyncbn import functional
from mpisyncbn.liveness import reports

reports._FORWARD_SECONDS = 1.0  # gives all ranks time to report before one ends the job
folder, rank = Path(sys.argv[1]), MPI.COMM_WORLD.rank
os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)
MPI.COMM_WORLD.Barrier()
(folder / f"{rank}.pid").write_text(str(os.getpid()))
if rank == 3:
    time.sleep(1000)
functional.batch_norm_forward(np.ones((2, 3)))
