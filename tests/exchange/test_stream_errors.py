"""Errors that are raised late under the stream transport, and the conditions for its choice."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from mpisyncbn import CollectiveMismatchError, Communicator, MPISyncBNError, exchange
from mpisyncbn.comm import transport
from mpisyncbn.errors import TransportError
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import link
from support.device import GPU
from support.ranks import WORLD, error_of, no_exchange, several
from support.stream_device import needs_standin, pretend_stream, stream_group

pytestmark = [needs_standin, pytest.mark.skipif(GPU, reason="scripts/gpu_check has its own")]
C = 3
CALL = LayerCall("a layer", "forward", C, "float32")
ME = WORLD.rank


@pytest.fixture
def device(monkeypatch):
    return pretend_stream(monkeypatch)


def forward(group, put=np.asarray, call=CALL, count=2):
    mean, m2 = np.arange(C) + ME, np.ones(C)
    if call.dtype == "float64":
        mean = np.stack((mean, np.zeros(C)))
    return exchange.merge_moments(group, call, count, put(mean), put(m2))


def backward(group, put=np.asarray, call=CALL):
    return exchange.reduce_sums(group, call._replace(direction="backward"), put(np.ones(C)), put(np.ones(C)))


def other_eps(group, put=np.asarray):
    return forward(group, put, CALL._replace(eps=1e-3 if ME else 1e-4))


def other_name(group, put=np.asarray):
    return forward(group, put, CALL._replace(layer=f"layer {ME}", dtype="float64"))


def other_order(group, put=np.asarray):
    return backward(group, put) if WORLD.size == ME + 1 else forward(group, put)


def next_exchange(group, put):
    forward(group, put)


def next_of_the_host(group, put):
    backward(group)


def synchronize(group, put):
    group.synchronize()


def collective(group, put):
    with group.collective("a barrier"):
        group.comm.Barrier()


@several
@pytest.mark.parametrize("raises", [next_exchange, next_of_the_host, synchronize, collective])
@pytest.mark.parametrize("wrong", [other_eps, other_name, other_order])
def test_a_mismatch_is_raised_later(wrong, raises, device):
    """Every rank raises the mismatch later, in the host's words. Until then, results are NaN."""
    groups = [stream_group(), stream_group()]
    eager = error_of(lambda: (forward(groups[0]), wrong(groups[0])), CollectiveMismatchError)
    group, right = groups[1], forward(groups[1], device.put)
    found = [*wrong(group, device.put)[-2:], *forward(group, device.put), *backward(group, device.put)]
    device.synchronize()
    failed = group.stream.failed
    late = error_of(lambda: raises(group, device.put), CollectiveMismatchError)
    after, expected = forward(group, device.put), forward(groups[0])
    device.synchronize()
    same = len(set(WORLD.allgather((group.exchanges, groups[0].exchanges)))) == 1
    for each in groups:
        each.free()
    assert np.isfinite(np.concatenate([each.flatten() for each in right])).all()
    assert np.isnan(np.concatenate([each.flatten() for each in found])).all()
    assert failed
    assert "in exchange number 2 of this communicator they made different ones" in str(eager)
    assert str(late) == str(eager)
    assert same
    for ours, theirs in zip(after, expected, strict=True):
        assert ours.numpy().tobytes() == np.asarray(theirs, float).tobytes()


@several
def test_ranks_that_have_enqueued_more_than_others(device):
    """Ranks go on together, even if some had enqueued more exchanges when the error was raised."""
    group = stream_group()
    other_eps(group, device.put)
    for _ in range(3 * ME):
        forward(group, device.put)
    late = error_of(group.synchronize, CollectiveMismatchError)
    after = [*forward(group, device.put), *backward(group)]
    device.synchronize()
    begun = WORLD.allgather((group.exchanges, group.rank_status.calls_begun))
    group.free()
    assert "in exchange number 1 of this communicator they made different ones" in str(late)
    assert after[0].item() == 2 * WORLD.size
    assert after[-1].tolist() == [WORLD.size] * C
    assert len(set(begun)) == 1


def failing_mpi(monkeypatch, function, code):
    """Let MPI fail in the worker while ``on`` of the returned switch is true."""
    switch, original = SimpleNamespace(on=False), link.addresses
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 7)  # the number of MPI_Allgather's arguments
    real = kind(*original(MPI, function))
    switch.function = kind(lambda *given: code if switch.on else real(*given))
    failing = ctypes.cast(switch.function, ctypes.c_void_p).value

    def addresses(mpi, *names):
        found = original(mpi, *names)
        if len(names) == 1:  # this is for the host's own calls
            return found
        return [failing if name == function else each for name, each in zip(names, found, strict=True)]

    monkeypatch.setattr(link, "addresses", addresses)
    return switch


