"""The collectives of torch.distributed over MPI, with torch's names and arguments."""

# mypy: disable-error-code="override, assignment"
# Torch calls these with lists and options alone, and has names for the other ways to call it.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import on_rank
from . import host_tensors, mpi_collectives
from .checked import DEFAULT, Action, CheckedProcessGroup, as_list, check_same, dtypes_and_shapes
from .no_compile import no_compile_methods
from .work import Work

__all__ = ["Collectives"]

Prepared = tuple[tuple[Any, ...], Action]


@no_compile_methods
class Collectives(CheckedProcessGroup):
    """Each method prepares on the caller's thread, where a GPU's values come to host memory in the order of
    its stream, and acts once the ranks agree: see CheckedProcessGroup._run."""

    # Reductions.

    def allreduce(self, tensors: Any, opts: Any = DEFAULT) -> Work:
        return self.allreduce_coalesced(tensors, opts, "all_reduce")

    def allreduce_coalesced(
        self, tensors: Any, opts: Any = DEFAULT, name: str = "all_reduce_coalesced"
    ) -> Work:
        tensors = as_list(tensors)

        def prepare() -> Prepared:
            operation = mpi_collectives.reduce_op_name(opts.reduceOp)
            jobs = [
                (host_tensors.to_cpu(tensor), mpi_collectives.reduction_for(operation, tensor.dtype), tensor)
                for tensor in tensors
            ]

            def action(comm: Any) -> None:
                for source, reduction, tensor in jobs:
                    host = host_tensors.contiguous(source)
                    reduction.all_reduce(comm, host)
                    host_tensors.copy_back(host, tensor)

            return (operation, "of", *dtypes_and_shapes(tensors)), action

        return self._run(name, prepare, tensors, opts)

    def reduce(self, tensors: Any, opts: Any = DEFAULT) -> Work:
        (tensor,) = tensors = as_list(tensors)

        def prepare() -> Prepared:
            operation, root = mpi_collectives.reduce_op_name(opts.reduceOp), self._root(opts)
            source, reduction = (
                host_tensors.to_cpu(tensor),
                mpi_collectives.reduction_for(operation, tensor.dtype),
            )

            def action(comm: Any) -> None:
                host = host_tensors.contiguous(source)
                reduction.reduce(comm, host, root)
                host_tensors.copy_back(host, tensor)

            return (operation, "to rank", root, "of", *dtypes_and_shapes(tensors)), action

        return self._run("reduce", prepare, tensors, opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        (out,), (parts,) = outputs, inputs

        def prepare() -> Prepared:
            self._check_one_per_rank(parts, out)
            check_same(
                "the output and this rank's part of the input",
                out.numel(),
                parts[self._collective_group.rank].numel(),
            )
            operation, host = mpi_collectives.reduce_op_name(opts.reduceOp), host_tensors.host_output_for(out)
            reduction, counts = (
                mpi_collectives.reduction_for(operation, out.dtype),
                [part.numel() for part in parts],
            )
            sources = [host_tensors.to_cpu(part) for part in parts]

            def action(comm: Any) -> None:
                values = host_tensors.cat_bytes(sources).view(out.dtype)
                reduction.reduce_scatter(comm, values, host.view(-1), counts)
                host_tensors.copy_back(host, out)

            return (operation, "of", *dtypes_and_shapes(parts)), action

        return self._run("reduce_scatter", prepare, [out], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = DEFAULT, name: str = "reduce_scatter_coalesced"
    ) -> Work:
        def prepare() -> Prepared:
            operation, jobs = mpi_collectives.reduce_op_name(opts.reduceOp), []
            for out, values in zip(outputs, inputs, strict=True):
                self._check_part_per_rank(values, out)
                reduction = mpi_collectives.reduction_for(operation, out.dtype)
                jobs.append((out, host_tensors.host_output_for(out), host_tensors.to_cpu(values), reduction))

            def action(comm: Any) -> None:
                for out, host, source, reduction in jobs:
                    flat = host_tensors.contiguous(source).view(-1)
                    reduction.reduce_scatter(comm, flat, host.view(-1), [out.numel()] * comm.size)
                    host_tensors.copy_back(host, out)

            return (operation, "of", *dtypes_and_shapes(inputs)), action

        return self._run(name, prepare, outputs, opts)

    def reduce_scatter_single(self, out: Tensor, values: Tensor, opts: Any = DEFAULT) -> Work:
        return self.reduce_scatter_single_coalesced([out], [values], opts, "reduce_scatter_tensor")

    # From one rank to all, and from all to one.

    def broadcast(self, tensors: Any, opts: Any = DEFAULT) -> Work:
        tensors = as_list(tensors)

        def prepare() -> Prepared:
            root = self._root(opts)
            is_root = self._collective_group.rank == root
            source = host_tensors.to_cpu if is_root else host_tensors.host_output_for
            sources = list(map(source, tensors))

            def action(comm: Any) -> None:
                for source, tensor in zip(sources, tensors, strict=True):
                    host = host_tensors.contiguous(source)
                    mpi_collectives.broadcast(comm, host, root)
                    host_tensors.copy_back(host, tensor)

            return ("from rank", root, "of", *dtypes_and_shapes(tensors)), action

        return self._run("broadcast", prepare, tensors, opts)

    def gather(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        (values,) = inputs

        def prepare() -> Prepared:
            root, source = self._root(opts), host_tensors.to_cpu(values)
            parts = outputs[0] if self._collective_group.rank == root else []
            if self._collective_group.rank == root:
                self._check_one_per_rank(parts, values)
                for part in parts:
                    check_same("the input and each output", values.numel(), part.numel())

            def action(comm: Any) -> None:
                host = host_tensors.contiguous(source)
                flat = torch.empty((comm.size, *host.shape), dtype=host.dtype) if parts else None
                mpi_collectives.gather(comm, host, flat, root)
                for part, piece in zip(parts, () if flat is None else flat, strict=True):
                    host_tensors.copy_back(piece, part)

            return ("to rank", root, "of", *dtypes_and_shapes(inputs)), action

        return self._run("gather", prepare, outputs, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        (out,) = outputs

        def prepare() -> Prepared:
            root, host = self._root(opts), host_tensors.host_output_for(out)
            parts = inputs[0] if self._collective_group.rank == root else []
            if self._collective_group.rank == root:
                self._check_one_per_rank(parts, out)
                for part in parts:
                    check_same("the output and each input", out.numel(), part.numel())

            sources = [host_tensors.to_cpu(part) for part in parts]

            def action(comm: Any) -> None:
                mpi_collectives.scatter(
                    comm, host_tensors.cat_bytes(sources) if sources else None, host, root
                )
                host_tensors.copy_back(host, out)

            return ("from rank", root, "of", *dtypes_and_shapes(outputs)), action

        return self._run("scatter", prepare, outputs, opts)

    # From all to all.

    def allgather(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        (parts,), (values,) = outputs, inputs

        def prepare() -> Prepared:
            self._check_one_per_rank(parts, values)
            check_same(
                "the input and this rank's output", values.numel(), parts[self._collective_group.rank].numel()
            )
            sizes, source = [part.nbytes for part in parts], host_tensors.to_cpu(values)

            def action(comm: Any) -> None:
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
                mpi_collectives.all_gather_uneven(comm, host_tensors.contiguous(source).view(-1), flat, sizes)
                for part, piece in zip(parts, flat.split(sizes), strict=True):
                    host_tensors.copy_back(piece.view(part.dtype), part)

            return ("into", *dtypes_and_shapes(parts)), action

        return self._run("all_gather", prepare, parts, opts)

    def all_gather_single_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = DEFAULT, name: str = "all_gather_coalesced"
    ) -> Work:
        def prepare() -> Prepared:
            jobs = []
            for out, values in zip(outputs, inputs, strict=True):
                self._check_part_per_rank(out, values)
                jobs.append((out, host_tensors.host_output_for(out), host_tensors.to_cpu(values)))

            def action(comm: Any) -> None:
                for out, host, source in jobs:
                    mpi_collectives.gather(comm, host_tensors.contiguous(source), host, None)
                    host_tensors.copy_back(host, out)

            return ("of", *dtypes_and_shapes(inputs)), action

        return self._run(name, prepare, outputs, opts)

    def all_gather_single(self, out: Tensor, values: Tensor, opts: Any = DEFAULT) -> Work:
        return self.all_gather_single_coalesced([out], [values], opts, "all_gather_into_tensor")

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        """``outputs[r][i]`` becomes ``inputs[i]`` of rank r."""

        def prepare() -> Prepared:
            self._check_one_per_rank(outputs, None)
            for row in outputs:
                for out, values in zip(row, inputs, strict=True):
                    check_same("input and output", (values.numel(), values.dtype), (out.numel(), out.dtype))
            sources = [host_tensors.to_cpu(values) for values in inputs]

            def action(comm: Any) -> None:
                for i, source in enumerate(sources):
                    host = host_tensors.contiguous(source)
                    flat = torch.empty((comm.size, *host.shape), dtype=host.dtype)
                    mpi_collectives.gather(comm, host, flat, None)
                    for row, part in zip(outputs, flat, strict=True):
                        host_tensors.copy_back(part, row[i])

            return ("of", *dtypes_and_shapes(inputs)), action

        return self._run("all_gather_coalesced", prepare, outputs, opts)

    def all_to_all_single(
        self, out: Tensor, values: Tensor, received: Any = None, sent: Any = None, opts: Any = DEFAULT
    ) -> Work:
        def prepare() -> Prepared:
            check_same("the dtypes of output and input", out.dtype, values.dtype)
            host, to, of = (
                host_tensors.host_output_for(out),
                self._splits(values, sent),
                self._splits(out, received),
            )
            source = host_tensors.to_cpu(values)

            def action(comm: Any) -> None:
                _checked_all_to_all(comm, host_tensors.contiguous(source).view(-1), host, to, of)
                host_tensors.copy_back(host, out)

            return ("of rows of", (out.dtype, out.shape[1:])), action

        return self._run("all_to_all_single", prepare, [out], opts)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = DEFAULT) -> Work:
        def prepare() -> Prepared:
            self._check_one_per_rank(outputs, None)
            self._check_one_per_rank(inputs, outputs[0])
            to, of = [values.nbytes for values in inputs], [out.nbytes for out in outputs]
            sources = [host_tensors.to_cpu(values) for values in inputs]

            def action(comm: Any) -> None:
                flat = torch.empty(sum(of), dtype=torch.uint8)
                _checked_all_to_all(comm, host_tensors.cat_bytes(sources), flat, to, of)
                for out, piece in zip(outputs, flat.split(of), strict=True):
                    host_tensors.copy_back(piece.view(out.dtype), out)

            return ("of", outputs[0].dtype), action

        return self._run("all_to_all", prepare, outputs, opts)

    def barrier(self, opts: Any = DEFAULT) -> Work:
        return self._run("barrier", lambda: ((), lambda comm: None), [], opts)

    def _check_part_per_rank(self, whole: Tensor, part: Tensor) -> None:
        size = self._collective_group.size
        check_same(f"the whole and {size} parts of {part.numel()} values", whole.numel(), size * part.numel())
        check_same("the dtypes of output and input", whole.dtype, part.dtype)

    # Names that other versions of torch have for the same.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _checked_all_to_all(
    comm: Any, values: Tensor, host: Tensor, sent: list[int], received: list[int]
) -> None:
    """``sent[r]`` bytes to each rank r, which must expect as many: that only both together know."""
    plans = comm.allgather((sent, received))
    for source, (theirs, _) in enumerate(plans):
        for rank, (_, wanted) in enumerate(plans):
            if theirs[rank] != wanted[source]:
                raise ValueError(
                    f"all_to_all: rank {source} sends {theirs[rank]} bytes to rank {rank}, which expects "
                    f"{wanted[source]}{on_rank()}"
                )
    most = max(sum(part) for plan in plans for part in plan)
    mpi_collectives.all_to_all(comm, values, host, sent, received, most)
