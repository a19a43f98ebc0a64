"""One suite for any number of ranks: ``pytest``, or ``mpiexec -n 4 python -m pytest``.

A test that fails on one rank fails on all of them, and rank 0 alone reports it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from mpisyncbn import Communicator, init_process_group
from mpisyncbn.distributed import mpi_collectives
from support import jobs, libraries
from support.ranks import WORLD, together
from support.recorder import Recorder

# Every rank must try the same examples, so they are not random and none is kept for later runs.
# They have no time limit: with more ranks than cores, a rank waits for the others.
settings.register_profile(
    "mpi",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    max_examples=int(os.environ.get("MPISYNCBN_TEST_EXAMPLES", "40")),
)
settings.load_profile("mpi")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def pytest_addoption(parser: Any) -> None:
    names = ",".join(libraries.NAMES)
    parser.addoption(
        "--mpi",
        metavar="NAMES",
        default=libraries.own(),
        help=f"MPI libraries of jobs, where tests try several: some of {names}, or NAME=PREFIX; "
        "that of the environment by default",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: Any) -> None:
    if config.option.mpi != libraries.own():
        try:
            [libraries.find(name) for name in config.option.mpi.split(",")]
        except ValueError as error:
            raise pytest.UsageError(f"--mpi: {error}") from None
    pytest.register_assert_rewrite("support.kernels", "support.subject")
    if WORLD.rank > 0:
        config.option.xmlpath = None
    # pytest's default is one folder, which all ranks would clean up at the same time.
    folder = tempfile.TemporaryDirectory(prefix="mpisyncbn-")
    config.add_cleanup(folder.cleanup)
    config.option.basetemp = Path(folder.name) / "tests"


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: Any) -> None:
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    if WORLD.rank > 0:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    else:
        reporter.write_line(f"{WORLD.size} rank{'s' if WORLD.size > 1 else ''}")


# Each of these files takes minutes.
_LONG = (
    "test_faults.py",
    "test_kernels.py",
    "test_documentation.py",
    "test_slurm.py",
    "test_cuda.py",
    "test_processes.py",
    "test_documented.py",
)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests for other numbers of ranks; if no test is left, skip them with a reason.

    The longest files come first: pytest-xdist keeps this order, so none of them starts late.
    """
    left_out = {item: why for item in items if (why := _not_at_this_size(item))}
    if len(left_out) < len(items):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    else:
        for item, why in left_out.items():
            item.add_marker(pytest.mark.skip(reason=why))
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(_LONG)))


def _not_at_this_size(item: pytest.Item) -> str:
    """The reason not to run a test at this number of ranks; empty without one."""
    for mark in item.iter_markers("ranks"):
        fewest, most, why = mark.args
        if not fewest <= WORLD.size <= most:
            return why
    return ""


def pytest_runtest_logreport(report: Any) -> None:
    """Print the failure of a fixture on ranks above 0: it may have failed on one of them alone.

    ``pytest_collectreport`` prints errors in the collection of tests for the same reason.
    """
    if report.when != "call":
        pytest_collectreport(report)


def pytest_collectreport(report: Any) -> None:
    if WORLD.rank > 0 and report.failed:
        print(f"rank {WORLD.rank}, {report.nodeid}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: Any) -> None:
    if "mpi_library" in metafunc.fixturenames:
        names = metafunc.config.option.mpi.split(",")
        metafunc.parametrize("mpi_library", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def mpi_library(request: Any) -> libraries.Library:
    """An MPI library: that of the environment, or in turn each that ``--mpi`` names."""
    try:
        return libraries.find(request.param)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["native", "plain"])
def group(request: Any) -> Iterator[Communicator]:
    """A Communicator of all ranks, once with exchanges in native code and once without."""
    made = Communicator().ready()
    if request.param == "plain":
        made.link = None
    yield made
    made.free()


@pytest.fixture
def recorded() -> Iterator[Recorder]:
    """A Recorder of the messages of a new Communicator of all ranks."""
    group = Communicator()
    yield Recorder(group)
    group.free()


@pytest.fixture(params=["whole", "in pieces"])
def limit(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the usual limit on the length of one MPI call, and with a limit of 24.

    Longer messages go in pieces. The usual limit is 2**30, since MPI's counts are ints.
    """
    if request.param == "in pieces":
        monkeypatch.setattr(mpi_collectives, "MAX_COUNT", 24)
        monkeypatch.setattr(mpi_collectives, "_WIDENED_PIECE", 5)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """Initialize torch.distributed over MPI for the tests of a module."""
    init_process_group(timeout=timedelta(seconds=60))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., jobs.End]:
    """A function that runs Python as a job: ``run_job("-c", code, ranks=4)``, a ``jobs.End``.

    It starts one process without mpiexec unless ``ranks`` is given. ``launcher`` is the command
    before ``-n``, mpiexec unless it is given. A job runs in this test's ``tmp_path`` unless
    ``folder`` is given. ``jobs.run`` takes all other arguments.
    """

    def run(
        *arguments: str,
        ranks: int = 0,
        launcher: Sequence[str] = (),
        library: libraries.Library | None = None,
        folder: Path = tmp_path,
        variables: Mapping[str, str] | None = None,
        **rest: Any,
    ) -> jobs.End:
        start: list[str] = []
        if ranks:
            mpiexec = library.mpiexec if library else jobs.find_mpiexec()
            if not (launcher or mpiexec):
                pytest.skip("no mpiexec")
            start = [*(launcher or [mpiexec]), "-n", str(ranks)]
        environment = {**jobs.for_jobs(), **(library.variables if library else {}), **(variables or {})}
        return jobs.run([*start, sys.executable, *arguments], folder, variables=environment, **rest)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[None]:
    with together():
        return (yield)
