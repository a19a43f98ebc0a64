"""Make PyPI's torchvision importable with a torch that was built for CPUs only."""

from __future__ import annotations

import torch


def allow() -> None:
    """Let torchvision be imported, if it is installed. timm and Lightning's torchmetrics need it.

    PyPI's torchvision is built for CUDA, and its compiled operators cannot be loaded without it.
    Its Python code, with all models, needs only the schemas of two operators, which this defines.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
