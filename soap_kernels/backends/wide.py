"""SOAP on planes too many for one tile (feature maps), on any GPU: PyTorch convolves, two kernels do all the rest.

Forward: the folded convolution, whose rows are HMEM's planes and behind them 3DEM's frames, then ``join``. Backward:
the convolution once more, ``join_backward`` from the incoming gradient to its output's, and from there to input and
weights. The convolution's operands have the frames' dtype where that holds their range, all that lies between is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Gradients, Needs, Options, Priors
from soap_kernels.backends.reference import Prepared, conv_backward, finish, given, prepare
from soap_kernels.fold import fold_joint, unfold_joint, unfold_three_dem
from soap_kernels.frames import as_float


class Join(Protocol):
    def __call__(self, x: Tensor, z: Tensor | None, p: Prepared, fusion: Fusion, y: Tensor) -> None:
        """Writes y, of any floating dtype and strides: x joined to its priors.

        z: the convolution without its bias, ``(B, rows, H, W)`` contiguous; None when no part needs one. ``p.bias`` and
        ``p.gate`` are contiguous and fp32.
        """


class JoinBackward(Protocol):
    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        z: Tensor | None,
        p: Prepared,
        fusion: Fusion,
        dz: Tensor | None,
        direct: Tensor | None,
    ) -> Tensor:
        """Writes dz, like z, and where given ``direct`` (fp32, contiguous): x's gradient beside the convolution.

        Returns the sums of what reaches a plane's gate and a plane's dz, by chunks of it: ``(2, B, T, C, chunks)``.
        """


def _convolved(x: Tensor, precision: str, backward: bool) -> Tensor:
    """The frames in the dtype of the convolution. A gradient's range is not fp16's: there fp16 goes as fp32."""
    exact = precision == "strict" or (backward and x.dtype == torch.float16)
    return x.float() if exact else x


def _frames(x: Tensor, options: Options, backward: bool) -> Tensor:
    if x.dtype == torch.uint8:
        return as_float(x, options.mean, options.std)
    return _convolved(x, options.precision, backward)


def _convolve(x: Tensor, p: Prepared, fusion: Fusion) -> tuple[Tensor | None, Tensor | None]:
    """The folded convolution's kernel and output; None when no part needs one."""
    joint = fold_joint(p.weight, p.rows, x.shape[2], fusion.interleaved)
    kernel = None if joint is None else joint.to(x.dtype)
    return kernel, None if kernel is None else F.conv2d(x.flatten(1, 2), kernel, padding=1).contiguous()


class Wide:
    """The ops of a backend that brings ``join`` and ``join_backward``."""

    def __init__(self, join: Join, join_backward: JoinBackward) -> None:
        self.join, self.join_backward = join, join_backward

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options, y: Tensor) -> None:
        """Writes y."""
        frames = _frames(x, options, backward=False)
        p = prepare(frames, options.unflatten(weights).to(torch.float32), options.tuple_sizes)
        self._fuse(frames, p, options.fusion, y)

    def soap_backward(
        self, grad: Tensor, x: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
    ) -> Gradients:
        frames = _frames(x, options, backward=True)
        w = options.unflatten(weights).to(torch.float32)
        p = prepare(frames, w, options.tuple_sizes)
        dx, d = self._sweep(grad, frames, p, options.fusion, needs)
        return finish(w, options.tuple_sizes, p, d, dx, x.shape[3] * x.shape[4])

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion, y: Tensor) -> None:
        """Writes y."""
        self._fuse(_convolved(x, fusion.precision, backward=False), given(x, priors, torch.float32), fusion, y)

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        frames, p = _convolved(x, fusion.precision, backward=True), given(x, priors, torch.float32)
        dx, d = self._sweep(grad, frames, p, fusion, Needs(needs[0], needs[1] or needs[3]))
        return [dx, None if d.rows is None else unfold_three_dem(d.rows).conv, d.gate, d.weight, d.bias]

    def _fuse(self, x: Tensor, p: Prepared, fusion: Fusion, y: Tensor) -> None:
        self.join(x, _convolve(x, p, fusion)[1], p, fusion, y)

    def _sweep(
        self, grad: Tensor, x: Tensor, p: Prepared, fusion: Fusion, needs: Needs
    ) -> tuple[Tensor | None, Prepared]:
        """dx in fp32 without CWEM's pool, and the gradients of all that is prepared."""
        kernel, z = _convolve(x, p, fusion)
        dz = None if z is None else torch.empty_like(z)
        direct = None
        if needs.x and fusion.multiplicative:
            direct = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        gate_shares, bias_shares = self.join_backward(grad, x, z, p, fusion, dz, direct)
        dx = None
        if needs.x:
            dx = grad.float() if direct is None else direct
        drows = dweight = dbias = None
        if p.weight is not None:
            dbias = bias_shares.sum((0, 3)).flatten()
        if kernel is not None and dz is not None and any(needs):
            back, dkernel = conv_backward(dz, x.flatten(1, 2), kernel, needs)
            if dx is not None:
                dx = dx + back.view(x.shape)
            if needs.weights:
                dweight, drows = unfold_joint(dkernel, p.weight, p.rows, x.shape[2], fusion.interleaved)
        dgate = None if p.gate is None else gate_shares.sum(-1)
        return dx, Prepared(drows, dgate, dweight, dbias)
