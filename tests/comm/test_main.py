"""python -m mpisyncbn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mpi4py import MPI

from mpisyncbn import __main__ as report
from mpisyncbn import config
from mpisyncbn.kernels import native
from support.ranks import WORLD, several


def test_report_says_what_would_be_used_and_why():
    facts = report.report()
    assert facts["ranks"]["world size"] == WORLD.size
    assert sum(map(int, facts["ranks"]["ranks per node"].split(", "))) == WORLD.size
    assert facts["transport"]["in use"] == "host"
    assert facts["transport"]["because"]
    assert facts["mpi"]["thread level"].startswith("THREAD_")
    assert facts["versions"]["torch"][0].isdigit()
    assert 0 < facts["exchange"]["minimum, us"] <= facts["exchange"]["median, us"]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["mpi"]["sums"] == "the same bits on all ranks and in all buffers"


def test_report_says_which_kernels_serve(monkeypatch):
    kernels = report.report()["kernels"]
    if native() is not None:
        for place in ("NumPy", "torch, cpu"):
            assert kernels[place].startswith("native, instruction set ")
        monkeypatch.setattr("mpisyncbn.kernels.native", lambda: None)
        monkeypatch.setattr(report, "native", lambda: None)
        kernels = report.report()["kernels"]
    assert kernels["NumPy"].startswith("generic: composed of NumPy operations")
    assert kernels["torch, cpu"].startswith("aten: composed of ATen operations")
    for place in ("NumPy", "torch, cpu"):
        assert "were not built: install a C++ compiler" in kernels[place]


def test_text_is_aligned():
    lines = report.as_text(report.report()).splitlines()
    entries = [line for line in lines if line.startswith("  ")]
    width = max(len(line[2:].split("  ")[0]) for line in entries)
    assert all(line[2 + width : 4 + width] == "  " and line[4 + width] != " " for line in entries)


def test_only_rank_zero_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mpisyncbn", "--json"])
    report.main()
    out = capsys.readouterr().out
    if WORLD.rank == 0:
        assert json.loads(out)["ranks"]["world size"] == WORLD.size
    else:
        assert out == ""


class Library:
    """An MPI whose sums are what ``result(rank, call)`` adds to them."""

    IN_PLACE = MPI.IN_PLACE

    def __init__(self, vendor, result):
        self.COMM_WORLD, self.rank = self, WORLD.rank
        self.vendor, self.result, self.calls = vendor, result, 0

    def get_vendor(self):
        return self.vendor, (1, 0)

    def Allreduce(self, _, values):
        self.calls += 1
        values += self.result(self.rank, self.calls)

    def allgather(self, value):
        return WORLD.allgather(value)


@pytest.mark.parametrize(
    ("vendor", "said"), [("Intel MPI", "lie elsewhere: set I_MPI_CBWR=1"), ("Other", "lie elsewhere")]
)
def test_sums_that_depend_on_the_buffer_are_reported(vendor, said, monkeypatch):
    monkeypatch.setattr("numpy.random.default_rng", lambda _: np.random.Generator(np.random.PCG64(0)))
    assert report._sums(Library(vendor, lambda rank, call: float(call == 4))).endswith(said)
    assert report._sums(Library(vendor, lambda rank, call: 1.0)).endswith("in all buffers")


@several
def test_sums_that_differ_between_ranks_are_reported(monkeypatch):
    monkeypatch.setattr("numpy.random.default_rng", lambda _: np.random.Generator(np.random.PCG64(0)))
    found = report._sums(Library("Other", lambda rank, call: float(rank)))
    assert found == "other bits on some ranks: running statistics may drift apart"


def test_a_transport_that_cannot_be_had_is_reported(monkeypatch):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "device")
    facts = report.report()
    assert facts["transport"]["in use"] == "none"
    assert "cannot take them" in facts["exchange"]["error"]


def test_a_variable_that_nothing_understands(monkeypatch, capsys):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "pigeon")
    monkeypatch.setattr("sys.argv", ["mpisyncbn"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert (
        "MPISYNCBN_TRANSPORT must be one of auto, host, device, stream, got 'pigeon'"
        in capsys.readouterr().err
    )


def test_report_says_that_the_ranks_are_apart(monkeypatch):
    """And measures all the same."""
    monkeypatch.setattr(config, "any_launcher_size", lambda size: (size + 1, "PMI_SIZE"))
    facts = report.report()
    more = WORLD.size + 1
    sizes = f"the launcher started {more} ranks (PMI_SIZE={more}), MPI has a world of {WORLD.size}: "
    assert facts["ranks"]["APART"].startswith(sizes)
    assert facts["exchange"]["median, us"] > 0
