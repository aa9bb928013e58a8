"""What the kernels are compiled for: layout, number formats, tiles; what they are handed; and the launcher that counts.

The folded convolution of 8 frames of 3 channels as :class:`Layout` has it, TP = ``padded_frames`` = 8:

    columns        0..7        8..15       16..23      24..31
    of frame u     channel 0   channel 1   channel 2   column 24 (``one``): normalisation's shift; padding
    rows        +-----------+-----------+-----------+-----------+
     0..7       |  HMEM's prior of channel 0, frame t           |
     8..15      |  HMEM's prior of channel 1, frame t           |   row j * TP + t, column c * TP + u
    16..23      |  HMEM's prior of channel 2, frame t           |
    24..31      |  3DEM's prior of frame t (``stencil_group``)  |
                +-----------------------------------------------+

A kernel takes :class:`Layout`, :class:`Numbers` and :class:`Block` whole, as ``tl.constexpr``, and reads their fields
and properties. Triton 3.6, the oldest served, lets a number into a tuple, such as a shape, only by a name that is bound
as ``tl.constexpr``, and hands no string or tuple on to a function: those are read where they are used. ``static_range``
wants a bound name too.

Nothing here touches a device, so that tests can compile for an architecture that is not at hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors
from soap_kernels.backends.triton import interpreted

LAUNCHES: Counter[str] = Counter()  # stages launched so far, by name

# Rows and columns of the folded convolution that one tile holds, and what the folds unroll; beyond it cuDNN convolves.
MAX_ROWS = 64
MAX_CHANNELS = 4
MAX_PLACES = 48
MAX_HIDDEN = 64

_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def stage_of(kernel: Any) -> str:
    return str(kernel.__name__).removesuffix("_kernel")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Multiply-adds are fused, whatever Triton's default."""
    LAUNCHES[stage_of(kernel)] += 1
    kernel[grid](*args, **({} if interpreted() else {"enable_fp_fusion": True}), **options)


def ceil_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Frames(NamedTuple):
    """Planes as a kernel takes them: where they begin and, in elements, how far apart neighbours are."""

    data: Any  # the tensor; in a kernel a pointer
    clip: int
    frame: int
    channel: int
    row: int
    column: int

    @classmethod
    def of(cls, t: Tensor) -> Frames:
        return cls(t, *t.stride())


class Normalization(NamedTuple):
    """``x * scale + shift`` by channel, from uint8 to normalised frames."""

    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None

    @classmethod
    def of(cls, options: Options) -> Normalization:
        if options.mean is None or options.std is None:
            return cls()
        pairs = list(zip(options.mean, options.std, strict=True))
        return cls(tuple(1 / (255 * s) for _, s in pairs), tuple(-m / s for m, s in pairs))


class Constants:
    """Base of what kernels read as constants."""

    @property
    def cache_key(self) -> str:
        """Tells Triton's cache on disk what the properties say too: it outlives a change of theirs."""
        properties = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        return f"{self} {[(name, getattr(self, name)) for name in properties]}"


