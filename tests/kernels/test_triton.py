"""Triton kernels: tiles and programs, running statistics, machines without Triton."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpisyncbn
from mpisyncbn.kernels import Kind, aten_cuda
from support.device import GPU, needs_triton, there
from support.dlpack import LikeCuPy, dlpack_kernels
from support.jobs import run_alone
from support.kernels import TOLERANCE, check, check_fused, cuda
from support.oracle import distance, shard
from support.ranks import no_exchange, together

pytestmark = [no_exchange, needs_triton]


@pytest.mark.skipif(GPU, reason="with a GPU, scripts/gpu_check does this with CuPy")
@pytest.mark.parametrize("pointer", [0, 77])
def test_arrays_by_way_of_dlpack(pointer, monkeypatch):
    """dlpack.py runs the Triton kernels, on the stream that is current."""
    with dlpack_kernels(monkeypatch, pointer) as (dlpack, streams):
        for dtype in ("float32", "float64", "float16"):
            shape = (4, 3, 5)
            x, dy, residual = (
                shard(shape, seed, 1.0).numpy().astype(dtype).view(LikeCuPy) for seed in (1, 2, 3)
            )
            weight, bias = (shard((3,), seed).numpy().astype(dtype) for seed in (4, 5))
            check(dlpack, x, dy, weight, bias)
            check(dlpack, x, dy, None, None)
            check_fused(dlpack, x, dy, weight, bias, residual)
            check_fused(dlpack, x, dy, weight, bias, None)
    assert set(streams) == {pointer}


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (
            RuntimeError("Failed to find C compiler"),
            "Triton does not work here: RuntimeError: Failed to find C",
        ),
        (ImportError("undefined symbol"), "Triton does not work here: ImportError: undefined symbol"),
        (torch.OutOfMemoryError("none left"), None),
    ],
    ids=["no compiler", "no driver module", "no memory"],
)
def test_other_kernels_serve_if_triton_fails(problem, why, monkeypatch):
    """If Triton fails, torch's operations take over with a warning. Lack of memory is raised."""
    cuda_kernels_for, device = mpisyncbn.kernels.cuda_kernels_for, torch.device("cuda", 0)

    def try_out(device):
        if problem is not None:
            raise problem

    monkeypatch.setattr(cuda.module, "try_out", try_out)
    cuda_kernels_for.cache_clear()
    try:
        if why is None:
            with pytest.raises(torch.OutOfMemoryError):
                cuda_kernels_for(device)
            problem = None
            assert cuda_kernels_for(device) == (cuda.module, "Triton")
        else:
            with pytest.warns(RuntimeWarning, match=f"cuda:0 are composed of torch's .* because {why}"):
                module, made_of = cuda_kernels_for(device)
            assert module is aten_cuda
            assert why in made_of
    finally:
        cuda_kernels_for.cache_clear()


def test_other_kernels_serve_without_triton():
    out = run_alone(
        """
import sys, warnings
sys.modules["triton"] = None  # import triton fails
import torch
from mpisyncbn.kernels import cuda_kernels_for
warnings.simplefilter("ignore")
module, made_of = cuda_kernels_for(torch.device("cuda", 0))
print(module.__name__, "Triton is not installed" in made_of)
"""
    )
    assert out.split() == ["mpisyncbn.kernels.aten_cuda", "True"]


