"""Fingerprints of calls: their sums tell whether all ranks are in the same one."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpisyncbn import CollectiveMismatchError
from mpisyncbn import fingerprint as fingerprints
from mpisyncbn.fingerprint import LayerCall, check, fingerprint
from support.ranks import no_exchange

pytestmark = no_exchange
LARGEST = 2**18 - 1
CALL = LayerCall("a layer", "forward", 3, "float32")


def agree(size, sum_h, sum_hh):
    group = SimpleNamespace(size=size)
    with patch.object(fingerprints, "mismatch", side_effect=CollectiveMismatchError):
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
        *(CALL._replace(**{name: other}) for name, other in zip(LayerCall._fields, others, strict=True)),
    ]
    assert len({fingerprint(call, 1) for call in calls}) == 6
