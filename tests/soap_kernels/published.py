"""The authors' published forward, transcribed step by step: the oracle of what stands in for it."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_kernels.compat import TriplePrior
from soap_kernels.weights import PARTS


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """As the published layers do: stride 1, padding that keeps the size."""
    w = conv.weight
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.dim()]
    return convolution(x, w, conv.bias, padding=w.shape[-1] // 2)


def transcription(module: nn.Module, x: Tensor, seq_len: int, sizes: tuple[int, ...], parts: tuple[str, ...]) -> Tensor:
    """The published forward on flattened frames, step by step with the module's weights, reshapes as they are."""
    n, c, h, w = x.shape
    b = n // seq_len
    y = x
    if "3dem" in parts:
        mixed = x.reshape(b, c, seq_len, h, w).mean(dim=1, keepdim=True)
        prior = convolve(module.conv_st, mixed).transpose(1, 2).contiguous().reshape(n, 1, h, w)
        y = y + x * torch.sigmoid(prior) + x
    if "cwem" in parts:
        pooled = convolve(module.conv_ch1, x).mean(dim=(2, 3)).reshape(b, seq_len, -1)
        slid = convolve(module.channel_diff, pooled).reshape(n, -1, 1, 1)
        y = y + x * torch.sigmoid(convolve(module.conv_ch2, slid)) + x
    if "hmem" in parts:
        frames = x.reshape(b, c, seq_len, h, w).transpose(1, 2).contiguous()
        maps = []
        for k, size in enumerate(sizes):
            split = [frames[:, i : i + size].reshape(b, size * c, h, w) for i in range(seq_len - size + 1)]
            for first, second in itertools.pairwise(split):
                maps.append(convolve(module.recover[k], first - convolve(module.frame_diff[k], second)))
        mean = torch.stack(maps, dim=1).mean(dim=1, keepdim=True).expand(b, seq_len, c, h, w)
        y = y + x * torch.sigmoid(mean.reshape(n, c, h, w).mean(dim=(2, 3), keepdim=True)) + x
    return y


def check_in_single_precision(module: TriplePrior, x: Tensor) -> None:
    """Against the published equations in float64, forward and backward; x holds fp32 frames on any device."""
    x.requires_grad_()
    wide, x_wide = copy.deepcopy(module).cpu().double(), x.detach().cpu().double().requires_grad_()
    y, expected = module(x, 8), transcription(wide, x_wide, 8, (1, 2, 3), PARTS)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *module.parameters()], grad)
    truth = torch.autograd.grad(expected, [x_wide, *wide.parameters()], grad.cpu().double())
    for one, true in zip(found, truth, strict=True):
        assert (one.cpu().double() - true).norm() <= 1e-3 * true.norm()
