"""Exchanges in native code have the same messages, bits and errors as those in Python."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from mpi4py import MPI

from mpisyncbn import exchange, kernels
from mpisyncbn.comm.communicator import Communicator
from mpisyncbn.errors import CollectiveMismatchError, MPISyncBNError
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import link
from support.ranks import WORLD

pytestmark = pytest.mark.skipif(kernels.native() is None, reason="the native kernels were not built")
ALLREDUCE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 3
)
CALL = LayerCall("a layer", "forward", 3, "float32")


def fake_allreduce(code, messages):
    """Return an MPI_Allreduce for one rank, which records its arguments and returns ``code``."""

    def allreduce(in_place, message, length, *handles):
        messages.append((in_place, ctypes.cast(message, ctypes.POINTER(ctypes.c_double))[:length], handles))
        return code

    return ALLREDUCE(allreduce)


def test_native_code_sends_the_same_message():
    messages = []
    function = fake_allreduce(0, messages)
    address = ctypes.cast(function, ctypes.c_void_p).value
    mean, m2, merged = np.array([1.0, 2.0, -3.0]), np.array([4.0, 5.0, 6.0]), np.empty((2, 3))
    for int_handles in (True, False):
        link = kernels.native().Link(address, 11, 12, 13, 99, int_handles, 1)
        assert link.sum_moments(5, 7, mean, m2, merged) == (0, 7, False, False)
        assert np.allclose(merged, [mean, m2 / 7])
        assert link.sum_vectors(5, mean, m2, merged) == 0
        assert merged.tolist() == [mean.tolist(), m2.tolist()]
    bodies = [[7, *(7 * mean), *(m2 + 7 * mean**2)], [0, *mean, *m2]] * 2
    # in the order of MPI: datatype, operation, communicator
    assert messages == [(99, [5, 25, *body], (12, 13, 11)) for body in bodies]


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (MPI.ERR_INTERN, MPISyncBNError, "MPI failed in rank"),
        (MPI.ERR_TRUNCATE, CollectiveMismatchError, "but in exchange"),
    ],
)
def test_an_error_in_native_code(code, error, match):
    group = Communicator().ready()
    function = fake_allreduce(code, [])
    address = ctypes.cast(function, ctypes.c_void_p).value
    group.link = kernels.native().Link(address, 0, 0, 0, 0, False, group.size)
    for exchanging in (
        lambda: exchange.merge_moments(group, CALL, 7, np.ones(3), np.ones(3)),
        lambda: exchange.reduce_sums(group, CALL, np.ones(3), np.ones(3)),
    ):
        with pytest.raises(error, match=match):
            exchanging()
    group.free()


@pytest.mark.parametrize("channels", [1, 3, 64, 1000])
def test_native_code_gives_the_same_bits(channels, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "host")  # native exchanges need messages in host memory
    native, plain = Communicator().ready(), Communicator().ready()
    assert native.link is not None
    plain.link = None
    rng = np.random.default_rng(WORLD.rank)
    for scale in (0.0, 1.0, 1e8, np.inf):
        with np.errstate(all="ignore"):
            mean, m2, count = rng.normal(scale, 1, channels), rng.random(channels) * 100, 5 * WORLD.rank
            mean, m2 = mean * (count > 0), m2 * (count > 0)
            both = [exchange.merge_moments(group, CALL, count, mean, m2) for group in (native, plain)]
            sums = [exchange.reduce_sums(group, CALL, mean, m2) for group in (native, plain)]
        assert both[0][0] == both[1][0]
        for ours, theirs in ((both[0][1:], both[1][1:]), sums):
            assert np.array_equal(ours, theirs, equal_nan=True)
    native.free()
    plain.free()


def test_no_rank_uses_native_code_if_one_lacks_it(monkeypatch):
    if WORLD.rank == 0:
        monkeypatch.setattr(link, "native", lambda: None)
    group = Communicator().ready()
    assert group.link is None
    group.free()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1.0, 2.0**60])
def test_a_sum_that_is_no_fingerprint_is_a_mismatch(garbage):
    def allreduce(in_place, message, *_):
        ctypes.cast(message, ctypes.POINTER(ctypes.c_double))[0] = garbage
        return 0

    function = ALLREDUCE(allreduce)
    link = kernels.native().Link(ctypes.cast(function, ctypes.c_void_p).value, 0, 0, 0, 0, False, 1)
    assert link.sum_vectors(5, np.ones(2), np.ones(2), np.empty((2, 2))) == -1
