# ruff: noqa: SIM102, since an if on a constant has to stand alone in a kernel
# mypy: disable-error-code=no-untyped-def
"""Stage ``reduce``: the sweep's partial sums to the gradients of the folded weights, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from soap_kernels.backends.triton.prepare import gate_rows, is_column


@triton.jit
def sum_rows(partial, first, rows, columns, column, ok, BP: tl.constexpr, BC: tl.constexpr):
    """Sum of ``rows`` rows of ``[rows, columns]`` from row ``first``, at BC of its columns."""
    acc = tl.zeros((BP, BC), tl.float32)
    r = tl.arange(0, BP)
    for p in range(0, rows, BP):
        at = (first + p + r).to(tl.int64)[:, None] * columns + column[None, :]
        acc += tl.load(partial + at, mask=(p + r < rows)[:, None] & ok[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["H", "programs", "tiles"])
def reduce(
    partial, partial_bias, partial_gate, means, cwem, dfolded, dbias, dgate, dtaps, programs, tiles, H, W,
    T: tl.constexpr, C: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, KQ: tl.constexpr,
    CHUNKS: tl.constexpr, WEIGHTS: tl.constexpr, GATE: tl.constexpr, POOL: tl.constexpr, ONE: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The first programs take BC columns of the folded weights' gradient each, the next the bias, then one a clip.

    With POOL a clip's program goes on through the sigmoid: dgate holds what comes before it, and dtaps
    ``[B, JP * 4 * CP + JP]`` the clip's share of the gradients of CWEM's folded taps ``[c][tap][c']`` and constants.
    """
    M: tl.constexpr = JP * TP
    COLUMNS: tl.constexpr = 9 * M * KQ * TP
    OWN: tl.constexpr = (COLUMNS + BC - 1) // BC + 1 if WEIGHTS else 0
    pid = tl.program_id(0)
    m = tl.arange(0, M)
    if WEIGHTS:
        if pid < OWN - 1:
            column = pid * BC + tl.arange(0, BC)
            kept = (column < COLUMNS) & is_column(column % (KQ * TP), T, C, TP, ONE)
            total = sum_rows(partial, 0, programs, COLUMNS, column, kept, BP, BC)
            tl.store(dfolded + column, total, mask=column < COLUMNS)
        if pid == OWN - 1:
            tl.store(dbias + m, sum_rows(partial_bias, 0, programs, M, m, m < M, BP, M))
    if GATE:
        if pid >= OWN:
            b = pid - OWN
            d = sum_rows(partial_gate, b * tiles, tiles, M, m, m < M, BP, M)
            if POOL:
                gate, seen = gate_rows(means, cwem, b, H.to(tl.float32) * W, T, C, TP, CP, JP, CHUNKS)
                d = tl.where((m // TP < C) & (m % TP < T), d * (gate * (1.0 - gate)), 0.0)
                taps = tl.sum(tl.reshape(d[:, None] * seen, (JP, TP, 4 * CP)), axis=1)
                constants = tl.sum(tl.reshape(d, (JP, TP)), axis=1)
                j = tl.arange(0, JP)
                to = dtaps + b.to(tl.int64) * (JP * 4 * CP + JP)
                tl.store(to + j[:, None] * (4 * CP) + tl.arange(0, 4 * CP)[None, :], taps)
                tl.store(to + JP * 4 * CP + j, constants)
            tl.store(dgate + b.to(tl.int64) * M + m, d)