@dataclass(frozen=True)
class Layout(Constants):
    """How planes become rows and columns of the folded convolution, as drawn above, and what is joined to them."""

    frames: int
    channels: int
    chunks: int  # programs that share a plane's sum
    long_offsets: bool  # offsets within a plane need 64 bits
    sizes: tuple[int, ...] = ()  # HMEM's tuple sizes, () when it is off or given folded
    hidden: int = 0  # CWEM's, 0 when it is off
    stencil: bool = False
    normalize: bool = False
    direct: bool = False  # the convolution's weight is given as it is
    gate: bool = False  # given as it is
    multiplicative: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, x: Tensor, options: Options, hidden: int, *others: Tensor) -> Layout:
        """For ``soap``; ``others``: what the kernels read of x's shape besides."""
        return cls(
            *_extent(x, *others),
            sizes=options.tuple_sizes if "hmem" in options.parts else (),
            hidden=hidden if "cwem" in options.parts else 0,
            stencil="3dem" in options.parts,
            normalize=options.mean is not None,
        )

    @classmethod
    def of_priors(cls, x: Tensor, priors: Priors, fusion: Fusion, *others: Tensor) -> Layout:
        return cls(
            *_extent(x, *others),
            stencil=priors.stencil is not None,
            direct=priors.weight is not None,
            gate=priors.gate is not None,
            multiplicative=fusion.multiplicative,
            interleaved=fusion.interleaved,
        )

    @property
    def hmem(self) -> bool:
        return bool(self.sizes) or self.direct

    @property
    def conv(self) -> bool:
        return self.hmem or self.stencil

    @property
    def gated(self) -> bool:
        return self.gate or self.hidden > 0

    @property
    def maps(self) -> int:
        return sum(self.frames - o for o in self.sizes)

    @property
    def stencil_group(self) -> int:
        return -1 if not self.stencil else self.channels if self.hmem else 0

    @property
    def groups(self) -> int:
        """Channels and stencil, padded."""
        return ceil_power(self.channels + (1 if self.stencil and self.hmem else 0))

    @property
    def padded_frames(self) -> int:
        """tl.dot wants 16 rows at least."""
        return max(ceil_power(self.frames), 16 // self.groups)

    @property
    def padded_channels(self) -> int:
        return ceil_power(self.channels)

    @property
    def padded_planes(self) -> int:
        """Of the largest tuple."""
        return ceil_power(max(self.sizes, default=1) * self.channels)

    @property
    def padded_hidden(self) -> int:
        return ceil_power(max(self.hidden, 1))

    @property
    def column_groups(self) -> int:
        """Channels padded, with a column to spare when frames are normalised on the fly."""
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


def _extent(x: Tensor, *others: Tensor) -> tuple[int, int, int, bool]:
    """The first fields of a layout."""
    frames, channels, height, width = x.shape[1:]
    return frames, channels, 4 if height * width >= 16384 else 1, long_offsets(x, *others)


@dataclass(frozen=True)
class Numbers(Constants):
    """How products are formed. ``split`` 0: one product, 1: the weights' (dz's) low term too, 2: x's as well."""

    split: int
    precision: str  # tl.dot's input_precision
    dtype: torch.dtype

    @classmethod
    def of_frames(cls, x: torch.dtype, out: torch.dtype, precision: str) -> Numbers:
        """fp32 by three bf16 products, half precision by one; uint8 is exact in either, so fp32 out needs two."""
        if precision == "strict":
            return cls(0, "ieee", torch.float32)
        if x == torch.uint8:
            return cls(1, "ieee", torch.bfloat16) if out == torch.float32 else cls(0, "ieee", torch.float16)
        if x in (torch.float16, torch.bfloat16):
            return cls(0, "ieee", x)
        return cls(0, "tf32", torch.float32) if precision == "fast" else cls(2, "ieee", torch.bfloat16)

    @classmethod
    def of_gradient(cls, x: torch.dtype, out: torch.dtype, precision: str, multiplicative: bool) -> Numbers:
        """Of products with dz, whose range is fp16's only where fp16 gradients are not multiplied by anything large.

        There dz sums at most ``MAX_CHANNELS`` of them times s (1 - s), which is 1/4 at most.
        """
        if precision == "strict" or x in (torch.float32, torch.bfloat16):
            return cls.of_frames(x, out, precision)
        if out == torch.float16 and not multiplicative:
            return cls(0, "ieee", torch.float16)
        if x == torch.float16:
            return cls(2, "ieee", torch.bfloat16)
        return cls(0, "ieee", out) if out == torch.bfloat16 else cls.of_frames(x, out, precision)

    @property
    def stored(self) -> torch.dtype:
        """The dtype that folded weights are kept in."""
        return torch.float32 if interpreted() else self.dtype

    @property
    def stored_gradient(self) -> torch.dtype:
        """The dtype that dz is kept in."""
        return torch.float32 if self.split else self.dtype

    @property
    def operand(self) -> tl.dtype:
        """What tl.dot multiplies."""
        return _TL[self.stored]

    @property
    def kind(self) -> str:
        return "ieee" if self.precision == "ieee" and self.dtype == torch.float32 else f"{self.precision}{self.split}"


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
class Block(Constants):
    """The pixels of a tile: rows of columns, ``halo`` of which on either side are read but not written."""

    height: int
    width: int
    halo: int
    stages: int  # loads in flight

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def step(self) -> int:
        """Columns from one tile to the next."""
        return self.width - 2 * self.halo


@dataclass(frozen=True)
class Cover:
    """How tiles cover a clip's pixels, and how a kernel is launched on them."""

    block: Block
    down: int
    across: int
    programs: int  # how many share all clips' tiles when each walks a run of them
    options: dict[str, int]

    @property
    def tiles(self) -> int:
        return self.down * self.across


@cache
def blocks(height: int, width: int, tile: Tile, halo: int) -> tuple[Block, int, int]:
    """The tiles that waste least, of those the tallest, whose rows are read again least; how many down and across."""
    found: tuple[Block, int, int] | None = None
    bw = tile.pixels
    while bw >= min(32, tile.pixels):
        block = Block(tile.pixels // bw, bw, halo, tile.stages)
        down, across = -(-height // block.height), -(-width // block.step)
        if found is None or down * across <= found[1] * found[2]:
            found = block, down, across
        bw //= 2
    assert found is not None
    return found


def cover(kernel: str, numbers: Numbers, layout: Layout, x: Tensor, of: Tensor | None = None) -> Cover:
    """For the frames x; ``of``: what the kernel reads with a halo, x unless given.

    Rows that start at 16 bytes get a halo of 16 bytes, which keeps them so.
    """
    seen = x if of is None else of
    count, arch = processors(x)
    chosen = tile(kernel, numbers, layout, arch)
    halo = 0
    if layout.conv and kernel != "weigh":
        halo = (chosen.halo or max(4, 8 // max(1, seen.element_size() // 2))) if aligned(seen) else 1
    block, down, across = blocks(x.shape[3], x.shape[4], chosen, halo)
    programs = min(x.shape[0] * down * across, (chosen.programs or PROGRAMS.get(kernel, 1)) * count)
    return Cover(block, down, across, programs, chosen.options())


@cache
def _processors(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def processors(x: Tensor) -> tuple[int, int]:
    """How many multiprocessors x's device has, and its architecture as 10 * major + minor."""
    return _processors(x.device.index or 0) if x.is_cuda else (1, 0)


def long_offsets(*frames: Tensor) -> bool:
    """Offsets within a plane need 64 bits."""
    height, width = frames[0].shape[-2:]
    spans = [(height - 1) * abs(t.stride(-2)) + (width - 1) * abs(t.stride(-1)) for t in frames]
    return max(height * width * MAX_CHANNELS, *spans) >= 2**31 - 2**20


def aligned(t: Tensor) -> bool:
    """The compiler can prove t's rows aligned: it knows of each stride whether 16 divides it."""
    return t.stride(-1) == 1 and t.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
