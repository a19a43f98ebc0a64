"""One rank of a part: ``python -m checks.worker JSON``. It imports torch only if the check does."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import traceback
from typing import Any

from .context import Context
from .records import summary


def main() -> int:
    run, device, quick = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(max(run["limit"] - 5, 1), exit=False)  # says where it hangs
    signal.alarm(run["limit"] + 15)  # ends this process if gpu_check, which keeps the limit, was killed
    module, _, name = run["function"].partition(".")
    context = Context(device, quick, alone=run["ranks"] == 0)
    try:
        getattr(importlib.import_module(f"checks.{module}"), name)(context, **run["arguments"])
        _check_transport(context)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        context.records.holds("ran to its end", False, summary(error))
        if context.size > 1:  # the others would wait for this one
            context.world.Abort(1)
        return 1
    context.records.end()
    return 0


def _check_transport(context: Context) -> None:
    """Check that a run with the stream transport had it, not the host's. Collective."""
    if context.on_gpu and os.environ.get("MPISYNCBN_TRANSPORT") == "stream":
        import mpisyncbn

        found = mpisyncbn.Communicator().ready().transport
        if found != "stream":  # a check that holds would make a run that skips all others pass
            context.records.holds("transport", False, found)


def probe(device: str) -> None:
    print(json.dumps(facts(device)))


def facts(device: str) -> dict[str, Any]:
    """Return the devices, the driver and the versions, but no host name and no path."""
    from mpisyncbn.kernels import native
    from mpisyncbn.report import versions

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **versions(),
    }
    try:
        import torch
    except ImportError as error:
        return {**found, "devices": [], "why": str(error)}
    found["native kernels for the host"] = native() is not None
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if device == "cpu":
        return {**found, "devices": ["cpu"]}
    if not torch.cuda.is_available():
        return {**found, "devices": []}
    first = torch.cuda.get_device_properties(0)
    return {
        **found,
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
