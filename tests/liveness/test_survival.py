"""scripts/survive.py: if ranks are killed, the others go on. Its checks find wrong results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI

import mpisyncbn
import survive
from support import jobs
from support.ranks import starts_mpiexec

pytestmark = starts_mpiexec
REVOKES = "from mpi4py import MPI; c = MPI.COMM_WORLD.Dup(); c.Revoke(); print('revoked', c.Is_revoked())"


@pytest.fixture(scope="module")
def ulfm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The mpiexec command that starts a fault-tolerant job."""
    start = [jobs.find_mpiexec() or "false", "--with-ft", "ulfm"]
    tried = jobs.run([*start, "-n", "1", sys.executable, "-c", REVOKES], tmp_path_factory.mktemp("ulfm"))
    if "revoked True" not in tried.stdout:
        pytest.skip("mpiexec has no --with-ft ulfm, or MPI no Revoke()")
    return start


@pytest.mark.full("a job with two losses takes seconds")
@pytest.mark.parametrize(
    ("ranks", "steps", "moments", "dtype"),
    [
        ((1, 3), (4, 9), ("before", "forward"), "float32"),
        ((2, 0), (3, 8), ("gradients", "backward"), "float32"),
        ((2, 3), (5, 5), ("forward", "recovery"), "float64"),
    ],
)
def test_two_of_four_are_killed(
    ranks: tuple[int, int],
    steps: tuple[int, int],
    moments: tuple[str, str],
    dtype: str,
    ulfm: list[str],
    run_job: Callable[..., jobs.End],
) -> None:
    """The checks that ranks print decide, not the status of mpiexec: two ranks were killed."""
    kills = ["--kill-rank", *map(str, ranks), "--kill-step", *map(str, steps), "--at", *moments]
    program = [str(jobs.ROOT / "scripts" / "survive.py"), *kills, "--dtype", dtype]
    end = run_job(*program, ranks=4, launcher=ulfm)
    printed = end.stdout + end.stderr
    left = [rank for rank in range(4) if rank not in ranks]
    assert printed.count("\nok ") == 6, printed
    assert "WRONG" not in printed, printed
    assert f"ok     ranks {left} survived" in printed, printed
    for dead, step, size in zip(ranks, steps, (3, 2), strict=True):
        assert printed.count(f": without [{dead}], {size} ranks go on with step {step}") == size, printed


def test_a_step_taken_back() -> None:
    run = survive.Run(torch.float64, [])
    survive.train(run, 3)
    before = copied(run)
    run.advance()
    images, _ = survive.batch(4, torch.float64)
    run.net(images)  # half a step more: the running statistics have changed
    assert not same(copied(run), before)
    for _ in range(2):
        run.restore(3)
        assert same(copied(run), before)
        run.advance()
    survive.train(run, 6)
    never_interrupted = survive.Run(torch.float64, [])
    survive.train(never_interrupted, 6)
    assert same(copied(run), copied(never_interrupted))
    assert run.losses == never_interrupted.losses


@pytest.mark.parametrize(
    "damage", ["nothing", "1.running_var", "3.weight", "8.bias.momentum", "loss", "step"]
)
def test_the_verdict(damage: str) -> None:
    run = survive.Run(torch.float64, [])
    survive.train(run, 8)
    if damage == "loss":
        run.losses[-1] += 1e-9
    elif damage == "step":
        run.advance()
    elif damage != "nothing":
        survive.state_of(run.net, run.optimizer)[damage].data[0] += (
            float("nan") if damage == "3.weight" else 1e-9
        )
    wrong = [text.split()[0] for text, ok in survive.checks(run, 8, 4) if not ok]
    expected = {"nothing": [], "loss": ["losses"], "step": ["9", "state"]}
    assert wrong == expected.get(damage, ["state"])


def test_errors_that_mean_a_lost_rank() -> None:
    for code, expected in [
        (MPI.ERR_PROC_FAILED, True),
        (MPI.ERR_PROC_FAILED_PENDING, True),
        (MPI.ERR_REVOKED, True),
        (MPI.ERR_TRUNCATE, False),
    ]:
        error = mpisyncbn.MPISyncBNError("failed")
        error.__cause__ = MPI.Exception(code)
        assert survive.is_loss(error) == survive.is_loss(error.__cause__) == expected
    assert not survive.is_loss(mpisyncbn.MPISyncBNError("another"))


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = survive.Run(torch.float32, [])
    errors = iter([MPI.Exception(MPI.ERR_TRUNCATE), AssertionError("it went on")])

    def fail() -> None:
        raise next(errors)

    monkeypatch.setattr(run, "advance", fail)
    with pytest.raises(MPI.Exception):
        survive.train(run, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--kill-rank 1 2", "as many ranks as steps and moments, and fewer than 4"),
        ("--kill-rank 0 1 2 3 --kill-step 5 5 5 5 --at before before before before", "fewer than 4"),
        ("--kill-step 20", "--kill-step from 1 to 19, got [20]"),
        ("--kill-step 0", "--kill-step from 1 to 19, got [0]"),
    ],
)
def test_arguments(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survive, "WORLD", SimpleNamespace(size=4))
    with pytest.raises(SystemExit):
        survive.parse(arguments.split())
    assert expected in capsys.readouterr().err
    assert survive.parse([])[1] == [survive.Kill(2, 6, "backward")]


def copied(run: survive.Run) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in survive.state_of(run.net, run.optimizer).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)
