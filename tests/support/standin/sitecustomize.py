"""Read when Python starts: as soon as torch is imported, its CUDA operations are those of operations.py."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            import operations  # noqa: F401

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("MPISYNCBN_STANDIN") == "values":
    sys.meta_path.insert(0, _AfterTorch())
