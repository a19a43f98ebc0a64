"""One rank of a run: ``python -m gpu_checks.worker MODULE.FUNCTION``. Leaves importing torch to the check."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import platform
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from .context import Context
from .records import summary


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("function", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without MPI")
    parser.add_argument("--probe", metavar="DEVICE")
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(options.probe)))
        return 0
    faulthandler.dump_traceback_later(max(options.limit - 5, 1), exit=False)  # says where it hangs
    module, _, name = options.function.partition(".")
    context = Context(options.folder, options.device, options.quick, options.alone)
    try:
        getattr(importlib.import_module(f"gpu_checks.{module}"), name)(context, **options.arguments)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        context.records.holds("ran to its end", False, summary(error))
        if context.size > 1:  # the others would wait for this one
            context.world.Abort(1)
        return 1
    context.records.end()
    return 0


def probe(device: str) -> dict[str, Any]:
    """Device, driver and versions: no host name, no path."""
    from mpisyncbn.__main__ import _versions
    from mpisyncbn.kernels import native

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **_versions(),
    }
    try:
        import torch
    except ImportError as error:
        return {**facts, "devices": [], "why": str(error)}
    facts["native kernels for the host"] = native() is not None
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if device == "cpu":
        return {**facts, "devices": ["cpu"]}
    if not torch.cuda.is_available():
        return {**facts, "devices": []}
    first = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "devices": [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())],
        "driver": _driver(),
        "capability": f"{first.major}.{first.minor}",
        "multiprocessors": first.multi_processor_count,
        "memory, GB": round(first.total_memory / 1e9, 1),
        "L2, MB": round(getattr(first, "L2_cache_size", 0) / 1e6, 1),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not say"


if __name__ == "__main__":
    sys.exit(main())
