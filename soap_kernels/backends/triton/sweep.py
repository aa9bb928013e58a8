# mypy: disable-error-code=no-untyped-def
"""Stage ``sweep``: from x and the incoming gradient to partial sums of the folded weights' gradients, in two launches.

``sweep`` computes the convolution again from x (nothing of it was saved) and leaves dz, the gradient before its
sigmoids; ``weigh`` multiplies dz with x. In one kernel the nine sums and the convolution's would spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from soap_kernels.backends import Fusion
from soap_kernels.backends.reference import Prepared as Folded
from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.fuse import (
    JOIN_BLOCK,
    clip_gate,
    conv_prior,
    conv_sigmoids,
    dz_rows,
    frame_pixels,
    load_row,
    pixel,
    planes,
    priors,
    split,
    tile_pixels,
)
from soap_kernels.backends.triton.plan import Frames, Layout, Numbers
from soap_kernels.backends.triton.prepare import Prepared, is_column, is_plane

ROWS_AT_ONCE = 1024  # entries of a tap up to which a program of weigh has room for all nine


def _new_dz(x: Tensor, layout: Layout, gradient: Numbers) -> tuple[Tensor, int]:
    """dz for every row, ``(B, padded frames, groups, H, W)``, and how many columns on either side of its rows are free.

    At least one, for zeros; rows are aligned as x's are.
    """
    clips, height, width = x.shape[0], *x.shape[3:]
    pad = 8 if width % 16 == 0 else 1
    shape = (clips, layout.groups, layout.padded_frames, height, width + 2 * pad)
    dz = torch.empty(shape, dtype=gradient.stored_gradient, device=x.device)
    return dz.transpose(1, 2)[..., pad : pad + width], pad


def sweep(
    grad: Tensor, x: Tensor, pieces: Prepared, gate: Tensor | None, offset: float, needs_x: bool,
    layout: Layout, numbers: Numbers, gradient: Numbers,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """dz, the gate's gradient by tile ``(B, tiles, rows)`` before its sigmoid, and dx beside the convolution."""
    over = plan.cover("sweep", numbers, layout, x)
    dz, pad = _new_dz(x, layout, gradient) if layout.conv else (None, 0)
    partial_gate = torch.empty(x.shape[0], over.tiles, layout.rows, device=x.device) if layout.gated else None
    direct = torch.empty(x.shape, device=x.device) if needs_x and layout.multiplicative else None
    plan.launch(
        sweep_kernel, (over.programs,), Frames.of(x), Frames.of(grad), pieces, gate,
        None if dz is None else Frames.of(dz), partial_gate, None if direct is None else Frames.of(direct),
        *x.shape[3:], over.down, over.tiles, x.shape[0] * over.tiles, float(offset),
        layout=layout, numbers=numbers, block=over.block, PAD=pad, **over.options,
    )  # fmt: skip
    return dz, partial_gate, grad if direct is None else direct


