# ruff: noqa: SIM102, since an if on a constant has to stand alone in a kernel
# mypy: disable-error-code=no-untyped-def
"""Stage ``finish``: from the gradients of the folded weights to the gradient of every weight, in one launch.

The adjoint of ``prepare``'s folds. Its programs are independent: each recomputes the little that it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soap_kernels.backends.triton.prepare import map_constant, pick, project_motion, restored


@triton.jit
def folded_gradient(
    dfolded, c, t, s, u, tap, ok, scale, shift,
    C: tl.constexpr, TP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Gradient of the folded weight of output (c, t) and input (s, u) at a tap, 0 where not ``ok``."""
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    at = dfolded + (tap * M + c * TP + t) * K
    d = tl.load(at + s * TP + u, mask=ok, other=0.0)
    if NORMALIZE:
        # Frames are stored un-normalised; column ONE holds the sums of dz alone over what the tap sees of the image.
        d = d * pick(scale, s, C) + tl.load(at + ONE + u * 0 + s * 0, mask=ok, other=0.0) * pick(shift, s, C)
    return d


@triton.jit
def difference_gradient(
    dfolded, restore, first, c, s, tap, o: tl.constexpr, f: tl.constexpr, scale, shift,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr, MAPS: tl.constexpr,
    NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Gradient of place f of a tuple's differences, for indices (c, s, tap) along one axis: ``[len]``."""
    v = tl.arange(0, TP * TP)
    t = (v // TP)[None, :]
    u = (v % TP)[None, :]
    i = u - f
    fits = (t < T) & (i >= 0) & (i < T - o)
    z = tl.load(restore + t * MAPS + first + i, mask=fits, other=0.0).to(tl.float32)
    ok = fits & ((c < C) & (s < C) & (tap < 9))[:, None]
    c, s, tap = c[:, None], s[:, None], tap[:, None]
    d = folded_gradient(dfolded, c, t, s, u, tap, ok, scale, shift, C, TP, JP, KQ, NORMALIZE, ONE)
    return tl.sum(d * z, axis=1)


@triton.jit
def finish_motion(
    dfolded, project, restore, first, out, place, scale, shift, o: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    QP: tl.constexpr, MAPS: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The 3x3 conv of a tuple size: all its outputs at one of its inputs ``place`` = (frame, channel)."""
    a = tl.arange(0, CP * 16)
    v = tl.arange(0, TP * TP)
    c = (a // 16)[:, None]
    tap = (a % 16)[:, None]
    s = place % C
    t = (v // TP)[None, :]
    u = (v % TP)[None, :]
    i = u - 1 - place // C
    fits = (t < T) & (i >= 0) & (i < T - o)
    z = tl.load(restore + t * MAPS + first + i, mask=fits, other=0.0).to(tl.float32)
    ok = fits & (c < C) & (tap < 9)
    d = folded_gradient(dfolded, c, t, s + t * 0, u, tap, ok, scale, shift, C, TP, JP, KQ, NORMALIZE, ONE)
    d = tl.reshape(tl.sum(d * z, axis=1), (CP, 16))
    q = tl.arange(0, QP)
    k = tl.arange(0, CP)
    e = tl.arange(0, 16)
    r = tl.load(project + k[:, None] * (o * C) + q[None, :], mask=(k < C)[:, None] & (q < o * C)[None, :], other=0.0)
    dk = -tl.sum(r.to(tl.float32)[:, :, None] * d[:, None, :], axis=0)
    to = out + (q[:, None] * (o * C) + place) * 9 + e[None, :]
    tl.store(to, dk.to(out.dtype.element_ty), mask=(q < o * C)[:, None] & (e < 9)[None, :])


@triton.jit
def finish_project(
    dfolded, dbias, motion, motion_bias, restore, first, out, out_bias, c, scale, shift, o: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    QP: tl.constexpr, MAPS: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The 1x1 conv of a tuple size: output c."""
    a = tl.arange(0, CP * 16)
    s = a // 16
    tap = a % 16
    q = tl.arange(0, QP)
    acc = tl.zeros((QP,), tl.float32)
    k = tl.arange(0, CP)
    for f in tl.static_range(o + 1):
        if f > 0:
            d = difference_gradient(
                dfolded, restore, first, c + a * 0, s, tap, o, f, scale, shift, T, C, TP, JP, KQ, MAPS, NORMALIZE, ONE
            )  # fmt: skip
            at = motion + (q[:, None] * (o * C) + (f - 1) * C + s[None, :]) * 9 + tap[None, :]
            m = tl.load(at, mask=(q < o * C)[:, None] & ((s < C) & (tap < 9))[None, :], other=0.0).to(tl.float32)
            acc -= tl.sum(m * d[None, :], axis=1)
        if f < o:
            d = difference_gradient(
                dfolded, restore, first, c + k * 0, k, 4 + k * 0, o, f, scale, shift,
                T, C, TP, JP, KQ, MAPS, NORMALIZE, ONE,
            )  # fmt: skip
            acc += tl.sum(tl.where(q[:, None] == f * C + k[None, :], d[None, :], 0.0), axis=1)
    t = tl.arange(0, TP)
    db = tl.load(dbias + c * TP + t, mask=t < T, other=0.0)
    dconstant = tl.sum(db * restored(restore, t, first, o, T, MAPS, TP), axis=0)
    acc -= dconstant * tl.load(motion_bias + q, mask=q < o * C, other=0.0).to(tl.float32)
    tl.store(out + c * (o * C) + q, acc.to(out.dtype.element_ty), mask=q < o * C)
    tl.store(out_bias + c, dconstant.to(out_bias.dtype.element_ty))


@triton.jit
def finish_motion_bias(
    dbias, project, restore, first, out, o: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, QP: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, TP)
    k = tl.arange(0, CP)
    q = tl.arange(0, QP)
    db = tl.load(dbias + k[:, None] * TP + t[None, :], mask=(k < C)[:, None] & (t < T)[None, :], other=0.0)
    dconstant = tl.sum(db * restored(restore, t, first, o, T, MAPS, TP)[None, :], axis=1)
    r = tl.load(project + k[:, None] * (o * C) + q[None, :], mask=(k < C)[:, None] & (q < o * C)[None, :], other=0.0)
    d = -tl.sum(dconstant[:, None] * r.to(tl.float32), axis=0)
    tl.store(out + q, d.to(out.dtype.element_ty), mask=q < o * C)


@triton.jit
def finish_restore(
    dfolded, dbias, motion, motion_bias, project, project_bias, first, out, i, scale, shift, o: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    QP: tl.constexpr, MAPS: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Z's column of map i of a tuple size."""
    a = tl.arange(0, CP * CP * 16)
    c = a // (CP * 16)
    s = a // 16 % CP
    tap = a % 16
    ok = (c < C) & (s < C) & (tap < 9)
    t = tl.arange(0, TP)
    acc = tl.zeros((TP,), tl.float32)
    q = tl.arange(0, QP)[:, None]
    for f in tl.static_range(o + 1):
        d = tl.zeros((CP * CP * 16,), tl.float32)
        if f > 0:
            d -= tl.sum(project_motion(project, motion, c[None, :], q, s[None, :], tap[None, :], o, f, C, 9), axis=0)
        if f < o:
            d += tl.load(project + c * (o * C) + f * C + s, mask=ok & (tap == 4), other=0.0).to(tl.float32)
        g = folded_gradient(
            dfolded, c[None, :], t[:, None], s[None, :], i + f + a[None, :] * 0, tap[None, :],
            (t < T)[:, None] & ok[None, :], scale, shift, C, TP, JP, KQ, NORMALIZE, ONE,
        )  # fmt: skip
        acc += tl.sum(g * tl.where(ok, d, 0.0)[None, :], axis=1)
    k = tl.arange(0, CP)
    constant = map_constant(project, project_bias, motion_bias, k, tl.arange(0, QP), o, C)
    db = tl.load(dbias + k[None, :] * TP + t[:, None], mask=(k < C)[None, :] & (t < T)[:, None], other=0.0)
    acc += tl.sum(db * constant[None, :], axis=1)
    tl.store(out + t * MAPS + first + i, acc.to(out.dtype.element_ty), mask=t < T)


@triton.jit
def finish_stencil(
    dfolded, out, scale, shift,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    STENCIL_GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """3DEM: its three frames one after the other, each over all outputs and the inputs they reach."""
    e = tl.arange(0, 16)[:, None]
    v = tl.arange(0, TP * CP)[None, :]
    t = v // CP
    j = v % CP
    for k in tl.static_range(3):
        slot = t + k - 1
        ok = (e < 9) & (t < T) & (j < C) & (slot >= 0) & (slot < T)
        u, s = slot, j
        if INTERLEAVED:
            u = (slot + j * T) // C
            s = (slot + j * T) % C
        d = folded_gradient(
            dfolded, STENCIL_GROUP + t * 0, t, s, u, e, ok, scale, shift, C, TP, JP, KQ, NORMALIZE, ONE
        )  # fmt: skip
        taps = tl.arange(0, 16)
        tl.store(out + k * 9 + taps, (tl.sum(d, axis=1) / C).to(out.dtype.element_ty), mask=taps < 9)


@triton.jit
def finish_cwem(
    dtaps, expand, temporal, temporal_bias, squeeze, dexpand, dtemporal, dtemporal_bias, dsqueeze, B,
    C: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """CWEM from its clips' shares, summed in the order of the clips."""
    SIZE: tl.constexpr = JP * 4 * CP + JP
    c = tl.arange(0, CP)
    a = tl.arange(0, RP)
    both = (a < R)[:, None] & (a < R)[None, :]
    outer = (c < C)[:, None] & (a < R)[None, :]
    squeezed = tl.load(squeeze + c[:, None] * R + a[None, :], mask=outer, other=0.0).to(tl.float32)
    added = tl.load(temporal_bias + a, mask=a < R, other=0.0).to(tl.float32)
    inner = (a < R)[:, None] & (c < C)[None, :]
    spread = tl.load(expand + a[:, None] * C + c[None, :], mask=inner, other=0.0).to(tl.float32)
    row = tl.arange(0, 16)
    constants = tl.zeros((16, CP), tl.float32)
    for b in range(0, B, 16):
        at = dtaps + (b + row).to(tl.int64)[:, None] * SIZE + JP * 4 * CP + c[None, :]
        constants += tl.load(at, mask=(b + row < B)[:, None] & (c < C)[None, :], other=0.0)
    d0 = tl.sum(constants, axis=0)
    tl.store(dtemporal_bias + a, tl.sum(squeezed * d0[:, None], axis=0).to(dtemporal_bias.dtype.element_ty), mask=a < R)
    ds = d0[:, None] * added[None, :]
    de = tl.zeros((RP, CP), tl.float32)
    for k in tl.static_range(3):
        shares = tl.zeros((16, CP, CP), tl.float32)
        for b in range(0, B, 16):
            at = (b + row).to(tl.int64)[:, None, None] * SIZE + c[None, :, None] * (4 * CP) + k * CP + c[None, None, :]
            ok = (b + row < B)[:, None, None] & (c < C)[None, :, None] & (c < C)[None, None, :]
            shares += tl.load(dtaps + at, mask=ok, other=0.0)
        d = tl.sum(shares, axis=0)
        over = tl.load(temporal + a[:, None] * (3 * R) + a[None, :] * 3 + k, mask=both, other=0.0).to(tl.float32)
        back = tl.sum(squeezed[:, :, None] * d[:, None, :], axis=0)
        dt = tl.sum(back[:, None, :] * spread[None, :, :], axis=2)
        to = dtemporal + a[:, None] * (3 * R) + a[None, :] * 3 + k
        tl.store(to, dt.to(dtemporal.dtype.element_ty), mask=both)
        reached = tl.sum(over[:, :, None] * spread[None, :, :], axis=1)
        ds += tl.sum(d[:, None, :] * reached[None, :, :], axis=2)
        de += tl.sum(over[:, :, None] * back[:, None, :], axis=0)
    tl.store(dexpand + a[:, None] * C + c[None, :], de.to(dexpand.dtype.element_ty), mask=inner)
    tl.store(dsqueeze + c[:, None] * R + a[None, :], ds.to(dsqueeze.dtype.element_ty), mask=outer)


@triton.jit
def finish(
    dfolded, dbias, dtaps, motion, motion_bias, project, project_bias, restore, expand, temporal, temporal_bias,
    squeeze, scale, shift, dmotion, dmotion_bias, dproject, dproject_bias, drestore, drestore_bias, dstencil, dexpand,
    dtemporal, dtemporal_bias, dsqueeze, B,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    SIZES: tl.constexpr, MAPS: tl.constexpr, QP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    STENCIL_GROUP: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Program 0: CWEM, 1: 3DEM, 2: Z's bias; then each tuple size's inputs, outputs, maps and one for its bias."""
    pid = tl.program_id(0)
    if pid == 0:
        if R > 0:
            finish_cwem(
                dtaps, expand, temporal, temporal_bias, squeeze, dexpand, dtemporal, dtemporal_bias, dsqueeze, B,
                C, CP, JP, R, RP,
            )  # fmt: skip
    elif pid == 1:
        if STENCIL_GROUP >= 0:
            finish_stencil(
                dfolded, dstencil, scale, shift, T, C, TP, CP, JP, KQ, STENCIL_GROUP, False, NORMALIZE, ONE
            )  # fmt: skip
    elif pid == 2:
        if len(SIZES) > 0:
            t = tl.arange(0, TP)
            c = tl.arange(0, CP)
            db = tl.load(dbias + c[:, None] * TP + t[None, :], mask=(c < C)[:, None] & (t < T)[None, :], other=0.0)
            tl.store(drestore_bias + t, tl.sum(db, axis=0).to(drestore_bias.dtype.element_ty), mask=t < T)
    if len(SIZES) > 0:
        at = 3
        first = 0
        for k in tl.static_range(len(SIZES)):
            p = pid - at
            if p >= 0:
                if p < SIZES[k] * C:
                    finish_motion(
                        dfolded, project[k], restore, first, dmotion[k], p, scale, shift, SIZES[k],
                        T, C, TP, CP, JP, KQ, QP, MAPS, NORMALIZE, ONE,
                    )  # fmt: skip
                elif p < (SIZES[k] + 1) * C:
                    finish_project(
                        dfolded, dbias, motion[k], motion_bias[k], restore, first, dproject[k], dproject_bias[k],
                        p - SIZES[k] * C, scale, shift, SIZES[k], T, C, TP, CP, JP, KQ, QP, MAPS, NORMALIZE, ONE,
                    )  # fmt: skip
                elif p < (SIZES[k] + 1) * C + T - SIZES[k]:
                    finish_restore(
                        dfolded, dbias, motion[k], motion_bias[k], project[k], project_bias[k], first, drestore,
                        p - (SIZES[k] + 1) * C, scale, shift, SIZES[k], T, C, TP, CP, JP, KQ, QP, MAPS, NORMALIZE, ONE,
                    )  # fmt: skip
                elif p == (SIZES[k] + 1) * C + T - SIZES[k]:
                    finish_motion_bias(
                        dbias, project[k], restore, first, dmotion_bias[k], SIZES[k], T, C, TP, CP, QP, MAPS
                    )
            at += (SIZES[k] + 1) * C + T - SIZES[k] + 1
            first += T - SIZES[k]


@triton.jit
def finish_priors(
    dfolded, dbias, dgate, dstencil, dgate_out, dweight, dbias_out, B,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    STENCIL_GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``finish`` for weights that were given folded: program 0 the stencil, 1 the bias, 2 the gate, then the weight."""
    P: tl.constexpr = T * C
    M: tl.constexpr = JP * TP
    K: tl.constexpr = KQ * TP
    pid = tl.program_id(0)
    if pid == 0:
        if dstencil is not None:
            finish_stencil(
                dfolded, dstencil, None, None, T, C, TP, CP, JP, KQ, STENCIL_GROUP, INTERLEAVED, False, -1
            )  # fmt: skip
    elif pid == 1:
        if dbias_out is not None:
            p = tl.arange(0, M)
            d = tl.load(dbias + p % C * TP + p // C, mask=p < P, other=0.0)
            tl.store(dbias_out + p, d.to(dbias_out.dtype.element_ty), mask=p < P)
    elif pid == 2:
        if dgate_out is not None:
            for first in range(0, B * P, BLOCK):
                i = first + tl.arange(0, BLOCK)
                p = i % P
                d = tl.load(dgate + (i // P).to(tl.int64) * M + p % C * TP + p // C, mask=i < B * P, other=0.0)
                tl.store(dgate_out + i, d.to(dgate_out.dtype.element_ty), mask=i < B * P)
    elif dweight is not None:
        i = (pid - 3) * BLOCK + tl.arange(0, BLOCK)
        tap = i % 9
        p = i // 9 // P
        q = i // 9 % P
        at = (tap * M + p % C * TP + p // C) * K + q % C * TP + q // C
        d = tl.load(dfolded + at, mask=i < 9 * P * P, other=0.0)
        tl.store(dweight + i, d.to(dweight.dtype.element_ty), mask=i < 9 * P * P)
