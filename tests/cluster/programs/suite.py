"""Run pytest on this rank: ``suite.py FOLDER [ARGUMENTS OF PYTEST]``.

The rank writes the name of its host, and the number of ranks on that host, to a file in FOLDER.
"""

import socket
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
Path(sys.argv[1], f"{MPI.COMM_WORLD.rank}.node").write_text(f"{socket.gethostname()} {node.size}")
sys.exit(pytest.main(sys.argv[2:]))
