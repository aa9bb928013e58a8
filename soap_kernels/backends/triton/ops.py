"""From the ops' arguments to the stages; feature maps go :mod:`soap_kernels.backends.wide`'s way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soap_kernels.backends import Fusion, Gradients, Needs, Options, Priors
from soap_kernels.backends.triton.finish import finish, finish_priors
from soap_kernels.backends.triton.fuse import fuse, fuse_dx, join
from soap_kernels.backends.triton.plan import Layout, Normalization, Numbers
from soap_kernels.backends.triton.prepare import Given, Prepared, prepare
from soap_kernels.backends.triton.prepare import prepared_numel as numel_of
from soap_kernels.backends.triton.reduce import Reduced, reduce
from soap_kernels.backends.triton.sweep import join_backward, sweep, weigh
from soap_kernels.backends.triton.window_sums import window_sums, window_sums_backward
from soap_kernels.backends.wide import Wide
from soap_kernels.frames import empty_frames

__all__ = [
    "fuse_priors", "fuse_priors_backward", "prepared_numel", "soap_backward", "soap_forward", "window_sums",
    "window_sums_backward",
]  # fmt: skip

WIDE = Wide(join, join_backward)


def _numbers(x: Tensor, options: Options) -> Numbers:
    return Numbers.of_frames(x.dtype, options.out_dtype, options.precision)


def prepared_numel(x: Tensor, options: Options) -> int:
    layout = Layout.of(x, options, 1)
    return numel_of(x.shape[0], layout, _numbers(x, options)) if layout.fits else 0


def _hidden(weights: Sequence[Tensor], options: Options) -> int:
    cwem = options.unflatten(weights).cwem
    return cwem.expand.shape[0] if cwem else 0


def soap_forward(x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    y = empty_frames(x, options.out_dtype, options.out_channels_last)
    layout, normalization = Layout.of(x, options, _hidden(weights, options), y), Normalization.of(options)
    if not layout.fits:
        WIDE.soap_forward(x, weights, options, y)
        return y, torch.empty(prepared_numel(x, options), device=x.device)
    numbers, given = _numbers(x, options), Given.of(options.unflatten(weights))
    prepared, pieces = prepare(x, given, normalization, layout, numbers)
    fuse(x, y, pieces, None, normalization, options.offset, layout, numbers)
    return y, prepared


def _backward(
    grad: Tensor, x: Tensor, pieces: Prepared, gate: Tensor | None, fusion: Fusion, needs: Needs,
    layout: Layout, numbers: Numbers,
) -> tuple[Tensor | None, Reduced]:  # fmt: skip
    """x's gradient, and those of all that is folded."""
    gradient = Numbers.of_gradient(x.dtype, grad.dtype, fusion.precision, fusion.multiplicative)
    dz, partial_gate, direct = sweep(grad, x, pieces, gate, fusion.offset, needs.x, layout, numbers, gradient)
    partial, partial_bias = (None, None) if dz is None or not needs.weights else weigh(x, dz, layout, gradient)
    reduced = reduce(partial, partial_bias, partial_gate, x, pieces, layout)
    dx = fuse_dx(x, dz, direct, reduced.gate, pieces, layout, numbers, gradient) if needs.x else None
    return dx, reduced


def soap_backward(
    grad: Tensor, x: Tensor, prepared: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
) -> Gradients:
    layout = Layout.of(x, options, _hidden(weights, options), grad)
    if not layout.fits:
        return WIDE.soap_backward(grad, x, weights, options, needs)
    numbers = _numbers(x, options)
    pieces = Prepared.of(prepared, layout, numbers)
    dx, reduced = _backward(grad, x, pieces, None, options.fusion, needs, layout, numbers)
    if not needs.weights:
        return dx, None
    dweights = [torch.empty_like(w) for w in weights]
    given, gradients = (Given.of(options.unflatten(w)) for w in (weights, dweights))
    finish(reduced, given, gradients, Normalization.of(options), x.shape[0], layout)
    return dx, dweights


def fuse_priors(x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layout = Layout.of_priors(x, priors, fusion)
    if not layout.fits:
        WIDE.fuse_priors(x, priors, fusion, y)
        return y
    numbers = Numbers.of_frames(x.dtype, x.dtype, fusion.precision)
    _, pieces = prepare(x, Given.of_priors(priors), Normalization(), layout, numbers)
    fuse(x, y, pieces, priors.gate, Normalization(), fusion.offset, layout, numbers)
    return y


def fuse_priors_backward(
    grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    layout = Layout.of_priors(x, priors, fusion, grad)
    if not layout.fits:
        return WIDE.fuse_priors_backward(grad, x, priors, fusion, needs)
    numbers = Numbers.of_frames(x.dtype, x.dtype, fusion.precision)
    _, pieces = prepare(x, Given.of_priors(priors), Normalization(), layout, numbers)
    two = Needs(needs[0], any((needs[1], *needs[3:])))
    dx, reduced = _backward(grad, x, pieces, priors.gate, fusion, two, layout, numbers)
    return dx, *finish_priors(reduced, priors, tuple(needs[1:]), x.shape[0], layout)
