"""SOAP on planes too many for one tile (feature maps): the folded convolution by cuDNN, the rest in one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion
from soap_kernels.backends.reference import Prepared
from soap_kernels.backends.triton.fuse import join
from soap_kernels.backends.triton.plan import launch
from soap_kernels.backends.triton.sweep import part
from soap_kernels.fold import fold_joint, unfold_joint

BLOCK = 1024


def _convolve(x: Tensor, p: Prepared, fusion: Fusion) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(planes, kernel, z)``: the input, weight and output of the convolution, or None when no part needs one."""
    joint = fold_joint(p.weight, p.rows, x.shape[2], fusion.interleaved)
    if joint is None:
        return None
    planes = (x.float() if fusion.precision == "strict" else x).flatten(1, 2)
    kernel = joint.to(planes.dtype)
    bias = None
    if p.bias is not None:
        bias = F.pad(p.bias, (0, kernel.shape[0] - p.bias.shape[0])).to(planes.dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=fusion.precision == "fast"):
        return planes, kernel, F.conv2d(planes, kernel, bias, padding=1)


def forward(x: Tensor, p: Prepared, fusion: Fusion, y: Tensor, channels_last: bool) -> None:
    """Writes y, contiguous or with its frames channels_last."""
    b, t, c, height, width = x.shape
    found = _convolve(x, p, fusion)
    z = x if found is None else found[2]
    grid = (-(-height * width // BLOCK), b * t)
    launch(
        join, grid, x, z, p.gate if p.gate is None else p.gate.contiguous(), y, *x.stride(), height, width,
        float(fusion.offset), T=t, C=c, HMEM=p.weight is not None, STENCIL=p.rows is not None, GATE=p.gate is not None,
        MULTIPLICATIVE=fusion.multiplicative, CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, p: Prepared, fusion: Fusion, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, Prepared]:
    """dx without CWEM's pool, and the gradients of all that is prepared."""
    b, t, c, height, width = x.shape
    found = _convolve(x, p, fusion)
    blocks = -(-height * width // BLOCK)
    z = x if found is None else found[2]
    dz = torch.empty_like(z) if found else None
    direct = None
    if needs_x:
        direct = torch.empty(x.shape, dtype=torch.float32, device=x.device) if fusion.multiplicative else grad
    shares = None if p.gate is None else torch.empty(b, t, c, blocks, device=x.device)
    launch(
        part, (blocks, b * t), x, grad, z, p.gate if p.gate is None else p.gate.contiguous(), dz, direct, shares,
        *x.stride(), *grad.stride(), height, width, float(fusion.offset), T=t, C=c, HMEM=p.weight is not None,
        STENCIL=p.rows is not None, GATE=p.gate is not None, MULTIPLICATIVE=fusion.multiplicative,
        STORE_DIRECT=needs_x and fusion.multiplicative, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    dgate = None if shares is None else shares.sum(-1)
    drows = dweight = dbias = None
    if found and dz is not None:
        planes, kernel, _ = found
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=fusion.precision == "fast"):
            back, dkernel, _ = torch.ops.aten.convolution_backward(
                dz, planes, kernel, None, *geometry, (needs_x, needs_weights, False)
            )
        if needs_x and direct is not None:
            direct = direct.float() + back.view(x.shape)
        if needs_weights:
            dweight, drows = unfold_joint(dkernel, p.weight, p.rows, c, fusion.interleaved)
            if p.weight is not None:
                dbias = dz[:, : t * c].sum((0, 2, 3), dtype=torch.float32)
    return direct, Prepared(drows, dgate, dweight, dbias)