@pytest.mark.parametrize(
    ("dtype", "function", "code", "error"),
    [
        ("float32", "MPI_Allreduce", MPI.ERR_INTERN, MPISyncBNError),
        ("float64", "MPI_Allgather", MPI.ERR_INTERN, MPISyncBNError),
        ("float32", "MPI_Allreduce", MPI.ERR_TRUNCATE, CollectiveMismatchError),
    ],
)
def test_an_error_of_mpi_is_raised_later(dtype, function, code, error, device, monkeypatch):
    switch = failing_mpi(monkeypatch, function, code)
    group, call = stream_group(), CALL._replace(dtype=dtype)
    forward(group, device.put, call)
    group.synchronize()
    switch.on = True
    found = forward(group, device.put, call)
    device.synchronize()
    switch.on = False
    late = error_of(group.synchronize, MPISyncBNError)
    after = forward(group, device.put, call)
    device.synchronize()
    group.free()
    assert np.isnan(np.concatenate([each.flatten() for each in found])).all()
    assert type(late) is error
    if error is MPISyncBNError:
        assert str(late).startswith(
            f"MPI failed in rank {ME} of {WORLD.size}, exchange number 2 of this communicator, {call}: "
        )
        assert late.__cause__.Get_error_code() == code
    assert np.isfinite(np.concatenate([each.flatten() for each in after])).all()


def test_one_value_per_channel_is_refused_later(device):
    group = stream_group()
    found = forward(group, device.put, count=1 if ME == 0 else 0)
    device.synchronize()
    late = error_of(lambda: forward(group, device.put), ValueError)
    after = forward(group, device.put)
    device.synchronize()
    group.free()
    assert np.isnan(np.concatenate([each.flatten() for each in found])).all()
    assert "expected more than 1 value per channel over the whole group when training, got 1" in str(late)
    assert "in layer a layer" in str(late)
    assert after[0].item() == 2 * WORLD.size


def test_the_first_error_is_the_one_that_is_raised(device, monkeypatch):
    """Later errors follow from the first. A group can be freed after its error is raised."""
    switch = failing_mpi(monkeypatch, "MPI_Allreduce", MPI.ERR_INTERN)
    group = stream_group()
    switch.on = True
    for name in ("first", "second"):
        forward(group, device.put, CALL._replace(layer=name))
    late = error_of(group.synchronize, MPISyncBNError)
    again = error_of(group.synchronize, MPISyncBNError)
    switch.on = False
    group.free()
    assert "exchange number 1 of this communicator, forward of first" in str(late)
    assert again is None


def refused_or_host(monkeypatch, **mpi):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "stream")
    fake = SimpleNamespace(**{name: getattr(MPI, name) for name in dir(MPI) if not name.startswith("__")})
    fake.__file__ = MPI.__file__
    vars(fake).update(mpi)
    return transport.chosen(fake)


@no_exchange
def test_it_needs_a_thread_that_calls_mpi(device, monkeypatch):
    with pytest.raises(TransportError, match=r"MPI provides thread level 2 .*: ask for MPI.THREAD_MULTIPLE"):
        refused_or_host(monkeypatch, Query_thread=lambda: MPI.THREAD_SERIALIZED)


@no_exchange
def test_it_needs_the_native_code(device, monkeypatch):
    monkeypatch.setattr(transport, "native", lambda: None)
    with pytest.raises(TransportError, match="needs the native code, which was not built"):
        refused_or_host(monkeypatch)


@no_exchange
@pytest.mark.parametrize(
    ("driver", "words"),
    [("libnothere.so", "libnothere.so"), ("libm.so.6", "libm.so.6 has no cuMemHostAlloc")],
)
def test_a_machine_without_the_driver_has_the_host_transport(driver, words, device, monkeypatch):
    monkeypatch.setattr(link, "CUDA_DRIVER", driver)
    found, reason = refused_or_host(monkeypatch)
    assert found == "host"
    assert "CUDA's driver cannot be used here: " in reason
    assert words in reason


@no_exchange
def test_a_device_without_memory_operations_has_the_host_transport(device, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_STANDIN_WITHOUT", "stream_memory_operations")
    with pytest.warns(RuntimeWarning, match="no stream memory operations .*: messages go by the host"):
        found, reason = refused_or_host(monkeypatch)
    assert (found, "stream memory operations" in reason) == ("host", True)


@several
def test_ranks_that_differ_agree_on_host(device, monkeypatch):
    if ME == 0:
        monkeypatch.setenv("MPISYNCBN_TRANSPORT", "host")
    group = Communicator().ready()
    found = forward(group, device.put)
    agreed = WORLD.allgather((group.transport, group.stream))
    group.free()
    assert agreed == [("host", None)] * WORLD.size
    assert found[0] == 2 * WORLD.size
