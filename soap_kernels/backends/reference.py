"""SOAP folded, in plain PyTorch: the backend that is always there, on every device and in every dtype.

``soap`` is differentiable as it stands. The backend's own backward recomputes what it needs from x instead of saving
it, in the same stages as the native ones: prepare, fuse; sweep, finish. (reduce belongs to those that split the sweep.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Gradients, Needs, Options, Priors
from soap_kernels.fold import fold_cwem, fold_hmem, fold_three_dem, unfold_cwem, unfold_hmem, unfold_three_dem
from soap_kernels.frames import as_float, as_output, compute_dtype
from soap_kernels.weights import ThreeDEMWeights, Weights

ADDITIVE = Fusion()


@dataclass(frozen=True)
class Prepared:
    """What ``fuse`` needs beside the frames; None for a part that is off."""

    rows: Tensor | None  # 3DEM as a conv between frames of channel means, (T, T, 3, 3)
    gate: Tensor | None  # CWEM's prior, (B, T, C)
    weight: Tensor | None  # HMEM folded, (TC, TC, 3, 3)
    bias: Tensor | None  # (TC,)
    means: Tensor | None = None  # of planes, (B, T, C), which the gate is from; None where it was given


def cwem_gate(means: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """CWEM's prior ``(B, T, C)`` from the plane means ``(B, T, C)`` and its folded weights."""
    padded = F.pad(means, (0, 0, 1, 1))
    return torch.sigmoid(bias + sum(padded[:, k : k + means.shape[1]] @ taps[k].T for k in range(3)))


def channel_means(x: Tensor, interleaved: bool = False) -> Tensor:
    """``(B, T, H, W)``: frame t's mean over its channels; interleaved, the mean of planes t, T + t, 2T + t, ..."""
    if interleaved:
        b, t, c, height, width = x.shape
        return x.reshape(b, c, t, height, width).mean(1)
    return x.mean(2)


def prepare(x: Tensor, weights: Weights, tuple_sizes: Sequence[int]) -> Prepared:
    """``weights`` in the dtype that sums and folds have; x may be narrower."""
    rows = fold_three_dem(weights.three_dem, x.shape[1]) if weights.three_dem else None
    means = gate = None
    if weights.cwem:
        taps, constant = fold_cwem(weights.cwem)
        means = x.mean((3, 4), dtype=taps.dtype)
        gate = cwem_gate(means, taps, constant)
    weight, bias = fold_hmem(weights.hmem, tuple_sizes) if weights.hmem else (None, None)
    return Prepared(rows, gate, weight, bias, means)


def given(x: Tensor, priors: Priors, dtype: torch.dtype) -> Prepared:
    """What ``fuse_priors`` is given, as ``prepare`` leaves it."""
    stencil, *rest = (None if v is None else v.to(dtype) for v in priors)
    rows = None if stencil is None else fold_three_dem(ThreeDEMWeights(stencil), x.shape[1])
    return Prepared(rows, *rest)


def stencil_prior(x: Tensor, rows: Tensor, interleaved: bool = False) -> Tensor:
    """3DEM's prior ``(B, T, H, W)``."""
    return torch.sigmoid(F.conv2d(channel_means(x, interleaved), rows, padding=1))


