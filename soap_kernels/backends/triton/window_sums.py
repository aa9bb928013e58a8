# mypy: disable-error-code=no-untyped-def
"""The nine sums that a zero-padded 3x3 convolution takes of each plane, and their adjoint."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from soap_kernels.backends.triton import plan
from soap_kernels.backends.triton.plan import long_offsets

PLANE_BLOCK, COPY_BLOCK = 2048, 1024  # pixels that a program takes at once


def window_sums(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    out = torch.empty((n, channels, 3, 3), device=x.device)
    plan.launch(
        window_sums_kernel, (n * channels,), x, out, channels, *x.stride(), height, width, LONG_OFFSETS=long_offsets(x),
        BLOCK=PLANE_BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def window_sums_backward(grad: Tensor, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (-(-height * width // COPY_BLOCK), n * channels)
    plan.launch(window_sums_backward_kernel, grid, grad, dx, height, width, BLOCK=COPY_BLOCK, num_warps=4)
    return dx


@triton.jit(do_not_specialize=["H"])
def window_sums_kernel(x, out, C, sN, sC, sH, sW, H, W, LONG_OFFSETS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes a plane: its total, its border rows and columns and their corners, then out ``[3, 3]``."""
    pid = tl.program_id(0)
    base = x + (pid // C).to(tl.int64) * sN + (pid % C).to(tl.int64) * sC
    pixels = H * W
    if LONG_OFFSETS:
        pixels = H.to(tl.int64) * W
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.zeros((BLOCK,), tl.float32)
    bottom = tl.zeros((BLOCK,), tl.float32)
    left = tl.zeros((BLOCK,), tl.float32)
    right = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, pixels, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = i // W
        w = i % W
        v = tl.load(base + h * sH + w * sW, mask=i < pixels, other=0.0).to(tl.float32)
        total += v
        top += tl.where(h == 0, v, 0.0)
        bottom += tl.where(h == H - 1, v, 0.0)
        left += tl.where(w == 0, v, 0.0)
        right += tl.where(w == W - 1, v, 0.0)
    whole = tl.sum(total, axis=0)
    # Tap 0 does not see the last row (column), tap 2 not the first; both missing, the corner was taken away twice.
    i = tl.arange(0, 16)
    r = i // 4
    c = i % 4
    no_row = tl.where(r == 0, tl.sum(bottom, axis=0), tl.where(r == 2, tl.sum(top, axis=0), 0.0))
    no_column = tl.where(c == 0, tl.sum(right, axis=0), tl.where(c == 2, tl.sum(left, axis=0), 0.0))
    h = tl.where(r == 0, H - 1, 0)
    w = tl.where(c == 0, W - 1, 0)
    if LONG_OFFSETS:
        h = h.to(tl.int64)
    corner = tl.load(base + h * sH + w * sW, mask=(r != 1) & (c != 1) & (r < 3) & (c < 3), other=0.0).to(tl.float32)
    found = whole - no_row - no_column + corner
    tl.store(out + pid.to(tl.int64) * 9 + r * 3 + c, found, mask=(r < 3) & (c < 3))


@triton.jit(do_not_specialize=["H"])
def window_sums_backward_kernel(grad, dx, H, W, BLOCK: tl.constexpr):
    """Each pixel's gradient is the sum over the taps that see it; dx is contiguous."""
    plane = tl.program_id(1).to(tl.int64)
    area = H.to(tl.int64) * W
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = i // W
    w = i % W
    d = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(3):
        for c in tl.static_range(3):
            g = tl.load(grad + plane * 9 + r * 3 + c).to(tl.float32)
            row_hidden = ((r == 0) & (h == H - 1)) | ((r == 2) & (h == 0))
            hidden = row_hidden | ((c == 0) & (w == W - 1)) | ((c == 2) & (w == 0))
            d += tl.where(hidden, 0.0, g)
    tl.store(dx + plane * area + i, d.to(dx.dtype.element_ty), mask=i < area)
