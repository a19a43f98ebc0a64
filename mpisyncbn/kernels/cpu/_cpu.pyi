# The native extension, made of module.cpp. Importing it fails if it was not built.
#
# Parameters are positional only. Each docstring names the arrays that a function fills or changes;
# it only reads all others. A function "refuses" arrays of a kind, a dtype or a layout in memory
# that native code does not read: it fills nothing then, and the caller may copy them.

from collections.abc import Callable, Sequence
from typing import Final

from numpy import float64
from numpy.typing import NDArray

from ..protocol import Array, Vector

most_dimensions: Final[int]  # of an array

class Link:
    """Exchanges over one communicator. Callers hold the communicator's lock."""

    def __init__(
        self,
        allreduce: int,
        comm: int,
        datatype: int,
        op: int,
        in_place: int,
        int_handles: bool,
        size: int,
        /,
    ) -> None:
        """Take the address of ``MPI_Allreduce``, and MPI's handles (int or pointer) as numbers."""

    def sum_moments(
        self, h: int, count: int, mean: Vector, m2: Vector, merged: NDArray[float64], /
    ) -> tuple[int, int, bool, bool]:
        """Fill ``merged``, (2, C), with mean and variance of the group. Collective.

        Returns the problem, the count of the group, whether some variance has lost digits by
        cancellation, and whether a rank has an M2 that was absorbed by its sum of squares. The
        problem is 0 for none, -1 if the ranks sent different ``h``, else MPI's error code.
        """

    def sum_vectors(self, h: int, a: Vector, b: Vector, totals: NDArray[float64], /) -> int:
        """Fill ``totals``, (2, C), with sums over the ranks of ``a`` and ``b``. Collective.

        Returns the problem, as ``sum_moments`` does.
        """

# 0: refused. 1: done. 2: done, except for channels with values that float32 cannot compute with.
_Outcome = int

def local_moments(
    x: Array, mask: Array | None, out: NDArray[float64], threads: int, /
) -> tuple[_Outcome, int]:
    """Fill ``out``, (3, C), with the mean in two parts and M2.

    For other dtypes than float64 the first row is the whole mean. Returns the outcome, and the
    number of values per channel where the mask is true. 0 threads stand for as many as OpenMP has.
    """

def normalize(
    x: Array,
    mean: Vector,
    invstd: Vector,
    weight: Array | None,
    bias: Array | None,
    mask: Array | None,
    residual: Array | None,
    y: Array,
    kind: int,
    parameter: float,
    threads: int,
    /,
) -> _Outcome:
    """Fill ``y``, with 0 where the mask is false."""

def backward_reduce(
    dy: Array,
    x: Array,
    mean: Vector,
    invstd: Vector,
    weight: Array | None,
    bias: Array | None,
    mask: Array | None,
    y: Array | None,
    residual: Array | None,
    dz: Array | None,
    kind: int,
    parameter: float,
    undo: bool,
    out: NDArray[float64],
    threads: int,
    /,
) -> _Outcome:
    """Fill ``out``, (2, C), with the sums of ``dz`` and ``dz * (x - mean)``.

    Fills ``dz`` too if it is given, as it must be with ``y`` or ``residual``. If ``undo``, ``x`` is
    the output of the activation, whose input is computed from it first.
    """

def backward_elementwise(
    dz: Array,
    x: Array,
    mean: Vector,
    invstd: Vector,
    weight: Array | None,
    bias: Array | None,
    mean_dy: Vector,
    mean_dy_xmu: Vector,
    mask: Array | None,
    dx: Array,
    kind: int,
    parameter: float,
    undo: bool,
    threads: int,
    /,
) -> _Outcome:
    """Fill ``dx``. ``dz`` is still the gradient of the activation's output.

    ``undo`` is as in ``backward_reduce``.
    """

def update_running_stats(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Array | None,
    record_change: Callable[[tuple[Array, Array]], object] | None,
    mean: Vector,
    var: Vector,
    to_unbiased: float,
    momentum: float,
    /,
) -> bool:
    """Move the running statistics towards a batch's, and count the batch, or change nothing.

    The variance of the batch is ``var * to_unbiased``. Returns False if it refuses the arrays, or
    if a value is not finite in their dtype. ``record_change`` tells autograd of the change.
    """

def invstd(var: Vector, eps: float, out: Vector, /) -> None:
    """Fill ``out`` with ``1 / sqrt(var + eps)``."""

