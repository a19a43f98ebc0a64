"""Any sequence of steps of any layers in any groups, each step against the whole batch in float64."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, functional, new_group, new_subgroups
from mpisyncbn.communicator import resolve
from support.oracle import distance, shard
from support.ranks import WORLD

RANK, SIZE = WORLD.rank, WORLD.size
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}
ONE_VALUE = "expected more than 1 value per channel over the whole group"
KINK = 0.02  # outputs this near to zero may be rounded to either side of it


def in_step(rule_: Callable[..., None]) -> Callable[..., None]:
    """What fails on one rank fails on all, as one error from one line: so all ranks shrink the same."""

    @functools.wraps(rule_)
    def run(self: Any, **drawn: Any) -> None:
        report = ""
        try:
            rule_(self, **drawn)
        except Exception:
            report = traceback.format_exc()
        reports = [f"on rank {rank}:\n{each}" for rank, each in enumerate(WORLD.allgather(report)) if each]
        if reports:
            raise AssertionError("\n".join(reports))

    return run


class Whole(NamedTuple):
    """Batch norm of a group's whole batch in float64, and this rank's part of it."""

    found: list[Tensor]  # y, its gradients (x, weight, bias, residual), those of sum(dx * v) (x, dy)
    scales: list[Tensor]  # what their errors are measured by
    z: Tensor  # before the activation
    mean: Tensor
    unbiased: Tensor
    count: int

    def check(self, found: list[Tensor | None], tolerance: float) -> None:
        for i, actual in enumerate(found):
            if actual is not None:
                assert distance(actual, self.found[i], self.scales[i]) < tolerance * (1 if i < 5 else 10), i


def whole_batch(subject: Subject, comm: MPI.Comm, *mine: Tensor) -> Whole:
    """Of x, dy, v and the residual. Collective: every rank of ``comm`` must call."""
    layer = subject.layer
    parts = comm.allgather([values.detach().double() for values in mine])
    x, dy, v, residual = (torch.cat(each).requires_grad_() for each in zip(*parts, strict=True))
    dims, view = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    # A row of parameters for each rank: their gradients are those of its own loss.
    sizes = torch.tensor([len(part[0]) for part in parts])
    owner = torch.arange(len(parts)).repeat_interleave(sizes)
    ones = torch.ones(len(parts), layer.num_features).double()
    rows = [
        (ones * default if given is None else ones * given.detach()).requires_grad_()
        for given, default in ((layer.weight, 1.0), (layer.bias, 0.0))
    ]
    weight, bias = (row[owner].reshape(len(x), len(ones[0]), *view[2:]) for row in rows)
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / max(count, 1)
    xmu = x - mean.view(view)
    var = xmu.square().sum(dims) / max(count, 1)
    invstd = (var + layer.eps).rsqrt()
    z = xmu * invstd.view(view) * weight + bias + residual
    y, far = (z.relu(), z.detach().abs() > KINK) if layer.activation else (z, 1.0)
    gradients = torch.autograd.grad(y, (x, *rows, residual), dy * far, create_graph=True)
    second = torch.autograd.grad((gradients[0] * v).sum(), (x, dy), allow_unused=True)
    second = [torch.zeros_like(x) if each is None else each for each in second]
    start = int(sizes[: comm.rank].sum())
    part = slice(start, start + int(sizes[comm.rank]))
    found = [y[part], gradients[0][part], *(each[comm.rank] for each in gradients[1:3]), gradients[3][part]]
    slope = 5 * rows[0].abs().max() * invstd.max()  # of dx by dy
    values = torch.tensor(3.0 * y[part].numel() / len(mean) + 1)
    scales = [1 + y.abs(), slope, values, values, torch.tensor(5.0), 5 * slope * invstd.max(), slope]
    found += [each[part] for each in second]
    return Whole(
        found, scales, z[part].detach(), mean.detach(), var.detach() * (count / max(count - 1, 1)), count
    )


class Subject:
    """A layer, the function or the functions for arrays, with what makes up its state."""

    def __init__(self, kind: str, channels: int, group: Any, options: dict[str, Any]) -> None:
        self.kind, self.group = kind, group
        dtype = DTYPES[options["dtype"]]
        if kind == "numpy" and dtype == torch.bfloat16:
            dtype = torch.float32
        names = ("eps", "momentum", "affine", "track_running_stats", "bias")
        self.layer = SyncBatchNorm(
            channels, process_group=group, dtype=dtype, **{name: options[name] for name in names}
        )
        if kind != "numpy" and options["relu"]:
            self.layer.activation = "relu"
        self.momentum = self.layer.momentum
        if kind != "layer" and self.momentum is None:
            self.momentum = 0.1
        for parameter, start in zip(self.layer.parameters(), (0.5, -0.5), strict=False):
            with torch.no_grad():
                parameter.copy_(torch.linspace(start, start + 1.5, channels))
        self.dtype = dtype

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.layer.state_dict().items()}

    def differentiate(
        self, x: Tensor, dy: Tensor, v: Tensor, residual: Tensor | None, twice: bool
    ) -> list[Tensor | None]:
        """``y`` with its gradients and, if ``twice``, those of ``sum(dx * v)`` with respect to x and dy."""
        layer = self.layer
        inputs = [x, layer.weight, layer.bias, residual]
        x, dy = x.requires_grad_(), dy.requires_grad_(twice)
        wanted = [each for each in inputs if each is not None]
        if residual is not None:
            residual.requires_grad_()
        y = self.forward(x, residual)
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=twice))
        found = [None if each is None else next(gradients) for each in inputs]
        if twice:
            by_x, by_dy = torch.autograd.grad((found[0] * v).sum(), (x, dy))
            found += [by_x, by_dy * (dy != 0)]  # 0 near a kink
        return [y, *found]

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        if self.kind == "layer":
            return layer(x) if residual is None else layer(x, residual)
        return mpisyncbn.sync_batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            momentum=self.momentum,
            eps=layer.eps,
            process_group=self.group,
            activation=layer.activation,
            residual=residual,
        )

    def arrays(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """``y`` and the gradients by functional.py, on NumPy arrays that share the layer's memory."""
        layer = self.layer
        weight, bias = (
            None if each is None else each.detach().numpy() for each in (layer.weight, layer.bias)
        )
        options = {"process_group": self.group}
        y, stats = functional.batch_norm_forward(x.numpy(), weight, bias, eps=layer.eps, **options)
        dx, dweight, dbias = functional.batch_norm_backward(dy.numpy(), x.numpy(), stats, weight, **options)
        if layer.running_mean is not None:
            functional.update_running_stats(
                layer.running_mean.numpy(), layer.running_var.numpy(), stats, self.momentum
            )
        return [torch.from_numpy(each) for each in (y, dx, dweight, dbias)]

    def check_state(self, before: dict[str, Tensor], after: dict[str, Tensor], batch: Whole) -> None:
        enters = batch.count > 1
        batches = after.pop("num_batches_tracked", None)
        if batches is not None:
            assert batches == before["num_batches_tracked"] + (enters and self.kind == "layer")
            momentum = 1 / (before["num_batches_tracked"].item() + 1)
        for name, new in (("running_mean", batch.mean), ("running_var", batch.unbiased)):
            if name in after and enters:
                old = before.pop(name).double()
                weight = momentum if self.momentum is None else self.momentum
                scale = torch.maximum(old.abs().max(), new.abs().max()).clamp_min(1e-3)
                assert distance(after.pop(name), old + weight * (new - old), scale) < TOLERANCE[self.dtype]
        assert all(torch.equal(before[key], value) for key, value in after.items())

    def replace(self, how: str) -> None:
        old = self.layer
        if how == "deepcopy":
            self.layer = copy.deepcopy(old)
        elif how == "state_dict":  # by way of torch's own layer
            flags = old.affine, old.track_running_stats, None, None, self.dtype
            theirs = nn.SyncBatchNorm(
                old.num_features, old.eps, old.momentum, *flags, bias=old.bias is not None
            )
            theirs.load_state_dict(old.state_dict())
            self.layer = copy.deepcopy(old)
            self.layer.reset_parameters()
            self.layer.load_state_dict(theirs.state_dict())
        else:
            activation, old.activation = old.activation, None
            model = mpisyncbn.revert_sync_batchnorm(nn.Sequential(old))
            assert not isinstance(old, SyncBatchNorm)
            mpisyncbn.convert_sync_batchnorm(model, self.group)
            assert type(old) is SyncBatchNorm
            old.activation = activation
        assert resolve(self.layer.process_group) is resolve(self.group)


