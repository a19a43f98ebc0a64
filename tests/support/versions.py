"""Marks for tests that need certain versions of torch, see docs/reference/versions.md."""

from __future__ import annotations

import pytest
import torch

from mpisyncbn import torch_versions


def newer_than_2_6(what: str) -> pytest.MarkDecorator:
    """A mark that skips a test with torch 2.6 or older, because "torch 2.6" ``what``."""
    return pytest.mark.skipif(torch.__version__ < "2.7", reason=f"torch 2.6 {what}")


compiles = pytest.mark.skipif(
    not torch_versions.COMPILES, reason="before torch 2.11 the compiler refuses synchronized layers"
)
# The marks of files whose tests compile: torch's compiler starts afresh, and may warn about itself.
compiler_tests = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch"),
]
before_2_15 = pytest.mark.skipif(
    torch.__version__ >= "2.15", reason="torch 2.15 records detach as alias, which keeps the history"
)
since_2_12 = pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="before torch 2.12 a graph in evaluation reads the newer statistics in its backward, and says so",
)
