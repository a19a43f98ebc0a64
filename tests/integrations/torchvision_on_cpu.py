"""Lets PyPI's torchvision be imported beside a torch for CPUs alone."""

from __future__ import annotations

import torch


def allow() -> None:
    """Import torchvision, where it is installed. timm needs it, and torchmetrics, which Lightning needs.

    PyPI's is built for CUDA, and its compiled operators cannot be loaded without. All that its Python,
    and so each of its models, asks of them at import are the schemas of two.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
