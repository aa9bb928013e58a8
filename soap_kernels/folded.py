"""SOAP for other runtimes: the folded weights in PyTorch's own layers, with nothing else around them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from soap_kernels import op
from soap_kernels.fold import fold_cwem, fold_hmem, fold_joint, fold_three_dem
from soap_kernels.frames import compute_dtype
from soap_kernels.weights import Weights


class FoldedSOAP(nn.Module):
    """What SOAP computes, as one 3x3 convolution over all planes of a clip, one over time, sigmoids and sums.

    ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace`` take it, with any of B, H and W dynamic. Its weights
    are a copy and not trained: what SOAP learns later it doesn't see.

    Args:
        weights: SOAP's, of the parts that are on.
        frames: T.
        channels: C.
        tuple_sizes: O, sorted.
        normalize: per-channel (mean, std) in units of 0..1: the input is uint8 frames, normalised on the way in.
        out_dtype: of the output; x's by default, that of the weights for uint8 frames.
        offset: what the sum of the priors starts from.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: Weights,
        frames: int,
        channels: int,
        tuple_sizes: Sequence[int],
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        out_dtype: torch.dtype | None = None,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.frames, self.channels, self.normalize, self.out_dtype = frames, channels, normalize, out_dtype
        self.offset = offset
        self.hmem, self.three_dem = weights.hmem is not None, weights.three_dem is not None
        some = next(iter(weights.flatten()), torch.zeros(1))
        some, weights = some.to(compute_dtype(some)), weights.to(compute_dtype(some))
        for name, values in zip(("mean", "std"), normalize or ([0.0] * channels, [1.0] * channels), strict=True):
            self.register_buffer(name, torch.tensor(values).to(some).view(-1, 1, 1), persistent=False)
        weight, bias = fold_hmem(weights.hmem, tuple_sizes) if weights.hmem else (None, None)
        rows = fold_three_dem(weights.three_dem, frames) if weights.three_dem else None
        self.planes = self.time = None
        if (joint := fold_joint(weight, rows, channels, interleaved=False)) is not None:
            biases = ([] if bias is None else [bias]) + ([] if rows is None else [rows.new_zeros(frames)])
            self.planes = _filled(nn.Conv2d(joint.shape[1], joint.shape[0], 3, padding=1), joint, torch.cat(biases))
        if weights.cwem:
            taps, constant = fold_cwem(weights.cwem)
            self.time = _filled(nn.Conv1d(channels, channels, 3, padding=1), taps.permute(1, 2, 0), constant)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C, H, W)`` in, the same out: x (normalised if uint8) plus the priors, in the weights' precision."""
        op.check_soap_dtype("FoldedSOAP", x, self.normalize is not None)
        frames = x.to(self.mean.dtype)
        if self.normalize is not None:
            frames = (frames / 255 - self.mean) / self.std
        terms: list[Any] = [self.offset] if self.offset else []  # the small ones first
        if self.time is not None:
            gates = torch.sigmoid(self.time(frames.mean((3, 4)).transpose(1, 2)))
            terms.append(gates.transpose(1, 2)[..., None, None])
        if self.planes is not None:
            priors = torch.sigmoid(self.planes(frames.flatten(1, 2)))
            if self.three_dem:
                terms.append(priors[:, -self.frames :].unsqueeze(2))
            if self.hmem:
                terms.append(priors[:, : self.frames * self.channels].unflatten(1, (self.frames, self.channels)))
        y: Tensor = reduce(add, [*terms, frames])
        return y.to(self.out_dtype or (y.dtype if self.normalize is not None else x.dtype))

    def extra_repr(self) -> str:
        return f"frames={self.frames}, channels={self.channels}, normalize={self.normalize is not None}"


def _filled(layer: nn.Conv1d | nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv1d | nn.Conv2d:
    layer.weight, layer.bias = (nn.Parameter(t.detach().clone(), requires_grad=False) for t in (weight, bias))
    return layer
