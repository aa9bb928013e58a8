# ruff: noqa: SIM102, since an if on a constant has to stand alone in a kernel
# mypy: disable-error-code=no-untyped-def
"""Stage ``reduce``: the sweep's partial sums to the gradients of the folded weights, in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.plan import Layout
from soap_kernels.backends.triton.prepare import Prepared, gate_rows, is_column, is_plane

ROWS, COLUMNS = 32, 64  # of partial sums that a program adds up at once


class Reduced(NamedTuple):
    """Gradients of what is folded; None for what is off or nobody asked for."""

    folded: Any = None  # (9, rows, columns)
    bias: Any = None  # (rows,)
    gate: Any = None  # (B, rows); before its sigmoid when the gate is CWEM's
    taps: Any = None  # (B, taps_numel), the clips' shares: CWEM's folded taps [c][tap][c'] and constants


def reduce(
    partial: Tensor | None, partial_bias: Tensor | None, partial_gate: Tensor | None, x: Tensor, pieces: Prepared,
    layout: Layout,
) -> Reduced:  # fmt: skip
    """From weigh's sums ``(programs, 9, rows, columns)`` and ``(programs, rows)``, and sweep's ``(B, tiles, rows)``."""
    clips, height, width = x.shape[0], *x.shape[3:]
    rows, columns = layout.rows, layout.columns
    found = Reduced(
        folded=None if partial is None else torch.empty(9, rows, columns, device=x.device),
        bias=None if partial is None else torch.empty(rows, device=x.device),
        gate=torch.empty(clips, rows, device=x.device) if layout.gated else None,
        taps=torch.empty(clips, layout.taps_numel, device=x.device) if layout.hidden else None,
    )
    own = 0 if partial is None else -(-9 * rows * columns // COLUMNS) + 1
    if own or layout.gated:
        plan.launch(
            reduce_kernel, (own + (clips if layout.gated else 0),), partial, partial_bias, partial_gate, pieces, found,
            0 if partial is None else partial.shape[0], 0 if partial_gate is None else partial_gate.shape[1],
            height, width, layout=layout, BP=ROWS, BC=COLUMNS, num_warps=4,
        )  # fmt: skip
    return found


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
def reduce_kernel(
    partial, partial_bias, partial_gate, pieces, out, programs, tiles, H, W,
    layout: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The first programs take BC columns of the folded weights' gradient each, the next the bias, then one a clip.

    For CWEM a clip's program goes on through the sigmoid, and to the clip's share of the taps' gradient.
    """
    M: tl.constexpr = layout.rows
    JP: tl.constexpr = layout.groups
    TP: tl.constexpr = layout.padded_frames
    TAPS: tl.constexpr = 4 * layout.padded_channels
    SUMS: tl.constexpr = 9 * M * layout.columns
    OWN: tl.constexpr = 0 if partial is None else (SUMS + BC - 1) // BC + 1
    pid = tl.program_id(0)
    m = tl.arange(0, M)
    if partial is not None:
        if pid < OWN - 1:
            column = pid * BC + tl.arange(0, BC)
            kept = (column < SUMS) & is_column(column % layout.columns, layout)
            total = sum_rows(partial, 0, programs, SUMS, column, kept, BP, BC)
            tl.store(out.folded + column, total, mask=column < SUMS)
        if pid == OWN - 1:
            tl.store(out.bias + m, sum_rows(partial_bias, 0, programs, M, m, m < M, BP, M))
    if layout.gated:
        if pid >= OWN:
            b = pid - OWN
            d = sum_rows(partial_gate, b * tiles, tiles, M, m, m < M, BP, M)
            if layout.hidden > 0:
                gate, seen = gate_rows(pieces, b, H.to(tl.float32) * W, layout)
                d = tl.where(is_plane(m, layout), d * (gate * (1.0 - gate)), 0.0)
                taps = tl.sum(tl.reshape(d[:, None] * seen, (JP, TP, TAPS)), axis=1)
                constants = tl.sum(tl.reshape(d, (JP, TP)), axis=1)
                j = tl.arange(0, JP)
                to = out.taps + b.to(tl.int64) * layout.taps_numel
                tl.store(to + j[:, None] * TAPS + tl.arange(0, TAPS)[None, :], taps)
                tl.store(to + JP * TAPS + j, constants)
            tl.store(out.gate + b.to(tl.int64) * M + m, d)