class Batch(NamedTuple):
    """What all ranks draw alike of a batch whose values differ between them."""

    sizes: list[int]
    inner: list[int]
    seed: int
    mean: float
    layout: str
    residual: bool
    twice: bool
    half: bool

    def values(self, subject: Subject, number: int, dtype: torch.dtype, more: int = 0) -> Tensor:
        shape = (self.sizes[RANK % 4] + more, subject.layer.num_features, *self.inner)
        x = shard(shape, 4 * self.seed + number, 0.0 if number else self.mean, dtype)
        if self.layout == "channels last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if self.layout == "strided":
            return x.repeat_interleave(2, -1)[..., ::2]
        if self.layout == "reversed":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        return x


WHICH, BOOLEANS = st.integers(0, 3), st.booleans()
BATCHES = st.builds(
    Batch,
    sizes=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    inner=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 1000),
    mean=st.sampled_from([0.0, 3.0, 100.0]),
    layout=st.sampled_from(["contiguous", "channels last", "strided", "reversed"]),
    residual=BOOLEANS,
    twice=BOOLEANS,
    half=BOOLEANS,
)
OPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)),
        "momentum": st.sampled_from([0.1, None, 0.0, 1.0]),
        "eps": st.sampled_from([1e-5, 1e-2]),
        **dict.fromkeys(("affine", "bias", "track_running_stats", "relu"), BOOLEANS),
    }
)


