"""The collectives of torch.distributed over MPI, with torch's names and arguments."""

# mypy: disable-error-code="override, assignment"
# Torch overloads these methods, but calls them only in the forms that are defined here.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import on_rank
from . import mpi_collectives
from .checked import DEFAULT, CheckedProcessGroup, Prepared, Tensors, as_list, check_same, dtypes_and_shapes
from .host_tensors import cat_bytes, contiguous, copy_back, host_output_for, to_cpu
from .mpi_collectives import reduce_op_name, reduction_for
from .no_compile import no_compile_methods
from .work import Work

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch._C._distributed_c10d import (
        AllgatherOptions,
        AllreduceOptions,
        AllToAllOptions,
        BarrierOptions,
        BroadcastOptions,
        GatherOptions,
        ReduceOptions,
        ReduceScatterOptions,
        ScatterOptions,
    )

__all__ = ["Collectives"]


@no_compile_methods
class Collectives(CheckedProcessGroup):
    """The collective methods of a process group.

    Each method has a function ``prepare``, which runs on the caller's thread, where a GPU's values
    come to host memory in the order of its stream. It returns the ``action``, which runs once the
    ranks have compared their calls: see CheckedProcessGroup._run.
    """

    # Reductions.

    def allreduce(self, tensors: Tensors, opts: AllreduceOptions = DEFAULT) -> Work:
        return self.allreduce_coalesced(tensors, opts, "all_reduce")

    def allreduce_coalesced(
        self, tensors: Tensors, opts: AllreduceOptions = DEFAULT, name: str = "all_reduce_coalesced"
    ) -> Work:
        tensors = as_list(tensors)

        def prepare() -> Prepared:
            operation = reduce_op_name(opts.reduceOp)
            jobs = [(to_cpu(tensor), reduction_for(operation, tensor.dtype), tensor) for tensor in tensors]

            def action(comm: MPI.Intracomm) -> None:
                for source, reduction, tensor in jobs:
                    host = contiguous(source)
                    reduction.all_reduce(comm, host)
                    copy_back(host, tensor)

            return (operation, "of", *dtypes_and_shapes(tensors)), action

        return self._run(name, prepare, tensors, opts)

    def reduce(self, tensors: Tensors, opts: ReduceOptions = DEFAULT) -> Work:
        (tensor,) = tensors = as_list(tensors)

        def prepare() -> Prepared:
            operation, root = reduce_op_name(opts.reduceOp), self._check_root(opts.rootRank)
            source, reduction = to_cpu(tensor), reduction_for(operation, tensor.dtype)

            def action(comm: MPI.Intracomm) -> None:
                host = contiguous(source)
                reduction.reduce(comm, host, root)
                copy_back(host, tensor)

            return (operation, "to rank", root, "of", *dtypes_and_shapes(tensors)), action

        return self._run("reduce", prepare, tensors, opts)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: ReduceScatterOptions = DEFAULT
    ) -> Work:
        (out,), (parts,) = outputs, inputs

        def prepare() -> Prepared:
            self._check_one_tensor_per_rank(parts, out)
            own = parts[self._collective_group.rank]
            check_same("the sizes of the output and this rank's part of the input", out.numel(), own.numel())
            operation, host = reduce_op_name(opts.reduceOp), host_output_for(out)
            reduction, counts = reduction_for(operation, out.dtype), [part.numel() for part in parts]
            sources = [to_cpu(part) for part in parts]

            def action(comm: MPI.Intracomm) -> None:
                values = cat_bytes(sources).view(out.dtype)
                reduction.reduce_scatter(comm, values, host.view(-1), counts)
                copy_back(host, out)

            return (operation, "of", *dtypes_and_shapes(parts)), action

        return self._run("reduce_scatter", prepare, [out], opts)

    def reduce_scatter_single_coalesced(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: ReduceScatterOptions = DEFAULT,
        name: str = "reduce_scatter_coalesced",
    ) -> Work:
        def prepare() -> Prepared:
            operation, jobs = reduce_op_name(opts.reduceOp), []
            for out, values in zip(outputs, inputs, strict=True):
                self._check_part_per_rank(values, out)
                reduction = reduction_for(operation, out.dtype)
                jobs.append((out, host_output_for(out), to_cpu(values), reduction))

            def action(comm: MPI.Intracomm) -> None:
                for out, host, source, reduction in jobs:
                    flat = contiguous(source).view(-1)
                    reduction.reduce_scatter(comm, flat, host.view(-1), [out.numel()] * comm.size)
                    copy_back(host, out)

            return (operation, "of", *dtypes_and_shapes(inputs)), action

        return self._run(name, prepare, outputs, opts)

    def reduce_scatter_single(
        self, out: Tensor, values: Tensor, opts: ReduceScatterOptions = DEFAULT
    ) -> Work:
        return self.reduce_scatter_single_coalesced([out], [values], opts, "reduce_scatter_tensor")

    # Collectives with a root rank.

    def broadcast(self, tensors: Tensors, opts: BroadcastOptions = DEFAULT) -> Work:
        tensors = as_list(tensors)

        def prepare() -> Prepared:
            root = self._check_root(opts.rootRank)
            is_root = self._collective_group.rank == root
            sources = list(map(to_cpu if is_root else host_output_for, tensors))

            def action(comm: MPI.Intracomm) -> None:
                for source, tensor in zip(sources, tensors, strict=True):
                    host = contiguous(source)
                    mpi_collectives.broadcast(comm, host, root)
                    copy_back(host, tensor)

            return ("from rank", root, "of", *dtypes_and_shapes(tensors)), action

        return self._run("broadcast", prepare, tensors, opts)

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: GatherOptions = DEFAULT
    ) -> Work:
        (values,) = inputs

        def prepare() -> Prepared:
            root, source = self._check_root(opts.rootRank), to_cpu(values)
            parts = outputs[0] if self._collective_group.rank == root else []
            if self._collective_group.rank == root:
                self._check_one_tensor_per_rank(parts, values)
                for part in parts:
                    check_same("the sizes of the input and each output", values.numel(), part.numel())

            def action(comm: MPI.Intracomm) -> None:
                host = contiguous(source)
                flat = torch.empty((comm.size, *host.shape), dtype=host.dtype) if parts else None
                mpi_collectives.gather(comm, host, flat, root)
                for part, piece in zip(parts, () if flat is None else flat, strict=True):
                    copy_back(piece, part)

            return ("to rank", root, "of", *dtypes_and_shapes(inputs)), action

        return self._run("gather", prepare, outputs, opts)

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: ScatterOptions = DEFAULT
    ) -> Work:
        (out,) = outputs

        def prepare() -> Prepared:
            root, host = self._check_root(opts.rootRank), host_output_for(out)
            parts = inputs[0] if self._collective_group.rank == root else []
            if self._collective_group.rank == root:
                self._check_one_tensor_per_rank(parts, out)
                for part in parts:
                    check_same("the sizes of the output and each input", out.numel(), part.numel())

            sources = [to_cpu(part) for part in parts]

            def action(comm: MPI.Intracomm) -> None:
                mpi_collectives.scatter(comm, cat_bytes(sources) if sources else None, host, root)
                copy_back(host, out)

            return ("from rank", root, "of", *dtypes_and_shapes(outputs)), action

        return self._run("scatter", prepare, outputs, opts)

    # Collectives between all ranks.

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: AllgatherOptions = DEFAULT
    ) -> Work:
        (parts,), (values,) = outputs, inputs

        def prepare() -> Prepared:
            self._check_one_tensor_per_rank(parts, values)
            own = parts[self._collective_group.rank]
            check_same("the sizes of the input and this rank's output", values.numel(), own.numel())
            sizes, source = [part.nbytes for part in parts], to_cpu(values)

            def action(comm: MPI.Intracomm) -> None:
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
                mpi_collectives.all_gather_uneven(comm, contiguous(source).view(-1), flat, sizes)
                for part, piece in zip(parts, flat.split(sizes), strict=True):
                    copy_back(piece.view(part.dtype), part)

            return ("into", *dtypes_and_shapes(parts)), action

        return self._run("all_gather", prepare, parts, opts)

    def all_gather_single_coalesced(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: AllgatherOptions = DEFAULT,
        name: str = "all_gather_coalesced",
    ) -> Work:
        def prepare() -> Prepared:
            jobs = []
            for out, values in zip(outputs, inputs, strict=True):
                self._check_part_per_rank(out, values)
                jobs.append((out, host_output_for(out), to_cpu(values)))

            def action(comm: MPI.Intracomm) -> None:
                for out, host, source in jobs:
                    mpi_collectives.gather(comm, contiguous(source), host, None)
                    copy_back(host, out)

            return ("of", *dtypes_and_shapes(inputs)), action

        return self._run(name, prepare, outputs, opts)

    def all_gather_single(self, out: Tensor, values: Tensor, opts: AllgatherOptions = DEFAULT) -> Work:
        return self.all_gather_single_coalesced([out], [values], opts, "all_gather_into_tensor")

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: AllgatherOptions = DEFAULT
    ) -> Work:
        """``outputs[r][i]`` becomes ``inputs[i]`` of rank r."""

        def prepare() -> Prepared:
            self._check_one_per_rank(outputs)
            for row in outputs:
                for out, values in zip(row, inputs, strict=True):
                    kinds = (values.numel(), values.dtype), (out.numel(), out.dtype)
                    check_same("the sizes and dtypes of input and output", *kinds)
            sources = [to_cpu(values) for values in inputs]

            def action(comm: MPI.Intracomm) -> None:
                for i, source in enumerate(sources):
                    host = contiguous(source)
                    flat = torch.empty((comm.size, *host.shape), dtype=host.dtype)
                    mpi_collectives.gather(comm, host, flat, None)
                    for row, part in zip(outputs, flat, strict=True):
                        copy_back(part, row[i])

            return ("of", *dtypes_and_shapes(inputs)), action

        return self._run("all_gather_coalesced", prepare, outputs, opts)

    def all_to_all_single(
        self,
        out: Tensor,
        values: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: AllToAllOptions = DEFAULT,
    ) -> Work:
        def prepare() -> Prepared:
            check_same("the dtypes of output and input", out.dtype, values.dtype)
            host = host_output_for(out)
            sent, received = (
                self._split_bytes(values, input_split_sizes),
                self._split_bytes(out, output_split_sizes),
            )
            source = to_cpu(values)

            def action(comm: MPI.Intracomm) -> None:
                _checked_all_to_all(comm, contiguous(source).view(-1), host, sent, received)
                copy_back(host, out)

            return ("of rows of", (out.dtype, out.shape[1:])), action

        return self._run("all_to_all_single", prepare, [out], opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: AllToAllOptions = DEFAULT) -> Work:
        def prepare() -> Prepared:
            self._check_one_per_rank(outputs)
            self._check_one_tensor_per_rank(inputs, outputs[0])
            sent, received = [values.nbytes for values in inputs], [out.nbytes for out in outputs]
            sources = [to_cpu(values) for values in inputs]

            def action(comm: MPI.Intracomm) -> None:
                flat = torch.empty(sum(received), dtype=torch.uint8)
                _checked_all_to_all(comm, cat_bytes(sources), flat, sent, received)
                for out, piece in zip(outputs, flat.split(received), strict=True):
                    copy_back(piece.view(out.dtype), out)

            return ("of", outputs[0].dtype), action

        return self._run("all_to_all", prepare, outputs, opts)

    def barrier(self, opts: BarrierOptions = DEFAULT) -> Work:
        return self._run("barrier", lambda: ((), lambda comm: None), [], opts)

    # The names of these methods in other versions of torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _checked_all_to_all(
    comm: MPI.Intracomm, values: Tensor, host: Tensor, sent: list[int], received: list[int]
) -> None:
    """Send ``sent[r]`` bytes of ``values`` to each rank r, and receive ``received[r]`` from it.

    The received bytes go to ``host``. Raises ValueError on every rank if one sends more or fewer
    bytes than another expects, which no rank can know alone. Collective: every rank must call.
    """
    plans = comm.allgather((sent, received))
    for source, (theirs, _) in enumerate(plans):
        for rank, (_, wanted) in enumerate(plans):
            if theirs[rank] != wanted[source]:
                raise ValueError(
                    f"all_to_all: rank {source} sends {theirs[rank]} bytes to rank {rank}, which expects "
                    f"{wanted[source]}{on_rank()}: split sizes and dtypes must fit"
                )
    most = max(sum(part) for plan in plans for part in plan)
    mpi_collectives.all_to_all(comm, values, host, sent, received, most)
