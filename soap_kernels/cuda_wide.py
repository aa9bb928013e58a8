"""SOAP on planes too many for one tile (feature maps), on CUDA: the folded convolution by cuDNN, the rest one kernel.

Forward: the convolution, whose rows are HMEM's planes and behind them 3DEM's frames, then ``join``. Backward: the
convolution once more, ``part`` from the incoming gradient to its output's, and cuDNN back to input and weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Options
from soap_kernels.equations import ThreeDEMWeights, Weights, as_float
from soap_kernels.fold import (
    fold_cwem,
    fold_hmem,
    fold_three_dem,
    unfold_cwem,
    unfold_hmem,
    unfold_three_dem,
)
from soap_kernels.reference import Prepared, _finish_gate, cast, cwem_gate

_library = torch.library.Library("soap_kernels", "FRAGMENT")
_library.define(
    "cuda_join(Tensor x, Tensor? z, Tensor? bias, Tensor? gate, int[] settings, float offset, Tensor(a!) y) -> ()"
)
_library.define(
    "cuda_part(Tensor grad, Tensor x, Tensor? z, Tensor? bias, Tensor? gate, int[] settings, float offset,"
    " Tensor(a!)? dz, Tensor(b!)? direct) -> Tensor"
)

_GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, its padding, groups


def _frames(x: Tensor, options: Options, backward: bool) -> Tensor:
    """The frames in the dtype of the convolution. A gradient's range is not fp16's: there fp16 goes as fp32."""
    if x.dtype == torch.uint8:
        return as_float(x, options.mean, options.std)
    return _convolved(x, options.precision, backward)


def _convolved(x: Tensor, precision: str, backward: bool) -> Tensor:
    exact = precision == "strict" or (backward and x.dtype == torch.float16)
    return x.float() if exact else x


def _kernel(p: Prepared, channels: int, fusion: Fusion, dtype: torch.dtype) -> Tensor | None:
    """The folded convolution, 3DEM's rows behind the planes'; None when no part needs one."""
    parts = [] if p.weight is None else [p.weight]
    if p.rows is not None:
        frames = p.rows.shape[0]
        plane = torch.arange(frames * channels, device=p.rows.device)
        slot = plane % frames if fusion.interleaved else plane // channels
        parts.append(p.rows[:, slot] / channels)
    return torch.cat(parts).to(dtype) if parts else None


def _settings(p: Prepared, fusion: Fusion) -> list[int]:
    return [p.weight is not None, p.rows is not None, fusion.multiplicative]


def _fuse(x: Tensor, p: Prepared, fusion: Fusion, y: Tensor) -> None:
    """Writes y, of any floating dtype and strides."""
    planes = x.flatten(1, 2)
    kernel = _kernel(p, x.shape[2], fusion, x.dtype)
    z = None if kernel is None else F.conv2d(planes, kernel, padding=1).contiguous()
    torch.ops.soap_kernels.cuda_join(x, z, p.bias, p.gate, _settings(p, fusion), float(fusion.offset), y)


def _sweep(
    grad: Tensor, x: Tensor, p: Prepared, fusion: Fusion, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, Prepared]:
    """dx in fp32 without CWEM's pool, and the gradients of all that is prepared."""
    t, c = x.shape[1:3]
    planes = x.flatten(1, 2)
    kernel = _kernel(p, c, fusion, x.dtype)
    z = None if kernel is None else F.conv2d(planes, kernel, padding=1).contiguous()
    dz = None if z is None else torch.empty_like(z)
    direct = torch.empty(x.shape, dtype=torch.float32, device=x.device) if needs_x and fusion.multiplicative else None
    shares = torch.ops.soap_kernels.cuda_part(
        grad, x, z, p.bias, p.gate, _settings(p, fusion), float(fusion.offset), dz, direct
    )
    dx = None
    if needs_x:
        dx = grad.float() if direct is None else direct
    drows = dweight = dbias = None
    if kernel is not None and dz is not None:
        back, dkernel, _ = torch.ops.aten.convolution_backward(
            dz, planes, kernel, None, *_GEOMETRY, (needs_x, needs_weights, False)
        )
        if dx is not None:
            dx = dx + back.view(x.shape)
        own = 0 if p.weight is None else t * c
        if own:
            dbias = shares[1].sum((0, 3)).flatten()
        if needs_weights:
            if own:
                dweight = dkernel[:own].float()
            if p.rows is not None:
                shape = (t, c, t, 3, 3) if fusion.interleaved else (t, t, c, 3, 3)
                drows = dkernel[own:].float().view(shape).sum(1 if fusion.interleaved else 2) / c
    dgate = None if p.gate is None else shares[0].sum(-1)
    return dx, Prepared(drows, dgate, dweight, dbias)


