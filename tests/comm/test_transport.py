"""The transport is chosen by what the MPI library reports. Most tests imitate the library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI

from mpisyncbn.comm import transport
from mpisyncbn.errors import TransportError
from support.ranks import WORLD, no_exchange

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
VARIABLES = (
    "MPICH_GPU_SUPPORT_ENABLED",
    "MV2_USE_CUDA",
    "MV2_USE_ROCM",
    "I_MPI_OFFLOAD",
    "OMPI_MCA_opal_cuda_support",
    "MPISYNCBN_TRANSPORT",
)
GPU_QUERY = "int MPIX_GPU_query_support(int kind, int *yes) { *yes = kind == %d; return 0; }"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that compiles C code to an MPI library, and returns an imitation of mpi4py.MPI."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def make(text="", vendor=("Some MPI", (1, 2, 3)), kinds=None):
        number = len(list(tmp_path.iterdir()))  # dlopen loads a path only once
        source, path = tmp_path / "mpi.c", tmp_path / f"libmpi-{WORLD.rank}-{number}.so"
        source.write_text(text + "\nint nothing;\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
        said = SimpleNamespace(Get=lambda key: {"mpi_memory_alloc_kinds": kinds}[key], Free=lambda: None)
        world = SimpleNamespace(Get_info=lambda: said)
        return SimpleNamespace(__file__=str(path), get_vendor=lambda: vendor, COMM_WORLD=world)

    return make


def answers(query, value):
    return f"int MPIX_Query_{query}_support(void) {{ return {value}; }}"


@no_exchange
@needs_compiler
@pytest.mark.parametrize(
    ("text", "vendor", "kinds", "variables", "expected", "because"),
    [
        (answers("cuda", 1), "Open MPI", None, None, "device", "MPIX_Query_cuda_support() says yes"),
        (answers("cuda", 0), "Open MPI", None, None, "host", "MPIX_Query_cuda_support() says no"),
        # the answer of the library's function overrides mpi_memory_alloc_kinds and variables
        (answers("cuda", 0), "MPICH", "mpi,system,cuda", "MV2_USE_CUDA=1", "host", "says no"),
        (GPU_QUERY % 0, "MPICH", None, None, "device", "MPIX_GPU_query_support() says yes"),
        (GPU_QUERY % 2, "MPICH", None, None, "host", "MPIX_GPU_query_support() says no"),
        ("", "MPICH", "mpi,system,cuda:device", None, "device", "mpi_memory_alloc_kinds is"),
        ("", "MPICH", "mpi,system", None, "host", "mpi_memory_alloc_kinds is 'mpi,system'"),
        ("", "Open MPI", "mpi,system,cuda", None, "host", "none is there"),  # it repeats the user's request
        ("", "MVAPICH2", None, "MV2_USE_CUDA=1", "device", "MV2_USE_CUDA is set"),
        ("", "MPICH", None, "MPICH_GPU_SUPPORT_ENABLED=1", "device", "MPICH_GPU_SUPPORT_ENABLED is set"),
        ("", "MPICH", None, "MPICH_GPU_SUPPORT_ENABLED=0", "host", "none is there"),
        ("", "MVAPICH2", None, "MV2_USE_ROCM=1", "host", "none is there"),
        ("", "MPICH", None, None, "host", "were looked for, and none is there"),
        # MPISYNCBN_TRANSPORT overrides the automatic choice
        (answers("cuda", 1), "MPICH", None, "MPISYNCBN_TRANSPORT=host", "host", "MPISYNCBN_TRANSPORT=host"),
        (answers("cuda", 1), "MPICH", None, "MPISYNCBN_TRANSPORT=device", "device", "says yes"),
    ],
)
def test_detection(text, vendor, kinds, variables, expected, because, library, monkeypatch):
    if variables:
        monkeypatch.setenv(*variables.split("="))
    found, reason = transport.chosen(library(text, (vendor, (5, 0, 11)), kinds))
    assert found == expected
    assert because in reason


@needs_compiler
@no_exchange
def test_open_mpi_from_6_on_is_believed(library):
    assert transport.chosen(library(vendor=("Open MPI", (6, 0, 0)), kinds="mpi,cuda"))[0] == "device"


@needs_compiler
@no_exchange
def test_rocm_is_not_cuda(library, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    text = answers("cuda", 1) + answers("rocm", 0)
    assert transport.chosen(library(text)) == ("host", "MPIX_Query_rocm_support() says no")
    assert transport.chosen(library(GPU_QUERY % 2))[0] == "device"
    assert transport.chosen(library(GPU_QUERY % 0))[0] == "host"
    assert transport.chosen(library(kinds="mpi,rocm"))[0] == "device"


def test_a_library_that_cannot_be_opened(monkeypatch):
    monkeypatch.delenv("MPISYNCBN_TRANSPORT", raising=False)
    gone = SimpleNamespace(__file__="/nowhere/MPI.so", get_vendor=lambda: ("Open MPI", (5, 0, 0)))
    assert transport.chosen(gone)[0] == "host"


@needs_compiler
def test_a_forced_transport_that_is_not_there(library, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "device")
    words = (
        r"asks for messages in device memory, but Some MPI 1.2.3 cannot take them \(on rank \d+ of \d+\): "
        "MPIX_Query_cuda_support, MPIX_GPU_query_support, mpi_memory_alloc_kinds and the variables of .* "
        "were looked for, and none is there. Use an MPI library built for cuda"
    )
    with pytest.raises(TransportError, match=words):
        transport.chosen(library())


def test_the_library_of_this_job():
    """The transport of this job is valid and has a reason. Common libraries have the query."""
    found, reason = transport.chosen(MPI)
    assert found in ("host", "device")
    assert reason
    if MPI.get_vendor()[0] in ("Open MPI", "MPICH", "Intel MPI"):
        assert hasattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support")
