"""SOAP on planes too many for one tile (feature maps): the folded convolution by cuDNN, the rest in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels import reference
from soap_kernels.equations import Weights
from soap_kernels.fold import fold_cwem, fold_hmem, fold_three_dem, unfold_cwem, unfold_hmem, unfold_three_dem
from soap_kernels.triton.fuse import join
from soap_kernels.triton.plan import launch
from soap_kernels.triton.sweep import part

BLOCK = 1024


@dataclass(frozen=True)
class Fused:
    """How the priors join x."""

    multiplicative: bool = False
    offset: float = 1.0
    interleaved: bool = False
    precision: str = "default"


def prepare(x: Tensor, w: Weights, tuple_sizes: Sequence[int]) -> reference.Prepared:
    """The folded weights in fp32 and CWEM's gate; ``w`` in fp32, x in any dtype."""
    rows = fold_three_dem(w.three_dem, x.shape[1]) if w.three_dem else None
    means = x.mean((3, 4), dtype=torch.float32)
    gate = reference.cwem_gate(means, *fold_cwem(w.cwem)) if w.cwem else None
    weight, bias = fold_hmem(w.hmem, tuple_sizes) if w.hmem else (None, None)
    return reference.Prepared(rows, gate, weight, bias)


def finish(
    x: Tensor, w: Weights, tuple_sizes: Sequence[int], p: reference.Prepared, d: reference.Prepared, dx: Tensor | None
) -> tuple[Tensor | None, list[Tensor]]:
    """dx with what comes through CWEM's pool, and the gradients of the weights whose folds' gradients there are."""
    t = x.shape[1]
    dthree = dcwem = dhmem = None
    if w.cwem and p.gate is not None and d.gate is not None:
        taps, _ = fold_cwem(w.cwem)
        dz = d.gate * p.gate * (1 - p.gate)
        seen = F.pad(x.mean((3, 4), dtype=torch.float32), (0, 0, 1, 1))
        dtaps = torch.stack([torch.einsum("btp,btq->pq", dz, seen[:, k : k + t]) for k in range(3)])
        dcwem = unfold_cwem(w.cwem, dtaps, dz.sum((0, 1)))
        if dx is not None:
            around = F.pad(dz, (0, 0, 1, 1))
            dmeans = torch.stack([around[:, 2 - k : 2 - k + t] @ taps[k] for k in range(3)]).sum(0)
            dx = dx + dmeans[..., None, None] / (x.shape[3] * x.shape[4])
    if w.hmem and d.weight is not None and d.bias is not None:
        dhmem = unfold_hmem(w.hmem, tuple_sizes, d.weight, d.bias)
    if d.rows is not None:
        dthree = unfold_three_dem(d.rows)
    return dx, Weights(dthree, dcwem, dhmem).flatten()


def _kernel(p: reference.Prepared, channels: int, fused: Fused) -> Tensor:
    """The folded convolution with the stencil's rows behind the planes'."""
    parts = [] if p.weight is None else [p.weight]
    if p.rows is not None:
        spread = p.rows / channels
        planes = p.rows.shape[0] * channels
        slot = torch.arange(planes, device=spread.device)
        slot = slot % p.rows.shape[0] if fused.interleaved else slot // channels
        parts.append(spread[:, slot])
    return torch.cat(parts)


def _convolve(x: Tensor, p: reference.Prepared, fused: Fused) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(planes, kernel, z)``: the input, weight and output of the convolution, or None when no part needs one."""
    if p.weight is None and p.rows is None:
        return None
    planes = (x.float() if fused.precision == "strict" else x).flatten(1, 2)
    kernel = _kernel(p, x.shape[2], fused).to(planes.dtype)
    bias = None
    if p.bias is not None:
        bias = F.pad(p.bias, (0, kernel.shape[0] - p.bias.shape[0])).to(planes.dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=fused.precision == "fast"):
        return planes, kernel, F.conv2d(planes, kernel, bias, padding=1)


def forward(x: Tensor, p: reference.Prepared, fused: Fused, y: Tensor, channels_last: bool) -> None:
    """Writes y, contiguous or with its frames channels_last."""
    b, t, c, height, width = x.shape
    found = _convolve(x, p, fused)
    z = x if found is None else found[2]
    grid = (-(-height * width // BLOCK), b * t)
    launch(
        join, grid, x, z, p.gate if p.gate is None else p.gate.contiguous(), y, *x.stride(), height, width,
        float(fused.offset), T=t, C=c, HMEM=p.weight is not None, STENCIL=p.rows is not None, GATE=p.gate is not None,
        MULTIPLICATIVE=fused.multiplicative, CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, p: reference.Prepared, fused: Fused, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, reference.Prepared]:
    """dx without CWEM's pool, and the gradients of all that is prepared."""
    b, t, c, height, width = x.shape
    found = _convolve(x, p, fused)
    blocks = -(-height * width // BLOCK)
    z = x if found is None else found[2]
    dz = torch.empty_like(z) if found else None
    direct = None
    if needs_x:
        direct = torch.empty(x.shape, dtype=torch.float32, device=x.device) if fused.multiplicative else grad
    shares = None if p.gate is None else torch.empty(b, t, c, blocks, device=x.device)
    launch(
        part, (blocks, b * t), x, grad, z, p.gate if p.gate is None else p.gate.contiguous(), dz, direct, shares,
        *x.stride(), *grad.stride(), height, width, float(fused.offset), T=t, C=c, HMEM=p.weight is not None,
        STENCIL=p.rows is not None, GATE=p.gate is not None, MULTIPLICATIVE=fused.multiplicative,
        STORE_DIRECT=needs_x and fused.multiplicative, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    dgate = None if shares is None else shares.sum(-1)
    drows = dweight = dbias = None
    if found and dz is not None:
        planes, kernel, _ = found
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=fused.precision == "fast"):
            back, dkernel, _ = torch.ops.aten.convolution_backward(
                dz, planes, kernel, None, *geometry, (needs_x, needs_weights, False)
            )
        if needs_x and direct is not None:
            direct = direct.float() + back.view(x.shape)
        if needs_weights:
            own = 0 if p.weight is None else p.weight.shape[0]
            if own:
                dweight = dkernel[:own].float()
                dbias = dz[:, :own].sum((0, 2, 3), dtype=torch.float32)
            if p.rows is not None:
                shape = (t, c, t, 3, 3) if fused.interleaved else (t, t, c, 3, 3)
                drows = dkernel[own:].float().view(shape).sum(1 if fused.interleaved else 2) / c
    return direct, reference.Prepared(drows, dgate, dweight, dbias)
