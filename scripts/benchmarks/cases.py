"""The cases that the benchmark measures, and the names of the peers."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

DTYPES = {"float32": 4, "bfloat16": 2}  # the bytes of a value of each dtype
FORMATS = ("contiguous", "channels_last")


class Case(NamedTuple):
    family: str
    shape: tuple[int, ...]  # (N, C, *), on one rank
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


# Each entry is a family, the shape on one rank, and whether --quick keeps it.
LAYERS = [
    ("ResNet-50", (8, 64, 112, 112), True),
    ("ResNet-50", (8, 64, 56, 56), False),
    ("ResNet-50", (8, 256, 56, 56), False),
    ("ResNet-50", (8, 512, 28, 28), True),
    ("ResNet-50", (8, 1024, 14, 14), False),
    ("ResNet-50", (8, 2048, 7, 7), False),
    ("segmentation", (2, 256, 129, 129), False),  # a crop of 513 x 513 pixels, at a quarter of its resolution
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
# Cases of the kernels. The shapes for bfloat16 are larger, so that these tensors have 25 MB too.
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
# Cases with a mask at half density. The tensors have 6 MB or more, in bfloat16 too.
MASKED = [
    ("planes", (16, 64, 56, 56), True),
    ("planes", (16, 1024, 14, 14), False),
    ("ocean-land grid", (4, 3, 512, 512), False),
    ("padded sequences", (64, 64, 1000), True),
    ("points", (16384, 256), False),
]
UNMASKED = "without the mask"
# Cases for the peers that are slow or have to be compiled.
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
SEPARATE = "ours, then torch's"  # activation: our layer, then torch's module
CHANNELS = (1, 16, 64, 128, 256, 512, 1024, 2048)
QUICK_CHANNELS = (64, 128, 512, 2048)

# The kinds of exchange that are compared.
WHOLE = ("merge_moments", "reduce_sums")
MESSAGE = "native message"  # the native call in reduce_sums: it packs, sends, checks and unpacks
BARE = "mpi4py Allreduce"
FLOOR = "C loop"
GATHERS = {f"gather-and-merge, {wire}": wire for wire in ("float64", "float32")}  # dtype on the wire
WITHOUT = "exchange without the watchdog"
AS_TORCH = "gather-and-merge, float32"

Figures = dict[str, float]  # the figures of the slowest rank, by statistic
STATISTICS = ("median", "minimum")


def ratio(of: Figures, to: Figures) -> Figures:
    return {label: of[label] / to[label] for label in STATISTICS if label in of}


# Tensors of 6 MB or more in float32 are large. In bfloat16 the same shapes count.
LARGE_VALUES = 1_500_000
LARGE_VERB_BYTES = 25_000_000


def cases(
    table: list[tuple[str, tuple[int, ...], bool]], quick: bool, dtypes: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[Case]:
    """Yield a case for each dtype, shape of ``table`` and memory format.

    Shapes with fewer than 4 dimensions have no channels_last.
    """
    for dtype in dtypes:
        for family, shape, keep in table:
            if quick and not keep:
                continue
            for memory_format in FORMATS if len(shape) > 3 else FORMATS[:1]:
                yield Case(family, shape, dtype, memory_format)


def verb_cases(quick: bool) -> Iterator[Case]:
    for dtype, table in VERBS.items():
        yield from cases(table, quick, (dtype,))
