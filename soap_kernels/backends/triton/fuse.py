# mypy: disable-error-code=no-untyped-def
"""Stage ``fuse``: the folded convolution, the sigmoids and the sum with x in one pass, and the same for x's gradient.

A tile is BH rows of BW columns, HALO of which on either side are read but not written. The three column taps are not
three shifted reads: each aligned row of pixels is multiplied with the weights of all three, and the *products* move by
one column. Reads stay aligned and 128 bits wide, and an fp32 pixel is split into two bf16 numbers once per row tap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soap_kernels.backends.triton.prepare import gate_rows, sigmoid


@triton.jit
def multiply(w, low_w, v, low_v, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + w v``; SPLIT 1: w has a low part, 2: v has one too. Small terms first."""
    if SPLIT == 2:
        acc = tl.dot(w, low_v, acc, input_precision=PRECISION)
    if SPLIT >= 1:
        acc = tl.dot(low_w, v, acc, input_precision=PRECISION)
    return tl.dot(w, v, acc, input_precision=PRECISION)


@triton.jit
def split(v, SPLIT: tl.constexpr, DT: tl.constexpr):
    """``v`` as ``DT`` and what that leaves over (SPLIT 2), also as ``DT``."""
    high = v.to(DT)
    if SPLIT == 2:
        return high, (v - high.to(tl.float32)).to(DT)
    return high, high


