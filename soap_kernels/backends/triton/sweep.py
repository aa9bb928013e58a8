# mypy: disable-error-code=no-untyped-def
"""Stage ``sweep``: from x and the incoming gradient to partial sums of the folded weights' gradients, in two launches.

``sweep`` computes the convolution again from x (nothing of it was saved) and leaves dz; ``weigh`` multiplies dz with x.
In one kernel the nine sums and the convolution's would spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soap_kernels.backends.triton.fuse import clip_gate, convolve, load_row, priors, row_planes, split, tile_pixels
from soap_kernels.backends.triton.prepare import is_column, sigmoid


@triton.jit
def outer(dz, low_dz, v, low_v, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + dz v'`` over the tile's pixels; SPLIT 1: dz has a low part, 2: v has one too."""
    if SPLIT == 2:
        acc = tl.dot(dz, tl.trans(low_v), acc, input_precision=PRECISION)
    if SPLIT >= 1:
        acc = tl.dot(low_dz, tl.trans(v), acc, input_precision=PRECISION)
    return tl.dot(dz, tl.trans(v), acc, input_precision=PRECISION)


@triton.jit
def halves(v, SPLIT: tl.constexpr, DT: tl.constexpr):
    """dz as ``DT`` and, if it is to be split, what that leaves over."""
    high = v.to(DT)
    if SPLIT >= 1:
        return high, (v - high.to(tl.float32)).to(DT)
    return high, high