class Steps(RuleBasedStateMachine):
    """Two groups, the world and another, and a few subjects, each in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[Any, MPI.Comm]] = []
        self.subjects: list[tuple[Subject, MPI.Comm]] = []

    @initialize(
        kind=st.sampled_from(["Split", "Communicator", "new_group", "new_subgroups"]),
        colours=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    )
    @in_step
    def make_groups(self, kind: str, colours: list[int]) -> None:
        ranks = [rank for rank in range(SIZE) if colours[rank % 4]] or [0]
        divisors = [size for size in range(1, SIZE + 1) if SIZE % size == 0]
        divisor = divisors[colours[0] % len(divisors)]
        comm = {
            "Split": lambda: WORLD.Split(colours[RANK % 4]),
            "Communicator": lambda: WORLD.Split(0, -RANK),
            "new_group": lambda: WORLD.Split(RANK in ranks),
            "new_subgroups": lambda: WORLD.Split(RANK // divisor),
        }[kind]()
        group = {
            "Split": lambda: comm,
            "Communicator": lambda: Communicator(comm),
            "new_group": lambda: new_group(ranks) or comm,  # those outside are a group too
            "new_subgroups": lambda: new_subgroups(divisor),
        }[kind]()
        self.groups = [(None, WORLD), (group, comm)]

    def teardown(self) -> None:
        for group, comm in self.groups[1:]:
            resolve(group).free()
            comm.Free()

    @precondition(lambda self: len(self.subjects) < 4)
    @rule(
        kind=st.sampled_from(["layer", "layer", "function", "numpy"]),
        channels=st.integers(1, 5),
        which=st.integers(0, 1),
        options=OPTIONS,
    )
    @in_step
    def build(self, kind: str, channels: int, which: int, options: dict[str, Any]) -> None:
        group, comm = self.groups[which]
        self.subjects.append((Subject(kind, channels, group, options), comm))

    @precondition(lambda self: self.subjects)
    @rule(which=WHICH, batch=BATCHES)
    @in_step
    def train(self, which: int, batch: Batch) -> None:
        subject, comm = self.subjects[which % len(self.subjects)]
        is_torch, dtype = subject.kind != "numpy", subject.dtype
        if batch.half and dtype == torch.float32 and is_torch:
            dtype = torch.bfloat16
        x, dy, v, residual = (batch.values(subject, i, dtype) for i in range(4))
        if not (batch.residual and is_torch):
            residual = torch.zeros_like(x)
        before = subject.state()
        expected = whole_batch(subject, comm, x, dy, v, residual)
        if subject.layer.activation:
            dy = dy * (expected.z.abs() > KINK)
        problem, found = "", []
        try:
            if is_torch:
                twice = batch.twice and dtype != torch.bfloat16
                found = subject.differentiate(x, dy, v, residual if batch.residual else None, twice)
            else:
                found = subject.arrays(x, dy)
        except ValueError as error:
            problem = str(error)
        after = subject.state()
        states = comm.allgather({key: value.double().tolist() for key, value in after.items()})

        assert all(state == states[0] for state in states), "the same bits on every rank of the group"
        assert (ONE_VALUE in problem) == (expected.count == 1), problem
        subject.check_state(before, after, expected)
        if not problem:
            expected.check(found, TOLERANCE[dtype])
            if x.numel() and batch.layout != "strided":
                for values in found[: 1 if batch.twice else 2]:
                    assert strides(values) == strides(x)

    @precondition(lambda self: self.subjects)
    @rule(which=WHICH, batch=BATCHES)
    @in_step
    def evaluate(self, which: int, batch: Batch) -> None:
        subject, _ = self.subjects[which % len(self.subjects)]
        layer, before, group = subject.layer, subject.state(), resolve(subject.group)
        alone = layer.running_mean is None  # then this rank's own batch decides
        # Evaluation is torch's, whose own moments are coarse in half precision.
        exact = subject.dtype if alone else torch.float64
        x = batch._replace(mean=0.0).values(subject, 0, subject.dtype, 2 * alone)
        exchanges = group.exchanges
        y = layer.eval()(x)
        done = group.exchanges - exchanges
        layer.train()
        wide = copy.deepcopy(layer).to(exact)
        vectors = wide.running_mean, wide.running_var, wide.weight, wide.bias
        expected = nn.functional.batch_norm(x.to(exact), *vectors, alone, eps=layer.eps)
        expected = expected.relu() if layer.activation else expected
        after = subject.state()
        assert done == 0
        assert distance(y, expected, 1 + expected.abs()) < TOLERANCE[subject.dtype]
        assert all(torch.equal(before[key], after[key]) for key in before)

    @precondition(lambda self: self.subjects)
    @rule(which=WHICH, how=st.sampled_from(["state_dict", "deepcopy", "revert"]))
    @in_step
    def replace(self, which: int, how: str) -> None:
        """The layer by one of the same state, which goes on in its place."""
        subject, _ = self.subjects[which % len(self.subjects)]
        before = subject.state()
        subject.replace(how)
        after = subject.state()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


def strides(values: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for stride, length in zip(values.stride(), values.shape, strict=True) if length > 1]


PHASES = settings(stateful_step_count=12, phases=(Phase.generate, Phase.shrink))


def test_any_sequence_of_steps() -> None:
    run_state_machine_as_test(Steps, settings=PHASES)


class Wrong(RuleBasedStateMachine):
    """One rank alone is wrong, and not always on the same line."""

    @rule(number=st.integers(0, 1000))
    @in_step
    def fail(self, number: int) -> None:
        if RANK == SIZE - 1:
            assert number < 500
        if RANK == 0:
            assert number % 7 != 6


def test_a_failure_on_one_rank_is_shrunk_by_all() -> None:
    with pytest.raises(AssertionError, match="on rank") as caught:
        run_state_machine_as_test(Wrong, settings=PHASES)
    same = set(WORLD.allgather(str(caught.value)))
    assert len(same) == 1
