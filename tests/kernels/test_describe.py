"""Descriptions of tensors: keys that find compiled kernels and checked arguments again."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from mpisyncbn import kernels
from mpisyncbn.kernels import native
from support.ranks import no_exchange

pytestmark = no_exchange


@pytest.fixture(params=["native", "python"])
def describe(request: pytest.FixtureRequest) -> Callable[..., object]:
    if request.param == "python":
        return kernels._describe_in_python
    code = native()
    if code is None or not code.use_tensors(torch.Tensor):
        pytest.skip("there is no native code, or torch is older than 2.10")
    return code.describe


def zeros(*shape: int, offset: int = 0, **options: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.zeros(count + offset, **options)[offset:].reshape(shape)


OTHERS = {
    "dtype": lambda: zeros(4, 3, dtype=torch.int32),
    "shape": lambda: zeros(3, 4),
    "dimensions": lambda: zeros(4, 3, 1),
    "strides": lambda: zeros(3, 4).t(),
    "alignment": lambda: zeros(4, 3, offset=1),
    "negation": lambda: zeros(4, 3, dtype=torch.complex64).conj().imag,
    "class": lambda: torch.nn.Parameter(zeros(4, 3)),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_descriptions_of_different_tensors_differ(describe, other):
    found = describe(zeros(4, 3), OTHERS[other]())
    assert None not in (found, describe(zeros(4, 3), zeros(4, 3)))
    assert found != describe(zeros(4, 3), zeros(4, 3))
    assert found == describe(zeros(4, 3), OTHERS[other]())


def test_values_and_addresses_do_not_matter(describe):
    assert describe(zeros(4, 3), None) == describe(torch.randn(4, 3), None)
    assert describe(zeros(4, 3), zeros(3)) != describe(zeros(3), zeros(4, 3))
    assert describe(zeros(0, 3)) == describe(torch.randn(0, 3)) is not None


NO_MEMORY = {
    "sparse": lambda: zeros(4, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([zeros(2), zeros(3)], layout=torch.jagged),
    "zeros without memory": lambda: torch._efficientzerotensor(3),
    "no tensor": lambda: "text",
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_tensors_without_memory_have_none(describe, kind):
    tensor = NO_MEMORY[kind]()
    references = sys.getrefcount(None)
    for _ in range(1000):
        assert describe(zeros(4, 3), tensor) is None
    assert abs(sys.getrefcount(None) - references) < 500
