"""Random steps of random layers and groups, each compared with the whole batch in float64."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

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

from mpisyncbn import Communicator, new_group, new_subgroups
from mpisyncbn.comm.groups import resolve
from support.activations import ACTIVATIONS, TORCHS, TWO, far_from_kinks
from support.oracle import distance, shard
from support.ranks import WORLD
from support.subject import DTYPES, KINK, TOLERANCE, Subject, autograd_oracle

RANK, SIZE = WORLD.rank, WORLD.size
ONE_VALUE = "expected more than 1 value per channel over the whole group"


def in_step(rule_: Callable[..., None]) -> Callable[..., None]:
    """Let a rule fail on all ranks if it fails on one, with one error from one line.

    Hypothesis then shrinks the same steps on all ranks.
    """

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


class Batch(NamedTuple):
    """The properties of a batch, which all ranks draw alike. Its values differ between ranks."""

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
        "activation": st.sampled_from([None, *ACTIVATIONS, *(TORCHS[each] for each in TWO)]),
        **dict.fromkeys(("affine", "bias", "track_running_stats"), BOOLEANS),
    }
)


class Steps(RuleBasedStateMachine):
    """Two groups, the world and another, and up to four subjects (layers or functions) in them."""

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
            "new_group": lambda: new_group(ranks) or comm,  # ranks outside form a group too
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
        expected = autograd_oracle(subject, comm, x, dy, v, residual)
        dy = dy * far_from_kinks(expected.z, subject.layer.activation, KINK)
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
        alone = layer.running_mean is None  # then it uses this rank's own batch
        # Evaluation is torch's batch norm, which computes coarse moments in half precision.
        exact = subject.dtype if alone else torch.float64
        x = batch._replace(mean=0.0).values(subject, 0, subject.dtype, 2 * alone)
        exchanges = group.exchanges
        y = layer.eval()(x)
        done = group.exchanges - exchanges
        layer.train()
        wide = copy.deepcopy(layer).to(exact)
        vectors = wide.running_mean, wide.running_var, wide.weight, wide.bias
        expected = nn.functional.batch_norm(x.to(exact), *vectors, alone, eps=layer.eps)
        expected = TORCHS[layer.activation](expected)
        after = subject.state()
        assert done == 0
        assert distance(y, expected, 1 + expected.abs()) < TOLERANCE[subject.dtype]
        assert all(torch.equal(before[key], after[key]) for key in before)

    @precondition(lambda self: self.subjects)
    @rule(which=WHICH, how=st.sampled_from(["state_dict", "deepcopy", "revert"]))
    @in_step
    def replace(self, which: int, how: str) -> None:
        """Replace the layer by another one with the same state, and use that from now on."""
        subject, _ = self.subjects[which % len(self.subjects)]
        before = subject.state()
        subject.replace(how)
        after = subject.state()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


def strides(values: Tensor) -> list[int]:
    """Return the strides of the dimensions longer than 1. The others mean nothing."""
    return [stride for stride, length in zip(values.stride(), values.shape, strict=True) if length > 1]


PHASES = settings(stateful_step_count=12, phases=(Phase.generate, Phase.shrink))


def test_any_sequence_of_steps() -> None:
    run_state_machine_as_test(Steps, settings=PHASES)