def _additive(options: Options) -> Fusion:
    return Fusion(False, 0.0, False, options.precision)


def _prepare(means: Tensor, w: Weights, tuple_sizes: Sequence[int]) -> Prepared:
    rows = fold_three_dem(w.three_dem, means.shape[1]) if w.three_dem else None
    gate = cwem_gate(means, *fold_cwem(w.cwem)).contiguous() if w.cwem else None
    weight, bias = fold_hmem(w.hmem, tuple_sizes) if w.hmem else (None, None)
    return Prepared(rows, gate, weight, None if bias is None else bias.contiguous())


def _means(x: Tensor) -> Tensor:
    return x.mean((3, 4), dtype=torch.float32)


def soap_forward(x: Tensor, weights: Sequence[Tensor], options: Options, y: Tensor) -> None:
    frames = _frames(x, options, backward=False)
    w = cast(
        Weights.unflatten(weights, options.parts, len(options.tuple_sizes)),
        torch.float32,
        options.parts,
        len(options.tuple_sizes),
    )
    _fuse(frames, _prepare(_means(frames), w, options.tuple_sizes), _additive(options), y)


def soap_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], options: Options, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx in x's dtype and the gradients of the weights in theirs."""
    frames = _frames(x, options, backward=True)
    sizes = len(options.tuple_sizes)
    w = cast(Weights.unflatten(weights, options.parts, sizes), torch.float32, options.parts, sizes)
    means = _means(frames)
    p = _prepare(means, w, options.tuple_sizes)
    dx, d = _sweep(grad, frames, p, _additive(options), needs_x, needs_weights)
    dthree = dcwem = dhmem = None
    if w.cwem and p.gate is not None and d.gate is not None:
        dmeans, dtaps, dbias = _finish_gate(means[..., None, None], p.gate, d.gate, fold_cwem(w.cwem)[0])
        dcwem = unfold_cwem(w.cwem, dtaps, dbias)
        if dx is not None:
            dx = dx + dmeans[..., None, None] / (x.shape[3] * x.shape[4])
    dweights: list[Tensor] = []
    if needs_weights:
        if w.hmem and d.weight is not None and d.bias is not None:
            dhmem = unfold_hmem(w.hmem, options.tuple_sizes, d.weight, d.bias)
        if d.rows is not None:
            dthree = unfold_three_dem(d.rows)
        gradients = Weights(dthree, dcwem, dhmem).flatten()
        dweights = [g.to(v.dtype).contiguous() for g, v in zip(gradients, weights, strict=True)]
    return None if dx is None else dx.to(x.dtype).contiguous(), dweights


def _given(
    x: Tensor, stencil: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Prepared:
    rows = None if stencil is None else fold_three_dem(ThreeDEMWeights(stencil.float()), x.shape[1])
    return Prepared(rows, *(None if v is None else v.float().contiguous() for v in (gate, weight, bias)))


def fuse_priors(
    x: Tensor,
    stencil: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    fusion: Fusion,
    y: Tensor,
) -> None:
    frames = _convolved(x, fusion.precision, backward=False)
    _fuse(frames, _given(x, stencil, gate, weight, bias), fusion, y)


def fuse_priors_backward(
    grad: Tensor,
    x: Tensor,
    stencil: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    fusion: Fusion,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, stencil, gate, weight and bias, in their dtypes."""
    frames = _convolved(x, fusion.precision, backward=True)
    p = _given(x, stencil, gate, weight, bias)
    dx, d = _sweep(grad, frames, p, fusion, needs[0], needs[1] or needs[3])
    dstencil = None if d.rows is None else unfold_three_dem(d.rows).conv
    found = (dx, dstencil, d.gate, d.weight, d.bias)
    return [
        None if g is None or like is None else g.to(like.dtype).contiguous()
        for g, like in zip(found, (x, stencil, gate, weight, bias), strict=True)
    ]
