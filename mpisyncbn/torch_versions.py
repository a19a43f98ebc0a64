"""The differences between versions of torch, from 2.6 on, in one place.

Remove a line when its version of torch is no longer supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch

from .errors import MPISyncBNError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = [
    "COMPILES",
    "CPP_KEEPS_WORKS",
    "HOST_TAKES_PART",
    "STORE_BY_LIBUV",
    "constant_when_compiled",
    "is_async",
    "is_exporting",
    "keep_flight_recorder_off",
    "refuse_to_compile",
    "shut_down_groups_of",
    "untraced",
    "work_of_cpp",
]

Function = TypeVar("Function", bound=Callable[..., object])

_VERSION = torch.__version__

# Torch 2.10 and older count the tensors that order the exchanges among those that a graph saves for
# its backward pass, and refuse that pass once another graph has made an exchange.
COMPILES = _VERSION >= "2.11"

# Torch 2.6 keeps a Work that it has from Python without its Python methods, and waits for ever.
CPP_KEEPS_WORKS = _VERSION >= "2.7"

# Torch 2.6 takes no socket for a store by libuv, 2.13 does. Between them the older store does.
STORE_BY_LIBUV = _VERSION >= "2.13"

# Torch 2.7 and older have no such tag. They compile no layer either.
HOST_TAKES_PART = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

# Torch 2.6 does not distinguish export from compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def untraced(function: Function) -> Function:
    """Keep torch.compile out of a function and all that it calls.

    The compiler looks at every function that is called while compiled code runs. It may refuse a
    caller and then compile a part of this library that is not made for it. torch.compiler.disable
    would import the compiler, which takes as long as importing torch.
    """
    if COMPILES:
        compiler = torch._C._dynamo.eval_frame
        skip = compiler._FrameAction.SKIP
        compiler.set_code_exec_strategy(function.__code__, compiler._FrameExecStrategy(skip, skip))
    return function


def work_of_cpp(future: torch.futures.Future[object]) -> Work:
    """Return a Work that is done when ``future`` is, without a Python half: for torch 2.6."""
    from torch._C import _distributed_c10d

    return _distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]


def is_async(options: object) -> bool:
    """Whether the caller of a collective goes on while it runs.

    Some options of torch 2.7 and older do not say so. Those collectives run on the thread of their
    group, and a caller that is not to go on waits.
    """
    return getattr(options, "asyncOp", True)


def shut_down_groups_of(cls: type[ProcessGroup]) -> None:
    """Let ``destroy_process_group`` shut down groups of ``cls``: torch 2.6 only does NCCL's."""
    from torch.distributed import distributed_c10d

    theirs = getattr(distributed_c10d, "_shutdown_backend", None)
    if theirs is None:
        return

    def shut_down(group: ProcessGroup) -> None:
        if isinstance(group, cls):
            group.shutdown()
        else:
            theirs(group)

    distributed_c10d._shutdown_backend = shut_down  # type: ignore[attr-defined]


def keep_flight_recorder_off(backend: str) -> None:
    """Keep torch's flight recorder off the groups of a backend whose groups are in Python.

    Torch 2.15 attaches it to each new group, and fails for want of the group's C++ backend.
    """
    from torch.distributed import distributed_c10d

    left_alone: set[str] = getattr(distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set())
    left_alone.add(backend)


def constant_when_compiled(function: Function) -> Function:
    """Let torch.compile call a function while it traces, and take the result for a constant.

    torch.compiler.assume_constant_result does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # else not called: the compiler traces no code that names neither torch nor tensors
def refuse_to_compile() -> NoReturn:
    """Raise MPISyncBNError: this torch cannot compile a synchronized layer that trains."""
    from torch._dynamo.exc import Unsupported  # the compiler passes on its own errors unchanged

    class CompilerError(MPISyncBNError, Unsupported):
        pass

    raise CompilerError(
        "expected torch 2.11 or newer to compile a synchronized layer that trains, got torch "
        f"{_VERSION}: upgrade torch, or leave these layers out of the graph: "
        "SyncBatchNorm.forward = torch.compiler.disable(SyncBatchNorm.forward)"
    )