@triton.jit
def load_row(
    plane, live, h, w, H, W, sH, sW, ONE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Pixels (h, w) of each plane ``[K, N]``, zero outside the image; column ONE, if any, tells inside from outside."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offset = h * sH + w * sW
    if WIDE:
        offset = h.to(tl.int64) * sH + w.to(tl.int64) * sW
    v = tl.load(plane[:, None] + offset[None, :], mask=live[:, None] & inside[None, :], other=0)
    if ONE >= 0:
        k = tl.arange(0, plane.shape[0])
        v = tl.where((k == ONE)[:, None], inside[None, :].to(tl.float32), v.to(tl.float32))
    return v


@triton.jit
def convolve(
    plane, live, weights, h, w, H, W, sH, sW,
    ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    FLIP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, ONE: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """3x3 convolution of the pixels (h, w), ``[ROWS, N]``; right where the columns beside a pixel are in the tile."""
    left = tl.zeros((ROWS, N), tl.float32)
    here = tl.zeros((ROWS, N), tl.float32)
    right = tl.zeros((ROWS, N), tl.float32)
    r = tl.arange(0, ROWS)
    q = tl.arange(0, COLS)
    TAP: tl.constexpr = ROWS * COLS
    LOW: tl.constexpr = 9 * TAP if SPLIT >= 1 else 0
    STEP: tl.constexpr = -TAP if FLIP else TAP
    at = weights + r[:, None] * ROW_STEP + q[None, :] * COL_STEP
    if FLIP:
        at += 8 * TAP
    for i in tl.range(0, 3, num_stages=STAGES):
        v, low = split(load_row(plane, live, h + (i - 1), w, H, W, sH, sW, ONE, WIDE), SPLIT, DT)
        tap = at + i * (3 * STEP)
        left = multiply(tl.load(tap), tl.load(tap + LOW), v, low, left, SPLIT, PRECISION)
        here = multiply(tl.load(tap + STEP), tl.load(tap + STEP + LOW), v, low, here, SPLIT, PRECISION)
        right = multiply(tl.load(tap + 2 * STEP), tl.load(tap + 2 * STEP + LOW), v, low, right, SPLIT, PRECISION)
    return here + move(left, -1, ROWS, N) + move(right, 1, ROWS, N)


@triton.jit
def move(v, by: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Column n of the result is column n + by of ``v``; the outermost stay."""
    n = tl.arange(0, N) + by
    n = tl.minimum(tl.maximum(n, 0), N - 1)
    return tl.gather(v, tl.broadcast_to(n[None, :], (ROWS, N)), 1)


@triton.jit
def tile_pixels(
    row, column, H, W, BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr
):  # fmt: skip
    """Row and column of each pixel of the tile (row, column) of a clip, and which of them the tile writes."""
    n = tl.arange(0, BH * BW)
    h = row * BH + n // BW
    w = column * (BW - 2 * HALO) - HALO + n % BW
    own = (h < H) & (w < W) & (n % BW >= HALO) & (n % BW < BW - HALO)
    return h, w, own


@triton.jit
def row_planes(
    x, b, sB, sT, sC, T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Pointers to clip b's planes in the order of the rows, and which rows are planes."""
    m = tl.arange(0, ROWS)
    t = (m % TP).to(tl.int64)
    c = (m // TP).to(tl.int64)
    return x + b.to(tl.int64) * sB + t * sT + c * sC, (m // TP < C) & (m % TP < T)


@triton.jit
def normalized(v, scale, shift, ROWS: tl.constexpr, TP: tl.constexpr, C: tl.constexpr):
    c = tl.arange(0, ROWS) // TP
    factor = tl.zeros((ROWS,), tl.float32)
    term = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(C):
        factor = tl.where(c == i, scale[i], factor)
        term = tl.where(c == i, shift[i], term)
    return v * factor[:, None] + term[:, None]


@triton.jit
def priors(
    z, gate, has_gate: tl.constexpr, CONV: tl.constexpr, HMEM: tl.constexpr,
    JP: tl.constexpr, TP: tl.constexpr, N: tl.constexpr, STENCIL_GROUP: tl.constexpr,
):  # fmt: skip
    """From the convolution's sigmoids, ``[JP * TP, N]``, to the sum of the priors of each plane, in the same rows."""
    total = z
    if CONV and STENCIL_GROUP >= 0:
        group = tl.arange(0, JP)[:, None, None]
        s = tl.reshape(z, (JP, TP, N))
        shared = tl.sum(tl.where(group == STENCIL_GROUP, s, 0.0), axis=0)
        if HMEM:
            total = tl.reshape(s + shared[None, :, :], (JP * TP, N))
        else:
            total = tl.reshape(tl.broadcast_to(shared[None, :, :], (JP, TP, N)), (JP * TP, N))
    if has_gate:
        total += gate[:, None]
    return total


@triton.jit
def clip_gate(
    gate, means, cwem, b, pixels, T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr,
    JP: tl.constexpr, CHUNKS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Clip b's gate in the order of the rows. GATE 1: from CWEM's means and taps, 2: given ``(B, T, C)``, 0: none."""
    found = tl.zeros((JP * TP,), tl.float32)
    if GATE == 1:
        found, _ = gate_rows(means, cwem, b, pixels, T, C, TP, CP, JP, CHUNKS)
    if GATE == 2:
        m = tl.arange(0, JP * TP)
        at = gate + (b.to(tl.int64) * T + m % TP) * C + m // TP
        found = tl.load(at, mask=(m // TP < C) & (m % TP < T), other=0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["H"])
def fuse(
    x, folded, folded_bias, gate, means, cwem, scale, shift, y,
    sB, sT, sC, sH, sW, H, W, tiles_w, tiles, offset,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    CONV: tl.constexpr, HMEM: tl.constexpr, GATE: tl.constexpr, STENCIL_GROUP: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr, CHUNKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program writes one tile of y: ``x + sum of priors``, or ``x * (offset + sum)``."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    N: tl.constexpr = BH * BW
    pid = tl.program_id(0)
    b = pid // tiles
    h, w, own = tile_pixels(pid % tiles // tiles_w, pid % tiles % tiles_w, H, W, BH, BW, HALO)
    pixels = H.to(tl.float32) * W
    row, real = row_planes(x, b, sB, sT, sC, T, C, TP, M)
    z = tl.zeros((M, N), tl.float32)
    if CONV:
        bias = tl.load(folded_bias + tl.arange(0, M))
        plane, live = row_planes(x, b, sB, sT, sC, T, C, TP, K)
        z = convolve(
            plane, live, folded, h, w, H, W, sH, sW, M, K, N, K, 1, False, SPLIT, PRECISION, DT, ONE, WIDE, STAGES
        )  # fmt: skip
        z = sigmoid(z + bias[:, None])
    g = clip_gate(gate, means, cwem, b, pixels, T, C, TP, CP, JP, CHUNKS, GATE)
    total = priors(z, g, GATE > 0, CONV, HMEM, JP, TP, N, STENCIL_GROUP)
    seen = real[:, None] & own[None, :]
    at = h * sH + w * sW
    to = h * W + w
    if WIDE:
        at = h.to(tl.int64) * sH + w.to(tl.int64) * sW
        to = h.to(tl.int64) * W + w
    v = tl.load(row[:, None] + at[None, :], mask=seen, other=0).to(tl.float32)
    if NORMALIZE:
        v = normalized(v, scale, shift, M, TP, C)
    v = v * (offset + total) if MULTIPLICATIVE else v + total
    area = H.to(tl.int64) * W
    if CHANNELS_LAST:
        m = tl.arange(0, M)
        first = y + (b.to(tl.int64) * T + m % TP) * (C * area) + m // TP
        tl.store(first[:, None] + (to * C)[None, :], v.to(y.dtype.element_ty), mask=seen)
    else:
        m = tl.arange(0, M)
        first = y + ((b.to(tl.int64) * T + m % TP) * C + m // TP) * area
        tl.store(first[:, None] + to[None, :], v.to(y.dtype.element_ty), mask=seen)


@triton.jit
def mean_gradient(
    dz, cwem, b, pixels, T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What reaches a plane's pixels through CWEM's pool, ``[ROWS]``, from ``dz[b, JP * TP]`` before its sigmoid."""
    m = tl.arange(0, ROWS)
    e = tl.arange(0, 4 * CP)
    t = (m % TP)[:, None] - (e // CP)[None, :] + 1
    c = (e % CP)[None, :]
    ok = ((m // TP < C) & (m % TP < T))[:, None] & (e // CP < 3)[None, :] & (c < C) & (t >= 0) & (t < T)
    up = tl.load(dz + b.to(tl.int64) * (JP * TP) + c * TP + t, mask=ok, other=0.0)
    taps = tl.load(cwem + c * (3 * C) + (e // CP)[None, :] * C + (m // TP)[:, None], mask=ok, other=0.0)
    return tl.sum(up * taps, axis=1) / pixels


@triton.jit(do_not_specialize=["H"])
def fuse_dx(
    dz, folded, direct, dgate, cwem, dx, gB, gT, gC, gH, gW, H, W, pitch, tiles_w, tiles,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    CONV: tl.constexpr, POOL: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x's gradient: ``direct`` plus the transposed convolution of dz plus what comes through CWEM's pool."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    N: tl.constexpr = BH * BW
    pid = tl.program_id(0)
    b = pid // tiles
    h, w, own = tile_pixels(pid % tiles // tiles_w, pid % tiles % tiles_w, H, W, BH, BW, HALO)
    area = H.to(tl.int64) * W
    total = tl.zeros((K, N), tl.float32)
    if CONV:
        m = tl.arange(0, M)
        plane = dz + (b.to(tl.int64) * M + m) * (H.to(tl.int64) * pitch) + PAD
        total = convolve(
            plane, m < M, folded, h, w, H, W, pitch, 1, K, M, N, 1, K, True, SPLIT, PRECISION, DT, -1, WIDE, STAGES
        )  # fmt: skip
    if POOL:
        total += mean_gradient(dgate, cwem, b, H.to(tl.float32) * W, T, C, TP, CP, JP, K)[:, None]
    row, real = row_planes(direct, b, gB, gT, gC, T, C, TP, K)
    seen = real[:, None] & own[None, :]
    at = h * gH + w * gW
    to = h * W + w
    if WIDE:
        at = h.to(tl.int64) * gH + w.to(tl.int64) * gW
        to = h.to(tl.int64) * W + w
    total += tl.load(row[:, None] + at[None, :], mask=seen, other=0.0).to(tl.float32)
    k = tl.arange(0, K)
    first = dx + ((b.to(tl.int64) * T + k % TP) * C + k // TP) * area
    tl.store(first[:, None] + to[None, :], total.to(dx.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["H"])
def join(
    x, z, gate, y, sB, sT, sC, sH, sW, H, W, offset,
    T: tl.constexpr, C: tl.constexpr, HMEM: tl.constexpr, STENCIL: tl.constexpr, GATE: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The epilogue alone, for planes too many for one tile: z is the folded convolution, planes then stencil rows."""
    frame = tl.program_id(1).to(tl.int64)
    b = frame // T
    t = frame % T
    area = H.to(tl.int64) * W
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = i < area
    rows = (T * C if HMEM else 0) + (T if STENCIL else 0)
    base = z + b * rows * area + i
    shared = tl.zeros((BLOCK,), tl.float32)
    if STENCIL:
        at = base + ((T * C if HMEM else 0) + t) * area
        shared = sigmoid(tl.load(at, mask=seen, other=0.0).to(tl.float32))
    source = x + b * sB + t * sT + i // W * sH + i % W * sW
    for c in tl.range(0, C):
        total = shared
        if HMEM:
            total += sigmoid(tl.load(base + (t * C + c) * area, mask=seen, other=0.0).to(tl.float32))
        if GATE:
            total += tl.load(gate + frame * C + c).to(tl.float32)
        v = tl.load(source, mask=seen, other=0.0).to(tl.float32)
        v = v * (offset + total) if MULTIPLICATIVE else v + total
        to = (frame * area + i) * C + c if CHANNELS_LAST else (frame * C + c) * area + i
        tl.store(y + to, v.to(y.dtype.element_ty), mask=seen)
        source += sC
