"""What the kernels are compiled for: layout, number formats, tiles, and the launcher that counts.

Nothing here touches a device, so that tests can compile for an architecture that is not at hand.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

LAUNCHES: Counter[str] = Counter()  # kernels launched so far, by name

# Rows and columns of the folded convolution that one tile holds, and what the folds unroll; beyond it cuDNN convolves.
MAX_ROWS = 64
MAX_CHANNELS = 4
MAX_PLACES = 48
MAX_HIDDEN = 64

_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interpreted() -> bool:
    """Triton's interpreter runs the kernels, on CPU tensors. It gets bf16 and fp16 products wrong: use fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiled(options: dict[str, Any]) -> dict[str, Any]:
    """A launch's options with what all kernels are compiled with: multiply-adds fused, whatever Triton's default."""
    return options if interpreted() else {"enable_fp_fusion": True, **options}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    LAUNCHES[kernel.__name__] += 1
    kernel[grid](*args, **compiled(options))


def ceil_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """How planes become rows and columns of the folded convolution; see :mod:`soap_kernels.backends.triton.prepare`."""

    frames: int
    channels: int
    sizes: tuple[int, ...]  # HMEM's tuple sizes, () when it is off or given folded
    hidden: int  # CWEM's, 0 when it is off
    direct: bool  # the convolution's weight is given as it is
    stencil: bool
    normalize: bool

    @property
    def hmem(self) -> bool:
        return bool(self.sizes) or self.direct

    @property
    def conv(self) -> bool:
        return self.hmem or self.stencil

    @property
    def maps(self) -> int:
        return sum(self.frames - o for o in self.sizes)

    @property
    def stencil_group(self) -> int:
        return -1 if not self.stencil else self.channels if self.hmem else 0

    @property
    def groups(self) -> int:
        """JP: channels and stencil, padded."""
        return ceil_power(self.channels + (1 if self.stencil and self.hmem else 0))

    @property
    def padded_frames(self) -> int:
        """TP: tl.dot wants 16 rows at least."""
        return max(ceil_power(self.frames), 16 // self.groups)

    @property
    def padded_channels(self) -> int:
        return ceil_power(self.channels)

    @property
    def column_groups(self) -> int:
        """KQ: channels padded, with a column to spare when frames are normalised on the fly."""
        groups = max(self.padded_channels, 16 // self.padded_frames)
        full = groups == self.channels and self.padded_frames == self.frames
        return 2 * groups if full and self.normalize else groups

    @property
    def one(self) -> int:
        """The column whose input is 1 inside the image and 0 outside: it carries normalisation's shift."""
        if not self.normalize:
            return -1
        return self.frames if self.padded_frames > self.frames else self.channels * self.padded_frames

    @property
    def rows(self) -> int:
        return self.groups * self.padded_frames

    @property
    def columns(self) -> int:
        return self.column_groups * self.padded_frames

    @property
    def taps_numel(self) -> int:
        """What a clip contributes to the gradient of CWEM's folded taps and constants."""
        return self.groups * (4 * self.padded_channels + 1)

    @property
    def fits(self) -> bool:
        return (
            self.rows <= MAX_ROWS
            and self.columns <= MAX_ROWS
            and self.channels <= MAX_CHANNELS
            and self.hidden <= MAX_HIDDEN
            and sum(o + 1 for o in self.sizes) <= MAX_PLACES
        )

    def grid(self) -> dict[str, int]:
        """The layout as constants of a kernel."""
        return {
            "T": self.frames,
            "C": self.channels,
            "TP": self.padded_frames,
            "CP": self.padded_channels,
            "JP": self.groups,
            "KQ": self.column_groups,
        }

    def folds(self) -> dict[str, Any]:
        return {
            "SIZES": self.sizes,
            "MAPS": self.maps,
            "QP": ceil_power(max(self.sizes, default=1) * self.channels),
            "R": self.hidden,
            "RP": ceil_power(max(self.hidden, 1)),
        }

    def finish_programs(self) -> int:
        return 3 + sum((o + 1) * self.channels + self.frames - o + 1 for o in self.sizes)


@dataclass(frozen=True)
class Numbers:
    """How the products are formed. ``split`` 0: one product, 1: the weights' (dz's) low part too, 2: x's as well."""

    split: int
    precision: str  # tl.dot's input_precision
    weights: torch.dtype  # the folded weights', and x's in the products with them
    dz: torch.dtype  # dz's, and x's in the products with it

    @classmethod
    def choose(cls, x: torch.dtype, out: torch.dtype, precision: str) -> Numbers:
        """fp32 by three bf16 products, half precision by one; uint8 is exact in either, so fp32 out needs two."""
        full, bf16 = torch.float32, torch.bfloat16
        if precision == "strict":
            return cls(0, "ieee", full, full)
        if x == torch.uint8:
            if out in (torch.float32, torch.float64):
                return cls(1, "ieee", bf16, bf16)
            return cls(0, "ieee", torch.float16, out)
        if x in (torch.float16, bf16):
            return cls(0, "ieee", x, x)
        return cls(0, "tf32", full, full) if precision == "fast" else cls(2, "ieee", bf16, bf16)

    def stored(self) -> torch.dtype:
        """The dtype the folded weights are kept in."""
        return torch.float32 if interpreted() else self.weights

    def constants(self, dz: bool = False) -> dict[str, Any]:
        kept = torch.float32 if interpreted() else self.dz if dz else self.weights
        return {"SPLIT": self.split, "PRECISION": self.precision, "DT": _TL[kept]}

    @property
    def kind(self) -> str:
        return "ieee" if self.precision == "ieee" and self.weights == torch.float32 else f"{self.precision}{self.split}"


@dataclass(frozen=True)
class Tile:
    """Pixels of a tile, warps of its program, loads in flight, a cap on a thread's registers, columns of halo.

    ``programs``: how many a multiprocessor gets of a kernel whose programs walk runs of tiles; a multiple of what it
    holds at once is best. None: as ``PROGRAMS`` says.
    """

    pixels: int
    warps: int
    stages: int = 1
    registers: int | None = None
    halo: int | None = None  # None: 16 bytes
    programs: int | None = None

    def options(self) -> dict[str, int]:
        cap = {} if self.registers is None or interpreted() else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **cap}


# (kernel, kind of numbers, rows) -> tile, sweep and fuse_dx as fuse unless named. "ieee" is the FMA path, the digit how
# often a product is split. Those of 32 rows for ieee0 and ieee2 were measured on an H100, the others have no spill.
TILES: dict[tuple[str, str, int], Tile] = {
    ("fuse", "ieee", 32): Tile(64, 8),
    ("fuse", "ieee0", 32): Tile(128, 4, 3),
    ("fuse", "ieee1", 32): Tile(128, 4),
    ("fuse", "ieee2", 32): Tile(128, 4, 2),
    ("fuse", "tf320", 32): Tile(128, 4),
    ("sweep", "ieee1", 32): Tile(128, 4, programs=2),
    ("sweep", "ieee2", 32): Tile(64, 4, 2),
    ("weigh", "ieee", 32): Tile(32, 8),
    ("weigh", "ieee0", 32): Tile(64, 8),
    ("weigh", "ieee1", 32): Tile(64, 8),
    ("weigh", "ieee2", 32): Tile(32, 8),
    ("weigh", "tf320", 32): Tile(32, 4),
    ("fuse", "ieee", 64): Tile(32, 8),
    ("fuse", "ieee0", 64): Tile(64, 8),
    ("fuse", "ieee1", 64): Tile(64, 8),
    ("fuse", "ieee2", 64): Tile(64, 8),
    ("fuse", "tf320", 64): Tile(64, 8),
    ("weigh", "ieee", 64): Tile(32, 8),
    ("weigh", "ieee0", 64): Tile(32, 8),
    ("weigh", "ieee1", 64): Tile(32, 8),
    ("weigh", "ieee2", 64): Tile(32, 8),
    ("weigh", "tf320", 64): Tile(32, 8),
}
# Where an architecture (10 * major + minor) wants another: measured better, or the table's spills there.
TILES_OF: dict[int, dict[tuple[str, str, int], Tile]] = {
    80: {
        ("sweep", "tf320", 32): Tile(128, 8),
        ("fuse", "ieee0", 64): Tile(32, 8, 2),
        ("fuse", "ieee2", 64): Tile(32, 8, 2),
    },
    100: {("fuse", "ieee2", 32): Tile(128, 8, 2), ("weigh", "ieee0", 32): Tile(64, 8, registers=128)},
    120: {
        ("fuse", "ieee2", 32): Tile(128, 8, 2),
        ("weigh", "ieee2", 32): Tile(32, 8, registers=240),
        ("fuse", "ieee0", 64): Tile(32, 8, 2),
        ("fuse", "ieee2", 64): Tile(32, 8, 2),
    },
}

PROGRAMS = {"sweep": 6, "weigh": 2}  # a multiprocessor holds 2 or 3 of sweep; each of weigh leaves partial sums


@cache
def tile(kernel: str, numbers: Numbers, layout: Layout, arch: int) -> Tile:
    rows = 64 if max(layout.rows, layout.columns) > 32 else 32
    table = {**TILES, **TILES_OF.get(arch, {})}
    return table.get((kernel, numbers.kind, rows)) or table["fuse", numbers.kind, rows]


@dataclass(frozen=True)
class Cover:
    """How tiles cover a clip's pixels."""

    bh: int
    bw: int
    halo: int
    tiles_h: int
    tiles_w: int

    @property
    def tiles(self) -> int:
        return self.tiles_h * self.tiles_w

    def constants(self) -> dict[str, int]:
        return {"BH": self.bh, "BW": self.bw, "HALO": self.halo}


@cache
def cover(height: int, width: int, tile: Tile, aligned: bool, itemsize: int, conv: bool) -> Cover:
    """The tiles that waste least, of those the tallest, whose rows are read again least.

    ``aligned``: rows start at 16 bytes, which a halo of 16 bytes keeps.
    """
    halo = 0
    if conv:
        halo = (tile.halo or max(4, 8 // max(1, itemsize // 2))) if aligned else 1
    pixels = tile.pixels
    found: tuple[int, Cover] | None = None
    bw = pixels
    while bw >= min(32, pixels):
        bh = pixels // bw
        tiles_w = -(-width // (bw - 2 * halo))
        tiles_h = -(-height // bh)
        cost = tiles_w * tiles_h
        if found is None or cost <= found[0]:
            found = cost, Cover(bh, bw, halo, tiles_h, tiles_w)
        bw //= 2
    assert found is not None
    return found[1]


@cache
def _processors(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def processors(x: Tensor) -> tuple[int, int]:
    """How many multiprocessors x's device has, and its architecture as 10 * major + minor."""
    return _processors(x.device.index or 0) if x.is_cuda else (1, 0)


def chunks(height: int, width: int) -> int:
    """Programs that share a plane's sum."""
    return 4 if height * width >= 16384 else 1


def wide(height: int, width: int, *strides: Sequence[int]) -> bool:
    """Offsets within a plane need 64 bits."""
    spans = [height * width * MAX_CHANNELS, *((height - 1) * abs(s[-2]) + (width - 1) * abs(s[-1]) for s in strides)]
    return max(spans) >= 2**31 - 2**20


def aligned(t: Tensor) -> bool:
    """The compiler can prove t's rows aligned: it knows of each stride whether 16 divides it."""
    return t.stride(-1) == 1 and t.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
