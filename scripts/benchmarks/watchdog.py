"""Time the cost of the watchdog for an exchange: section watchdog.

The exchange runs in turn with a copy of its code without the lines that tell the watchdog what the
rank is doing. The watchdog's two threads look at that four times a second in both cases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mpisyncbn
from mpisyncbn import exchange
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import kernels_for

from .cases import QUICK_CHANNELS, WITHOUT, ratio
from .timing import interleave, often

_CALLS = 100


def watchdog(quick: bool) -> Iterator[dict[str, Any]]:
    import torch

    group = mpisyncbn.Communicator().ready()
    bare = without_marks()
    for channels in QUICK_CHANNELS:
        x = torch.randn(4, channels, 2)
        vectors = kernels_for(x).local_moments(x)
        peers = {}
        for name, module in (("exchange", exchange), (WITHOUT, bare)):
            call = LayerCall("benchmark", "forward", channels, "float32")
            peers[name] = often(partial(module.merge_moments, group, call, *vectors), _CALLS)
        figures = interleave(peers, 1.0 if quick else 10.0, calls=_CALLS)
        yield {
            "channels": channels,
            "us": figures,
            "ours to": {WITHOUT: ratio(figures["exchange"], figures[WITHOUT])},
        }
    group.free()


def without_marks() -> ModuleType:
    """A copy of mpisyncbn.exchange that does not tell the watchdog what the rank is doing."""
    text, marks = re.subn(r"\b\w+(\.\w+)*\.current_call = .*", "pass", Path(exchange.__file__).read_text())
    if not marks:
        raise RuntimeError("expected exchange.py to say what it is doing, found no such line")
    module = ModuleType(f"{exchange.__name__}_without_marks")
    module.__package__ = exchange.__package__
    exec(compile(text, module.__name__, "exec"), vars(module))
    return module
