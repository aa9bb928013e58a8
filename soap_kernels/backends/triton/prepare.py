# ruff: noqa: SIM102, since an if on a constant has to stand alone in a kernel
# mypy: disable-error-code=no-untyped-def
"""Stage ``prepare``: fold the weights into one 3x3 convolution and average the planes, in one launch.

The folded convolution has one row per frame and channel (HMEM) and one per frame for 3DEM, whose stencil on the channel
mean is a convolution over all planes too. Rows and columns are grouped by channel: row ``j * TP + t`` is channel j of
frame t (group ``STENCIL_GROUP`` the stencil's), column ``c * TP + t`` plane c of frame t, TP the frames padded to a
power of two. So the epilogue adds the stencil's row to a frame's channels without leaving a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def pick(values, index, n: tl.constexpr):
    """``values[index]`` for a tensor of indices into a short tuple of numbers."""
    found = index.to(tl.float32) * 0.0
    for i in tl.static_range(n):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def is_column(k, T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, ONE: tl.constexpr):
    """Whether column k of the folded convolution is a plane or the one that carries normalisation's shift."""
    return ((k // TP < C) & (k % TP < T)) | (k == ONE)


@triton.jit
def project_motion(
    project, motion, c, q, s, tap, o: tl.constexpr, f: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    """The 1x1 conv after the 3x3 one, at one tap, as seen by place f >= 1 of a tuple's o + 1 frames.

    ``c``, ``q``, ``s``: indices that broadcast to [outputs, planes of the tuple, inputs]; ROW masks the outputs.
    """
    r = tl.load(project + c * (o * C) + q, mask=(c < C) & (q < o * C), other=0.0).to(tl.float32)
    k = tl.load(
        motion + (q * (o * C) + (f - 1) * C + s) * 9 + tap, mask=(q < o * C) & (s < C) & (tap < ROW), other=0.0
    ).to(tl.float32)
    return r * k


@triton.jit
def fold_tap(
    tap, motion, project, restore, stencil, weight, scale, shift, out,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    SIZES: tl.constexpr, MAPS: tl.constexpr, QP: tl.constexpr, STENCIL_GROUP: tl.constexpr, DIRECT: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tap of the folded convolution, ``[JP * TP, KQ * TP]``, written as high and (SPLIT) low part."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    c = tl.arange(0, JP)[:, None, None, None]
    t = tl.arange(0, TP)[None, :, None, None]
    s = tl.arange(0, KQ)[None, None, :, None]
    u = tl.arange(0, TP)[None, None, None, :]
    real = (t < T) & (s < C) & (u < T)
    acc = tl.zeros((JP, TP, KQ, TP), tl.float32)
    if DIRECT:
        row = (t * C + c) * (T * C) + u * C + s
        acc += tl.load(weight + row * 9 + tap, mask=real & (c < C), other=0.0).to(tl.float32)
    if len(SIZES) > 0:
        first = 0
        c2 = tl.arange(0, JP)[:, None]
        s2 = tl.arange(0, KQ)[None, :]
        c3 = tl.arange(0, JP)[:, None, None]
        q3 = tl.arange(0, QP)[None, :, None]
        s3 = tl.arange(0, KQ)[None, None, :]
        taps = tap + s2 * 0  # a block: in Triton 3.9's interpreter a scalar's comparison is no mask
        for i in tl.static_range(len(SIZES)):
            for f in tl.static_range(SIZES[i] + 1):
                d = tl.zeros((JP, KQ), tl.float32)
                if f > 0:
                    d -= tl.sum(
                        project_motion(project[i], motion[i], c3, q3, s3, taps[None, :, :], SIZES[i], f, C, 9), axis=1
                    )
                if f < SIZES[i]:
                    centre = tl.load(
                        project[i] + c2 * (SIZES[i] * C) + f * C + s2, mask=(c2 < C) & (s2 < C) & (taps == 4), other=0.0
                    )
                    d += centre.to(tl.float32)
                place = u - f
                z = tl.load(
                    restore + t * MAPS + first + place,
                    mask=real & (c < C) & (place >= 0) & (place < T - SIZES[i]),
                    other=0.0,
                )
                acc += z.to(tl.float32) * d[:, None, :, None]
            first += T - SIZES[i]
    if STENCIL_GROUP >= 0:
        slot = u
        if INTERLEAVED:
            slot = (u * C + s) % T
        dt = slot - t + 1
        k3 = tl.load(stencil + dt * 9 + tap, mask=real & (c == STENCIL_GROUP) & (dt >= 0) & (dt < 3), other=0.0)
        acc += k3.to(tl.float32) / C
    acc = tl.reshape(acc, (M, K))
    k = tl.arange(0, K)[None, :]
    if NORMALIZE:
        moved = tl.sum(acc * pick(shift, k // TP, C), axis=1)
        acc = tl.where(k == ONE, moved[:, None], acc * pick(scale, k // TP, C))
    at = out + tap * (M * K) + tl.arange(0, M)[:, None] * K + k
    high = acc.to(out.dtype.element_ty)
    tl.store(at, high)
    if SPLIT:
        tl.store(at + 9 * M * K, (acc - high.to(tl.float32)).to(out.dtype.element_ty))


@triton.jit
def map_constant(project, project_bias, motion_bias, c, q, o: tl.constexpr, C: tl.constexpr):
    """The constant that one tuple size adds to each of its maps: ``[outputs]``; c and q span [outputs, planes]."""
    r = tl.load(project + c[:, None] * (o * C) + q[None, :], mask=(c < C)[:, None] & (q < o * C)[None, :], other=0.0)
    moved = tl.load(motion_bias + q, mask=q < o * C, other=0.0).to(tl.float32)
    own = tl.load(project_bias + c, mask=c < C, other=0.0).to(tl.float32)
    return own - tl.sum(r.to(tl.float32) * moved[None, :], axis=1)


@triton.jit
def restored(restore, t, first, o: tl.constexpr, T: tl.constexpr, MAPS: tl.constexpr, TP: tl.constexpr):
    """The sum of Z's entries over the maps of one tuple size: ``[frames]``."""
    i = tl.arange(0, TP)[None, :]
    z = tl.load(restore + t[:, None] * MAPS + first + i, mask=(t < T)[:, None] & (i < T - o), other=0.0)
    return tl.sum(z.to(tl.float32), axis=1)


@triton.jit
def fold_bias(
    motion_bias, project, project_bias, restore, restore_bias, bias, out,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, JP: tl.constexpr, SIZES: tl.constexpr, MAPS: tl.constexpr,
    QP: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, JP)
    t = tl.arange(0, TP)
    real = (c < C)[:, None] & (t < T)[None, :]
    acc = tl.zeros((JP, TP), tl.float32)
    if DIRECT:
        if bias is not None:
            acc += tl.load(bias + t[None, :] * C + c[:, None], mask=real, other=0.0).to(tl.float32)
    if len(SIZES) > 0:
        acc += tl.load(restore_bias + t, mask=t < T, other=0.0).to(tl.float32)[None, :]
        q = tl.arange(0, QP)
        first = 0
        for i in tl.static_range(len(SIZES)):
            constant = map_constant(project[i], project_bias[i], motion_bias[i], c, q, SIZES[i], C)
            acc += constant[:, None] * restored(restore, t, first, SIZES[i], T, MAPS, TP)[None, :]
            first += T - SIZES[i]
    tl.store(out + c[:, None] * TP + t[None, :], tl.where(real, acc, 0.0))


@triton.jit
def fold_cwem(
    expand, temporal, temporal_bias, squeeze, out, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr
):  # fmt: skip
    """CWEM before its sigmoid: taps ``[c][k][c']`` on the plane means, then C constants."""
    c = tl.arange(0, CP)
    a = tl.arange(0, RP)
    squeezed = tl.load(squeeze + c[:, None] * R + a[None, :], mask=(c < C)[:, None] & (a < R)[None, :], other=0.0)
    squeezed = squeezed.to(tl.float32)
    added = tl.load(temporal_bias + a, mask=a < R, other=0.0).to(tl.float32)
    tl.store(out + 3 * C * C + c, tl.sum(squeezed * added[None, :], axis=1), mask=c < C)
    spread = tl.load(expand + a[:, None] * C + c[None, :], mask=(a < R)[:, None] & (c < C)[None, :], other=0.0)
    spread = spread.to(tl.float32)
    for k in tl.static_range(3):
        both = (a < R)[:, None] & (a < R)[None, :]
        over = tl.load(temporal + a[:, None] * (3 * R) + a[None, :] * 3 + k, mask=both, other=0.0).to(tl.float32)
        hidden = tl.sum(squeezed[:, :, None] * over[None, :, :], axis=1)
        taps = tl.sum(hidden[:, :, None] * spread[None, :, :], axis=1)
        at = c[:, None] * (3 * C) + k * C + c[None, :]
        tl.store(out + at, taps, mask=(c < C)[:, None] & (c < C)[None, :])


@triton.jit
def sum_plane(
    x, out, p, sB, sT, sC, sH, sW, H, W, scale, shift,
    T: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of a plane's CHUNKS partial sums."""
    plane = p // CHUNKS
    c = plane % C
    base = x + (plane // (T * C)).to(tl.int64) * sB + (plane // C % T).to(tl.int64) * sT + c.to(tl.int64) * sC
    pixels = H * W
    if WIDE:
        pixels = H.to(tl.int64) * W
    size = tl.cdiv(tl.cdiv(pixels, CHUNKS), BLOCK) * BLOCK
    start = (p % CHUNKS) * size
    acc = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, tl.minimum(start + size, pixels), BLOCK):
        i = at + tl.arange(0, BLOCK)
        offset = i * sW
        if not FLAT:
            offset = i // W * sH + i % W * sW
        acc += tl.load(base + offset, mask=i < pixels, other=0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    if NORMALIZE:
        count = tl.maximum(tl.minimum(size, pixels - start), 0).to(tl.float32)
        total = total * pick(scale, c, C) + count * pick(shift, c, C)
    tl.store(out + p, total)


@triton.jit(do_not_specialize=["H"])
def prepare(
    x, motion, motion_bias, project, project_bias, restore, restore_bias, stencil, weight, bias,
    expand, temporal, temporal_bias, squeeze, scale, shift, folded, folded_bias, cwem, means,
    sB, sT, sC, sH, sW, H, W,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    SIZES: tl.constexpr, MAPS: tl.constexpr, QP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, CONV: tl.constexpr,
    DIRECT: tl.constexpr,
    STENCIL_GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
    SPLIT: tl.constexpr, CHUNKS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs 0..8 fold a tap each, 9 the constants and CWEM, the others sum a chunk of a plane each."""
    pid = tl.program_id(0)
    if pid < 9:
        if CONV:
            fold_tap(
                pid, motion, project, restore, stencil, weight, scale, shift, folded,
                T, C, TP, JP, KQ, SIZES, MAPS, QP, STENCIL_GROUP, DIRECT, INTERLEAVED, NORMALIZE, ONE, SPLIT,
            )  # fmt: skip
    elif pid == 9:
        if CONV:
            fold_bias(
                motion_bias, project, project_bias, restore, restore_bias, bias, folded_bias,
                T, C, TP, JP, SIZES, MAPS, QP, DIRECT,
            )  # fmt: skip
        if R > 0:
            fold_cwem(expand, temporal, temporal_bias, squeeze, cwem, C, CP, R, RP)
    elif R > 0:
        sum_plane(
            x, means, pid - 10, sB, sT, sC, sH, sW, H, W, scale, shift, T, C, CHUNKS, FLAT, WIDE, NORMALIZE, BLOCK
        )  # fmt: skip


@triton.jit
def plane_means(
    means, b, t, c, ok, pixels, T: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Means of clip b's planes (t, c), 0 where not ``ok``."""
    at = means + ((b.to(tl.int64) * T + t) * C + c) * CHUNKS
    total = tl.load(at, mask=ok, other=0.0)
    for i in tl.static_range(1, CHUNKS):
        total += tl.load(at + i, mask=ok, other=0.0)
    return total / pixels


@triton.jit
def gate_rows(
    means, cwem, b, pixels,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """CWEM's prior in the order of the rows, ``[JP * TP]``; with its input ``[JP * TP, 4 * CP]`` (tap, channel)."""
    m = tl.arange(0, JP * TP)
    e = tl.arange(0, 4 * CP)
    c = m // TP
    t = (m % TP)[:, None] + (e // CP)[None, :] - 1
    s = (e % CP)[None, :]
    ok = ((c < C) & (m % TP < T))[:, None] & (e // CP < 3)[None, :] & (s < C) & (t >= 0) & (t < T)
    seen = plane_means(means, b, t, s, ok, pixels, T, C, CHUNKS)
    taps = tl.load(cwem + c[:, None] * (3 * C) + (e // CP)[None, :] * C + s, mask=ok, other=0.0)
    z = tl.sum(seen * taps, axis=1) + tl.load(cwem + 3 * C * C + c, mask=c < C, other=0.0)
    return sigmoid(z), seen
