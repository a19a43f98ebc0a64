"""CuPy arrays in the emulated device memory of fake_cupy.py, also with an MPI that can read it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpisyncbn import functional, kernels
from mpisyncbn.batch_stats import BatchStats
from mpisyncbn.comm import staging, streams, transport
from mpisyncbn.comm.communicator import Communicator
from mpisyncbn.errors import CollectiveMismatchError, MPISyncBNError
from mpisyncbn.kernels import generic
from support import fake_cupy
from support.oracle import bits_equal_on_all_ranks, distance, oracle, shard
from support.ranks import WORLD, several

AWARE, WHY = transport._is_aware(MPI, "cuda")
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="this stand-in for CuPy is for machines without a GPU"
    ),
    pytest.mark.skipif(
        not fake_cupy.SHARED and not shutil.which(fake_cupy.COMPILER[0]),
        reason=f"no C compiler {fake_cupy.COMPILER[0]} for mock_cuda.c",
    ),
]
needs_device_messages = pytest.mark.skipif(
    not (fake_cupy.SHARED and AWARE),
    reason=f"{MPI.get_vendor()[0]} does not take pointers to the memory of mock_cuda.c: "
    + (WHY if fake_cupy.SHARED else "I_MPI_OFFLOAD_CUDA_LIBRARY is not set"),
)


@pytest.fixture(scope="module")
def cupy(tmp_path_factory):
    with fake_cupy.installed(tmp_path_factory.mktemp("cuda")) as module:
        yield module


@pytest.fixture
def group(cupy, monkeypatch):
    # A CUDA-aware MPI that does not know this emulated memory must not get pointers to it.
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "auto" if fake_cupy.SHARED or not AWARE else "host")
    group = Communicator().ready()
    yield group
    group.free()


def there(tensor):
    import cupy

    return None if tensor is None else cupy.asarray(tensor.numpy())


def back(array):
    return torch.from_numpy(array.get())


def run(group, x, dy, weight=None, bias=None):
    """Run forward and backward on the device. Return torch tensors, and the count."""
    x, dy, weight, bias = map(there, (x, dy, weight, bias))
    assert kernels.kernels_for(x) is generic
    y, stats = functional.batch_norm_forward(x, weight, bias, process_group=group)
    gradients = functional.batch_norm_backward(dy, x, stats, weight, process_group=group)
    for result in (y, *stats[:3], *gradients):
        assert type(result) is type(x)
    assert y.dtype == gradients[0].dtype == x.dtype
    return *map(back, (y, *stats[:3], *gradients)), stats.count


DTYPES = [torch.float16, torch.float32, torch.float64]
MIXED = (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "affine"), [(d, affine) for d in DTYPES for affine in (d, None)] + [MIXED], ids=str
)
@pytest.mark.parametrize("shape", [(3,), (4, 7), (5, 4, 6)], ids=str)
def test_uneven_batches(group, shape, dtype, affine):
    x, dy = (shard((2 + WORLD.rank, *shape), seed, 2.0, dtype) for seed in (1, 2))
    parameters = None, None
    if affine is not None:
        parameters = torch.arange(1, shape[0] + 1).to(affine), torch.ones(shape[0], dtype=affine)
    y, mean, var, invstd, dx, dweight, dbias, count = run(group, x, dy, *parameters)
    expected = oracle(x, dy, *parameters)
    sums = WORLD.allreduce(torch.stack([dweight, dbias]))
    same = [bits_equal_on_all_ranks(v) for v in (mean, var, invstd)]
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    rounded = max(exact, torch.finfo(dtype).eps)
    assert all(same)
    assert count == expected.count
    assert mean.dtype == var.dtype == invstd.dtype == dweight.dtype == dbias.dtype == torch.float64
    assert distance(var, expected.var) < exact
    assert distance(mean, expected.mean, expected.var.sqrt()) < exact
    assert distance(y, expected.y) < rounded
    assert distance(dx, expected.dx, dy / expected.var.sqrt().min()) < 10 * rounded
    assert distance(sums[0], expected.dweight, dy.double().abs().sum()) < exact
    assert distance(sums[1], expected.dbias, dy.double().abs().sum()) < exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(group, dtype):
    mask = shard((3 + WORLD.rank, 1, 6), 5) < 0
    x, dy = (shard((3 + WORLD.rank, 4, 6), seed, 2.0, dtype).masked_fill(~mask, np.nan) for seed in (1, 2))
    y, stats = functional.batch_norm_forward(there(x), mask=there(mask), process_group=group)
    dx, *_ = functional.batch_norm_backward(there(dy), there(x), stats, mask=there(mask), process_group=group)
    true, dtrue, y_true, dx_true = (v.movedim(1, -1)[mask[:, 0]] for v in (x, dy, back(y), back(dx)))
    expected = oracle(true, dtrue)
    assert stats.count == expected.count
    assert distance(y_true, expected.y) < max(1e-6, torch.finfo(dtype).eps)
    assert distance(dx_true, expected.dx, expected.dx_scale) < max(1e-5, torch.finfo(dtype).eps * 4)
    assert not any(back(each).masked_fill(mask, 0).any() for each in (y, dx))
    with pytest.raises(TypeError, match="expected mask to be"):
        functional.batch_norm_forward(there(x), mask=mask, process_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_batches(group, dtype):
    """Only ranks with an even number have data."""
    n = 5 if WORLD.rank % 2 == 0 else 0
    x, dy = shard((n, 3, 4), 1, dtype=dtype), shard((n, 3, 4), 2, dtype=dtype)
    y, _, var, _, dx, dweight, dbias, count = run(group, x, dy)
    expected = oracle(x, dy)
    assert count == expected.count
    assert distance(var, expected.var) < 1e-6
    assert distance(y, expected.y) < 1e-6
    assert distance(dx, expected.dx) < 1e-5
    assert n or not (dweight.any() or dbias.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_rank_has_data(group, cupy, dtype):
    x = torch.zeros(0, 3, 4, dtype=dtype)
    y, mean, var, _, dx, _, _, count = run(group, x, x)
    running = cupy.asarray(np.ones(3)), cupy.asarray(np.ones(3))
    stats = BatchStats(there(mean), there(var), None, count)
    updated = functional.update_running_stats(*running, stats, 0.5)
    assert not updated
    assert count == 0
    assert y.shape == dx.shape == x.shape
    assert (running[0].get() == 1).all()
    assert (running[1].get() == 1).all()


def test_eps_zero_and_a_constant_channel(group, cupy):
    x = cupy.asarray(np.full((3 + WORLD.rank, 2, 5), 0.1, "f4"))
    y, stats = functional.batch_norm_forward(x, eps=0.0, process_group=group)
    dx, *_ = functional.batch_norm_backward(x, x, stats, process_group=group)
    assert not y.get().any()
    assert not dx.get().any()


@needs_device_messages
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mpi_copies_from_the_device(group, dtype):
    before = fake_cupy.calls("cuMemcpyAsync")
    x = shard((2 + WORLD.rank, 3, 5), 1, dtype=dtype)
    run(group, x, x)
    copies = fake_cupy.calls("cuMemcpyAsync") - before
    assert group.transport == "device"
    assert copies > 0 or WORLD.size == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_some_ranks_have_their_data_in_host_memory(group, dtype):
    x, dy = (shard((2 + WORLD.rank, 3, 5), seed, 2.0, dtype) for seed in (1, 2))
    if WORLD.rank == 0:
        y, stats = functional.batch_norm_forward(x, process_group=group)
        dx, *_ = functional.batch_norm_backward(dy, x, stats, process_group=group)
        mean = stats.mean
    else:
        y, mean, _, _, dx, *_ = run(group, x, dy)
    expected, same = oracle(x, dy), bits_equal_on_all_ranks(mean)
    assert same
    assert distance(y, expected.y) < 1e-6
    assert distance(dx, expected.dx) < 1e-5


@several
def test_ranks_in_different_calls(group, cupy):
    x, vectors = cupy.zeros((2, 3), "f4"), [cupy.zeros(3)] * 3
    arguments = (x,) if WORLD.rank == 0 else (x, x, BatchStats(*vectors, 4))
    called = functional.batch_norm_forward if WORLD.rank == 0 else functional.batch_norm_backward
    with pytest.raises(CollectiveMismatchError, match="to make the same call"):
        called(*arguments, process_group=group)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # about values that are not finite
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("ours", ["device", "host"])
@pytest.mark.parametrize("batch", ["device", "host"])
def test_running_statistics(cupy, batch, ours, dtype):
    """Running statistics may be on the device or on the host, and so may those of the batch."""
    kinds = {"host": np.array, "device": cupy.asarray}
    running = [kinds[ours](np.full(2, start, dtype)) for start in (0, 1)]
    seen = []
    for var in (8.0, np.nan, np.inf, 1e309 if dtype == "f8" else 1e39):  # all but the first are kept out
        moments = np.array([1.0, -2.0]), np.array([4.0, var])
        stats = BatchStats(*map(kinds[batch], moments), kinds[batch](np.ones(2)), 5)
        seen.append(bool(functional.update_running_stats(*running, stats, 0.25)))
    assert seen == [True, False, False, False]
    assert running[0].dtype == running[1].dtype == dtype
    found = [(each.get() if ours == "device" else each).tolist() for each in running]
    assert found == [[0.25, -0.5], [2.0, 3.25]]


class Hasty(streams.CuPyStreams):
    """Streams that do not wait for copies."""

    def wait_for(self, stream):
        pass


DRIVERS = pytest.mark.parametrize("driver", [streams.CuPyStreams, Hasty])


@DRIVERS
def test_staged_to_the_host(cupy, driver):
    stage, numbers = staging.StagingBuffers(driver(cupy.cuda.Device(0))), np.random.default_rng(0)
    right = []
    for length in (3, 1000, 1, 70):
        vectors = [numbers.normal(size=length) for _ in range(3)]
        found = stage.to_host([cupy.asarray(vector) for vector in vectors])
        right.append(np.array_equal(found, vectors))
    assert all(right) if driver is streams.CuPyStreams else not any(right)


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_staged_to_the_host_in_float64(cupy, dtype):
    stage = staging.StagingBuffers(streams.CuPyStreams(cupy.cuda.Device(0)))
    values = np.arange(5, dtype=dtype)
    strided = cupy.asarray(np.arange(10, dtype=dtype))[::2]
    found = stage.to_host([cupy.asarray(values), strided])
    assert found[0].dtype == found[1].dtype == np.float64
    assert np.array_equal(found, [values, 2 * values])


@DRIVERS
def test_staged_to_the_device_and_not_waited_for(cupy, driver):
    """There are more copies than buffers, and no buffer is filled again before it was read."""
    stage, numbers = staging.StagingBuffers(driver(cupy.cuda.Device(0))), np.random.default_rng(0)
    vectors = [numbers.normal(size=(2, length)) for length in (3, 600, 1, 70, 2000) * 10]
    uploaded = [stage.to_device(list(rows)) for rows in vectors]
    right = [
        np.array_equal([row.get() for row in found], rows)
        for found, rows in zip(uploaded, vectors, strict=True)
    ]
    assert all(right) if driver is streams.CuPyStreams else not all(right)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_message_is_whole_when_mpi_gets_it(cupy, monkeypatch, waiting):
    if not waiting:
        monkeypatch.setattr(cupy.cuda.Stream, "synchronize", lambda self: None)
    message = staging.DeviceMessage(MPI, 1, 5, cupy.zeros(2))
    message.pack(np.array([1.0, 2.0, 3.0]), [cupy.asarray(np.array([4.0])), cupy.asarray(np.array([5.0]))])
    seen = message.values._now().copy()  # as MPI reads it, which knows of no queue
    assert np.array_equal(seen, [1, 2, 3, 4, 5]) is waiting


def test_no_graph_is_captured(cupy, monkeypatch):
    monkeypatch.setattr(cupy.Stream, "is_capturing", lambda self: True)
    with pytest.raises(
        MPISyncBNError, match=r"cannot be captured in a CUDA graph.* or set MPISYNCBN_TRANSPORT=stream"
    ):
        transport.to_host(cupy.zeros(3))


def test_the_stand_in_has_the_refusals_of_cupy(cupy):
    ours, theirs = cupy.zeros((2, 3)), np.zeros((2, 3))
    for refused, error in (
        (lambda: ours + theirs, TypeError),
        (lambda: theirs + ours, TypeError),
        (lambda: np.asarray(ours), TypeError),
        (lambda: np.stack((ours, theirs)), TypeError),
        (lambda: cupy.concatenate((ours, theirs)), TypeError),
        (lambda: ours.set(theirs.astype("f4")), TypeError),
        (lambda: ours.get(out=theirs.astype("f4")), TypeError),
        (lambda: hash(ours.device), TypeError),
        (lambda: ours.set(theirs[0]), ValueError),
        (lambda: ours.get(out=theirs[0]), ValueError),
        (lambda: ours.__setitem__(0, theirs[0]), ValueError),
    ):
        with pytest.raises(error):
            refused()
