"""Run each CUDA operation of torch on the CPU. Device memory is host memory from runtime.cpp.

Importing this changes torch. An operation waits for its stream first, so only copies happen late.
On a stream that is being captured it is recorded: each replay runs it again on the same memory.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from support.batch_norm_operations import EMULATED

# Operations that make tensors and views: torch's own versions for CUDA are kept.
_KEPT = {
    *("empty.memory_format", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "resize_"),
    *("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor"),
    *("record_stream", "is_pinned", "_pin_memory", "is_set_to", "view_as_real", "view_as_complex"),
}
_NOT_OURS = ("_cudnn", "cudnn", "miopen", "_use_cudnn", "_nested", "_flash", "_efficient")
_runtime: Any = ctypes.CDLL(None)
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_recorded: list[object] = []  # never freed: a graph may be replayed at any time
_library = torch.library.Library("aten", "IMPL")


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a device tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    bytes = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(bytes, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    there = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    on_host(there).copy_(tensor)
    return there


def down(value: object) -> object:
    return on_host(value) if isinstance(value, Tensor) and value.is_cuda else value


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def checked(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code} of a stand-in" + (", while capturing" if capturing() else ""))


def work_off() -> None:
    checked(_runtime.cudaStreamSynchronize(stream()))


def capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def in_stream_order(function: Callable[[], object]) -> None:
    """Call a function after earlier work of the stream; during a capture, record it for replays."""
    if not capturing():
        work_off()
        function()
        return
    recorded = _HostFunction(lambda _: function())
    _recorded.append(recorded)
    checked(_runtime.standin_call(stream(), recorded))


class _Call:
    """The arguments of one operation as CPU tensors, and its results as device tensors."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.results: list[Tensor | None] = []  # for each: its memory if it is new, else None
        self.enlarged: list[tuple[Tensor, Tensor]] = []

    def down(self, value: object) -> object:
        if isinstance(value, Tensor) and value.is_cuda:
            self.devices.append(value.device)
            host = on_host(value)
            self.pairs[id(host)] = host, value
            return host
        if isinstance(value, torch.Generator):
            return None
        if isinstance(value, torch.device) and value.type == "cuda":
            self.devices.append(value)
            return torch.device("cpu")
        return value

    def up(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        known = self.pairs.get(id(value))
        device = self.devices[0] if self.devices else torch.device("cuda", torch.cuda.current_device())
        there = known[1] if known else on_device(value, device)
        self.results.append(None if known else on_host(there))
        return there

    def enlarge(self) -> None:
        for host, there in self.pairs.values():
            if host.size() != there.size():  # an "out" that the operation has resized
                there.resize_(host.size()).as_strided_(host.size(), host.stride())
                self.enlarged.append((on_host(there), host))
        self.copy_enlarged()

    def copy_enlarged(self) -> None:
        for memory, host in self.enlarged:
            memory.copy_(host)

    def again(self, found: object) -> None:
        """Copy the results of a replay to the memory of the results of the capture."""
        tensors = (each for each in tree_leaves(found) if isinstance(each, Tensor))
        for memory, value in zip(self.results, tensors, strict=True):
            if memory is not None:
                memory.copy_(value)
        self.copy_enlarged()


def by_the_host(
    operation: Callable[..., object], schema: torch.FunctionSchema | None = None
) -> Callable[..., object]:
    def call(*arguments: object, **options: object) -> object:
        recorded = capturing()
        if not recorded:
            work_off()
        this = _Call()
        arguments = tuple(map(_as_declared, arguments, schema.arguments)) if schema else arguments
        arguments, options = tree_map(this.down, arguments), tree_map(this.down, options)
        # A capture runs the operation only for the shapes of its results: memory is restored below.
        storages = [host.untyped_storage() for host, _ in this.pairs.values()] if recorded else []
        before = [storage.clone() for storage in storages]
        found = operation(*arguments, **options)
        this.enlarge()
        result = tree_map(this.up, found)
        if recorded:
            if any(isinstance(each, (bool, int, float)) for each in tree_leaves(found)):
                work_off()  # raises an error: a capture cannot return a number
            for storage, old in zip(storages, before, strict=True):
                if storage.nbytes() == old.nbytes():
                    storage.copy_(old)
            this.pairs.clear()  # as in CUDA, a graph holds addresses and keeps no tensor alive
            in_stream_order(lambda: this.again(operation(*arguments, **options)))
        return result

    return call


def _as_declared(value: object, argument: torch.Argument) -> object:
    """Make a tensor of a Python number if the operation declares a tensor as its argument."""
    bare = isinstance(value, (bool, int, float)) and str(argument.type) == "Tensor"
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if bare else value


def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy by cudaMemcpyAsync if dtype and dense layout are the same, and otherwise on the CPU."""
    if self.numel() == 0:
        return self
    dense = self.is_contiguous() or (self.ndim > 1 and self.movedim(1, -1).is_contiguous())
    same = self.dtype == source.dtype and self.size() == source.size() and self.stride() == source.stride()
    if dense and same and not (source.is_neg() or source.is_conj() or self.is_neg() or self.is_conj()):
        pointers = map(ctypes.c_void_p, (self.data_ptr(), source.data_ptr()))
        checked(_runtime.cudaMemcpyAsync(*pointers, ctypes.c_size_t(self.nbytes), 4, stream()))
        if not non_blocking and not (self.is_cuda and source.is_cuda):
            work_off()
        return self
    to, from_ = down(self), down(source)
    in_stream_order(lambda: to.copy_(from_))
    return self


def emulated(operation: Callable[..., object]) -> Callable[..., object]:
    """Make an emulated operation, which needs contiguous tensors, accept tensors of any layout."""

    def call(*arguments: object, **options: object) -> object:
        x = next(each for each in arguments if isinstance(each, Tensor))
        found = operation(*(e.contiguous() if isinstance(e, Tensor) else e for e in arguments), **options)
        same = isinstance(found, Tensor) and not options and found.shape == x.shape
        return torch.empty_like(x).copy_(found) if same else found

    return call


def install() -> None:
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        space, _, name = name.partition("::")
        if space != "aten" or name in _KEPT or name.startswith(_NOT_OURS):
            continue
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if name in EMULATED:
            _library.impl(name, by_the_host(emulated(EMULATED[name])), "CUDA")
        else:
            _library.impl(name, by_the_host(operation, operation._schema), "CUDA")
    _library.impl("copy_", copy, "CUDA")
    torch.backends.cudnn.enabled = False  # cuDNN has a CUDA runtime of its own


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns that operations are replaced
    install()
