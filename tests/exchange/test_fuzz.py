"""An odd value for any argument gives a result, or a documented error that changes nothing."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

import mpisyncbn
from mpisyncbn import Communicator, MPISyncBNError, SyncBatchNorm, distributed, functional
from support.odd_values import Odd, activations, arrays, numbers, objects, tensors
from support.ranks import WORLD, no_exchange, together, up_to_two

RANK, SIZE = WORLD.rank, WORLD.size
DOCUMENTED = (ValueError, TypeError, MPISyncBNError)
# Words of errors that torch's autograd raises for any operation.
TORCHS = (
    "leaf Variable that requires grad",
    "nference tensor",
    "is not differentiable with respect to argument 'running_",
    "more than one element of the written-to tensor",
)
pytestmark = [
    up_to_two,
    pytest.mark.filterwarnings("ignore:a batch whose mean or variance is not finite"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
C, SHAPE = 3, (4, 3, 2)
X, VECTOR = torch.linspace(-2.0, 3.0, 24).reshape(SHAPE), torch.linspace(0.5, 1.5, C)
TENSORS, VECTORS = {**tensors(X), **objects()}, {**tensors(VECTOR), **objects()}
# Masks of other dtypes, and bool masks of odd layouts and shapes, some of them without values.
MASK, ODD_MASKS = X[:, :1] > 0, ["inference", "subclass", "meta", "sparse", "transposed", "strided"]
ODD_MASKS += ["overlapping", "one value for all", "0-d", "1-d", "longer", "more dimensions", "no batch"]
MASKS = {**TENSORS, **{f"bool {key}": tensors(MASK).get(key, lambda: MASK) for key in ODD_MASKS}}
ODD_ARRAYS = (
    "read-only broadcast reversed transposed Fortran subclass masked matrix objects 0-d longer nothing"
)
ARRAY_MASKS = {f"array {key}": arrays(MASK.numpy())[key] for key in ODD_ARRAYS.split()}
ARRAYS, ARRAY_VECTORS = ({**arrays(good.numpy()), **objects()} for good in (X, VECTOR))
MIXED = {**{f"array {k}": v for k, v in arrays(X.numpy()).items()}, **numbers()}
MIXED_VECTORS = {**{f"array {k}": v for k, v in arrays(VECTOR.numpy()).items()}, **numbers()}
GROUPS = {**objects(), **numbers(), **{key: TENSORS[key] for key in ("meta", "1-d")}}
NO_GROUPS = {key: make for key, make in GROUPS.items() if key != "None"}
INPUTS, PARAMETERS = {**TENSORS, **MIXED}, {**VECTORS, **MIXED_VECTORS}
ANYTHING = {**objects(), **numbers(), **tensors(VECTOR)}


def layer(group: Any, **attributes: Any) -> SyncBatchNorm:
    module = SyncBatchNorm(C, process_group=group)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


Keep = Callable[[Any], Any]
Target = Callable[[Any, Any, Keep], Any]


def backward(y: Tensor) -> None:
    if y.requires_grad:
        y.sum().backward()


def by_layer(training: bool, name: str) -> Target:
    def call(group: Any, odd: Any, keep: Keep) -> None:
        module = layer(group, activation="silu").train(training)
        keep(list(module.state_dict().values()))
        backward(module(odd) if name == "input" else module(keep(X.clone()), **{name: odd}))

    return call


def by_attribute(name: str, training: bool) -> Target:
    def call(group: Any, odd: Any, keep: Keep) -> None:
        module = layer(group).train(training)
        if name in ("weight", "bias") and isinstance(odd, Tensor):  # nn.Module's own checks could refuse it
            module._parameters[name] = odd
        else:
            setattr(module, name, odd)
        keep(list(module.state_dict().values()))
        backward(module(X.clone().requires_grad_()))

    return call


def by_constructor(name: str) -> Target:
    def call(group: Any, odd: Any, keep: Keep) -> None:
        module = SyncBatchNorm(**{"num_features": C, "process_group": group, name: odd})
        module(X)

    return call


BY_CHANNEL = ("running_mean", "running_var", "weight", "bias")
ARGUMENTS = {
    "input": lambda: X.clone(),
    **dict.fromkeys(BY_CHANNEL, lambda: VECTOR.clone()),
    "momentum": lambda: 0.1,
    "eps": lambda: 1e-5,
    "activation": lambda: "leaky_relu(-0.2)",
    "residual": lambda: X.clone(),
    "mask": lambda: None,
}


def by_function(name: str, training: bool = True) -> Target:
    def call(group: Any, odd: Any, keep: Keep) -> None:
        arguments = {key: keep(make()) for key, make in ARGUMENTS.items()}
        arguments |= {"training": training, "process_group": group, name: odd}
        backward(mpisyncbn.sync_batch_norm(**arguments))

    return call


def by_arrays(function: str, name: str, is_torch: bool) -> Target:
    """Return a target for a function of functional.py. ``name``: an argument, or stats.FIELD."""

    def call(group: Any, odd: Any, keep: Keep) -> None:
        x, vector = (each.clone() if is_torch else each.numpy().copy() for each in (X, VECTOR))
        _, stats = functional.batch_norm_forward(x, process_group=group)
        options = {"process_group": group}
        arguments = {
            "batch_norm_forward": {"x": x, "weight": vector, "bias": vector, "eps": 1e-5, **options},
            "batch_norm_backward": {"dy": x, "x": x, "stats": stats, "weight": vector, **options},
            "update_running_stats": {
                "running_mean": vector,
                "running_var": vector + 1,
                "stats": stats,
                "momentum": 0.1,
            },
        }[function]
        keep([each for each in arguments.values() if hasattr(each, "ndim")])
        if name.startswith("stats."):
            arguments["stats"] = stats._replace(**{name[6:]: odd})
        else:
            arguments[name] = odd
        getattr(functional, function)(**arguments)

    return call


def by_conversion(group: Any, odd: Any, keep: Keep) -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    try:
        mpisyncbn.convert_sync_batchnorm(model, odd)
    except DOCUMENTED:
        assert type(model[0]) is nn.BatchNorm1d
        raise


def by_group(group: Any, odd: Any, keep: Keep) -> None:
    made = Communicator(odd)
    made.ready().free()


def freeing(make: Callable[..., Any]) -> Target:
    def call(group: Any, odd: Any, keep: Keep) -> None:
        made = make(group, odd)
        if made is not None:
            made.free()

    return call


def by_process_group(group: Any, odd: Any, keep: Keep) -> None:
    comm = group.comm.Dup()
    try:
        made = distributed.ProcessGroup(comm, odd)
    except DOCUMENTED:
        comm.Free()
        raise
    made.barrier()
    made.shutdown()


def barrier(group: Any, odd: Any, keep: Keep) -> None:
    made = distributed.ProcessGroup(group.comm.Dup(), timedelta(seconds=60))
    try:
        distributed.monitored_barrier(made, odd)
    finally:
        made.shutdown()


def joined(group: Any, odd: Any, keep: Keep) -> None:
    with distributed.join(odd):
        pass


def simply(call: Callable[[Any, Any], Any]) -> Target:
    """Return a target for a call that has no other values to check for changes."""
    return lambda group, odd, keep: call(group, odd)


TARGETS: dict[str, tuple[Odd, Target]] = {
    "convert_sync_batchnorm(process_group=)": (GROUPS, by_conversion),
    "convert_sync_batchnorm(module=)": (
        ANYTHING,
        simply(lambda group, odd: mpisyncbn.convert_sync_batchnorm(odd, group)),
    ),
    "revert_sync_batchnorm(module=)": (
        ANYTHING,
        simply(lambda _, odd: mpisyncbn.revert_sync_batchnorm(odd)),
    ),
    "Communicator(comm=)": (GROUPS, by_group),
    "Communicator.message(length=)": (ANYTHING, simply(lambda group, odd: group.message(odd))),
    "new_group(ranks=)": (ANYTHING, freeing(lambda group, odd: mpisyncbn.new_group(odd, group))),
    "new_group(comm=)": (GROUPS, freeing(lambda group, odd: mpisyncbn.new_group([0], odd))),
    "new_subgroups(group_size=)": (ANYTHING, freeing(lambda group, odd: mpisyncbn.new_subgroups(odd, group))),
    "new_subgroups(comm=)": (GROUPS, freeing(lambda group, odd: mpisyncbn.new_subgroups(1, odd))),
    "ProcessGroup(timeout=)": (ANYTHING, by_process_group),
    "ProcessGroup(comm=)": (
        NO_GROUPS,
        simply(lambda _, odd: distributed.ProcessGroup(odd, timedelta(seconds=60))),
    ),
    "init_process_group(comm=)": (NO_GROUPS, simply(lambda _, odd: mpisyncbn.init_process_group(odd))),
    "monitored_barrier(group=)": (ANYTHING, simply(lambda _, odd: distributed.monitored_barrier(odd))),
    "monitored_barrier(timeout=)": (ANYTHING, barrier),
    "join(model=)": (ANYTHING, joined),
}
for mode, training in (("train", True), ("eval", False)):
    for name in ("input", "residual"):
        TARGETS[f"layer, {name}, {mode}"] = INPUTS, by_layer(training, name)
    TARGETS[f"layer, mask, {mode}"] = {**MASKS, **ARRAY_MASKS}, by_layer(training, "mask")
    for name in (*BY_CHANNEL, "num_batches_tracked", "momentum", "eps", "activation", "process_group"):
        TARGETS[f"layer.{name}, {mode}"] = PARAMETERS, by_attribute(name, training)
    for name in (*ARGUMENTS, "process_group"):
        odd = INPUTS if name in ("input", "residual") else MASKS if name == "mask" else PARAMETERS
        TARGETS[f"sync_batch_norm({name}=), {mode}"] = odd, by_function(name, training)
for name in ("eps", "momentum", "process_group", "activation"):
    TARGETS[f"SyncBatchNorm({name}=)"] = ANYTHING, by_constructor(name)
for name, target in TARGETS.items():
    if "activation" in name:
        TARGETS[name] = {**target[0], **activations()}, target[1]
for function, names in {
    "batch_norm_forward": "x weight bias eps process_group mask",
    "batch_norm_backward": "dy x stats stats.mean stats.invstd stats.count weight process_group mask",
    "update_running_stats": "running_mean running_var stats stats.mean stats.var stats.count momentum",
}.items():
    for name in names.split():
        odd = {**VECTORS, **(MASKS if name == "mask" else TENSORS), **numbers()}
        TARGETS[f"{function}({name}=), torch"] = odd, by_arrays(function, name, True)
        odd = {**ARRAY_VECTORS, **(ARRAY_MASKS if name == "mask" else ARRAYS), **numbers()}
        TARGETS[f"{function}({name}=), NumPy"] = odd, by_arrays(function, name, False)


def bits(value: Any) -> Any:
    """Return the contents of a value, to notice changes; None if it is not plain in memory."""
    if isinstance(value, (list, tuple)):
        return [bits(each) for each in value]
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.layout != torch.strided:
            return None
        return (
            value.dtype,
            value.shape,
            value.detach().resolve_conj().resolve_neg().to(torch.complex128).numpy().tobytes(),
        )
    return value.tobytes() if isinstance(value, np.ndarray) else None


def problem_of(call: Target, group: Any, make: Callable[[], Any]) -> str:
    """Return the problem in how ``call`` handles an odd value, or "" if there is none."""
    kept: list[tuple[Any, Any]] = []

    def keep(value: Any) -> Any:
        kept.append((value, bits(value)))
        return value

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd = make()
            call(group, odd, keep)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:150]}"
        if any(bits(value) != before for value, before in kept):
            return f"something changed in spite of {said}"
        if not isinstance(error, DOCUMENTED) and not any(words in str(error) for words in TORCHS):
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{said} ({last.name}, line {last.lineno})"
    return ""


def works(group: Communicator) -> bool:
    y, stats = functional.batch_norm_forward(np.full((2, 3), float(RANK)), process_group=group)
    return y.shape == (2, 3) and stats.count == 2 * group.size


@pytest.mark.parametrize("where", ["alone", "world"])
@pytest.mark.parametrize("target", TARGETS)
def test_odd_arguments(target: str, where: str) -> None:
    """Lone ranks try the values in different orders. The world tries each on all ranks."""
    odd, call = TARGETS[target]
    group = Communicator(MPI.COMM_SELF if where == "alone" else None).ready()
    names = list(odd)
    turn = RANK if where == "alone" else 0
    problems = []
    for name in names[turn:] + names[:turn]:
        problem = problem_of(call, group, odd[name])
        if problem:
            problems.append(f"{name}: {problem}")
        if not works(group):
            problems.append(f"{name}: the group does not work any more")
    group.free()
    with together():
        assert len(names) > 10
        assert not problems, "\n".join(problems)


@no_exchange
@pytest.mark.parametrize("is_torch", [True, False], ids=["torch", "NumPy"])
@pytest.mark.parametrize("length", [0, 1, C - 1, C + 1, 1000])
@pytest.mark.parametrize("name", ["mean", "var", "invstd"])
def test_stats_of_another_length(name: str, length: int, is_torch: bool) -> None:
    """Statistics of another length are refused, because native code would read beyond their end."""
    x, running = (each.clone() if is_torch else each.numpy().copy() for each in (X, VECTOR))
    _, stats = functional.batch_norm_forward(x, process_group=MPI.COMM_SELF)
    odd = np.ones(length)
    wrong = stats._replace(**{name: torch.from_numpy(odd) if is_torch else odd})
    before = bits(running)
    words = rf"expected stats.{name} of {C} channels, got shape \({length},\)"
    if name != "var":
        with pytest.raises(ValueError, match=words):
            functional.batch_norm_backward(x, x, wrong, process_group=MPI.COMM_SELF)
    if name != "invstd":
        with pytest.raises(ValueError, match=words):
            functional.update_running_stats(running, running + 1, wrong, 0.1)
    assert bits(running) == before
