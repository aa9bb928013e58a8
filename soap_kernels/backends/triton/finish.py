# ruff: noqa: SIM102, since an if on a constant has to stand alone in a kernel
# mypy: disable-error-code=no-untyped-def
"""Stage ``finish``: from the gradients of the folded weights to the gradient of every weight, in one launch.

The adjoint of ``prepare``'s folds. Its programs are independent: each recomputes the little that it needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from soap_kernels.backends import Priors
from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.plan import Layout, Normalization
from soap_kernels.backends.triton.prepare import Given, map_constant, pick, project_motion, restored
from soap_kernels.backends.triton.reduce import Reduced

COPY_BLOCK = 1024  # numbers that a program copies


def finish(
    reduced: Reduced, given: Given, gradients: Given, normalization: Normalization, clips: int, layout: Layout
) -> None:
    """Writes ``gradients``, of the weights ``given``."""
    programs = 3 + sum((o + 1) * layout.channels + layout.frames - o + 1 for o in layout.sizes)
    plan.launch(finish_kernel, (programs,), reduced, given, gradients, normalization, clips, layout=layout, num_warps=4)


def finish_priors(reduced: Reduced, priors: Priors, needs: tuple[bool, ...], clips: int, layout: Layout) -> Priors:
    """The gradients of what was given folded, as far as it is needed."""
    wanted = zip(priors, needs, strict=True)
    found = Priors(*(torch.empty_like(v) if need and v is not None else None for v, need in wanted))
    size = 0 if found.weight is None else found.weight.numel()
    if any(v is not None for v in found):
        plan.launch(
            finish_priors_kernel, (3 + -(-size // COPY_BLOCK),), reduced, found, clips, layout=layout,
            BLOCK=COPY_BLOCK, num_warps=4,
        )  # fmt: skip
    return found


@triton.jit
def folded_gradient(dfolded, c, t, s, u, tap, ok, normalization, layout: tl.constexpr):
    """Gradient of the folded weight of output (c, t) and input (s, u) at a tap, 0 where not ``ok``."""
    TP: tl.constexpr = layout.padded_frames
    C: tl.constexpr = layout.channels
    at = dfolded + (tap * layout.rows + c * TP + t) * layout.columns
    d = tl.load(at + s * TP + u, mask=ok, other=0.0)
    if layout.normalize:
        # Frames are stored un-normalised; column ``one`` holds the sums of dz alone over what a tap sees of the image.
        sums = tl.load(at + layout.one + u * 0 + s * 0, mask=ok, other=0.0)
        d = d * pick(normalization.scale, s, C) + sums * pick(normalization.shift, s, C)
    return d


@triton.jit
def difference_gradient(reduced, w, first, c, s, tap, o: tl.constexpr, f, normalization, layout: tl.constexpr):
    """Gradient of place f of a tuple's differences, for indices (c, s, tap) along one axis: ``[len]``."""
    T: tl.constexpr = layout.frames
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    v = tl.arange(0, TP * TP)
    t = (v // TP)[None, :]
    u = (v % TP)[None, :]
    i = u - f
    fits = (t < T) & (i >= 0) & (i < T - o)
    z = tl.load(w.restore + t * layout.maps + first + i, mask=fits, other=0.0).to(tl.float32)
    ok = fits & ((c < C) & (s < C) & (tap < 9))[:, None]
    d = folded_gradient(reduced.folded, c[:, None], t, s[:, None], u, tap[:, None], ok, normalization, layout)
    return tl.sum(d * z, axis=1)


@triton.jit
def finish_motion(reduced, w, gradients, first, place, normalization, n: tl.constexpr, layout: tl.constexpr):
    """The 3x3 conv of the n-th tuple size: all its outputs at one of its inputs ``place`` = (frame, channel)."""
    o: tl.constexpr = layout.sizes[n]
    C: tl.constexpr = layout.channels
    CP: tl.constexpr = layout.padded_channels
    a = tl.arange(0, CP * 16)
    s = place % C + a * 0
    d = difference_gradient(reduced, w, first, a // 16, s, a % 16, o, 1 + place // C, normalization, layout)
    d = tl.reshape(d, (CP, 16))
    q = tl.arange(0, layout.padded_planes)
    k = tl.arange(0, CP)
    e = tl.arange(0, 16)
    ok = (k < C)[:, None] & (q < o * C)[None, :]
    r = tl.load(w.project[n] + k[:, None] * (o * C) + q[None, :], mask=ok, other=0.0)
    dk = -tl.sum(r.to(tl.float32)[:, :, None] * d[:, None, :], axis=0)
    out = gradients.motion[n]
    to = out + (q[:, None] * (o * C) + place) * 9 + e[None, :]
    tl.store(to, dk.to(out.dtype.element_ty), mask=(q < o * C)[:, None] & (e < 9)[None, :])


@triton.jit
def finish_project(reduced, w, gradients, first, c, normalization, n: tl.constexpr, layout: tl.constexpr):
    """The 1x1 conv of the n-th tuple size: output c."""
    o: tl.constexpr = layout.sizes[n]
    C: tl.constexpr = layout.channels
    QP: tl.constexpr = layout.padded_planes
    a = tl.arange(0, layout.padded_channels * 16)
    s = a // 16
    tap = a % 16
    q = tl.arange(0, QP)
    acc = tl.zeros((QP,), tl.float32)
    k = tl.arange(0, layout.padded_channels)
    for f in tl.static_range(o + 1):
        if f > 0:
            d = difference_gradient(reduced, w, first, c + a * 0, s, tap, o, f, normalization, layout)
            at = w.motion[n] + (q[:, None] * (o * C) + (f - 1) * C + s[None, :]) * 9 + tap[None, :]
            m = tl.load(at, mask=(q < o * C)[:, None] & ((s < C) & (tap < 9))[None, :], other=0.0).to(tl.float32)
            acc -= tl.sum(m * d[None, :], axis=1)
        if f < o:
            d = difference_gradient(reduced, w, first, c + k * 0, k, 4 + k * 0, o, f, normalization, layout)
            acc += tl.sum(tl.where(q[:, None] == f * C + k[None, :], d[None, :], 0.0), axis=1)
    t = tl.arange(0, layout.padded_frames)
    db = tl.load(reduced.bias + c * layout.padded_frames + t, mask=t < layout.frames, other=0.0)
    dconstant = tl.sum(db * restored(w.restore, t, first, o, layout), axis=0)
    acc -= dconstant * tl.load(w.motion_bias[n] + q, mask=q < o * C, other=0.0).to(tl.float32)
    out, out_bias = gradients.project[n], gradients.project_bias[n]
    tl.store(out + c * (o * C) + q, acc.to(out.dtype.element_ty), mask=q < o * C)
    tl.store(out_bias + c, dconstant.to(out_bias.dtype.element_ty))


@triton.jit
def bias_gradient(dbias, t, layout: tl.constexpr):
    """Of the folded bias: ``[padded channels, len(t)]``."""
    k = tl.arange(0, layout.padded_channels)
    ok = (k < layout.channels)[:, None] & (t < layout.frames)[None, :]
    return tl.load(dbias + k[:, None] * layout.padded_frames + t[None, :], mask=ok, other=0.0)


@triton.jit
def finish_motion_bias(dbias, w, gradients, first, n: tl.constexpr, layout: tl.constexpr):
    o: tl.constexpr = layout.sizes[n]
    C: tl.constexpr = layout.channels
    t = tl.arange(0, layout.padded_frames)
    k = tl.arange(0, layout.padded_channels)
    q = tl.arange(0, layout.padded_planes)
    db = bias_gradient(dbias, t, layout)
    dconstant = tl.sum(db * restored(w.restore, t, first, o, layout)[None, :], axis=1)
    ok = (k < C)[:, None] & (q < o * C)[None, :]
    r = tl.load(w.project[n] + k[:, None] * (o * C) + q[None, :], mask=ok, other=0.0)
    d = -tl.sum(dconstant[:, None] * r.to(tl.float32), axis=0)
    out = gradients.motion_bias[n]
    tl.store(out + q, d.to(out.dtype.element_ty), mask=q < o * C)


@triton.jit
def finish_restore(reduced, w, gradients, first, i, normalization, n: tl.constexpr, layout: tl.constexpr):
    """Z's column of map i of the n-th tuple size."""
    o: tl.constexpr = layout.sizes[n]
    C: tl.constexpr = layout.channels
    CP: tl.constexpr = layout.padded_channels
    TP: tl.constexpr = layout.padded_frames
    a = tl.arange(0, CP * CP * 16)
    c = a // (CP * 16)
    s = a // 16 % CP
    tap = a % 16
    ok = (c < C) & (s < C) & (tap < 9)
    t = tl.arange(0, TP)
    acc = tl.zeros((TP,), tl.float32)
    q = tl.arange(0, layout.padded_planes)[:, None]
    for f in tl.static_range(o + 1):
        d = tl.zeros((CP * CP * 16,), tl.float32)
        if f > 0:
            d -= tl.sum(project_motion(w, c[None, :], q, s[None, :], tap[None, :], n, f, layout), axis=0)
        if f < o:
            d += tl.load(w.project[n] + c * (o * C) + f * C + s, mask=ok & (tap == 4), other=0.0).to(tl.float32)
        g = folded_gradient(
            reduced.folded, c[None, :], t[:, None], s[None, :], i + f + a[None, :] * 0, tap[None, :],
            (t < layout.frames)[:, None] & ok[None, :], normalization, layout,
        )  # fmt: skip
        acc += tl.sum(g * tl.where(ok, d, 0.0)[None, :], axis=1)
    k = tl.arange(0, CP)
    q = tl.arange(0, layout.padded_planes)
    constant = map_constant(w.project[n], w.project_bias[n], w.motion_bias[n], k, q, o, C)
    acc += tl.sum(bias_gradient(reduced.bias, t, layout) * constant[:, None], axis=0)
    out = gradients.restore
    tl.store(out + t * layout.maps + first + i, acc.to(out.dtype.element_ty), mask=t < layout.frames)


@triton.jit
def finish_stencil(dfolded, out, normalization, layout: tl.constexpr):
    """3DEM: its three frames one after the other, each over all outputs and the inputs they reach."""
    T: tl.constexpr = layout.frames
    C: tl.constexpr = layout.channels
    CP: tl.constexpr = layout.padded_channels
    e = tl.arange(0, 16)[:, None]
    v = tl.arange(0, layout.padded_frames * CP)[None, :]
    t = v // CP
    j = v % CP
    for k in tl.static_range(3):
        slot = t + k - 1
        ok = (e < 9) & (t < T) & (j < C) & (slot >= 0) & (slot < T)
        u, s = slot, j
        if layout.interleaved:
            u = (slot + j * T) // C
            s = (slot + j * T) % C
        d = folded_gradient(dfolded, layout.stencil_group + t * 0, t, s, u, e, ok, normalization, layout)
        taps = tl.arange(0, 16)
        tl.store(out + k * 9 + taps, (tl.sum(d, axis=1) / C).to(out.dtype.element_ty), mask=taps < 9)


@triton.jit
def finish_cwem(dtaps, w, gradients, B, layout: tl.constexpr):
    """CWEM from its clips' shares, summed in the order of the clips."""
    C: tl.constexpr = layout.channels
    CP: tl.constexpr = layout.padded_channels
    R: tl.constexpr = layout.hidden
    RP: tl.constexpr = layout.padded_hidden
    SIZE: tl.constexpr = layout.taps_numel
    c = tl.arange(0, CP)
    a = tl.arange(0, RP)
    both = (a < R)[:, None] & (a < R)[None, :]
    outer = (c < C)[:, None] & (a < R)[None, :]
    squeezed = tl.load(w.squeeze + c[:, None] * R + a[None, :], mask=outer, other=0.0).to(tl.float32)
    added = tl.load(w.temporal_bias + a, mask=a < R, other=0.0).to(tl.float32)
    inner = (a < R)[:, None] & (c < C)[None, :]
    spread = tl.load(w.expand + a[:, None] * C + c[None, :], mask=inner, other=0.0).to(tl.float32)
    row = tl.arange(0, 16)
    constants = tl.zeros((16, CP), tl.float32)
    for b in range(0, B, 16):
        at = dtaps + (b + row).to(tl.int64)[:, None] * SIZE + 4 * CP * layout.groups + c[None, :]
        constants += tl.load(at, mask=(b + row < B)[:, None] & (c < C)[None, :], other=0.0)
    d0 = tl.sum(constants, axis=0)
    db = tl.sum(squeezed * d0[:, None], axis=0)
    tl.store(gradients.temporal_bias + a, db.to(gradients.temporal_bias.dtype.element_ty), mask=a < R)
    ds = d0[:, None] * added[None, :]
    de = tl.zeros((RP, CP), tl.float32)
    for k in tl.static_range(3):
        shares = tl.zeros((16, CP, CP), tl.float32)
        for b in range(0, B, 16):
            at = (b + row).to(tl.int64)[:, None, None] * SIZE + c[None, :, None] * (4 * CP) + k * CP + c[None, None, :]
            ok = (b + row < B)[:, None, None] & (c < C)[None, :, None] & (c < C)[None, None, :]
            shares += tl.load(dtaps + at, mask=ok, other=0.0)
        d = tl.sum(shares, axis=0)
        over = tl.load(w.temporal + a[:, None] * (3 * R) + a[None, :] * 3 + k, mask=both, other=0.0).to(tl.float32)
        back = tl.sum(squeezed[:, :, None] * d[:, None, :], axis=0)
        dt = tl.sum(back[:, None, :] * spread[None, :, :], axis=2)
        to = gradients.temporal + a[:, None] * (3 * R) + a[None, :] * 3 + k
        tl.store(to, dt.to(gradients.temporal.dtype.element_ty), mask=both)
        reached = tl.sum(over[:, :, None] * spread[None, :, :], axis=1)
        ds += tl.sum(d[:, None, :] * reached[None, :, :], axis=2)
        de += tl.sum(over[:, :, None] * back[:, None, :], axis=0)
    tl.store(gradients.expand + a[:, None] * C + c[None, :], de.to(gradients.expand.dtype.element_ty), mask=inner)
    tl.store(gradients.squeeze + c[:, None] * R + a[None, :], ds.to(gradients.squeeze.dtype.element_ty), mask=outer)


@triton.jit
def finish_size(p, reduced, w, d, first, normalization, n: tl.constexpr, layout: tl.constexpr):
    """Program p of the n-th tuple size, whose maps begin with ``first``."""
    C: tl.constexpr = layout.channels
    o: tl.constexpr = layout.sizes[n]
    MAPS: tl.constexpr = layout.frames - o
    if p >= 0:
        if p < o * C:
            finish_motion(reduced, w, d, first, p, normalization, n, layout)
        elif p < (o + 1) * C:
            finish_project(reduced, w, d, first, p - o * C, normalization, n, layout)
        elif p < (o + 1) * C + MAPS:
            finish_restore(reduced, w, d, first, p - (o + 1) * C, normalization, n, layout)
        elif p == (o + 1) * C + MAPS:
            finish_motion_bias(reduced.bias, w, d, first, n, layout)


@triton.jit
def finish_kernel(reduced, w, d, normalization, B, layout: tl.constexpr):
    """Program 0: CWEM, 1: 3DEM, 2: Z's bias; then each tuple size's inputs, outputs, maps and one for its bias."""
    pid = tl.program_id(0)
    if pid == 0:
        if layout.hidden > 0:
            finish_cwem(reduced.taps, w, d, B, layout)
    elif pid == 1:
        if layout.stencil:
            finish_stencil(reduced.folded, d.stencil, normalization, layout)
    elif pid == 2:
        if len(layout.sizes) > 0:
            t = tl.arange(0, layout.padded_frames)
            sums = tl.sum(bias_gradient(reduced.bias, t, layout), axis=0)
            tl.store(d.restore_bias + t, sums.to(d.restore_bias.dtype.element_ty), mask=t < layout.frames)
    at = 3
    first = 0
    for k in tl.static_range(len(layout.sizes)):
        finish_size(pid - at, reduced, w, d, first, normalization, k, layout)
        at += (layout.sizes[k] + 1) * layout.channels + layout.frames - layout.sizes[k] + 1
        first += layout.frames - layout.sizes[k]


@triton.jit
def finish_priors_kernel(reduced, d, B, layout: tl.constexpr, BLOCK: tl.constexpr):
    """``finish`` for weights that were given folded: program 0 the stencil, 1 the bias, 2 the gate, then the weight."""
    C: tl.constexpr = layout.channels
    TP: tl.constexpr = layout.padded_frames
    M: tl.constexpr = layout.rows
    P: tl.constexpr = layout.frames * C
    pid = tl.program_id(0)
    if pid == 0:
        if d.stencil is not None:
            finish_stencil(reduced.folded, d.stencil, None, layout)
    elif pid == 1:
        if d.bias is not None:
            p = tl.arange(0, M)
            found = tl.load(reduced.bias + p % C * TP + p // C, mask=p < P, other=0.0)
            tl.store(d.bias + p, found.to(d.bias.dtype.element_ty), mask=p < P)
    elif pid == 2:
        if d.gate is not None:
            for first in range(0, B * P, BLOCK):
                i = first + tl.arange(0, BLOCK)
                p = i % P
                at = reduced.gate + (i // P).to(tl.int64) * M + p % C * TP + p // C
                tl.store(d.gate + i, tl.load(at, mask=i < B * P, other=0.0).to(d.gate.dtype.element_ty), mask=i < B * P)
    elif d.weight is not None:
        i = (pid - 3) * BLOCK + tl.arange(0, BLOCK)
        p = i // 9 // P
        q = i // 9 % P
        at = (i % 9 * M + p % C * TP + p // C) * layout.columns + q % C * TP + q // C
        found = tl.load(reduced.folded + at, mask=i < 9 * P * P, other=0.0)
        tl.store(d.weight + i, found.to(d.weight.dtype.element_ty), mask=i < 9 * P * P)
