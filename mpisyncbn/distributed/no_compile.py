"""What torch.compile may call, and not look into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType

from torch._C._dynamo.eval_frame import set_eval_frame

__all__ = ["no_compile", "no_compile_methods"]


@contextlib.contextmanager
def no_compile() -> Iterator[None]:
    """Also a decorator: Python inside runs as it is.

    torch.compiler.disable does the same, but imports the compiler, which takes a second. The
    compiler passes over generators and contextlib, so that it does not look into this either.
    """
    before = set_eval_frame(None)
    try:
        yield
    finally:
        set_eval_frame(before)


def no_compile_methods(cls: type) -> type:
    """Make the methods of a class no_compile.

    torch calls them as those of a class in C++, also amid what is compiled; the compiler would
    compile Python that it finds there, and fails at attributes of a process group.
    """
    for name, method in list(vars(cls).items()):
        if isinstance(method, FunctionType) and not name.startswith("__"):
            setattr(cls, name, no_compile()(method))
    return cls
