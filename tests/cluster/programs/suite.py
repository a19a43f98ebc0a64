"""A rank that runs tests: FOLDER, then what pytest takes. Notes its host, and how many ranks that has."""

import socket
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
Path(sys.argv[1], f"{MPI.COMM_WORLD.rank}.node").write_text(f"{socket.gethostname()} {node.size}")
sys.exit(pytest.main(sys.argv[2:]))