def conv_prior(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """HMEM's prior ``(B, T, C, H, W)``."""
    return torch.sigmoid(F.conv2d(x.flatten(1, 2), weight, bias, padding=1)).view(x.shape)


def fuse(x: Tensor, p: Prepared, fusion: Fusion = ADDITIVE) -> Tensor:
    total: Tensor | float = fusion.offset
    if p.gate is not None:
        total = p.gate[..., None, None] + total
    if p.rows is not None:
        total = stencil_prior(x, p.rows, fusion.interleaved)[:, :, None] + total
    if p.weight is not None:
        total = conv_prior(x, p.weight, p.bias) + total
    return x * total if fusion.multiplicative else x + total


def priors(x: Tensor, weights: Weights, tuple_sizes: Sequence[int]) -> dict[str, Tensor]:
    """The prior of each part that is on, by the part's name, in the shapes of :mod:`soap_kernels.equations`."""
    p = prepare(x, weights, tuple_sizes)
    found = {}
    if p.rows is not None:
        found["3dem"] = stencil_prior(x, p.rows)[:, :, None]
    if p.gate is not None:
        found["cwem"] = p.gate[..., None, None]
    if p.weight is not None:
        found["hmem"] = conv_prior(x, p.weight, p.bias)
    return found


def soap(x: Tensor, weights: Weights, tuple_sizes: Sequence[int]) -> Tensor:
    """``x`` plus the priors of the parts that are on: :func:`soap_kernels.equations.soap`, folded. Differentiable."""
    return fuse(x, prepare(x, weights, tuple_sizes))


def conv_backward(dz: Tensor, planes: Tensor, kernel: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
    """Of a zero-padded 3x3 convolution without bias: the gradients of its input and of its kernel."""
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, its padding, groups
    back, dkernel, _ = torch.ops.aten.convolution_backward(dz, planes, kernel, None, *geometry, (*needs, False))
    return back, dkernel


def _sweep(
    grad: Tensor, x: Tensor, p: Prepared, needs: Needs, fusion: Fusion = ADDITIVE
) -> tuple[Tensor | None, Prepared]:
    """One pass over x and the incoming gradient: dx without CWEM's pool, and the gradients of all that is prepared."""
    b, t, c, height, width = x.shape
    multiplicative, interleaved = fusion.multiplicative, fusion.interleaved
    upstream = grad * x if multiplicative else grad
    dx = None
    if needs.x:
        dx = grad * fusion.offset if multiplicative else grad
    drows = dgate = dweight = dbias = None

    def through_conv(dz: Tensor, planes: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor | None]:
        return conv_backward(dz, planes, kernel, needs) if any(needs) else (dz, None)

    if p.weight is not None:
        s = conv_prior(x, p.weight, p.bias)
        dz = (upstream * s * (1 - s)).flatten(1, 2)
        back, dweight = through_conv(dz, x.flatten(1, 2), p.weight)
        dbias = dz.sum((0, 2, 3))
        if dx is not None:
            dx = dx + back.view(x.shape) + (grad * s if multiplicative else 0)
    if p.rows is not None:
        s = stencil_prior(x, p.rows, interleaved)
        dz = upstream.sum(2) * s * (1 - s)
        back, drows = through_conv(dz, channel_means(x, interleaved), p.rows)
        if dx is not None:
            shared = back[:, None].expand(b, c, t, height, width) / c
            dx = dx + (shared.reshape(x.shape) if interleaved else shared.transpose(1, 2))
            dx = dx + (grad * s[:, :, None] if multiplicative else 0)
    if p.gate is not None:
        dgate = upstream.sum((3, 4))
        if dx is not None and multiplicative:
            dx = dx + grad * p.gate[..., None, None]
    return dx, Prepared(drows, dgate, dweight, dbias)


def _finish_gate(means: Tensor, gate: Tensor, dgate: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gate's gradient to those of the plane means, the folded taps and the folded bias of CWEM."""
    t = means.shape[1]
    dz = dgate * gate * (1 - gate)
    padded = F.pad(means, (0, 0, 1, 1))
    dtaps = torch.stack([torch.einsum("btp,btq->pq", dz, padded[:, k : k + t]) for k in range(3)])
    around = F.pad(dz, (0, 0, 1, 1))
    dmeans = torch.stack([around[:, 2 - k : 2 - k + t] @ taps[k] for k in range(3)]).sum(0)
    return dmeans, dtaps, dz.sum((0, 1))


def finish(
    w: Weights, tuple_sizes: Sequence[int], p: Prepared, d: Prepared, dx: Tensor | None, pixels: int
) -> tuple[Tensor | None, list[Tensor]]:
    """dx with what comes through CWEM's pool, and the gradients of the weights whose folds' gradients there are.

    Args:
        w: as ``prepare`` had them.
        p: what ``prepare`` left.
        d: the gradients of it.
        dx: without the pool; None: not wanted.
        pixels: H W.
    """
    dthree = dcwem = dhmem = None
    if w.cwem and p.means is not None and p.gate is not None and d.gate is not None:
        dmeans, dtaps, dbias = _finish_gate(p.means, p.gate, d.gate, fold_cwem(w.cwem)[0])
        dcwem = unfold_cwem(w.cwem, dtaps, dbias)
        if dx is not None:
            dx = dx + dmeans[..., None, None] / pixels
    if w.hmem and d.weight is not None and d.bias is not None:
        dhmem = unfold_hmem(w.hmem, tuple_sizes, d.weight, d.bias)
    if d.rows is not None:
        dthree = unfold_three_dem(d.rows)
    return dx, Weights(dthree, dcwem, dhmem).flatten()


class ReferenceBackend:
    name = "reference"

    def why_absent(self, device: torch.device) -> str | None:
        return None

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        return 0

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        frames = as_float(x, options.mean, options.std)
        w = options.unflatten(weights).to(frames.dtype)
        y = fuse(frames, prepare(frames, w, options.tuple_sizes), options.fusion)
        return as_output(y, options.out_dtype, options.out_channels_last), x.new_empty(0, dtype=torch.float32)

    def soap_backward(
        self, grad: Tensor, x: Tensor, prepared: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
    ) -> Gradients:
        frames = as_float(x, options.mean, options.std)
        w = options.unflatten(weights).to(frames.dtype)
        p = prepare(frames, w, options.tuple_sizes)
        dx, d = _sweep(grad.to(frames.dtype), frames, p, needs)
        return finish(w, options.tuple_sizes, p, d, dx, x.shape[3] * x.shape[4])

    def window_sums(self, x: Tensor) -> Tensor:
        v = x.to(compute_dtype(x))
        height, width = v.shape[2:]
        # What tap i of a zero-padded 3x3 conv sees of the rows: all but the last, all, all but the first.
        rows = [v[:, :, : height - 1].sum(2), v.sum(2), v[:, :, 1:].sum(2)]
        sums = [[r[..., : width - 1].sum(-1), r.sum(-1), r[..., 1:].sum(-1)] for r in rows]
        return torch.stack([torch.stack(s, -1) for s in sums], -2)

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx = grad.sum((2, 3))[..., None, None].expand(x.shape).clone()
        dx[:, :, -1] -= grad[:, :, 0].sum(-1)[..., None]
        dx[:, :, 0] -= grad[:, :, 2].sum(-1)[..., None]
        dx[..., -1] -= grad[..., 0].sum(-1)[..., None]
        dx[..., 0] -= grad[..., 2].sum(-1)[..., None]
        for i, row in ((0, -1), (2, 0)):
            for j, column in ((0, -1), (2, 0)):
                dx[:, :, row, column] += grad[:, :, i, j]
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        frames = x.to(compute_dtype(x))
        return fuse(frames, given(frames, priors, frames.dtype), fusion).to(x.dtype)

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        frames = x.to(compute_dtype(x))
        p = given(frames, priors, frames.dtype)
        dx, d = _sweep(grad.to(frames.dtype), frames, p, Needs(needs[0], needs[1] or needs[3]), fusion)
        return dx, None if d.rows is None else unfold_three_dem(d.rows).conv, d.gate, d.weight, d.bias


BACKEND = ReferenceBackend()
