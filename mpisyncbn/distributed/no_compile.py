"""Decorators that keep torch.compile out of functions and methods, which compiled code may call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType

from torch._C._dynamo.eval_frame import set_eval_frame

__all__ = ["no_compile", "no_compile_methods"]


@contextlib.contextmanager
def no_compile() -> Iterator[None]:
    """Run the body, or as a decorator the function, without compiling it.

    torch.compiler.disable does the same, but imports the compiler. The compiler skips generators
    and contextlib, and so it does not compile this function either.
    """
    before = set_eval_frame(None)
    try:
        yield
    finally:
        set_eval_frame(before)


def no_compile_methods(cls: type) -> type:
    """Decorate the methods of a class with ``no_compile``, and return the class.

    torch calls methods of a process group as if they were written in C++, within compiled
    functions too. The compiler would compile those in Python, and fail at the group's attributes.
    """
    for name, method in list(vars(cls).items()):
        if isinstance(method, FunctionType) and not name.startswith("__"):
            setattr(cls, name, no_compile()(method))
    return cls
