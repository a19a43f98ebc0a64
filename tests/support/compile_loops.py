"""Compile the Triton loops without a GPU: ``python tests/support/compile_loops.py 80 90``.

Prints, for each architecture, kernel and kind of tensor, the registers and the bytes of spilled
values of a thread, and how many of its loads are of 16 bytes. The default is sm_80 and sm_90.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mpisyncbn.kernels.activation import Kind
from mpisyncbn.kernels.cuda import plans
from mpisyncbn.kernels.cuda.elementwise import backward_elementwise, normalize
from mpisyncbn.kernels.cuda.moments import merge_moments, moments
from mpisyncbn.kernels.cuda.running_stats import record_batch
from mpisyncbn.kernels.cuda.sums import backward_sums, merge_sums

POINTERS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16"}
VECTOR = "*fp64"
# Samples, channels, and adjacent values of one channel: 1 if the channels are adjacent.
SHAPES = {
    "contiguous": (32, 256, 3136),
    "split": (32, 64, 3136),
    "14x14": (32, 1024, 196),
    "7x7": (50, 2048, 49),
    "odd": (3, 5, 12345),
    "channels_last": (32 * 3136, 256, 1),
    "three": (40001, 3, 1),
}
MULTIPROCESSORS = 132


def arguments(
    name: str, shape: tuple[int, int, int], kinds: Iterable[Kind]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each kernel with its arguments, for every option. A pointer is given by its type."""
    x, dtype = POINTERS[name], getattr(torch, name)
    parameter = VECTOR if dtype == torch.float64 else "*fp32"
    plan = plans.plan_sums(*shape, dtype, MULTIPROCESSORS)
    named = ("rows", "width", "stride", "tiles", "share", "channels")
    sums = {
        "partials": VECTOR if plan.shares > 1 else None,
        "out": VECTOR,
        **dict(zip(named, plan.sizes, strict=True)),
    }
    vectors = {"mean": VECTOR, "invstd": VECTOR, "weight": parameter}
    yield moments, {"x": x, "ONE": plan.one, **sums, **plan.options}
    for kind, source in (*((kind, None) for kind in kinds), (Kind.RELU, "y"), (Kind.SILU, "residual")):
        more = {"dy": x, "x": x, "y": None, "residual": None, "dz": x if source else None}
        more |= {**vectors, "bias": parameter, "KIND": int(kind), "PARAMETER": 0.1}
        if source:
            more[source] = x
        yield backward_sums, {**more, **sums, **plan.options}
    merged = {"partials": VECTOR, "out": VECTOR, "shares": 7, **plans.plan_merge(7, 512).options}
    yield merge_sums, {"length": 512, **merged}
    yield merge_moments, {"channels": 256, "SPLIT_MEAN": dtype == torch.float64, **merged}
    plan = plans.plan_running_stats(256, 1.0, 0.1)
    running = {"running_mean": parameter, "running_var": parameter, "num_batches_tracked": "*i64"}
    named = ("channels", "to_unbiased", "momentum")
    numbers = dict(zip(named, plan.sizes, strict=True))
    running |= {"mean": VECTOR, "var": VECTOR}
    yield record_batch, {**running, **numbers, **plan.options}
    plan = plans.plan_elementwise(*shape, dtype, MULTIPROCESSORS)
    named = ("rows", "width", "stride", "channels", "column_tiles")
    small = {**dict(zip(named, plan.sizes, strict=True)), **plan.options}
    for residual, kind, bias in ((None, 0, parameter), *((x, kind, None) for kind in kinds)):
        yield (
            normalize,
            {
                "x": x,
                "residual": residual,
                "y": x,
                **vectors,
                "bias": bias,
                "KIND": int(kind),
                "PARAMETER": 0.1,
                **small,
            },
        )
    for kind in kinds:
        more = {"mean_dy": VECTOR, "mean_dy_xmu": VECTOR, "bias": parameter if kind else None}
        more |= {"KIND": int(kind), "PARAMETER": 0.1}
        yield backward_elementwise, {"dz": x, "x": x, "dx": x, **vectors, **more, **small}


def compiled(kernel: triton.JITFunction, values: dict[str, Any], architecture: int) -> CompiledKernel:
    """Compile as Triton does for these values: it specializes on 1 and on multiples of 16."""
    settings = ("num_warps", "enable_fp_fusion", "maxnreg")
    options = {name: values[name] for name in settings if name in values}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (value == 1 and not plain):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        wide = isinstance(value, int) and value >= 2**31
        signature[parameter.name] = value if isinstance(value, str) else "i64" if wide else "i32"
        if isinstance(value, str) or (value % 16 == 0 and not plain):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(binary: bytes) -> tuple[int, int]:
    """The registers and the bytes of stack that one thread of a compiled kernel takes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    if found is None:
        raise RuntimeError(f"expected cuobjdump to tell of registers, got {said.stdout} {said.stderr}")
    return int(found[1]), int(found[2])


def main(
    architectures: Iterable[int],
    names: Iterable[str] = SHAPES,
    dtypes: Iterable[str] = POINTERS,
    kinds: Iterable[int] = Kind,
) -> None:
    cases = itertools.product(architectures, dtypes, names, [[Kind(kind) for kind in kinds]])
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for lines in pool.map(report, *zip(*cases, strict=True)):
            print(*lines, sep="\n")


def report(architecture: int, dtype: str, name: str, kinds: list[Kind]) -> list[str]:
    lines = []
    for kernel, values in arguments(dtype, SHAPES[name], kinds):
        binary = compiled(kernel, values, architecture)
        loads = re.findall(r"ld\.global\S*", binary.asm["ptx"])
        wide = [load for load in loads if ".v4.b32" in load or ".v2.b64" in load]
        registers, stack = resources(binary.asm["cubin"])
        lines.append(
            f"sm_{architecture} {dtype:8} {name:13} {kernel.__name__:20} "
            f"registers {registers} stack {stack} loads {len(loads)} of_16_bytes {len(wide)}"
        )
    return lines


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or (80, 90))
