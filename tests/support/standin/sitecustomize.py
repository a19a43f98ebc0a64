"""Python imports this at its start. It replaces torch's CUDA operations by operations.py's."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import operations  # noqa: F401

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("MPISYNCBN_STANDIN") == "values":
    sys.meta_path.insert(0, _AfterTorch())
