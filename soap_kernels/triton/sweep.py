"""Stage ``sweep``: one pass over x and the incoming gradient, to partial sums of the folded weights' gradients.

The convolution is computed again from x; nothing of it was saved. Each column tap of the weight gradient needs dz beside
x, not x beside dz: dz is at hand and moves by one column, x is read as it lies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soap_kernels.triton.fuse import clip_gate, convolve, load_row, move, priors, row_planes, split, tile_pixels
from soap_kernels.triton.prepare import sigmoid


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
    high = v.to(DT)
    if SPLIT >= 1:
        return high, (v - high.to(tl.float32)).to(DT)
    return high, high


@triton.jit
def sweep(
    x, grad, folded, folded_bias, gate, means, cwem, partial, partial_bias, partial_gate, dz_out, direct,
    sB, sT, sC, sH, sW, gB, gT, gC, gH, gW, H, W, tiles_w, tiles, total_tiles, offset,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    CONV: tl.constexpr, HMEM: tl.constexpr, GATE: tl.constexpr, STENCIL_GROUP: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, ONE: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTS: tl.constexpr, STORE_DZ: tl.constexpr, STORE_DIRECT: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, DZ: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + programs, ...; with ROWS_AT_ONCE 1 axis 1 shares out the three row taps."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    N: tl.constexpr = BH * BW
    pid = tl.program_id(0)
    first_row = tl.program_id(1)
    pixels = H.to(tl.float32) * W
    area = H.to(tl.int64) * W
    m = tl.arange(0, M)
    d00 = tl.zeros((M, K), tl.float32)
    d01 = tl.zeros((M, K), tl.float32)
    d02 = tl.zeros((M, K), tl.float32)
    d10 = tl.zeros((M, K), tl.float32)
    d11 = tl.zeros((M, K), tl.float32)
    d12 = tl.zeros((M, K), tl.float32)
    d20 = tl.zeros((M, K), tl.float32)
    d21 = tl.zeros((M, K), tl.float32)
    d22 = tl.zeros((M, K), tl.float32)
    dbias = tl.zeros((M,), tl.float32)
    for step in tl.range(0, tl.cdiv(total_tiles - pid, tl.num_programs(0)), num_stages=1):
        tile = pid + step * tl.num_programs(0)
        b = tile // tiles
        h, w, own = tile_pixels(tile % tiles, tiles_w, H, W, BH, BW, HALO)
        plane, live = row_planes(x, b, sB, sT, sC, T, C, TP, K)
        row, real = row_planes(grad, b, gB, gT, gC, T, C, TP, M)
        seen = real[:, None] & own[None, :]
        at = h * gH + w * gW
        if WIDE:
            at = h.to(tl.int64) * gH + w.to(tl.int64) * gW
        z = tl.zeros((M, N), tl.float32)
        if CONV:
            z = convolve(
                plane, live, folded, h, w, H, W, sH, sW, M, K, N, K, 1, False, SPLIT, PRECISION, DT, ONE, WIDE, STAGES
            )  # fmt: skip
            z = sigmoid(z + tl.load(folded_bias + m)[:, None])
        up = tl.load(row[:, None] + at[None, :], mask=seen, other=0.0).to(tl.float32)
        if STORE_DIRECT:
            g = clip_gate(gate, means, cwem, b, pixels, T, C, TP, CP, JP, CHUNKS, GATE)
            near = up * (offset + priors(z, g, GATE > 0, CONV, HMEM, JP, TP, N, STENCIL_GROUP))
            to = (h * W + w).to(tl.int64)
            into = direct + ((b.to(tl.int64) * T + m % TP) * C + m // TP) * area
            tl.store(into[:, None] + to[None, :], near, mask=seen)
        if MULTIPLICATIVE:
            own_row, _ = row_planes(x, b, sB, sT, sC, T, C, TP, M)
            here = h * sH + w * sW
            if WIDE:
                here = h.to(tl.int64) * sH + w.to(tl.int64) * sW
            up *= tl.load(own_row[:, None] + here[None, :], mask=seen, other=0.0).to(tl.float32)
        if GATE > 0:
            if first_row == 0:
                tl.store(partial_gate + tile.to(tl.int64) * M + m, tl.sum(up, axis=1))
        if CONV:
            if STENCIL_GROUP >= 0:
                group = tl.arange(0, JP)[:, None, None]
                by_group = tl.reshape(up, (JP, TP, N))
                shared = tl.sum(by_group, axis=0)
                up = tl.reshape(tl.where(group == STENCIL_GROUP, shared[None, :, :], by_group), (M, N))
            dz = up * (z * (1.0 - z))
            if STORE_DZ:
                into = dz_out + (b.to(tl.int64) * M + m) * area
                to = (h * W + w).to(tl.int64)
                tl.store(into[:, None] + to[None, :], dz.to(dz_out.dtype.element_ty), mask=own[None, :])
            if WEIGHTS:
                dbias += tl.sum(dz, axis=1)
                here, here_low = halves(dz, SPLIT, DZ)
                left, left_low = halves(move(dz, 1, M, N), SPLIT, DZ)
                right, right_low = halves(move(dz, -1, M, N), SPLIT, DZ)
                v, low = split(load_row(plane, live, h + (first_row - 1), w, H, W, sH, sW, ONE, WIDE), SPLIT, DZ)
                d00 = outer(left, left_low, v, low, d00, SPLIT, PRECISION)
                d01 = outer(here, here_low, v, low, d01, SPLIT, PRECISION)
                d02 = outer(right, right_low, v, low, d02, SPLIT, PRECISION)
                if ROWS_AT_ONCE == 3:
                    v, low = split(load_row(plane, live, h, w, H, W, sH, sW, ONE, WIDE), SPLIT, DZ)
                    d10 = outer(left, left_low, v, low, d10, SPLIT, PRECISION)
                    d11 = outer(here, here_low, v, low, d11, SPLIT, PRECISION)
                    d12 = outer(right, right_low, v, low, d12, SPLIT, PRECISION)
                    v, low = split(load_row(plane, live, h + 1, w, H, W, sH, sW, ONE, WIDE), SPLIT, DZ)
                    d20 = outer(left, left_low, v, low, d20, SPLIT, PRECISION)
                    d21 = outer(here, here_low, v, low, d21, SPLIT, PRECISION)
                    d22 = outer(right, right_low, v, low, d22, SPLIT, PRECISION)
    if CONV and WEIGHTS:
        TAP: tl.constexpr = M * K
        to = partial + pid.to(tl.int64) * (9 * TAP) + first_row * (3 * TAP) + m[:, None] * K + tl.arange(0, K)[None, :]
        tl.store(to, d00)
        tl.store(to + TAP, d01)
        tl.store(to + 2 * TAP, d02)
        if ROWS_AT_ONCE == 3:
            tl.store(to + 3 * TAP, d10)
            tl.store(to + 4 * TAP, d11)
            tl.store(to + 5 * TAP, d12)
            tl.store(to + 6 * TAP, d20)
            tl.store(to + 7 * TAP, d21)
            tl.store(to + 8 * TAP, d22)
        if first_row == 0:
            tl.store(partial_bias + pid * M + m, dbias)


@triton.jit
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
