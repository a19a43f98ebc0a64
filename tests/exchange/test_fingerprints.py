"""Fingerprints of calls: their sums tell whether all ranks are in the same one."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mpisyncbn import CollectiveMismatchError, SyncBatchNorm, diagnostics
from mpisyncbn.diagnostics import Call, check, fingerprint
from support.oracle import local_batch, shard
from support.ranks import WORLD

LARGEST = 2**18 - 1
CALL = Call("a layer", "forward", 3, "float32")


def agree(size, sum_h, sum_hh):
    group = SimpleNamespace(size=size)
    with patch.object(diagnostics, "mismatch", side_effect=CollectiveMismatchError):
        try:
            check(group, sum_h, sum_hh, CALL)
        except CollectiveMismatchError:
            return False
    return True


@given(
    st.lists(st.integers(0, LARGEST), min_size=1, max_size=40)
    | st.integers(0, LARGEST).map(lambda h: [h] * 9)
)
def test_the_sums_tell_whether_all_are_equal(values):
    h = np.array(values, float)
    assert agree(len(h), h.sum(), (h * h).sum()) == (len(set(values)) == 1)


@given(st.integers(1, 131072), st.integers(0, 131072), st.integers(0, LARGEST), st.integers(0, LARGEST))
@example(131072, 1, LARGEST, LARGEST - 1)
@example(131072, 131071, LARGEST, LARGEST - 1)
@example(131072, 0, LARGEST, 0)
def test_one_rank_of_many_is_noticed(size, others, h, other):
    others = min(others, size)
    sum_h = (size - others) * h + others * other
    sum_hh = (size - others) * h**2 + others * other**2
    assert (float(sum_h), float(sum_hh)) == (sum_h, sum_hh), "float64 holds the sums exactly"
    assert agree(size, float(sum_h), float(sum_hh)) == (h == other or others in (0, size))


@pytest.mark.parametrize("sums", [(np.nan, 1.0), (1.0, np.inf), (np.nan, np.nan)])
def test_sums_that_are_not_finite_are_a_mismatch(sums):
    assert not agree(2, *sums)


@given(st.integers(0, 2**40), st.integers(1, LARGEST))
def test_fingerprints_are_18_bits_and_tell_exchanges_apart(exchanges, later):
    one, other = fingerprint(CALL, exchanges), fingerprint(CALL, exchanges + later)
    assert 0 <= one <= LARGEST
    assert one != other


def test_no_two_exchanges_look_alike_for_a_long_time():
    assert len({fingerprint(CALL, number) for number in range(2**18)}) == 2**18


def test_every_field_of_a_call_counts():
    others = ["another layer", "backward", 4, "float64", 1e-3]
    calls = [
        CALL,
        *(CALL._replace(**{name: other}) for name, other in zip(Call._fields, others, strict=True)),
    ]
    assert len({fingerprint(call, 1) for call in calls}) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_message_is_signed(dtype, recorded):
    layer = SyncBatchNorm(3, process_group=recorded.group, dtype=dtype)
    x = shard((local_batch(), 3, 2), dtype=dtype).requires_grad_()
    layer(x).pow(3).sum().backward()
    first_order = len(recorded.messages)
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    signatures = [tuple(message[:2]) for _, message in recorded.messages]
    same = len(set(WORLD.allgather(tuple(signatures)))) == 1
    assert first_order == 2
    assert len(signatures) > 4
    assert same
    assert len(set(signatures)) == len(signatures)
    for h, square in signatures:
        assert h == int(h)
        assert 0 <= h <= LARGEST
        assert square == h * h
