"""The stub of the native extension agrees with the extension."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpisyncbn.kernels import native
from support.ranks import no_exchange

pytestmark = [
    no_exchange,
    pytest.mark.skipif(native() is None, reason="the native kernels were not built"),
]


def of_stub(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Yield each public name of the stub, with its number of parameters and its return type."""
    for each in body:
        if isinstance(each, ast.ClassDef):
            members = dict(of_stub(each.body))
            attributes = {n.target.id for n in each.body if isinstance(n, ast.AnnAssign)}
            yield each.name, members | dict.fromkeys(attributes, "Final[property]")
        elif isinstance(each, ast.FunctionDef) and [ast.unparse(d) for d in each.decorator_list] == [
            "property"
        ]:
            yield each.name, "Final[property]"
        elif isinstance(each, ast.FunctionDef):
            given = each.args
            assert ast.unparse(given).endswith("/") or not given.posonlyargs, "nanobind's are positional only"
            returned = "" if each.returns is None else ast.unparse(each.returns)
            yield each.name, (len(given.posonlyargs), returned.replace("_Outcome", "int"))
        elif isinstance(each, ast.AnnAssign):
            yield ast.unparse(each.target), ast.unparse(each.annotation)


def of_extension(owner: Any) -> Iterator[tuple[str, Any]]:
    for name, each in vars(owner).items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(each, type):
            yield name, dict(of_extension(each))
        elif callable(each):
            parameters, returned = re.fullmatch(r"\w+\((.*)\) -> (.*)", each.__doc__).groups()
            yield name, (len(re.findall(r"\b(?:self|arg\d*)\b", parameters)), returned)
        else:
            yield name, f"Final[{type(each).__name__}]"


def test_the_stub_matches_the_native_module() -> None:
    from mpisyncbn.kernels.cpu import _cpu

    stub = ast.parse(Path(_cpu.__file__).with_name("_cpu.pyi").read_text())
    assert dict(of_stub(stub.body)) == dict(of_extension(_cpu))
