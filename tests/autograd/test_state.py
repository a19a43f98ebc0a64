"""If a training step is interrupted anywhere, its running statistics are all old or all new."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, autograd, batch_stats, functional, kernels, running_stats
from mpisyncbn.kernels import link
from support.ranks import WORLD, no_exchange, together

RANK, SIZE = WORLD.rank, WORLD.size
PACKAGE = str(Path(mpisyncbn.__file__).parent)
State = tuple[bytes, ...]
# If Python deletes a generator early, an exception in it is only reported as unraisable.
closing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def modes() -> Iterator[None]:
    """Restore the modes of torch and NumPy. An interrupt may leave torch.no_grad in force."""
    with torch.set_grad_enabled(True), np.errstate():
        yield


class Step:
    """A training step of the layer, the function or functional.py, with running statistics."""

    def __init__(self, path: str, dtype: torch.dtype, group: Any) -> None:
        self.path, self.group = path, group
        self.layer = SyncBatchNorm(3, process_group=group, dtype=dtype)
        if path == "cumulative layer":
            self.layer.momentum = None

    def run(self, x: Tensor) -> None:
        layer = self.layer
        if "layer" in self.path:
            layer(x)
            return
        running = layer.running_mean, layer.running_var
        if self.path == "function":
            mpisyncbn.sync_batch_norm(x, *running, process_group=self.group)
            return
        if self.path == "NumPy":
            x, *running = (each.numpy() for each in (x, *running))
        _, stats = functional.batch_norm_forward(x, process_group=self.group)
        functional.update_running_stats(*running, stats, 0.1)

    def tensors(self) -> list[Tensor]:
        return list(self.layer.buffers())

    def state(self) -> State:
        return tuple(buffer.reshape(-1).view(torch.uint8).numpy().tobytes() for buffer in self.tensors())

    def reset(self) -> None:
        self.layer.reset_running_stats()


PATHS = ("layer", "cumulative layer", "function", "torch", "NumPy")
DTYPES = (torch.float32, torch.float16)


@contextlib.contextmanager
def without_native() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (kernels, batch_stats, running_stats, autograd, link):
            stack.enter_context(mock.patch.object(module, "native", return_value=None))
        yield


@pytest.fixture(params=[True, False], ids=["native", "no native code"])
def native(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param:
        if kernels.native() is None:
            pytest.skip("the native kernels were not built")
        yield
    else:
        with without_native():
            yield


def prepared(path: str, dtype: torch.dtype) -> tuple[Step, Callable[[], None], State, State]:
    """Return a step of this rank alone, a function to run it, and states before and after."""
    step = Step(path, dtype, Communicator(MPI.COMM_SELF).ready())
    x = torch.linspace(-3.0, 5.0, 36).reshape(4, 3, 3).to(dtype)
    step.run(x)  # imports, look-ups and other work of the first use are done now
    step.reset()
    before = step.state()
    step.run(x)
    after = step.state()
    step.reset()
    return step, lambda: step.run(x), before, after


class Interrupted(BaseException):
    """An exception that nothing but the test may catch, as with KeyboardInterrupt."""


def at_moment(run: Callable[[], None], moment: int, error: type[BaseException]) -> str:
    """Call ``run``, and raise ``error`` at line, call or return number ``moment`` of the package.

    Return where it was raised, or "" if there are fewer lines, calls and returns.
    """
    seen, where = 0, ""

    def now(frame: Any, event: str, arg: Any) -> Any:
        nonlocal seen, where
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        seen += event != "exception"
        if seen == moment and not where:
            where = f"{event} in {frame.f_code.co_name}, line {frame.f_lineno} of {frame.f_code.co_filename}"
            raise error
        return now

    def in_c(frame: Any, event: str, arg: Any) -> None:
        if event.startswith("c_"):
            now(frame, event, arg)

    before = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(now)
        sys.setprofile(in_c)
        run()
    except error:
        pass
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return where


@closing
@no_exchange
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("native")
def test_an_error_at_any_moment(path: str, dtype: torch.dtype) -> None:
    step, run, before, after = prepared(path, dtype)
    torn, found, moment = [], [], 0
    error = MemoryError if dtype == torch.float16 else Interrupted
    while where := at_moment(run, moment := moment + 1, error):
        found.append(step.state())
        if found[-1] not in (before, after):
            torn.append(where)
        step.reset()
    last = step.state()  # of the last run, which no error interrupted
    step.group.free()
    assert not torn, "\n".join(torn)
    assert moment > 20
    assert before in found
    assert last == after


@closing
@no_exchange
@pytest.mark.untraced  # an exception inside coverage.py leaves one of its locks locked
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("native")
def test_a_signal_at_any_moment(path: str) -> None:
    step, run, before, after = prepared(path, torch.float32)
    start = time.perf_counter()
    for _ in range(20):
        run()
    usual = (time.perf_counter() - start) / 20
    step.reset()
    armed, torn = [True], []

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(1, 201):
            try:
                signal.setitimer(signal.ITIMER_REAL, usual * turn / 160)
                run()
                armed.clear()
            except KeyboardInterrupt:
                pass
            armed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)
            if step.state() not in (before, after):
                torn.append(turn)
            step.reset()
            armed.append(True)
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    run()
    last = step.state()
    step.group.free()
    assert not torn
    assert last == after


@no_exchange
@pytest.mark.parametrize("late", [False, True], ids=["instead", "afterwards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", [path for path in PATHS if "layer" in path])
@pytest.mark.usefixtures("native")
def test_a_count_that_fails(path: str, dtype: torch.dtype, late: bool) -> None:
    """If the increment of num_batches_tracked fails, no statistics are changed.

    Native code increments it, where no tracing of Python code can raise an error.
    """
    real = torch.Tensor.add_

    def fails(*args: Any) -> None:
        if late:
            real(*args)
        raise MemoryError

    step, run, before, _ = prepared(path, dtype)
    with mock.patch.object(torch.Tensor, "add_", fails), pytest.raises(MemoryError):
        run()
    found = step.state()
    step.group.free()
    assert found == before


NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
LARGE = 400.0  # its square overflows float16


@pytest.mark.filterwarnings("ignore:a batch whose mean or variance is not finite")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("native")
def test_a_batch_not_finite_on_one_rank_is_recorded_on_none(path: str, dtype: torch.dtype) -> None:
    if path == "NumPy" and dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    step = Step(path, dtype, Communicator())
    x = torch.linspace(-3.0, 5.0, 9 * (3 + RANK)).reshape(3 + RANK, 3, 3).to(dtype)
    step.run(x)
    states = [step.state()]
    for value in NOT_FINITE:
        bad = x.clone()
        if RANK == SIZE - 1:
            bad[1, 1, 1] = value
        step.run(bad)
        states.append(step.state())
    large = x.clone()
    large[:, 1] = LARGE * torch.tensor([-1.0, 0.0, 1.0])
    step.run(large)
    states.append(step.state())
    step.run(x)
    states.append(step.state())
    same = [len(set(WORLD.allgather(state))) == 1 for state in states]
    finite = all(torch.isfinite(buffer).all() for buffer in step.tensors())
    step.group.free()
    with together():
        assert set(states[:-2]) == {states[0]}
        assert (states[-2] == states[0]) == (dtype == torch.float16)
        assert states[-1] not in (states[0], states[-2])
        assert finite
        assert all(same)
