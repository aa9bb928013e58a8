# mypy: disable-error-code=no-untyped-def
"""Stage ``fuse``: the folded convolution, the sigmoids and the sum with x in one pass, and the same for x's gradient.

A tile is rows of columns, a halo of which on either side are read but not written. The three column taps are not three
shifted reads: each aligned row of pixels is multiplied with the weights of all three, and the *products* move by one
column. Reads stay aligned and of 128 bits, and an fp32 pixel is split into two bf16 numbers once per row tap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from soap_kernels.backends import Fusion
from soap_kernels.backends.reference import Prepared as Folded
from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.plan import Frames, Layout, Normalization, Numbers
from soap_kernels.backends.triton.prepare import Prepared, gate_rows, is_plane, sigmoid

JOIN_BLOCK = 1024  # pixels of a program of join, either way


def fuse(
    x: Tensor, y: Tensor, pieces: Prepared, gate: Tensor | None, normalization: Normalization, offset: float,
    layout: Layout, numbers: Numbers,
) -> None:  # fmt: skip
    """Writes y, of any strides."""
    over = plan.cover("fuse", numbers, layout, x)
    plan.launch(
        fuse_kernel, (x.shape[0] * over.tiles,), Frames.of(x), Frames.of(y), pieces, gate, normalization, *x.shape[3:],
        over.across, over.tiles, float(offset), layout=layout, numbers=numbers, block=over.block, **over.options,
    )  # fmt: skip


def fuse_dx(
    x: Tensor, dz: Tensor | None, direct: Tensor, dgate: Tensor | None, pieces: Prepared, layout: Layout,
    numbers: Numbers, gradient: Numbers,
) -> Tensor:  # fmt: skip
    """x's gradient from what sweep left: dz, its direct term and, before CWEM's sigmoid, the gate's gradient."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    over = plan.cover("fuse_dx", gradient, layout, x, dz)
    plan.launch(
        fuse_dx_kernel, (x.shape[0] * over.tiles,), None if dz is None else Frames.of(dz), Frames.of(direct),
        Frames.of(dx), dgate, pieces, *x.shape[3:], over.across, over.tiles,
        layout=layout, numbers=numbers, gradient=gradient, block=over.block, **over.options,
    )  # fmt: skip
    return dx


