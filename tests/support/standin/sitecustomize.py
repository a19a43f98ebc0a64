"""Python imports this at its start. operations.py replaces torch's CUDA operations,
and launches.py Triton's launches."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules of this folder, each imported after the module that is its key.
_AFTER = {"torch": "operations", "triton.runtime.interpreter": "launches"}


class _After(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        ours = _AFTER.pop(name, None)
        if ours is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(ours)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("MPISYNCBN_STANDIN") == "values":
    sys.meta_path.insert(0, _After())