@given(
    st.integers(1, 1 << 33), st.integers(1, 5000), st.integers(1, 1 << 20), st.sampled_from(list(TOLERANCE))
)
def test_how_sums_are_shared_out(samples, channels, length, dtype):
    """Each tile goes to one program. A share suits float32 sums, their number suits CUDA."""
    plan = cuda.module.plans.plan_sums(samples, channels, length, dtype, 132)
    rows, width, _, tiles, share, _ = plan.sizes
    height, columns = plan.options["ROWS"], plan.options["COLUMNS"]
    blocks, shares, _ = plan.grid
    planes = plan.options["PLANES"]
    across = -(-width // columns)
    with together():
        assert tiles == -(-rows // height) * (across if planes else 1)
        assert blocks == (channels if planes else across)
        assert (shares - 1) * share < tiles <= shares * share
        assert shares <= 65535
        assert share <= 64 or shares > 65535 // 2
        assert height * columns <= 1 << 14


@given(
    st.integers(1, 1 << 33), st.integers(1, 5000), st.integers(1, 1 << 32), st.sampled_from(list(TOLERANCE))
)
def test_how_elements_are_shared_out(samples, channels, length, dtype):
    """Each element goes to one program, and no program is without elements."""
    plan = cuda.module.plans.plan_elementwise(samples, channels, length, dtype, 132)
    rows, width, stride, _, across = plan.sizes
    planes, steps = plan.options["PLANES"], plan.options["STEPS"]
    high, columns = plan.options["ROWS"] * steps, plan.options["COLUMNS"]
    down = plan.grid[0] // across // (channels if planes else 1)
    with together():
        assert (rows, width) == (samples, length if planes else channels)
        assert stride == channels * length
        assert plan.grid == (down * across * (channels if planes else 1), 1, 1)
        assert (down - 1) * high < rows <= down * high
        assert (across - 1) * columns < width <= across * columns
        assert plan.options["ROWS"] * columns <= 1 << 12
        assert width < 1 << 30 or plan.options["INDEX"] == cuda.module.plans.tl.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(50, 2, 7, 7), (6, 2, 63, 65), (1100, 33)], ids=str)
def test_many_tiles(shape, dtype, monkeypatch):
    """Inputs have one tile, or several in planes or rows. A program may get several."""
    plans = cuda.module.plans
    monkeypatch.setattr(plans, "_ENOUGH", 1)
    monkeypatch.setattr(plans, "plan_elementwise", plans.plan_elementwise.__wrapped__)
    x, dy = shard(shape, 1, 3.0, dtype), shard(shape, 2, 0.5, dtype)
    weight = shard(shape[1:2], 3)
    check(cuda, x, dy, weight, None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 700])
def test_a_batch_enters_in_one_kernel(channels, dtype):
    mean, var = (shard((channels,), seed, dtype=torch.float64) for seed in (1, 2))
    running = [shard((channels,), seed).to(dtype) for seed in (3, 4)]
    expected = [old.double().lerp(new, 0.1) for old, new in zip(running, (mean, var * 1.25), strict=True)]
    arguments = [there(each.clone()) for each in (*running, torch.tensor(7), mean, var)]
    versions = [each._version for each in arguments]
    entered = cuda.module.record_batch(*arguments, 1.25, 0.1)
    bar = {torch.float64: 1e-15, torch.float32: 1e-7}.get(dtype, 1e-2)
    with together():
        assert entered
        assert arguments[2].item() == 8
        for found, wanted in zip(arguments, expected, strict=False):
            assert distance(found.cpu(), wanted) < bar
        changed = [each._version > before for each, before in zip(arguments, versions, strict=True)]
        assert changed == [True, True, True, False, False]


def test_a_momentum_of_one_forgets_in_one_kernel():
    """A momentum of 1 forgets even old values beside which the batch would vanish by rounding."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        running = [there(torch.full((3,), 1e30, dtype=dtype)) for _ in range(2)]
        mean, var = (there(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        entered = cuda.module.record_batch(*running, None, mean, var, 1.0, 1.0)
        with together():
            assert entered
            assert torch.equal(torch.stack(running).cpu(), torch.ones(2, 3, dtype=dtype))


def test_tensors_that_a_kernel_must_not_change():
    mean, var = (there(shard((4,), seed, dtype=torch.float64)) for seed in (1, 2))
    plain, count = there(torch.ones(4)), there(torch.tensor(7))
    with torch.inference_mode():
        inferred = plain.clone()
    refused = (
        (there(torch.ones(8))[::2], plain, count),
        (plain, plain.clone().requires_grad_(), count),
        (plain, torch.nn.Parameter(plain.clone(), requires_grad=False), count),
        (plain, plain.clone(), torch.empty((), device="meta")),
        (inferred, plain, count),
    )
    entered = [cuda.module.record_batch(*each, mean, var, 1.0, 0.1) for each in refused]
    with together():
        assert not any(entered)
        assert torch.equal(plain.cpu(), torch.ones(4))
        assert count.item() == 7


@needs_triton
def test_triton_has_the_numbers_of_all_activations():
    module = importlib.import_module("mpisyncbn.kernels.cuda.activation")
    numbers = {name: getattr(module, name).value for name in Kind.__members__}
    assert numbers == dict(Kind.__members__)
