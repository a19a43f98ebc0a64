"""What is measured, as data."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

DTYPES = {"float32": 4, "bfloat16": 2}  # and the bytes of a value
FORMATS = ("contiguous", "channels_last")


class Case(NamedTuple):
    family: str
    shape: tuple[int, ...]  # of one rank, (N, C, *)
    dtype: str
    format: str

    @property
    def values(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.values * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.format}"


# Family, shape of one rank, whether --quick keeps it.
LAYERS = [
    ("ResNet-50", (8, 64, 112, 112), True),
    ("ResNet-50", (8, 64, 56, 56), False),
    ("ResNet-50", (8, 256, 56, 56), False),
    ("ResNet-50", (8, 512, 28, 28), True),
    ("ResNet-50", (8, 1024, 14, 14), False),
    ("ResNet-50", (8, 2048, 7, 7), False),
    ("segmentation", (2, 256, 129, 129), False),  # a crop of 513, at a quarter of its resolution
    ("segmentation", (2, 48, 129, 129), True),
    ("3-D U-Net", (1, 32, 64, 64, 64), True),
    ("3-D U-Net", (2, 128, 16, 32, 32), False),
    ("1-D", (16, 128, 4096), True),
    ("1-D", (8192, 256), False),
]
TINY = [
    ("tiny", (2, 64, 8, 8), True),
    ("tiny", (4, 256, 4, 4), False),
    ("tiny", (32, 128), False),
]
# Larger for bfloat16, so that these too have 25 MB.
VERBS = {
    "float32": [
        ("ResNet-50", (8, 64, 112, 112), True),
        ("ResNet-50", (8, 256, 56, 56), False),
        ("segmentation", (2, 256, 129, 129), False),
        ("3-D U-Net", (1, 32, 64, 64, 64), False),
        ("1-D", (16, 128, 4096), False),
    ],
    "bfloat16": [
        ("ResNet-50", (16, 64, 112, 112), False),
        ("segmentation", (4, 256, 129, 129), False),
    ],
}
# With a mask at half density: 6 MB and more in bfloat16 too.
MASKED = [
    ("planes", (16, 64, 56, 56), True),
    ("planes", (16, 1024, 14, 14), False),
    ("ocean-land grid", (4, 3, 512, 512), False),
    ("padded sequences", (64, 64, 1000), True),
    ("points", (16384, 256), False),
]
UNMASKED = "without the mask"
# Beside the slow peers and those that have to be compiled.
PEERS = [
    Case("ResNet-50", (8, 64, 112, 112), "float32", "contiguous"),
    Case("ResNet-50", (8, 512, 28, 28), "float32", "contiguous"),
    Case("ResNet-50", (8, 512, 28, 28), "float32", "channels_last"),
    Case("tiny", (2, 64, 8, 8), "float32", "contiguous"),
    Case("tiny", (2, 64, 8, 8), "float32", "channels_last"),
]
RELU = [("ResNet-50", (8, 64, 112, 112), True), ("ResNet-50", (8, 512, 28, 28), False)]
# The levels of a 3-D U-Net for patches of 64 x 64 x 64.
MEMORY = [
    ("3-D U-Net", (1, 32, 64, 64, 64), True),
    ("3-D U-Net", (1, 64, 32, 32, 32), True),
    ("3-D U-Net", (1, 128, 16, 16, 16), False),
]
SEPARATE = "ours, then torch's"  # activation
CHANNELS = (1, 16, 64, 128, 256, 512, 1024, 2048)
QUICK_CHANNELS = (64, 128, 512, 2048)

# Peers of an exchange.
WHOLE = ("merge_moments", "reduce_sums")
MESSAGE = "native message"  # what merge_moments and reduce_sums call: pack, send, check, unpack
BARE = "mpi4py Allreduce"
FLOOR = "C loop"
GATHERS = {f"gather-and-merge, {wire}": wire for wire in ("float64", "float32")}  # dtype on the wire
WITHOUT = "exchange without the watchdog"
AS_TORCH = "gather-and-merge, float32"

Figures = dict[str, float]  # by statistic, of the slowest rank
STATISTICS = ("median", "minimum")


def ratio(of: Figures, to: Figures) -> Figures:
    return {label: of[label] / to[label] for label in STATISTICS if label in of}


# "6 MB or more" is said of float32; in bfloat16 the same shapes count.
LARGE_VALUES = 1_500_000
LARGE_VERB_BYTES = 25_000_000


def cases(
    table: list[tuple[str, tuple[int, ...], bool]], quick: bool, dtypes: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[Case]:
    """Every dtype and memory format of the shapes in ``table``; channels_last for images only."""
    for dtype in dtypes:
        for family, shape, keep in table:
            if quick and not keep:
                continue
            for memory_format in FORMATS if len(shape) > 3 else FORMATS[:1]:
                yield Case(family, shape, dtype, memory_format)


def verb_cases(quick: bool) -> Iterator[Case]:
    for dtype, table in VERBS.items():
        yield from cases(table, quick, (dtype,))
