"""Who is timed against whom: each provider computes SOAP on the same frames with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels import SOAP, equations, op
from soap_kernels.backends import reference
from soap_kernels.weights import PARTS, Weights


@dataclass(frozen=True)
class Work:
    """Frames, weights and an incoming gradient; the weights are leaves, the frames are not."""

    x: Tensor
    weights: list[Tensor]
    tuple_sizes: tuple[int, ...]
    grad: Tensor

    @classmethod
    def make(cls, clips: int, frames: int = 8, channels: int = 3, size: int = 224, device: str = "cpu") -> Work:
        torch.manual_seed(0)
        sizes = (1, 2, 3)
        x = torch.randn(clips, frames, channels, size, size, device=device)
        module = SOAP(frames, channels, sizes).to(device)
        return cls(x, [w.detach().requires_grad_() for w in module.weights().flatten()], sizes, torch.randn_like(x))


Forward = Callable[[Tensor, Sequence[Tensor]], Tensor]


def plain(sizes: tuple[int, ...]) -> Forward:
    return lambda x, w: equations.soap(x, Weights.unflatten(w, PARTS, len(sizes)).to(x.dtype), sizes)


def folded(sizes: tuple[int, ...]) -> Forward:
    return lambda x, w: reference.soap(x, Weights.unflatten(w, PARTS, len(sizes)).to(x.dtype), sizes)


def kernels(sizes: tuple[int, ...], backend: str = "auto", precision: str = "default") -> Forward:
    return lambda x, w: op.soap(x, w, PARTS, sizes, precision, backend=backend)


def conv_alone(work: Work) -> tuple[Forward, list[Tensor]]:
    """The folded 3x3 conv by itself, with its own leaves."""
    planes = work.x.shape[1] * work.x.shape[2]
    weight = (0.05 * torch.randn(planes, planes, 3, 3, device=work.x.device)).requires_grad_()
    bias = torch.zeros(planes, device=work.x.device, requires_grad=True)
    return lambda x, w: F.conv2d(x.flatten(1, 2), w[0], w[1], padding=1).view(x.shape), [weight, bias]


def run_forward(forward: Forward, work: Work, weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        forward(work.x, weights)


def run_training(forward: Forward, work: Work, weights: Sequence[Tensor]) -> None:
    torch.autograd.grad(forward(work.x, weights), list(weights), work.grad)
