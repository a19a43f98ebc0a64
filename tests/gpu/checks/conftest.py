"""The options of scripts/gpu_check. pytest has them only if its command line names this folder."""

from __future__ import annotations

import argparse
from typing import Any

from . import launch, points, report

NO_GPU = 3


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--only", type=_numbers, metavar="POINTS", default=points.NUMBERS)
    parser.addoption("--quick", action="store_true")
    parser.addoption("--tune", action="store_true")
    parser.addoption("--output", metavar="PATH")
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda")  # cpu: to try this without a GPU


def pytest_cmdline_main(config: Any) -> int | None:
    config.option.only = [points.TUNE] if config.option.tune else config.option.only
    facts = launch.probe(config.option.device)
    if not facts.get("devices"):
        print(f"gpu_check: no GPU here that torch can use ({facts.get('why', 'torch finds none')})")
        return NO_GPU
    config.pluginmanager.register(report.Report(facts, config.option), "gpu_check")
    return None


def _numbers(text: str) -> list[int]:
    if not set(text.split(",")) <= set(map(str, points.NUMBERS)):
        numbers = ",".join(map(str, points.NUMBERS))
        raise argparse.ArgumentTypeError(f"expected some of {numbers}, got {text}")
    return sorted(set(map(int, text.split(","))))
