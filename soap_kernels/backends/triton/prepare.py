# mypy: disable-error-code=no-untyped-def
"""Stage ``prepare``: fold the weights into one 3x3 convolution and average the planes, in one launch.

The folded convolution has one row per frame and channel (HMEM) and one per frame for 3DEM, whose stencil on the channel
mean is a convolution over all planes too. Rows and columns are grouped by channel: row ``j * TP + t`` is channel j of
frame t (group ``stencil_group`` the stencil's), column ``c * TP + t`` plane c of frame t, TP the frames padded to a
power of two. So the epilogue adds the stencil's row to a frame's channels without leaving a thread.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soap_kernels.backends import Priors
from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.plan import Frames, Layout, Normalization, Numbers
from soap_kernels.weights import Weights

BLOCK = 2048  # pixels that a program adds up at once
FOLDS = 10  # programs before those that sum planes


class Given(NamedTuple):
    """The weights, or their gradients, as prepare and finish take them; None for those of a part that is off."""

    stencil: Any = None
    weight: Any = None  # HMEM folded already
    bias: Any = None
    expand: Any = None
    temporal: Any = None
    temporal_bias: Any = None
    squeeze: Any = None
    motion: Any = None
    motion_bias: Any = None
    project: Any = None
    project_bias: Any = None
    restore: Any = None
    restore_bias: Any = None

    @classmethod
    def of(cls, w: Weights) -> Given:
        found: dict[str, Any] = {"stencil": w.three_dem.conv} if w.three_dem else {}
        for part in (w.cwem, w.hmem):
            if part:
                found |= {name: tuple(v) if isinstance(v, list) else v for name, v in vars(part).items()}
        return cls(**found)

    @classmethod
    def of_priors(cls, priors: Priors) -> Given:
        return cls(stencil=priors.stencil, weight=priors.weight, bias=priors.bias)


class Prepared(NamedTuple):
    """The pieces of ``prepared``; one that no part needs is empty."""

    folded: Any  # (1 or 2, 9, rows, columns): high and low term
    bias: Any  # (rows,)
    cwem: Any  # taps [c][k][c'] on the plane means, then C constants
    means: Any  # (B, T, C, chunks): sums

    @classmethod
    def of(cls, prepared: Tensor, layout: Layout, numbers: Numbers) -> Prepared:
        """Of a vector of ``prepared_numel`` numbers."""
        *lengths, _ = _lengths(layout, numbers)
        folded, *rest = torch.split(prepared, [*lengths, prepared.numel() - sum(lengths)])
        return cls(folded.view(numbers.stored), *rest)


@cache
def _lengths(layout: Layout, numbers: Numbers) -> tuple[int, int, int, int]:
    """Of the pieces in fp32 numbers, rounded up so that the next begins at 16 bytes; the means' of one clip."""
    itemsize = torch.finfo(numbers.stored).bits // 8
    folded = layout.conv * (2 if numbers.split else 1) * 9 * layout.rows * layout.columns * itemsize // 4
    channels, cwem = layout.channels, layout.hidden > 0
    lengths = (folded, layout.conv * layout.rows, cwem * (3 * channels + 1) * channels)
    means = cwem * layout.frames * channels * layout.chunks
    return *(-(-length // 4) * 4 for length in lengths), means  # type: ignore[return-value]


def prepared_numel(clips: int, layout: Layout, numbers: Numbers) -> int:
    *lengths, means = _lengths(layout, numbers)
    return sum(lengths) + clips * means


def prepare(
    x: Tensor, given: Given, normalization: Normalization, layout: Layout, numbers: Numbers
) -> tuple[Tensor, Prepared]:
    """``prepared`` as one vector and in pieces."""
    prepared = torch.empty(prepared_numel(x.shape[0], layout, numbers), device=x.device)
    pieces = Prepared.of(prepared, layout, numbers)
    height, width = x.shape[3:]
    planes = x.shape[0] * x.shape[1] * x.shape[2] if layout.hidden else 0
    if layout.conv or layout.hidden:
        plan.launch(
            prepare_kernel, (FOLDS + planes * layout.chunks,), Frames.of(x), given, normalization, pieces,
            height, width, layout=layout, numbers=numbers, FLAT=x.stride(3) == width * x.stride(4), BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
    return prepared, pieces


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
def is_plane(m, layout: tl.constexpr):
    """Whether row or column m of the folded convolution is a plane."""
    return (m // layout.padded_frames < layout.channels) & (m % layout.padded_frames < layout.frames)


@triton.jit
def is_column(k, layout: tl.constexpr):
    """Whether column k is a plane or the one that carries normalisation's shift."""
    return is_plane(k, layout) | (k == layout.one)


@triton.jit
def project_motion(w, c, q, s, tap, n: tl.constexpr, f: tl.constexpr, layout: tl.constexpr):
    """The 1x1 conv after the 3x3 one, at one tap, as seen by place f >= 1 of the n-th tuple size's o + 1 frames.

    ``c``, ``q``, ``s``: indices that broadcast to [outputs, planes of the tuple, inputs].
    """
    o: tl.constexpr = layout.sizes[n]
    C: tl.constexpr = layout.channels
    r = tl.load(w.project[n] + c * (o * C) + q, mask=(c < C) & (q < o * C), other=0.0).to(tl.float32)
    ok = (q < o * C) & (s < C) & (tap < 9)
    k = tl.load(w.motion[n] + (q * (o * C) + (f - 1) * C + s) * 9 + tap, mask=ok, other=0.0)
    return r * k.to(tl.float32)


@triton.jit
def fold_tap(tap, w, normalization, out, layout: tl.constexpr, numbers: tl.constexpr):
    """One tap of the folded convolution, ``[rows, columns]``, written as high and, when split, low term."""
    T: tl.constexpr = layout.frames
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    JP: tl.constexpr = layout.groups
    KQ: tl.constexpr = layout.column_groups
    M: tl.constexpr = layout.rows
    K: tl.constexpr = layout.columns
    c = tl.arange(0, JP)[:, None, None, None]
    t = tl.arange(0, TP)[None, :, None, None]
    s = tl.arange(0, KQ)[None, None, :, None]
    u = tl.arange(0, TP)[None, None, None, :]
    real = (t < T) & (s < C) & (u < T)
    acc = tl.zeros((JP, TP, KQ, TP), tl.float32)
    if layout.direct:
        row = (t * C + c) * (T * C) + u * C + s
        acc += tl.load(w.weight + row * 9 + tap, mask=real & (c < C), other=0.0).to(tl.float32)
    if len(layout.sizes) > 0:
        first = 0
        c2 = tl.arange(0, JP)[:, None]
        s2 = tl.arange(0, KQ)[None, :]
        c3 = tl.arange(0, JP)[:, None, None]
        q3 = tl.arange(0, layout.padded_planes)[None, :, None]
        s3 = tl.arange(0, KQ)[None, None, :]
        taps = tap + s2 * 0  # a block: in Triton 3.9's interpreter a scalar's comparison is no mask
        for i in tl.static_range(len(layout.sizes)):
            for f in tl.static_range(layout.sizes[i] + 1):
                d = tl.zeros((JP, KQ), tl.float32)
                if f > 0:
                    d -= tl.sum(project_motion(w, c3, q3, s3, taps[None, :, :], i, f, layout), axis=1)
                if f < layout.sizes[i]:
                    at = w.project[i] + c2 * (layout.sizes[i] * C) + f * C + s2
                    d += tl.load(at, mask=(c2 < C) & (s2 < C) & (taps == 4), other=0.0).to(tl.float32)
                place = u - f
                ok = real & (c < C) & (place >= 0) & (place < T - layout.sizes[i])
                z = tl.load(w.restore + t * layout.maps + first + place, mask=ok, other=0.0)
                acc += z.to(tl.float32) * d[:, None, :, None]
            first += T - layout.sizes[i]
    if layout.stencil:
        slot = u
        if layout.interleaved:
            slot = (u * C + s) % T
        dt = slot - t + 1
        ok = real & (c == layout.stencil_group) & (dt >= 0) & (dt < 3)
        acc += tl.load(w.stencil + dt * 9 + tap, mask=ok, other=0.0).to(tl.float32) / C
    acc = tl.reshape(acc, (M, K))
    k = tl.arange(0, K)[None, :]
    if layout.normalize:
        shifts = tl.sum(acc * pick(normalization.shift, k // TP, C), axis=1)
        acc = tl.where(k == layout.one, shifts[:, None], acc * pick(normalization.scale, k // TP, C))
    at = out + tap * (M * K) + tl.arange(0, M)[:, None] * K + k
    high = acc.to(out.dtype.element_ty)
    tl.store(at, high)
    if numbers.split > 0:
        tl.store(at + 9 * M * K, (acc - high.to(tl.float32)).to(out.dtype.element_ty))


@triton.jit
def map_constant(project, project_bias, motion_bias, c, q, o: tl.constexpr, C: tl.constexpr):
    """The constant that one tuple size adds to each of its maps: ``[outputs]``; c and q span [outputs, planes]."""
    r = tl.load(project + c[:, None] * (o * C) + q[None, :], mask=(c < C)[:, None] & (q < o * C)[None, :], other=0.0)
    moved = tl.load(motion_bias + q, mask=q < o * C, other=0.0).to(tl.float32)
    own = tl.load(project_bias + c, mask=c < C, other=0.0).to(tl.float32)
    return own - tl.sum(r.to(tl.float32) * moved[None, :], axis=1)


@triton.jit
def restored(restore, t, first, o: tl.constexpr, layout: tl.constexpr):
    """The sum of Z's entries over the maps of one tuple size: ``[frames]``."""
    i = tl.arange(0, layout.padded_frames)[None, :]
    ok = (t < layout.frames)[:, None] & (i < layout.frames - o)
    z = tl.load(restore + t[:, None] * layout.maps + first + i, mask=ok, other=0.0)
    return tl.sum(z.to(tl.float32), axis=1)


@triton.jit
def fold_bias(w, out, layout: tl.constexpr):
    T: tl.constexpr = layout.frames
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    JP: tl.constexpr = layout.groups
    c = tl.arange(0, JP)
    t = tl.arange(0, TP)
    real = (c < C)[:, None] & (t < T)[None, :]
    acc = tl.zeros((JP, TP), tl.float32)
    if w.bias is not None:
        acc += tl.load(w.bias + t[None, :] * C + c[:, None], mask=real, other=0.0).to(tl.float32)
    if len(layout.sizes) > 0:
        acc += tl.load(w.restore_bias + t, mask=t < T, other=0.0).to(tl.float32)[None, :]
        q = tl.arange(0, layout.padded_planes)
        first = 0
        for i in tl.static_range(len(layout.sizes)):
            constant = map_constant(w.project[i], w.project_bias[i], w.motion_bias[i], c, q, layout.sizes[i], C)
            acc += constant[:, None] * restored(w.restore, t, first, layout.sizes[i], layout)[None, :]
            first += T - layout.sizes[i]
    tl.store(out + c[:, None] * TP + t[None, :], tl.where(real, acc, 0.0))


@triton.jit
def fold_cwem(w, out, layout: tl.constexpr):
    """CWEM before its sigmoid: taps ``[c][k][c']`` on the plane means, then C constants."""
    C: tl.constexpr = layout.channels
    R: tl.constexpr = layout.hidden
    c = tl.arange(0, layout.padded_channels)
    a = tl.arange(0, layout.padded_hidden)
    squeezed = tl.load(w.squeeze + c[:, None] * R + a[None, :], mask=(c < C)[:, None] & (a < R)[None, :], other=0.0)
    squeezed = squeezed.to(tl.float32)
    added = tl.load(w.temporal_bias + a, mask=a < R, other=0.0).to(tl.float32)
    tl.store(out + 3 * C * C + c, tl.sum(squeezed * added[None, :], axis=1), mask=c < C)
    spread = tl.load(w.expand + a[:, None] * C + c[None, :], mask=(a < R)[:, None] & (c < C)[None, :], other=0.0)
    spread = spread.to(tl.float32)
    for k in tl.static_range(3):
        both = (a < R)[:, None] & (a < R)[None, :]
        over = tl.load(w.temporal + a[:, None] * (3 * R) + a[None, :] * 3 + k, mask=both, other=0.0).to(tl.float32)
        hidden = tl.sum(squeezed[:, :, None] * over[None, :, :], axis=1)
        taps = tl.sum(hidden[:, :, None] * spread[None, :, :], axis=1)
        at = c[:, None] * (3 * C) + k * C + c[None, :]
        tl.store(out + at, taps, mask=(c < C)[:, None] & (c < C)[None, :])


@triton.jit
def sum_plane(x, normalization, out, p, H, W, layout: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """One of a plane's partial sums."""
    C: tl.constexpr = layout.channels
    plane = p // layout.chunks
    c = plane % C
    frame = plane // C
    base = x.data + (frame // layout.frames).to(tl.int64) * x.clip + (frame % layout.frames).to(tl.int64) * x.frame
    base += c.to(tl.int64) * x.channel
    pixels = H * W
    if layout.long_offsets:
        pixels = H.to(tl.int64) * W
    size = tl.cdiv(tl.cdiv(pixels, layout.chunks), BLOCK) * BLOCK
    start = (p % layout.chunks) * size
    acc = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, tl.minimum(start + size, pixels), BLOCK):
        i = at + tl.arange(0, BLOCK)
        offset = i * x.column
        if not FLAT:
            offset = i // W * x.row + i % W * x.column
        acc += tl.load(base + offset, mask=i < pixels, other=0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    if layout.normalize:
        count = tl.maximum(tl.minimum(size, pixels - start), 0).to(tl.float32)
        total = total * pick(normalization.scale, c, C) + count * pick(normalization.shift, c, C)
    tl.store(out + p, total)


@triton.jit(do_not_specialize=["H"])
def prepare_kernel(
    x, given, normalization, pieces, H, W,
    layout: tl.constexpr, numbers: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs 0..8 fold a tap each, 9 the constants and CWEM, the others sum a chunk of a plane each."""
    pid = tl.program_id(0)
    if pid < 9:
        if layout.conv:
            fold_tap(pid, given, normalization, pieces.folded, layout, numbers)
    elif pid == 9:
        if layout.conv:
            fold_bias(given, pieces.bias, layout)
        if layout.hidden > 0:
            fold_cwem(given, pieces.cwem, layout)
    elif layout.hidden > 0:
        sum_plane(x, normalization, pieces.means, pid - 10, H, W, layout, FLAT, BLOCK)


@triton.jit
def plane_means(means, b, t, c, ok, pixels, layout: tl.constexpr):
    """Means of clip b's planes (t, c), 0 where not ``ok``."""
    CHUNKS: tl.constexpr = layout.chunks
    at = means + ((b.to(tl.int64) * layout.frames + t) * layout.channels + c) * CHUNKS
    total = tl.load(at, mask=ok, other=0.0)
    for i in tl.static_range(1, CHUNKS):
        total += tl.load(at + i, mask=ok, other=0.0)
    return total / pixels


@triton.jit
def gate_rows(pieces, b, pixels, layout: tl.constexpr):
    """CWEM's prior in the order of the rows, ``[rows]``; with its input ``[rows, 4 * CP]`` (tap, channel)."""
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    CP: tl.constexpr = layout.padded_channels
    m = tl.arange(0, layout.rows)
    e = tl.arange(0, 4 * CP)
    c = m // TP
    t = (m % TP)[:, None] + (e // CP)[None, :] - 1
    s = (e % CP)[None, :]
    ok = is_plane(m, layout)[:, None] & (e // CP < 3)[None, :] & (s < C) & (t >= 0) & (t < layout.frames)
    seen = plane_means(pieces.means, b, t, s, ok, pixels, layout)
    taps = tl.load(pieces.cwem + c[:, None] * (3 * C) + (e // CP)[None, :] * C + s, mask=ok, other=0.0)
    z = tl.sum(seen * taps, axis=1) + tl.load(pieces.cwem + 3 * C * C + c, mask=c < C, other=0.0)
    return sigmoid(z), seen
