"""MPI's collectives on dense tensors in host memory, each as a function of an mpi4py communicator.

Every rank of the communicator must call. MPI counts in C ints, so longer messages go in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..comm.runtime import mpi
from .host_tensors import without_overlap

if TYPE_CHECKING:
    from mpi4py import MPI
    from mpi4py.typing import BufSpec

__all__ = [
    "OWN_TAG",
    "all_gather_uneven",
    "all_to_all",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "reduce_op_name",
    "reduction_for",
    "scatter",
]

MAX_COUNT = 1 << 30  # values or bytes in one call
OWN_TAG = 32767  # of this package's own messages; the largest tag that every MPI library has
_WIDENED_PIECE = 1 << 22  # values that are widened at a time

_MPI_NAMES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
    torch.uint16: "UINT16_T",
    torch.uint32: "UINT32_T",
    torch.uint64: "UINT64_T",
    torch.bool: "C_BOOL",
    torch.complex64: "C_FLOAT_COMPLEX",
    torch.complex128: "C_DOUBLE_COMPLEX",
}
_HALF = (torch.float16, torch.bfloat16)
_SHORT = (torch.int8, torch.int16, torch.uint8, torch.uint16)
_OPERATIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
_BITWISE = ("BAND", "BOR", "BXOR")
_ORDERED = ("MIN", "MAX")
_OF_BOOL = {
    "SUM": "LOR",
    "PRODUCT": "LAND",
    "MIN": "LAND",
    "MAX": "LOR",
    "BAND": "LAND",
    "BOR": "LOR",
    "BXOR": "LXOR",
}
_OF_NUMBERS = {"AVG": "SUM", "PRODUCT": "PROD"}


def reduce_op_name(operation: ReduceOp | ReduceOp.RedOpType) -> str:
    """Return "SUM" for ReduceOp.SUM, and so on. Raises TypeError for operations that MPI lacks."""
    for name in _OPERATIONS:
        if operation == getattr(ReduceOp, name):
            return name
    given = getattr(operation, "op", operation)
    raise TypeError(f"expected one of {', '.join(_OPERATIONS)} as the reduction, got {given}")


class Reduction:
    """A reduction of torch.distributed for tensors of one dtype. ``reduction_for`` makes each once.

    MPI computes in ``compute_dtype``. Half precision is widened to float32 and rounded once, at
    the end. Bool is reduced logically: SUM and MAX are "or". AVG of integers is their sum, divided
    and truncated towards zero, as in NCCL. AVG of 8 and 16 bits takes the sum in 32 bits, because
    MPI libraries do not agree on overflow: Open MPI's vector code saturates.

    Raises TypeError for reductions without a meaning: the average of bool, the minimum and maximum
    of complex numbers, bitwise operations on floating point.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        compute_dtype = torch.float32 if dtype in _HALF else dtype
        if name == "AVG" and dtype in _SHORT:
            compute_dtype = torch.int32
        if compute_dtype not in _MPI_NAMES:
            raise TypeError(f"MPI has no {dtype} to reduce: send it as another dtype")
        if not _is_defined(name, dtype):
            raise TypeError(f"{name} of {dtype} is not defined: convert the tensor, or use another reduction")
        self.name, self.dtype, self.compute_dtype = name, dtype, compute_dtype
        MPI = mpi()
        self._in_place, self._from_address = MPI.IN_PLACE, MPI.memory.fromaddress
        self._mpi_type = getattr(MPI, _MPI_NAMES[compute_dtype])
        self._mpi_op = getattr(MPI, _OF_BOOL[name] if dtype is torch.bool else _OF_NUMBERS.get(name, name))

    def all_reduce(self, comm: MPI.Intracomm, values: Tensor) -> None:
        """Reduce ``values`` in place, on every rank."""
        for piece, widened in self._pieces(values):
            comm.Allreduce(self._in_place, self._mpi_buffer(widened), op=self._mpi_op)
            self._store_result(comm, piece, widened)

    def reduce(self, comm: MPI.Intracomm, values: Tensor, root: int) -> None:
        """Reduce ``values`` in place on rank ``root``; on other ranks they stay as they are."""
        for piece, widened in self._pieces(values):
            if comm.rank == root:
                comm.Reduce(self._in_place, self._mpi_buffer(widened), op=self._mpi_op, root=root)
                self._store_result(comm, piece, widened)
            else:
                comm.Reduce(self._mpi_buffer(widened), None, op=self._mpi_op, root=root)

    def reduce_scatter(self, comm: MPI.Intracomm, values: Tensor, out: Tensor, counts: list[int]) -> None:
        """Reduce ``values``, and write this rank's part of the result to ``out``.

        Rank r gets ``counts[r]`` values. Both tensors are 1-d and contiguous.
        """
        if values.numel() > MAX_COUNT:
            for rank, part in enumerate(values.split(counts)):
                reduced = part.clone()
                self.reduce(comm, reduced, rank)
                if rank == comm.rank:
                    out.copy_(reduced)
            return
        widened = without_overlap(values.to(self.compute_dtype), out)
        result = out if out.dtype is self.compute_dtype else torch.empty(out.shape, dtype=self.compute_dtype)
        comm.Reduce_scatter(self._mpi_buffer(widened), self._mpi_buffer(result), counts, op=self._mpi_op)
        self._store_result(comm, out, result)

    def _mpi_buffer(self, values: Tensor) -> BufSpec:
        return [self._from_address(values.data_ptr(), values.nbytes), values.numel(), self._mpi_type]

    def _pieces(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces that MPI takes in one call, each as it is and in ``compute_dtype``."""
        is_widened = self.compute_dtype is not self.dtype
        most = _WIDENED_PIECE if is_widened else MAX_COUNT
        if values.numel() > most:
            for piece in values.view(-1).split(most):
                yield piece, piece.to(self.compute_dtype)
        elif values.numel():
            yield values, values.to(self.compute_dtype) if is_widened else values

    def _store_result(self, comm: MPI.Intracomm, piece: Tensor, widened: Tensor) -> None:
        """Copy MPI's result from ``widened`` to ``piece``; for AVG divide by the ranks."""
        if self.name == "AVG":
            _divide(widened, comm.size)
        if widened is not piece and widened.data_ptr() != piece.data_ptr():
            piece.copy_(widened)


reduction_for = lru_cache(maxsize=None)(Reduction)


def _is_defined(name: str, dtype: torch.dtype) -> bool:
    """Whether a reduction has a meaning for values of ``dtype``."""
    if name == "AVG":
        return dtype is not torch.bool
    if name in _BITWISE:
        return not (dtype.is_floating_point or dtype.is_complex)
    return not (name in _ORDERED and dtype.is_complex)


def _divide(values: Tensor, size: int) -> None:
    """Divide in place by the number of ranks; integers are truncated towards zero."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        values /= size
    elif values.dtype is torch.uint64:  # torch cannot divide it, and int64 cannot hold it
        values.numpy()[...] //= np.uint64(size)
    else:
        # in int64, because int8 cannot hold the size of a large group
        for piece in values.view(-1).split(_WIDENED_PIECE):
            piece.copy_(piece.to(torch.int64).div_(size, rounding_mode="trunc"))


def broadcast(comm: MPI.Intracomm, values: Tensor, root: int) -> None:
    """Overwrite ``values`` with those of rank ``root``."""
    for offset, length in _spans(values.nbytes):
        comm.Bcast(_bytes(values, offset, length), root=root)


def gather(comm: MPI.Intracomm, values: Tensor, out: Tensor | None, root: int | None) -> None:
    """Write the ``values`` of all ranks, one after the other, to ``out``.

    ``root`` is the rank that gets them, and ``out`` is None on others. None: all ranks get them.
    """
    values = without_overlap(values, out)
    for offset, length in _spans(values.nbytes):
        with _strided(length, values.nbytes) as block:
            sent = _bytes(values, offset, length)
            received = None if out is None else [_memory(out, offset), *block]
            if root is None:
                comm.Allgather(sent, received)
            else:
                comm.Gather(sent, received, root=root)


def scatter(comm: MPI.Intracomm, values: Tensor | None, out: Tensor, root: int) -> None:
    """Write each rank's part of the ``values`` of rank ``root`` to its ``out``.

    ``values`` is None on the other ranks.
    """
    values = None if values is None else without_overlap(values, out)
    for offset, length in _spans(out.nbytes):
        with _strided(length, out.nbytes) as block:
            sent = None if values is None else [_memory(values, offset), *block]
            comm.Scatter(sent, _bytes(out, offset, length), root=root)


def all_gather_uneven(comm: MPI.Intracomm, values: Tensor, out: Tensor, sizes: list[int]) -> None:
    """Write the ``values`` of all ranks, one after the other, to ``out``, on every rank.

    Rank r has ``sizes[r]`` bytes. Both tensors are 1-d and contiguous.
    """
    values = without_overlap(values, out)
    if sum(sizes) <= MAX_COUNT:
        comm.Allgatherv(_bytes(values, 0, values.nbytes), [_memory(out), (sizes, _starts(sizes)), mpi().BYTE])
        return
    for rank, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        part = out.view(torch.uint8)[start : start + size]
        if rank == comm.rank:
            part.copy_(values.view(torch.uint8))
        broadcast(comm, part, rank)


def all_to_all(
    comm: MPI.Intracomm, values: Tensor, out: Tensor, sent: list[int], received: list[int], most: int
) -> None:
    """Send ``sent[r]`` bytes of ``values`` to each rank r, and receive ``received[r]`` from it.

    The received bytes go to ``out``. Both tensors are contiguous, with the parts in the order of
    ranks. ``most`` is the largest number of bytes that any rank sends or receives.
    """
    MPI = mpi()
    values, to, of = without_overlap(values, out), _starts(sent), _starts(received)
    if most <= MAX_COUNT:
        comm.Alltoallv([_memory(values), (sent, to), MPI.BYTE], [_memory(out), (received, of), MPI.BYTE])
        return
    requests = []
    for rank in range(comm.size):
        for offset, length in _spans(received[rank]):
            requests.append(comm.Irecv(_bytes(out, of[rank] + offset, length), rank, OWN_TAG))
    for rank in range(comm.size):
        for offset, length in _spans(sent[rank]):
            requests.append(comm.Isend(_bytes(values, to[rank] + offset, length), rank, OWN_TAG))
    MPI.Request.Waitall(requests)


def isend(comm: MPI.Intracomm, values: Tensor, to: int, tag: int) -> list[MPI.Request]:
    """Begin to send ``values``, and return the requests, one for each piece."""
    return [comm.Isend(_bytes(values, offset, length), to, tag) for offset, length in _spans(values.nbytes)]


def irecv(comm: MPI.Intracomm, values: Tensor, source: int, tag: int) -> list[MPI.Request]:
    """Begin to receive into ``values``, and return the requests, one for each piece."""
    return [
        comm.Irecv(_bytes(values, offset, length), source, tag) for offset, length in _spans(values.nbytes)
    ]


def _memory(values: Tensor, offset: int = 0) -> MPI.buffer:
    return mpi().memory.fromaddress(values.data_ptr() + offset, values.nbytes - offset)


def _bytes(values: Tensor, offset: int, length: int) -> BufSpec:
    return [_memory(values, offset), length, mpi().BYTE]


def _spans(length: int) -> Iterator[tuple[int, int]]:
    """Yield the offsets and lengths of pieces that MPI can count.

    For a ``length`` of 0 there is one empty piece, so that all ranks make the same calls.
    """
    yield 0, min(length, MAX_COUNT)
    for offset in range(MAX_COUNT, length, MAX_COUNT):
        yield offset, min(MAX_COUNT, length - offset)


@contextmanager
def _strided(length: int, pitch: int) -> Iterator[tuple[int, MPI.Datatype]]:
    """Yield count and datatype of ``length`` bytes in each part, ``pitch`` bytes apart."""
    MPI = mpi()
    if length == pitch:
        yield length, MPI.BYTE
        return
    plain = MPI.BYTE.Create_contiguous(length)
    spread = plain.Create_resized(0, pitch).Commit()
    try:
        yield 1, spread
    finally:
        spread.Free()
        plain.Free()


def _starts(sizes: list[int]) -> list[int]:
    """Return where each part begins, if parts of these sizes follow each other."""
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts
