"""Derivatives across ranks: of every order, in both modes, in torch.func and checkpoints."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import mpisyncbn
from mpisyncbn.batch_stats import BatchStats
from support.across_ranks import ONE_EMPTY, UNEVEN, inputs, whole_batch_function
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD


def test_gradcheck_and_gradgradcheck_over_ranks():
    for sizes in (UNEVEN, ONE_EMPTY):
        function, arguments = whole_batch_function(sizes), inputs(sizes, 2, 2)[:3]
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=False)
        assert torch.autograd.gradgradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments[:1])


def test_second_derivatives_in_float32_of_half_input():
    """Second derivatives exist for the same input dtypes as first derivatives."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = shard((local_batch(), 3, 4, 4), 1, dtype=dtype).requires_grad_()
        weight = torch.ones(3, requires_grad=True)
        y = mpisyncbn.sync_batch_norm(x, None, None, weight, None)
        (dx,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
        (ddx, ddweight) = torch.autograd.grad(dx.float().square().sum(), (x, weight))
        assert dx.dtype == ddx.dtype == dtype
        assert ddweight.dtype == torch.float32
        assert ddx.isfinite().all()


def test_requires_grad_on_some_inputs_only():
    x, dy = shard((local_batch(), 3, 4), 6), shard((local_batch(), 3, 4), 7)
    expected = oracle(x, dy)
    for wanted in ([0], [1], [2], [1, 2], [0, 2], [0, 1, 2]):
        leaves = [x.clone(), torch.ones(3), torch.zeros(3)]
        for i in wanted:
            leaves[i].requires_grad_()
        for create_graph in (False, True):
            y = mpisyncbn.sync_batch_norm(leaves[0], None, None, leaves[1], leaves[2])
            grads = torch.autograd.grad(y, [leaves[i] for i in wanted], dy, create_graph=create_graph)
            for i, grad in zip(wanted, grads, strict=True):
                total = grad.detach() if i == 0 else torch.from_numpy(WORLD.allreduce(grad.detach().numpy()))
                assert distance(total, (expected.dx, expected.dweight, expected.dbias)[i]) < 1e-5


def test_no_grad_records_nothing():
    x = shard((local_batch(), 3), 8).requires_grad_()
    with torch.no_grad():
        assert not mpisyncbn.sync_batch_norm(x, None, None).requires_grad
    with torch.inference_mode():
        assert mpisyncbn.sync_batch_norm(x, None, None).is_inference()
    assert not mpisyncbn.sync_batch_norm(x.detach(), None, None).requires_grad


def test_backward_twice_with_retain_graph():
    x = shard((local_batch(), 3, 4), 9).requires_grad_()
    y = mpisyncbn.sync_batch_norm(x, None, None).square()
    dy = shard(tuple(x.shape), 10)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])


def test_adjoint_identity():
    """<J v, u> = <v, J* u> over all ranks: forward mode against reverse mode."""
    x = shard((local_batch(), 3, 4), 11, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.full((3,), float(v), dtype=torch.float64, requires_grad=True) for v in (2, 3))
    v, u = (shard(tuple(x.shape), seed, dtype=torch.float64) for seed in (12, 13))
    dweight, dbias = torch.tensor([1.0, -1.0, 2.0]).double(), torch.tensor([0.5, 0.0, 3.0]).double()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in ((x, v), (weight, dweight), (bias, dbias))]
        tangent = forward_ad.unpack_dual(mpisyncbn.sync_batch_norm(duals[0], None, None, *duals[1:])).tangent
    y = mpisyncbn.sync_batch_norm(x, None, None, weight, bias)
    gx, gw, gb = torch.autograd.grad(y, (x, weight, bias), u)
    left = WORLD.allreduce((tangent * u).sum().item())
    right = WORLD.allreduce((v * gx).sum().item() + (dweight * gw).sum().item() + (dbias * gb).sum().item())
    assert abs(left - right) < 1e-10 * max(1.0, abs(left))


def test_torch_func():
    x = shard((local_batch(), 3, 4), 14, dtype=torch.float64)
    t = shard(tuple(x.shape), 15, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return mpisyncbn.sync_batch_norm(x, None, None).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected_hvp,) = torch.autograd.grad(expected, leaf, t)
    gradient = torch.func.grad(loss)(x)
    value, pullback = torch.func.vjp(loss, x)
    (pulled,) = pullback(torch.ones_like(value))
    _, hvp = torch.func.jvp(torch.func.grad(loss), (x,), (t,))
    twice = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * t).sum())(x)
    # with eps 0, scaling x does not change y, so the derivative of y along x is 0
    _, along = torch.func.jvp(lambda x: mpisyncbn.sync_batch_norm(x, None, None, eps=0.0), (x,), (x,))
    jacobian = torch.func.jacrev(lambda x: mpisyncbn.sync_batch_norm(x, None, None).pow(3).sum((0, 2)))(x)
    assert distance(gradient, expected.detach()) < 1e-12
    assert distance(pulled, expected.detach()) < 1e-12
    # a Hessian is symmetric, so forward over reverse equals reverse over reverse
    assert distance(hvp, expected_hvp) < 1e-10
    assert distance(twice, expected_hvp) < 1e-10
    assert along.abs().max() < 1e-9
    assert distance(jacobian.sum(0), expected.detach()) < 1e-12


@pytest.mark.parametrize(
    ("empty", "dtype", "activation"),
    [(False, torch.float64, None), (True, torch.float64, "gelu"), (False, torch.float32, "gelu")],
)
def test_third_derivatives_in_all_orders_of_modes(empty, dtype, activation):
    """Every input moves along a line. All modes give the derivatives, summed over ranks."""
    batch = 0 if empty and WORLD.rank == WORLD.size - 1 > 0 else local_batch(5)
    points, steps = (
        [shard((batch, *shape), seed, dtype=dtype) for shape in ((2, 3), (2, 3))] for seed in (61, 62)
    )
    start, step = torch.tensor([0.7, -1.2], dtype=dtype), torch.tensor([1.0, 0.6], dtype=dtype)
    mask = shard((batch, 1, 3), 63) > -0.5
    whole = [torch.cat(WORLD.allgather(each)).double() for each in (*points, *steps)]
    whole_mask = torch.cat(WORLD.allgather(mask))

    def ours(s: Tensor) -> Tensor:
        x, residual = (point + s * step for point, step in zip(points, steps, strict=True))
        weight = start + s * step
        y = mpisyncbn.sync_batch_norm(
            x, None, None, weight, weight, activation=activation, residual=residual, mask=mask
        )
        return y.pow(3).sum()

    def theirs(s: Tensor) -> Tensor:
        x, residual = (point + s * step for point, step in zip(whole[:2], whole[2:], strict=True))
        weight, values = (start + s * step).double().view(1, -1, 1), whole_mask.sum()
        xmu = (x - (x * whole_mask).sum((0, 2), keepdim=True) / values) * whole_mask
        y = xmu / (xmu.square().sum((0, 2), keepdim=True) / values + 1e-5).sqrt() * weight + weight
        z = (y + residual) * whole_mask
        return (z if activation is None else torch.nn.functional.gelu(z)).pow(3).sum()

    modes = {
        "reverse": torch.func.grad,
        "forward": lambda f: lambda s: torch.func.jvp(f, (s,), (s.new_ones(()),))[1],
    }
    found, expected = {}, theirs
    for order in (1, 2, 3):
        expected = torch.func.grad(expected)
        value = expected(torch.zeros((), dtype=torch.float64))
        for names in itertools.product(modes, repeat=order):
            function = ours
            for name in names:
                function = modes[name](function)
            mine = function(torch.zeros((), dtype=dtype)).double().item()
            found[names] = abs(WORLD.allreduce(mine) / value.item() - 1)
    assert max(found.values()) < (1e-11 if dtype == torch.float64 else 1e-4), found