def weigh(x: Tensor, dz: Tensor, layout: Layout, gradient: Numbers) -> tuple[Tensor, Tensor]:
    """Partial sums for the folded weights ``(programs, 9, rows, columns)`` and for their bias ``(programs, rows)``."""
    over = plan.cover("weigh", gradient, layout, x)
    at_once = 3 if layout.rows * layout.columns <= ROWS_AT_ONCE else 1
    partial = torch.empty(over.programs, 9, layout.rows, layout.columns, device=x.device)
    partial_bias = torch.empty(over.programs, layout.rows, device=x.device)
    plan.launch(
        weigh_kernel, (over.programs, 3 // at_once), Frames.of(x), Frames.of(dz), partial, partial_bias, *x.shape[3:],
        over.down, over.tiles, x.shape[0] * over.tiles,
        layout=layout, numbers=gradient, block=over.block, ROWS_AT_ONCE=at_once, **over.options,
    )  # fmt: skip
    return partial, partial_bias


def join_backward(
    grad: Tensor, x: Tensor, z: Tensor | None, p: Folded, fusion: Fusion, dz: Tensor | None, direct: Tensor | None
) -> Tensor:
    """The sweep's pixelwise half alone, of feature maps: see :class:`soap_kernels.backends.wide.Wide`."""
    clips, frames, channels, height, width = x.shape
    blocks = -(-height * width // JOIN_BLOCK)
    shares = torch.empty(2, clips, frames, channels, blocks, device=x.device)
    plan.launch(
        join_backward_kernel, (blocks, clips * frames), Frames.of(x), Frames.of(grad), z, p.bias, p.gate, dz, direct,
        shares, shares[0].numel(), height, width, float(fusion.offset), T=frames, C=channels,
        PLANES=0 if p.weight is None else frames * channels, ROWS=0 if z is None else z.shape[1],
        MULTIPLICATIVE=fusion.multiplicative, BLOCK=JOIN_BLOCK, num_warps=8,
    )  # fmt: skip
    return shares


@triton.jit
def outer(dz, low_dz, v, low_v, acc, numbers: tl.constexpr):
    """``acc + dz v'`` over the tile's pixels, each split as ``numbers`` say."""
    if numbers.split == 2:
        acc = tl.dot(dz, tl.trans(low_v), acc, input_precision=numbers.precision)
    if numbers.split >= 1:
        acc = tl.dot(low_dz, tl.trans(v), acc, input_precision=numbers.precision)
    return tl.dot(dz, tl.trans(v), acc, input_precision=numbers.precision)


@triton.jit
def run_of_tiles(total):
    """The tiles [first, last) that this program walks, one below the other, so that it meets a halo's rows once."""
    programs = tl.num_programs(0)
    pid = tl.program_id(0).to(tl.int64)
    return (pid * total // programs).to(tl.int32), ((pid + 1) * total // programs).to(tl.int32)


@triton.jit(do_not_specialize=["H"])
def sweep_kernel(
    x, grad, pieces, gate, dz_out, partial_gate, direct, H, W, down, tiles, total_tiles, offset,
    layout: tl.constexpr, numbers: tl.constexpr, block: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """A program walks a run of tiles."""
    JP: tl.constexpr = layout.groups
    TP: tl.constexpr = layout.padded_frames
    M: tl.constexpr = layout.rows
    N: tl.constexpr = block.pixels
    pixels = H.to(tl.float32) * W
    m = tl.arange(0, M)
    first, last = run_of_tiles(total_tiles)
    # What does not depend on the tile is computed again in each: kept, it would fill registers.
    for step in tl.range(0, last - first, num_stages=1, disable_licm=True):
        tile = first + step
        b, h, w, own = tile_pixels(tile, tiles, down, H, W, block, DOWN=True)
        z = conv_sigmoids(x, pieces, b, h, w, H, W, layout, numbers, block)
        seen = is_plane(m, layout)[:, None] & own[None, :]
        at = planes(grad, b, layout, M)[:, None] + pixel(grad, h, w, layout)[None, :]
        up = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        if direct is not None:
            g = clip_gate(gate, pieces, offset, b, pixels, layout)
            near = up * priors(z, g, layout, N)
            tl.store(planes(direct, b, layout, M)[:, None] + pixel(direct, h, w, layout)[None, :], near, mask=seen)
        if layout.multiplicative:
            here = planes(x, b, layout, M)[:, None] + pixel(x, h, w, layout)[None, :]
            up *= tl.load(here, mask=seen, other=0.0).to(tl.float32)
        if layout.gated:
            tl.store(partial_gate + tile.to(tl.int64) * M + m, tl.sum(up, axis=1))
        if layout.conv:
            if layout.stencil:
                group = tl.arange(0, JP)[:, None, None]
                by_group = tl.reshape(up, (JP, TP, N))
                shared = tl.sum(by_group, axis=0)
                up = tl.reshape(tl.where(group == layout.stencil_group, shared[None, :, :], by_group), (M, N))
            dz = up * (z * (1.0 - z))
            # Zeros go beside the image, so that weigh need not ask where a row ends.
            beside = (h < H) & (w >= -PAD) & (w < W + PAD) & ((w < 0) | (w >= W))
            to = dz_rows(dz_out, b, m, layout)[:, None] + pixel(dz_out, h, w, layout)[None, :]
            tl.store(to, dz.to(dz_out.data.dtype.element_ty), mask=(own | beside)[None, :])


@triton.jit(do_not_specialize=["H"])
def weigh_kernel(
    x, dz, partial, partial_bias, H, W, down, tiles, total_tiles,
    layout: tl.constexpr, numbers: tl.constexpr, block: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The folded weights' gradient: a program adds up a run of tiles; ROWS_AT_ONCE 1: the grid's axis 1 is the row.

    dz's rows come three times, one column to the right, in place and to the left, as one operand of 3 (padded: 4) times
    the rows: the three column taps are one product, and warps share its rows out evenly.
    """
    M: tl.constexpr = layout.rows
    K: tl.constexpr = layout.columns
    ONE: tl.constexpr = layout.one
    pid = tl.program_id(0)
    first_row = tl.program_id(1)
    r = tl.arange(0, 4 * M)
    by = 1 - r // M % 3
    k = tl.arange(0, K)
    live = is_plane(k, layout)
    d0 = tl.zeros((4 * M, K), tl.float32)
    d1 = tl.zeros((4 * M, K), tl.float32)
    d2 = tl.zeros((4 * M, K), tl.float32)
    dbias = tl.zeros((4 * M, 16), tl.float32)
    ones = tl.full((block.pixels, 16), 1.0, numbers.operand)
    first, last = run_of_tiles(total_tiles)
    for step in tl.range(0, last - first, num_stages=1):
        tile = first + step
        b, h, w, own = tile_pixels(tile, tiles, down, H, W, block, DOWN=True)
        plane = planes(x, b, layout, K)
        at = dz_rows(dz, b, r % M, layout) + by
        z = tl.load(at[:, None] + pixel(dz, h, w, layout)[None, :], mask=own[None, :], other=0.0)
        z, z_low = split(z, 1, numbers)
        if numbers.split >= 1:
            dbias = tl.dot(z_low, ones, dbias, input_precision=numbers.precision)
        dbias = tl.dot(z, ones, dbias, input_precision=numbers.precision)
        v, low = split(load_row(x, plane, live, h + (first_row - 1), w, H, W, ONE, layout), 2, numbers)
        d0 = outer(z, z_low, v, low, d0, numbers)
        if ROWS_AT_ONCE == 3:
            v, low = split(load_row(x, plane, live, h, w, H, W, ONE, layout), 2, numbers)
            d1 = outer(z, z_low, v, low, d1, numbers)
            v, low = split(load_row(x, plane, live, h + 1, w, H, W, ONE, layout), 2, numbers)
            d2 = outer(z, z_low, v, low, d2, numbers)
    TAPS: tl.constexpr = 3 * M * K
    to = partial + pid.to(tl.int64) * (3 * TAPS) + first_row * TAPS + r[:, None] * K + k[None, :]
    kept = (r < 3 * M)[:, None] & is_column(k, layout)[None, :]
    tl.store(to, d0, mask=kept)
    if ROWS_AT_ONCE == 3:
        tl.store(to + TAPS, d1, mask=kept)
        tl.store(to + 2 * TAPS, d2, mask=kept)
    if first_row == 0:
        column = tl.arange(0, 16)
        bias_to = partial_bias + pid * M + r[:, None] - M + column[None, :]
        tl.store(bias_to, dbias, mask=(r // M == 1)[:, None] & (column == 0)[None, :])


@triton.jit(do_not_specialize=["H"])
def join_backward_kernel(
    x, grad, z, bias, gate, dz, direct, shares, shares_numel, H, W, offset,
    T: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, MULTIPLICATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes pixels of one frame, from z to dz, in z's rows."""
    frame, t, i, seen, area = frame_pixels(H, W, T, BLOCK)
    base = frame // T * ROWS * area + i
    shared = tl.zeros((BLOCK,), tl.float32)
    gathered = tl.zeros((BLOCK,), tl.float32)
    if ROWS > PLANES:
        shared = conv_prior(z + base, None, PLANES + t, area, seen)
    source = x.data + frame // T * x.clip + t * x.frame + i // W * x.row + i % W * x.column
    incoming = grad.data + frame // T * grad.clip + t * grad.frame + i // W * grad.row + i % W * grad.column
    for c in tl.range(0, C):
        up = tl.load(incoming, mask=seen, other=0.0).to(tl.float32)
        near = up
        total = shared
        s = shared
        if PLANES > 0:
            s = conv_prior(z + base, bias, t * C + c, area, seen)
            total = shared + s
        if MULTIPLICATIVE:
            if gate is not None:
                total += tl.load(gate + frame * C + c).to(tl.float32)
            near = up * (offset + total)
            up *= tl.load(source, mask=seen, other=0.0).to(tl.float32)
        if direct is not None:
            tl.store(direct + (frame * C + c) * area + i, near, mask=seen)
        share = shares + (frame * C + c) * tl.num_programs(0) + tl.program_id(0)
        tl.store(share, tl.sum(up, axis=0))
        if PLANES > 0:
            d = up * (s * (1.0 - s))
            tl.store(dz + base + (t * C + c) * area, d.to(dz.dtype.element_ty), mask=seen)
            tl.store(share + shares_numel, tl.sum(d, axis=0))
        gathered += up
        source += x.channel
        incoming += grad.channel
    if ROWS > PLANES:
        d = gathered * (shared * (1.0 - shared))
        tl.store(dz + base + (PLANES + t) * area, d.to(dz.dtype.element_ty), mask=seen)