@triton.jit
def run_of_tiles(total):
    """The tiles [first, last) that this program walks, one below the other, so that it meets a halo's rows once."""
    programs = tl.num_programs(0)
    pid = tl.program_id(0).to(tl.int64)
    return (pid * total // programs).to(tl.int32), ((pid + 1) * total // programs).to(tl.int32)


@triton.jit(do_not_specialize=["H"])
def sweep(
    x, grad, folded, folded_bias, gate, means, cwem, dz_out, partial_gate, direct,
    sB, sT, sC, sH, sW, gB, gT, gC, gH, gW, H, W, pitch, tiles_h, tiles, total_tiles, offset,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    CONV: tl.constexpr, HMEM: tl.constexpr, GATE: tl.constexpr, STENCIL_GROUP: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, ONE: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
    STORE_DIRECT: tl.constexpr, PAD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From x and the incoming gradient to dz, the gradient before the convolution's sigmoids; a program takes a run."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    N: tl.constexpr = BH * BW
    pixels = H.to(tl.float32) * W
    area = H.to(tl.int64) * W
    m = tl.arange(0, M)
    first, last = run_of_tiles(total_tiles)
    # What does not depend on the tile is computed again in each: kept, it would fill registers.
    for step in tl.range(0, last - first, num_stages=1, disable_licm=True):
        tile = first + step
        b = tile // tiles
        h, w, own = tile_pixels(tile % tiles % tiles_h, tile % tiles // tiles_h, H, W, BH, BW, HALO)
        z = tl.zeros((M, N), tl.float32)
        if CONV:
            bias = tl.load(folded_bias + m)
            plane, live = row_planes(x, b, sB, sT, sC, T, C, TP, K)
            z = convolve(
                plane, live, folded, h, w, H, W, sH, sW, M, K, N, K, 1, False, SPLIT, PRECISION, DT, ONE, WIDE, STAGES
            )  # fmt: skip
            z = sigmoid(z + bias[:, None])
        row, real = row_planes(grad, b, gB, gT, gC, T, C, TP, M)
        seen = real[:, None] & own[None, :]
        at = h * gH + w * gW
        to = h * W + w
        if WIDE:
            at = h.to(tl.int64) * gH + w.to(tl.int64) * gW
            to = h.to(tl.int64) * W + w
        up = tl.load(row[:, None] + at[None, :], mask=seen, other=0.0).to(tl.float32)
        if STORE_DIRECT:
            g = clip_gate(gate, means, cwem, b, pixels, T, C, TP, CP, JP, CHUNKS, GATE)
            near = up * (offset + priors(z, g, GATE > 0, CONV, HMEM, JP, TP, N, STENCIL_GROUP))
            into = direct + ((b.to(tl.int64) * T + m % TP) * C + m // TP) * area
            tl.store(into[:, None] + to[None, :], near, mask=seen)
        if MULTIPLICATIVE:
            own_row, _ = row_planes(x, b, sB, sT, sC, T, C, TP, M)
            here = h * sH + w * sW
            if WIDE:
                here = h.to(tl.int64) * sH + w.to(tl.int64) * sW
            up *= tl.load(own_row[:, None] + here[None, :], mask=seen, other=0.0).to(tl.float32)
        if GATE > 0:
            tl.store(partial_gate + tile.to(tl.int64) * M + m, tl.sum(up, axis=1))
        if CONV:
            if STENCIL_GROUP >= 0:
                group = tl.arange(0, JP)[:, None, None]
                by_group = tl.reshape(up, (JP, TP, N))
                shared = tl.sum(by_group, axis=0)
                up = tl.reshape(tl.where(group == STENCIL_GROUP, shared[None, :, :], by_group), (M, N))
            dz = up * (z * (1.0 - z))
            # Zeros go beside the image, so that weigh need not ask where a row ends.
            beside = (h < H) & (w >= -PAD) & (w < W + PAD) & ((w < 0) | (w >= W))
            into = dz_out + (b.to(tl.int64) * M + m) * (H.to(tl.int64) * pitch) + PAD
            to = h * pitch + w
            if WIDE:
                to = h.to(tl.int64) * pitch + w
            tl.store(into[:, None] + to[None, :], dz.to(dz_out.dtype.element_ty), mask=(own | beside)[None, :])


@triton.jit(do_not_specialize=["H"])
def weigh(
    x, dz, partial, partial_bias, sB, sT, sC, sH, sW, H, W, pitch, tiles_h, tiles, total_tiles,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    ONE: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """The folded weights' gradient: a program adds up a run of tiles; ROWS_AT_ONCE 1: the grid's axis 1 is the row.

    dz's rows come three times, one column to the right, in place and to the left, as one operand of 3 (padded: 4) times
    the rows: the three column taps are one product, and warps share its rows out evenly.
    """
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    N: tl.constexpr = BH * BW
    pid = tl.program_id(0)
    first_row = tl.program_id(1)
    r = tl.arange(0, 4 * M)
    by = 1 - r // M % 3
    d0 = tl.zeros((4 * M, K), tl.float32)
    d1 = tl.zeros((4 * M, K), tl.float32)
    d2 = tl.zeros((4 * M, K), tl.float32)
    dbias = tl.zeros((4 * M, 16), tl.float32)
    ones = tl.full((N, 16), 1.0, DT)
    first, last = run_of_tiles(total_tiles)
    for step in tl.range(0, last - first, num_stages=1):
        tile = first + step
        b = tile // tiles
        h, w, own = tile_pixels(tile % tiles % tiles_h, tile % tiles // tiles_h, H, W, BH, BW, HALO)
        plane, live = row_planes(x, b, sB, sT, sC, T, C, TP, K)
        at = dz + (b.to(tl.int64) * M + r % M) * (H.to(tl.int64) * pitch) + (PAD + by)
        to = h * pitch + w
        if WIDE:
            to = h.to(tl.int64) * pitch + w
        z = tl.load(at[:, None] + to[None, :], mask=own[None, :], other=0.0)
        z, z_low = halves(z, SPLIT, DT)
        if SPLIT >= 1:
            dbias = tl.dot(z_low, ones, dbias, input_precision=PRECISION)
        dbias = tl.dot(z, ones, dbias, input_precision=PRECISION)
        v, low = split(load_row(plane, live, h + (first_row - 1), w, H, W, sH, sW, ONE, WIDE), SPLIT, DT)
        d0 = outer(z, z_low, v, low, d0, SPLIT, PRECISION)
        if ROWS_AT_ONCE == 3:
            v, low = split(load_row(plane, live, h, w, H, W, sH, sW, ONE, WIDE), SPLIT, DT)
            d1 = outer(z, z_low, v, low, d1, SPLIT, PRECISION)
            v, low = split(load_row(plane, live, h + 1, w, H, W, sH, sW, ONE, WIDE), SPLIT, DT)
            d2 = outer(z, z_low, v, low, d2, SPLIT, PRECISION)
    TAPS: tl.constexpr = 3 * M * K
    k = tl.arange(0, K)
    to = partial + pid.to(tl.int64) * (3 * TAPS) + first_row * TAPS + r[:, None] * K + k[None, :]
    kept = (r < 3 * M)[:, None] & is_column(k, T, C, TP, ONE)[None, :]
    tl.store(to, d0, mask=kept)
    if ROWS_AT_ONCE == 3:
        tl.store(to + TAPS, d1, mask=kept)
        tl.store(to + 2 * TAPS, d2, mask=kept)
    if first_row == 0:
        column = tl.arange(0, 16)
        bias_to = partial_bias + pid * M + r[:, None] - M + column[None, :]
        tl.store(bias_to, dbias, mask=(r // M == 1)[:, None] & (column == 0)[None, :])


@triton.jit(do_not_specialize=["H"])
def part(
    x, grad, z, gate, dz, direct, partial_gate, sB, sT, sC, sH, sW, gB, gT, gC, gH, gW, H, W, offset,
    T: tl.constexpr, C: tl.constexpr, HMEM: tl.constexpr, STENCIL: tl.constexpr, GATE: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, STORE_DIRECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sweep's pixelwise half alone, for planes too many for one tile: from z to dz, in z's rows."""
    frame = tl.program_id(1).to(tl.int64)
    b = frame // T
    t = frame % T
    area = H.to(tl.int64) * W
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = i < area
    base = b * ((T * C if HMEM else 0) + (T if STENCIL else 0)) * area + i
    stencil_row = base + ((T * C if HMEM else 0) + t) * area
    shared = tl.zeros((BLOCK,), tl.float32)
    gathered = tl.zeros((BLOCK,), tl.float32)
    if STENCIL:
        shared = sigmoid(tl.load(z + stencil_row, mask=seen, other=0.0).to(tl.float32))
    source = x + b * sB + t * sT + i // W * sH + i % W * sW
    incoming = grad + b * gB + t * gT + i // W * gH + i % W * gW
    for c in tl.range(0, C):
        up = tl.load(incoming, mask=seen, other=0.0).to(tl.float32)
        near = up
        total = shared
        s = shared
        if HMEM:
            s = sigmoid(tl.load(z + base + (t * C + c) * area, mask=seen, other=0.0).to(tl.float32))
            total = shared + s
        if MULTIPLICATIVE:
            if GATE:
                total += tl.load(gate + frame * C + c).to(tl.float32)
            near = up * (offset + total)
            up *= tl.load(source, mask=seen, other=0.0).to(tl.float32)
        if STORE_DIRECT:
            tl.store(direct + (frame * C + c) * area + i, near, mask=seen)
        if HMEM:
            tl.store(dz + base + (t * C + c) * area, (up * (s * (1.0 - s))).to(dz.dtype.element_ty), mask=seen)
        if GATE:
            tl.store(partial_gate + (frame * C + c) * tl.num_programs(0) + tl.program_id(0), tl.sum(up, axis=0))
        gathered += up
        source += sC
        incoming += gC
    if STENCIL:
        tl.store(dz + stencil_row, (gathered * (shared * (1.0 - shared))).to(dz.dtype.element_ty), mask=seen)
