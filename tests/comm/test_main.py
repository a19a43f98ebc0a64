"""The command ``python -m mpisyncbn``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mpi4py import MPI

from mpisyncbn import __main__ as command
from mpisyncbn import config, report
from mpisyncbn.kernels import native
from mpisyncbn.report import rank
from mpisyncbn.report.text import as_text
from support.ranks import WORLD, several


@pytest.fixture(scope="module")
def facts():
    return report.report()


def test_report_names_the_transport_and_the_reason(facts):
    assert facts["ranks"]["world size"] == WORLD.size
    assert sum(map(int, facts["ranks"]["ranks per node"].split(", "))) == WORLD.size
    assert facts["transport"]["in use"] == "host"
    assert facts["transport"]["because"]
    assert facts["mpi"]["thread level"].startswith("THREAD_")
    assert facts["versions"]["torch"][0].isdigit()
    assert 0 < facts["exchange"]["minimum, us"] <= facts["exchange"]["median, us"]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["mpi"]["sums"] == "the same bits on all ranks and in all buffers"


def test_report_says_which_kernels_serve(facts, monkeypatch):
    kernels = facts["kernels"]
    if native() is not None:
        for place in ("NumPy", "torch, cpu"):
            assert kernels[place].startswith("native, instruction set ")
        monkeypatch.setattr("mpisyncbn.kernels.native", lambda: None)
        monkeypatch.setattr(rank, "native", lambda: None)
        kernels = report.report()["kernels"]
    assert kernels["NumPy"] == "generic: composed of NumPy operations"
    assert kernels["torch, cpu"] == "aten: composed of ATen operations"


def test_text_is_aligned(facts):
    lines = as_text(facts, [], colour=False).splitlines()
    assert lines[:2] == ["Problems", "  none"]
    assert [line for line in lines[2:] if line and line[0] != " "] == [
        "Versions",
        "MPI",
        "Ranks",
        "Kernels",
        "GPU",
        "Settings",
        "Time of one exchange",
    ]
    entries = [line for line in lines[2:] if line.startswith("  ")]
    column = 2 + len("MPISYNCBN_TRANSPORT  ")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in entries)
    assert max(map(len, lines)) <= 100


def test_only_rank_zero_prints(capsys):
    assert command.main(["--json"]) == 0
    out = capsys.readouterr().out
    if WORLD.rank == 0:
        facts = json.loads(out)
        assert facts["ranks"]["world size"] == WORLD.size
        # More ranks than cores are a problem unless MPI says that it yields. MPICH does not.
        assert [each for each in facts["problems"] if ". A rank that waits " not in each["what"]] == []
    else:
        assert out == ""


def test_colours_are_forced(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    command.main([])
    assert capsys.readouterr().out.startswith("\033[1mProblems\033[0m\n") == (WORLD.rank == 0)


@pytest.mark.parametrize("given", ["0", "soon", "inf", "-1"])
def test_a_timeout_that_is_none(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--timeout", given])
    assert f"argument --timeout: expected seconds, more than 0, got '{given}'" in capsys.readouterr().err


class Library:
    """An MPI library whose Allreduce only adds ``result(rank, call)`` to the values of the rank."""

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
    words, problem = report._sums(Library(vendor, lambda rank, call: float(call == 4)))
    assert words.endswith(said)
    assert problem is None
    words, problem = report._sums(Library(vendor, lambda rank, call: 1.0))
    assert words.endswith("in all buffers")


@several
def test_sums_that_differ_between_ranks_are_reported(monkeypatch):
    monkeypatch.setattr("numpy.random.default_rng", lambda _: np.random.Generator(np.random.PCG64(0)))
    words, problem = report._sums(Library("Other", lambda rank, call: float(rank)))
    assert words == "other bits on some ranks: running statistics may drift apart"
    assert problem.level == report.ERROR
    assert problem.what == f"MPI_Allreduce returns {words}"


def test_a_transport_that_cannot_be_had_is_reported(monkeypatch):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "device")
    facts = report.report()
    assert facts["transport"]["in use"] == "none"
    assert "cannot take them" in facts["exchange"]["error"]


def test_a_value_that_nothing_understands(monkeypatch, capsys):
    """A setting with an invalid value is an error in the report, which shows all else too."""
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "pigeon")
    assert command.main(["--timeout", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    if WORLD.rank == 0:
        where = "all ranks" if WORLD.size > 1 else "rank 0"
        text = " ".join(lines[1].split() + lines[2].split())
        what = "error: MPISYNCBN_TRANSPORT must be one of auto, host, device, stream, got 'pigeon', on"
        assert text.startswith(f"{what} {where}")
        assert "Ranks" in lines
    else:
        assert lines == []


def test_ranks_are_apart(monkeypatch, capsys):
    """If the launcher started more ranks than MPI has, the report has an error, and still measures.

    With ``--check``, every rank returns status 1.
    """
    more = WORLD.size + 1
    monkeypatch.setattr(config, "any_launcher_size", lambda size: (size + 1, "PMI_SIZE"))
    assert command.main(["--check"]) == 1
    assert command.main(["--json"]) == 0
    out = capsys.readouterr().out
    if WORLD.rank == 0:
        text, _, facts = out.partition("\n{")
        sizes = f"the launcher started {more} ranks (PMI_SIZE={more}), MPI has a world of {WORLD.size}"
        assert " ".join(text.split()).startswith(f"error: {sizes}: each world would train by itself.")
        facts = json.loads("{" + facts)
        assert facts["problems"][0]["what"].startswith(sizes)
        assert facts["exchange"]["median, us"] > 0
    else:
        assert out == ""


def test_a_child_of_a_rank(monkeypatch, capsys):
    """In a child process of a rank, the check prints the reason and fails before it uses MPI."""
    monkeypatch.setattr(command.ancestors, "ancestor_rank_pid", lambda: 7)
    assert command.main(["--check"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    if WORLD.rank == 0:
        assert out.startswith("error: this process is a child of process 7, which is a rank of MPI")
        assert "cure: Let the rank do what needs MPI" in out
