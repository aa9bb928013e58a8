"""SOAP on planes too many for one tile (feature maps), on CUDA: the folded convolution by cuDNN, the rest one kernel.

Forward: the convolution, whose rows are HMEM's planes and behind them 3DEM's frames, then ``join``. Backward: the
convolution once more, ``part`` from the incoming gradient to its output's, and cuDNN back to input and weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors, reference
from soap_kernels.backends.reference import Prepared
from soap_kernels.fold import fold_joint, unfold_joint, unfold_three_dem
from soap_kernels.frames import as_float
from soap_kernels.weights import Weights

_library = torch.library.Library("soap_kernels", "FRAGMENT")
_JOINED = "Tensor? z, Tensor? bias, Tensor? gate, bool planes, bool stencil, bool multiplicative, float offset"
_library.define(f"cuda_join(Tensor x, {_JOINED}, Tensor(a!) y) -> ()")
_library.define(f"cuda_part(Tensor grad, Tensor x, {_JOINED}, Tensor(a!)? dz, Tensor(b!)? direct) -> Tensor")

_GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, its padding, groups


def _frames(x: Tensor, options: Options, backward: bool) -> Tensor:
    """The frames in the dtype of the convolution. A gradient's range is not fp16's: there fp16 goes as fp32."""
    if x.dtype == torch.uint8:
        return as_float(x, options.mean, options.std)
    return _convolved(x, options.precision, backward)


def _convolved(x: Tensor, precision: str, backward: bool) -> Tensor:
    exact = precision == "strict" or (backward and x.dtype == torch.float16)
    return x.float() if exact else x


def _convolve(planes: Tensor, p: Prepared, channels: int, fusion: Fusion) -> tuple[Tensor | None, Tensor | None]:
    """The folded convolution's kernel and output; None when no part needs one."""
    joint = fold_joint(p.weight, p.rows, channels, fusion.interleaved)
    kernel = None if joint is None else joint.to(planes.dtype)
    return kernel, None if kernel is None else F.conv2d(planes, kernel, padding=1).contiguous()


def _joined(p: Prepared, fusion: Fusion) -> tuple[Tensor | None, Tensor | None, bool, bool, bool, float]:
    """What ``_JOINED`` names behind z."""
    bias, gate = (None if v is None else v.contiguous() for v in (p.bias, p.gate))
    return bias, gate, p.weight is not None, p.rows is not None, fusion.multiplicative, fusion.offset


def _fuse(x: Tensor, p: Prepared, fusion: Fusion, y: Tensor) -> None:
    """Writes y, of any floating dtype and strides."""
    _, z = _convolve(x.flatten(1, 2), p, x.shape[2], fusion)
    torch.ops.soap_kernels.cuda_join(x, z, *_joined(p, fusion), y)


def _sweep(
    grad: Tensor, x: Tensor, p: Prepared, fusion: Fusion, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, Prepared]:
    """dx in fp32 without CWEM's pool, and the gradients of all that is prepared."""
    c = x.shape[2]
    planes = x.flatten(1, 2)
    kernel, z = _convolve(planes, p, c, fusion)
    dz = None if z is None else torch.empty_like(z)
    direct = torch.empty(x.shape, dtype=torch.float32, device=x.device) if needs_x and fusion.multiplicative else None
    shares = torch.ops.soap_kernels.cuda_part(grad, x, z, *_joined(p, fusion), dz, direct)
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
        if p.weight is not None:
            dbias = shares[1].sum((0, 3)).flatten()
        if needs_weights:
            dweight, drows = unfold_joint(dkernel, p.weight, p.rows, c, fusion.interleaved)
    dgate = None if p.gate is None else shares[0].sum(-1)
    return dx, Prepared(drows, dgate, dweight, dbias)


def _additive(options: Options) -> Fusion:
    return Fusion(False, 0.0, False, options.precision)


def _prepare(frames: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Weights, Prepared]:
    """The weights in fp32, and what they fold to."""
    w = options.unflatten(weights).to(torch.float32)
    return w, reference.prepare(frames, w, options.tuple_sizes)


def soap_forward(x: Tensor, weights: Sequence[Tensor], options: Options, y: Tensor) -> None:
    frames = _frames(x, options, backward=False)
    _, p = _prepare(frames, weights, options)
    _fuse(frames, p, _additive(options), y)


def soap_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], options: Options, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, list[Tensor]]:
    frames = _frames(x, options, backward=True)
    w, p = _prepare(frames, weights, options)
    dx, d = _sweep(grad, frames, p, _additive(options), needs_x, needs_weights)
    return reference.finish(w, options.tuple_sizes, p, d, dx, x.shape[3] * x.shape[4])


def fuse_priors(x: Tensor, priors: Priors, fusion: Fusion, y: Tensor) -> None:
    frames = _convolved(x, fusion.precision, backward=False)
    _fuse(frames, reference.given(x, priors, torch.float32), fusion, y)


def fuse_priors_backward(
    grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, stencil, gate, weight and bias."""
    frames = _convolved(x, fusion.precision, backward=True)
    p = reference.given(x, priors, torch.float32)
    dx, d = _sweep(grad, frames, p, fusion, needs[0], needs[1] or needs[3])
    return [dx, None if d.rows is None else unfold_three_dem(d.rows).conv, d.gate, d.weight, d.bias]