def test_batched_derivatives():
    """jacfwd, hessian and batched gradients work: they do not batch the input."""
    x, weight = shard((local_batch(5), 2), 21, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor = weight) -> Tensor:
        return mpisyncbn.sync_batch_norm(x, None, None, weight).pow(3).sum(0)

    # every rank must batch equally many directions: the weight has equally many values on all ranks
    forward = torch.func.jacfwd(loss, argnums=1)(x, weight)
    reverse = torch.func.jacrev(loss, argnums=1)(x, weight)
    hessian = torch.func.hessian(lambda w: loss(x, w).sum())(weight)
    leaf = x.clone().requires_grad_()
    dys = torch.eye(2, dtype=torch.float64)
    y = loss(leaf)
    batched = torch.func.vmap(lambda dy: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0])(dys)
    single = [torch.autograd.grad(loss(leaf), leaf, dy)[0] for dy in dys]
    assert distance(forward, reverse) < 1e-12
    assert distance(hessian, torch.diag(6 * loss(x).detach())) < 1e-12
    assert distance(batched, torch.stack(single)) < 1e-12


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 4, 2, 3, 2)], ids=str)
def test_the_output_may_be_changed_in_place(shape):
    """The output may be changed in place, as ReLU(inplace=True) does it, in every memory layout."""
    x, dy = shard(shape, 22), shard(shape, 23)
    for laid in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.repeat_interleave(2, -1)[..., ::2]):
        results = []
        for change in (torch.relu_, torch.relu):
            leaf = laid.clone().requires_grad_()
            y = change(mpisyncbn.sync_batch_norm(leaf, None, None))
            y.backward(dy)
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_changes_of_saved_tensors_are_errors():
    for changed in ("x", "weight"):
        leaves = {
            "x": shard((local_batch(), 3), 24).requires_grad_(),
            "weight": torch.ones(3, requires_grad=True),
        }
        y = mpisyncbn.sync_batch_norm(leaves["x"], None, None, leaves["weight"])
        with torch.no_grad():
            leaves[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_nothing_but_the_input_is_saved():
    sizes = []
    x, weight = shard((local_batch(), 3, 8, 8), 25).requires_grad_(), torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.data_ptr()), t)[1], lambda t: t):
        mpisyncbn.sync_batch_norm(x, None, None, weight, weight)
    assert sizes == [x.data_ptr(), weight.data_ptr()]


def test_vmap_over_the_input_is_refused():
    x = shard((2, local_batch(), 3), 16)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: mpisyncbn.sync_batch_norm(x, None, None))(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_the_statistics_once(use_reentrant, momentum):
    torch.manual_seed(0)
    layer = mpisyncbn.SyncBatchNorm(4, momentum=momentum)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), layer, torch.nn.Tanh())
    checkpointed = copy.deepcopy(plain)
    for step in range(2):
        x = shard((local_batch(), 3), 20 + step).requires_grad_()
        plain(x).sum().square().backward()
        expected, x.grad = x.grad, None
        y = torch.utils.checkpoint.checkpoint(checkpointed, x, use_reentrant=use_reentrant)
        y.sum().square().backward()
        assert torch.equal(x.grad, expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, checkpointed.state_dict()[name]), name
    assert checkpointed[1].num_batches_tracked == 2


def test_two_graphs_backward_in_another_order():
    """Statistics belong to a call, not to the layer: a second one does not disturb the first."""
    layer = mpisyncbn.SyncBatchNorm(3)
    xs = [shard((local_batch(), 3, 4), seed, 5.0 * seed).requires_grad_() for seed in (1, 2)]
    dy = shard(tuple(xs[0].shape), 3)
    ys = [layer(x) for x in xs]
    for y in ys:
        y.backward(dy)
    for x in xs:
        assert distance(x.grad, oracle(x, dy).dx) < 1e-5


def test_expanded_and_transposed_gradients():
    x = shard((local_batch(), 3, 4, 5), 17).requires_grad_()
    expected = oracle(x, torch.ones_like(x)).dx
    mpisyncbn.sync_batch_norm(x, None, None).sum().backward()  # dy is one number, expanded
    assert distance(x.grad, expected, torch.ones(1)) < 1e-5
    dy = shard((5, 4, 3, local_batch()), 18).permute(3, 2, 1, 0)
    x.grad = None
    mpisyncbn.sync_batch_norm(x, None, None).backward(dy)
    assert distance(x.grad, oracle(x, dy).dx) < 1e-5


def test_functional_agrees_with_autograd():
    x, dy = shard((local_batch(), 3, 4), 19), shard((local_batch(), 3, 4), 20)
    leaf = x.clone().requires_grad_()
    y = mpisyncbn.sync_batch_norm(leaf, None, None)
    y.backward(dy)
    same, stats = mpisyncbn.functional.batch_norm_forward(x)
    dx, _, _ = mpisyncbn.functional.batch_norm_backward(dy, x, stats)
    assert isinstance(stats, BatchStats)
    assert torch.equal(same, y.detach())
    assert torch.equal(dx, leaf.grad)