def join(x: Tensor, z: Tensor | None, p: Folded, fusion: Fusion, y: Tensor) -> None:
    """The epilogue alone, of feature maps: see :class:`soap_kernels.backends.wide.Wide`."""
    clips, frames, channels, height, width = x.shape
    plan.launch(
        join_kernel, (-(-height * width // JOIN_BLOCK), clips * frames), Frames.of(x), z, p.bias, p.gate, Frames.of(y),
        height, width, float(fusion.offset), T=frames, C=channels, PLANES=0 if p.weight is None else frames * channels,
        ROWS=0 if z is None else z.shape[1], MULTIPLICATIVE=fusion.multiplicative, BLOCK=JOIN_BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def multiply(w, low_w, v, low_v, acc, numbers: tl.constexpr):
    """``acc + w v``, each split as ``numbers`` say. Small terms first."""
    if numbers.split == 2:
        acc = tl.dot(w, low_v, acc, input_precision=numbers.precision)
    if numbers.split >= 1:
        acc = tl.dot(low_w, v, acc, input_precision=numbers.precision)
    return tl.dot(w, v, acc, input_precision=numbers.precision)


@triton.jit
def split(v, least: tl.constexpr, numbers: tl.constexpr):
    """``v`` as an operand and, of numbers split so often at least, what that leaves over, also as one."""
    high = v.to(numbers.operand)
    if numbers.split >= least:
        return high, (v - high.to(tl.float32)).to(numbers.operand)
    return high, high


@triton.jit
def load_weights(tap, low: tl.constexpr, numbers: tl.constexpr, stored: tl.constexpr):
    """A tap's weights and their low term, which lies ``low`` behind them, or else is split off here."""
    w = tl.load(tap)
    low_w = w
    if stored.split > 0:
        low_w = tl.load(tap + low)
    elif numbers.split > 0:
        w, low_w = split(w.to(tl.float32), 1, numbers)
    return w, low_w


@triton.jit
def pixel(frames, h, w, layout: tl.constexpr):
    """Where pixel (h, w) lies in a plane."""
    if layout.long_offsets:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return h * frames.row + w * frames.column


@triton.jit
def planes(frames, b, layout: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to clip b's planes in the order of the rows, or columns, of the folded convolution."""
    m = tl.arange(0, ROWS)
    t = (m % layout.padded_frames).to(tl.int64)
    c = (m // layout.padded_frames).to(tl.int64)
    return frames.data + b.to(tl.int64) * frames.clip + t * frames.frame + c * frames.channel


@triton.jit
def dz_rows(dz, b, m, layout: tl.constexpr):
    """Pointers to clip b's rows m of dz, which lie one behind the other."""
    return dz.data + (b.to(tl.int64) * layout.rows + m) * dz.frame


@triton.jit
def load_row(frames, plane, live, h, w, H, W, ONE: tl.constexpr, layout: tl.constexpr):
    """Pixels (h, w) of each plane ``[K, N]``, zero outside the image; column ONE, if any, tells inside from outside."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = pixel(frames, h, w, layout)
    v = tl.load(plane[:, None] + at[None, :], mask=live[:, None] & inside[None, :], other=0)
    if ONE >= 0:
        k = tl.arange(0, plane.shape[0])
        v = tl.where((k == ONE)[:, None], inside[None, :].to(tl.float32), v.to(tl.float32))
    return v


@triton.jit
def convolve(
    frames, b, weights, h, w, H, W, layout: tl.constexpr, numbers: tl.constexpr, stored: tl.constexpr,
    block: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """3x3 convolution of clip b's pixels (h, w), ``[rows, N]``; right where the columns beside a pixel are in the tile.

    ``stored``: how the weights are. FLIP: transposed, from the rows of dz to columns.
    """
    ROWS: tl.constexpr = layout.columns if FLIP else layout.rows
    COLS: tl.constexpr = layout.rows if FLIP else layout.columns
    N: tl.constexpr = block.pixels
    left = tl.zeros((ROWS, N), tl.float32)
    here = tl.zeros((ROWS, N), tl.float32)
    right = tl.zeros((ROWS, N), tl.float32)
    r = tl.arange(0, ROWS)
    q = tl.arange(0, COLS)
    TAP: tl.constexpr = ROWS * COLS
    LOW: tl.constexpr = 9 * TAP
    STEP: tl.constexpr = -TAP if FLIP else TAP
    ONE: tl.constexpr = -1 if FLIP else layout.one
    if FLIP:
        plane = dz_rows(frames, b, q, layout)
        at = weights + 8 * TAP + r[:, None] + q[None, :] * ROWS
        live = q < COLS
    else:
        plane = planes(frames, b, layout, COLS)
        at = weights + r[:, None] * COLS + q[None, :]
        live = is_plane(q, layout)
    for i in tl.range(0, 3, num_stages=block.stages):
        v, low = split(load_row(frames, plane, live, h + (i - 1), w, H, W, ONE, layout), 2, numbers)
        tap = at + i * (3 * STEP)
        first, first_low = load_weights(tap, LOW, numbers, stored)
        left = multiply(first, first_low, v, low, left, numbers)
        second, second_low = load_weights(tap + STEP, LOW, numbers, stored)
        here = multiply(second, second_low, v, low, here, numbers)
        third, third_low = load_weights(tap + 2 * STEP, LOW, numbers, stored)
        right = multiply(third, third_low, v, low, right, numbers)
    return here + move(left, -1, ROWS, N) + move(right, 1, ROWS, N)


@triton.jit
def move(v, by: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Column n of the result is column n + by of ``v``; the outermost stay."""
    n = tl.arange(0, N) + by
    n = tl.minimum(tl.maximum(n, 0), N - 1)
    return tl.gather(v, tl.broadcast_to(n[None, :], (ROWS, N)), 1)


@triton.jit
def tile_pixels(tile, tiles, side, H, W, block: tl.constexpr, DOWN: tl.constexpr = False):
    """The clip of a tile, row and column of each of its pixels, and which of them it writes.

    A clip's ``tiles`` come row by row of ``side`` tiles; DOWN: column by column.
    """
    b = tile // tiles
    if DOWN:
        row = tile % tiles % side
        column = tile % tiles // side
    else:
        row = tile % tiles // side
        column = tile % tiles % side
    n = tl.arange(0, block.pixels)
    h = row * block.height + n // block.width
    w = column * block.step - block.halo + n % block.width
    own = (h < H) & (w < W) & (n % block.width >= block.halo) & (n % block.width < block.width - block.halo)
    return b, h, w, own


@triton.jit
def normalized(v, normalization, layout: tl.constexpr):
    C: tl.constexpr = layout.channels
    c = tl.arange(0, layout.rows) // layout.padded_frames
    factor = tl.zeros((v.shape[0],), tl.float32)
    term = tl.zeros((v.shape[0],), tl.float32)
    for i in tl.static_range(C):
        factor = tl.where(c == i, normalization.scale[i], factor)
        term = tl.where(c == i, normalization.shift[i], term)
    return v * factor[:, None] + term[:, None]


@triton.jit
def conv_sigmoids(x, pieces, b, h, w, H, W, layout: tl.constexpr, numbers: tl.constexpr, block: tl.constexpr):
    """Of the folded convolution of clip b's pixels (h, w), ``[rows, N]``; 0 where no part needs one."""
    M: tl.constexpr = layout.rows
    N: tl.constexpr = block.pixels
    z = tl.zeros((M, N), tl.float32)
    if layout.conv:
        bias = tl.load(pieces.bias + tl.arange(0, M))
        z = convolve(x, b, pieces.folded, h, w, H, W, layout, numbers, numbers, block, False)
        z = sigmoid(z + bias[:, None])
    return z


@triton.jit
def priors(z, gate, layout: tl.constexpr, N: tl.constexpr):
    """From the convolution's sigmoids, ``[rows, N]``, to the sum of the priors of each plane, in the same rows."""
    JP: tl.constexpr = layout.groups
    TP: tl.constexpr = layout.padded_frames
    M: tl.constexpr = layout.rows
    total = z
    if layout.stencil:
        group = tl.arange(0, JP)[:, None, None]
        s = tl.reshape(z, (JP, TP, N))
        shared = tl.sum(tl.where(group == layout.stencil_group, s, 0.0), axis=0)
        if layout.hmem:
            total = tl.reshape(s + shared[None, :, :], (M, N))
        else:
            total = tl.reshape(tl.broadcast_to(shared[None, :, :], (JP, TP, N)), (M, N))
    return total + gate[:, None]


@triton.jit
def clip_gate(gate, pieces, offset, b, pixels, layout: tl.constexpr):
    """``offset`` and clip b's gate in the order of the rows: from CWEM's means and taps, given ``(B, T, C)``, or 0."""
    m = tl.arange(0, layout.rows)
    found = m.to(tl.float32) * 0.0
    if layout.hidden > 0:
        found, _ = gate_rows(pieces, b, pixels, layout)
    if layout.gate:
        t = m % layout.padded_frames
        at = gate + (b.to(tl.int64) * layout.frames + t) * layout.channels + m // layout.padded_frames
        found = tl.load(at, mask=is_plane(m, layout), other=0.0).to(tl.float32)
    return offset + found


@triton.jit(do_not_specialize=["H"])
def fuse_kernel(
    x, y, pieces, gate, normalization, H, W, across, tiles, offset,
    layout: tl.constexpr, numbers: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program writes one tile of y: ``x + (offset + sum of priors)``, or ``x`` times that."""
    M: tl.constexpr = layout.rows
    b, h, w, own = tile_pixels(tl.program_id(0), tiles, across, H, W, block)
    z = conv_sigmoids(x, pieces, b, h, w, H, W, layout, numbers, block)
    g = clip_gate(gate, pieces, offset, b, H.to(tl.float32) * W, layout)
    total = priors(z, g, layout, block.pixels)
    seen = is_plane(tl.arange(0, M), layout)[:, None] & own[None, :]
    v = tl.load(planes(x, b, layout, M)[:, None] + pixel(x, h, w, layout)[None, :], mask=seen, other=0).to(tl.float32)
    if layout.normalize:
        v = normalized(v, normalization, layout)
    v = v * total if layout.multiplicative else v + total
    to = planes(y, b, layout, M)[:, None] + pixel(y, h, w, layout)[None, :]
    tl.store(to, v.to(y.data.dtype.element_ty), mask=seen)


@triton.jit
def mean_gradient(dgate, cwem, b, pixels, layout: tl.constexpr):
    """What reaches a plane's pixels through CWEM's pool, ``[columns]``, from ``dgate[b, rows]`` before its sigmoid."""
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    CP: tl.constexpr = layout.padded_channels
    m = tl.arange(0, layout.columns)
    e = tl.arange(0, 4 * CP)
    t = (m % TP)[:, None] - (e // CP)[None, :] + 1
    c = (e % CP)[None, :]
    ok = is_plane(m, layout)[:, None] & (e // CP < 3)[None, :] & (c < C) & (t >= 0) & (t < layout.frames)
    up = tl.load(dgate + b.to(tl.int64) * layout.rows + c * TP + t, mask=ok, other=0.0)
    taps = tl.load(cwem + c * (3 * C) + (e // CP)[None, :] * C + (m // TP)[:, None], mask=ok, other=0.0)
    return tl.sum(up * taps, axis=1) / pixels


@triton.jit(do_not_specialize=["H"])
def fuse_dx_kernel(
    dz, direct, dx, dgate, pieces, H, W, across, tiles,
    layout: tl.constexpr, numbers: tl.constexpr, gradient: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """x's gradient: ``direct`` plus the transposed convolution of dz plus what comes through CWEM's pool."""
    K: tl.constexpr = layout.columns
    N: tl.constexpr = block.pixels
    b, h, w, own = tile_pixels(tl.program_id(0), tiles, across, H, W, block)
    total = tl.zeros((K, N), tl.float32)
    if layout.conv:
        total = convolve(dz, b, pieces.folded, h, w, H, W, layout, gradient, numbers, block, True)
    if layout.hidden > 0:
        total += mean_gradient(dgate, pieces.cwem, b, H.to(tl.float32) * W, layout)[:, None]
    seen = is_plane(tl.arange(0, K), layout)[:, None] & own[None, :]
    near = planes(direct, b, layout, K)[:, None] + pixel(direct, h, w, layout)[None, :]
    total += tl.load(near, mask=seen, other=0.0).to(tl.float32)
    to = planes(dx, b, layout, K)[:, None] + pixel(dx, h, w, layout)[None, :]
    tl.store(to, total.to(dx.data.dtype.element_ty), mask=seen)


@triton.jit
def frame_pixels(H, W, T: tl.constexpr, BLOCK: tl.constexpr):
    """A program's frame in the batch and in its clip, its pixels, which exist, and how many: of join, either way."""
    frame = tl.program_id(1).to(tl.int64)
    t = frame % T
    area = H.to(tl.int64) * W
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return frame, t, i, i < area, area


@triton.jit(do_not_specialize=["H"])
def join_kernel(
    x, z, bias, gate, y, H, W, offset,
    T: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, MULTIPLICATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes pixels of one frame. z: the convolution without its bias, PLANES' rows, then the stencil's."""
    frame, t, i, seen, area = frame_pixels(H, W, T, BLOCK)
    rows = z if ROWS == 0 else z + frame // T * ROWS * area + i
    shared = tl.zeros((BLOCK,), tl.float32)
    if ROWS > PLANES:
        shared = conv_prior(rows, None, PLANES + t, area, seen)
    shared += offset
    source = x.data + frame // T * x.clip + t * x.frame + i // W * x.row + i % W * x.column
    to = y.data + frame // T * y.clip + t * y.frame + i // W * y.row + i % W * y.column
    for c in tl.range(0, C):
        total = shared
        if PLANES > 0:
            total += conv_prior(rows, bias, t * C + c, area, seen)
        if gate is not None:
            total += tl.load(gate + frame * C + c).to(tl.float32)
        v = tl.load(source, mask=seen, other=0.0).to(tl.float32)
        v = v * total if MULTIPLICATIVE else v + total
        tl.store(to, v.to(y.data.dtype.element_ty), mask=seen)
        source += x.channel
        to += y.channel


@triton.jit
def conv_prior(rows, bias, plane, area, seen):
    """The convolution's prior of one of its rows."""
    v = tl.load(rows + plane * area, mask=seen, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + plane).to(tl.float32)
    return sigmoid(v)