def passes_fast_check(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    /,
) -> bool:
    """Whether the vectors fit ``x`` as they usually do. If not, they may still be right."""

def install_finalize_hook(
    functions: Sequence[int],
    comm_self: int,
    comm_world: int,
    byte: int,
    any_source: int,
    int_handles: bool,
    /,
) -> bool:
    """Have MPI_Finalize wait for the departing groups first. Returns whether MPI accepted the hook.

    ``functions`` are the addresses of MPI's Comm_create_keyval, Comm_set_attr, Issend, Improbe,
    Mrecv, Ibarrier, Test and Abort.
    """

def add_departing_group(
    comm: int, rank: int, exchanges: int, timeout: float, hostnames: Sequence[str], /
) -> None:
    """Add a group that this rank departs from in MPI_Finalize. 0 seconds stand for no timeout."""

def instruction_set() -> str:
    """The name of the instruction set that the loops use."""

def threads() -> int:
    """How many threads OpenMP would use; 1 without OpenMP."""

# The next three functions are for tests.

def set_highest_level(level: int, /) -> None:
    """Use no instruction set above ``level``, from 0 to 3, even if the processor has it."""

def stream_from(size: int, /) -> None:
    """Write output of at least ``size`` bytes past the cache."""

def streamed_values() -> int:
    """How many values were written past the cache since the last call."""

def use_tensors(tensor: type, /) -> bool:
    """Let ``describe`` and StreamWorker read this class of tensors. False before torch 2.10."""

def describe(*tensors: Array | None) -> bytes | None:
    """A key of all that kernels and checks of arguments depend on, except addresses and values.

    It holds class, device, dtype, shape, strides, alignment to 16 bytes, and whether values are
    negated when they are read. None if a tensor has no memory of its own.
    """

class Total:
    """The count of a group's batch, for a backward exchange."""

    count: float

    def __init__(self, /) -> None: ...

class Call:
    """An exchange of the stream transport, apart from its values: see Call in worker.h."""

    def __init__(
        self, kind: int, number: int, channels: int, hash: int, again: int, eps: float, largest: float, /
    ) -> None: ...

class Launches:
    """Compiled kernels of CUDA to start one after the other.

    Each is a function, a grid, the number of threads, the bytes of shared memory, and arguments.
    An argument is a pair of a place among pointers and a value. The place is -1 for a value, and -2
    for the message of the exchange.
    """

    def __init__(
        self, given: list[tuple[int, tuple[int, ...], int, int, list[tuple[int, int]]]], /
    ) -> None: ...

class StreamWorker:
    """A thread that does the exchanges of a communicator in the order of a device's streams."""

    exchanges: int  # begun so far
    in_join: bool  # whether replays of captured graphs are refused; only once there was an exchange

    def __init__(
        self,
        driver: str,
        allreduce: int,
        allgather: int,
        comm: int,
        datatype: int,
        op: int,
        in_place: int,
        int_handles: bool,
        size: int,
        rank: int,
        /,
    ) -> None: ...
    @property
    def current(self) -> int: ...
    @property
    def enqueued(self) -> int: ...
    @property
    def failed(self) -> bool: ...
    @property
    def owned(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def slots(self) -> int: ...
    def enqueue(
        self,
        device_and_stream: tuple[int, int],
        call: Call,
        count: float,
        total: Total | None,
        before: Launches | None,
        vectors: list[int],
        out: int,
        after: Launches | None,
        pointers: tuple[Array | int | None, ...],
        /,
    ) -> None:
        """Enqueue kernels, an exchange, and further kernels.

        ``device_and_stream`` are as ``Streams`` returns them.
        ``vectors`` are the addresses of the message's vectors on the device. The list is empty if
        the kernels ``before`` write the message. The result is copied to the address ``out``. An
        exchange of moments sets ``total``, and sums are divided by it. ``pointers`` are tensors of
        torch, addresses, or None.
        """

    def wait(self, /) -> None:
        """Wait until all exchanges that were enqueued are done."""

    def failure(self, /) -> tuple[int, int, int]:
        """The first problem, and the numbers of its call and exchange; zeros without any."""

    def forget_failure(self, /) -> None:
        """Clear the failure, and send messages again."""
    def close(self, /) -> None:
        """Give NaN as all further results, because the communicator is freed."""
    def stop(self, /) -> None:
        """End the worker after all enqueued exchanges."""
    def has_memory_operations(self, device: int, /) -> bool: ...
