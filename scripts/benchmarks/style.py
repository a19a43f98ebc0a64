"""The common style of all pictures.

Each colour has one meaning. Letters have 9 points or more on a page of 700 pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The main colours are from Okabe and Ito's palette, which colour-blind people can tell apart. In
# grey they differ too.
OURS, OURS_LIGHT = "#0072B2", "#8CC4E6"
LOCAL = "#E69F00"  # torch's local batch norm
TORCH_SYNC = "#D55E00"  # torch.nn.SyncBatchNorm, and exchanges made as it does
MPI = "#3C3C3C"  # MPI alone, called from C
MODEL = "#EAF5F0"  # the background of figures that a model computed
WHOLE_BATCH = "#C4C4C4"  # batch norm of all samples in one process
GREY, FAINT = "#5A5A5A", "#DDDDDD"
WIDTH = 7.3  # inches: 700 pixels of a browser

_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "svg.hashsalt": "mpisyncbn",  # the same picture has the same bytes
}


def figure(height: float) -> Figure:
    """Make an empty figure, as wide as a page and ``height`` inches high. It needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(_SETTINGS)
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def save(picture: Figure, path: Path, source: object = None) -> None:
    """Write the picture as SVG, with the fingerprint of ``source``, or as PNG of 64 colours."""
    if path.suffix == ".svg":
        about = {"Date": None, "Creator": "scripts/pictures", "Description": fingerprint(source)}
        picture.savefig(path, metadata=about)
        return
    from io import BytesIO

    from PIL import Image

    drawn = BytesIO()
    picture.savefig(drawn, format="png", dpi=192)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def fingerprint(source: Any) -> str:
    """A short text that changes if the data of a picture change."""
    return "data " + hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
