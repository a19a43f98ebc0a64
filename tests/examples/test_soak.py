"""Tests of scripts/soak.py: it makes the exchanges that it claims, and fails if memory grows.

Runs this short cannot show that memory stays constant.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import soak
from support.ranks import WORLD, together, up_to_two


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take fewer samples, and keep objects of other tests out of counts and collection."""
    monkeypatch.setattr(soak, "_SAMPLES", 3)
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_short_run() -> None:
    cycles = soak.Cycles()
    counted = [group.exchanges for group in cycles.groups]
    cycles.once()
    kinds = [group.exchanges - before for group, before in zip(cycles.groups, counted, strict=True)]
    cycles.free()
    grown = soak.soak(200, warm_up=60)
    with together():
        assert min(kinds) >= 4, "every group has exchanges both ways"
        assert 200 <= grown.exchanges < 200 + sum(kinds)
        assert grown.objects < 100


@pytest.mark.full("hundreds of exchanges")
@up_to_two
@pytest.mark.parametrize("leaks", [True, False])
def test_the_verdict(
    leaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run fails exactly if the last rank keeps 400 KiB and some objects in every cycle."""
    kept = []
    once = soak.Cycles.once

    def keeps(self: object) -> None:
        once(self)
        if WORLD.rank == WORLD.size - 1:
            kept.append([np.ones(400 * 128), *([] for _ in range(100))])

    monkeypatch.setattr(soak, "WARM_UP", 50)
    if leaks:
        monkeypatch.setattr(soak.Cycles, "once", keeps)
    else:
        monkeypatch.setattr(soak, "_resident", lambda: 4096)  # in so short a run memory does not settle
    threads = torch.get_num_threads()
    status = soak.main(["--exchanges", "200"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    with together():
        assert status == int(leaks), "\n".join(lines)
        assert len(lines) == (1 + WORLD.size if WORLD.rank == 0 else 0)
        if WORLD.rank == 0:
            ranks = [line.split() for line in lines[1:]]
            assert [int(words[0]) for words in ranks] == list(range(WORLD.size))
            assert (int(ranks[-1][3]) > soak.LIMIT) == leaks
            assert (int(ranks[-1][4]) > 500) == leaks


def test_memory_is_seen() -> None:
    before = soak._resident()
    block = np.ones(2**23)  # 64 MiB: more than an allocator keeps in reserve
    grown = soak._resident() - before
    with together():
        assert block.sum() == 2**23
        assert 32 * 1024 < grown < 96 * 1024, "some of it, where the system takes other pages meanwhile"


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    few = soak.parse(["--exchanges", "7"]).exchanges, soak.parse([]).exchanges
    with pytest.raises(SystemExit):
        soak.parse(["--exchanges", "0"])
    with together():
        assert few == (7, 100_000)
        assert "--exchanges takes at least 1, got 0" in capsys.readouterr().err
