"""SOAP written out one equation at a time (arXiv 2407.16344, section 3): the oracle every backend is held to.

Nothing here is folded or fused. Each function reads like its equation and is as fast as plain PyTorch code gets
without rearranging the maths, so that it is a fair baseline too. Shapes throughout: ``x`` is ``(B, T, C, H, W)``,
B clips of T frames with C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.frames import compute_dtype, without_autocast
from soap_kernels.weights import CWEMWeights, HMEMWeights, ThreeDEMWeights, Weights


def three_dem(x: Tensor, w: ThreeDEMWeights) -> Tensor:
    """3DEM (Eqns 3-5): ``s(Conv3d_3x3x3(mean_C(x)))``, ``(B, T, 1, H, W)``."""
    a = x.mean(2).unsqueeze(1)  # (B, 1, T, H, W): Conv3d wants the time axis behind the channels
    return torch.sigmoid(F.conv3d(a, w.conv.to(x.dtype), padding=1)).transpose(1, 2)


def cwem(x: Tensor, w: CWEMWeights) -> Tensor:
    """CWEM (Eqns 6-9): pool, 1x1 conv C -> C_r, Conv1d over time, 1x1 conv C_r -> C, sigmoid; ``(B, T, C, 1, 1)``."""
    b, t, c = x.shape[:3]
    p = x.mean((3, 4)).flatten(0, 1)[..., None, None]
    e = F.conv2d(p, w.expand.to(x.dtype)).flatten(1).unflatten(0, (b, t))
    h = F.conv1d(e.transpose(1, 2), w.temporal.to(x.dtype), w.temporal_bias.to(x.dtype), padding=1)
    z = F.conv2d(h.transpose(1, 2).flatten(0, 1)[..., None, None], w.squeeze.to(x.dtype))
    return torch.sigmoid(z).view(b, t, c, 1, 1)


def hmem(x: Tensor, w: HMEMWeights, tuple_sizes: Sequence[int]) -> Tensor:
    """HMEM (Eqns 10-14): differences of frame tuples, projected, restored to T frames, sigmoid; ``(B, T, C, H, W)``.

    ``D_i = M_i - Conv2d_3x3(M_{i+1})`` for the tuples ``M_i = x[:, i:i+o]`` with their frames stacked on the channels.
    """
    b, t, c, height, width = x.shape
    maps = []
    for k, o in enumerate(tuple_sizes):
        motion, motion_bias = w.motion[k].to(x.dtype), w.motion_bias[k].to(x.dtype)
        project, project_bias = w.project[k].to(x.dtype), w.project_bias[k].to(x.dtype)
        for i in range(t - o):
            now = x[:, i : i + o].flatten(1, 2)
            then = x[:, i + 1 : i + 1 + o].flatten(1, 2)
            difference = now - F.conv2d(then, motion, motion_bias, padding=1)
            maps.append(F.conv2d(difference, project, project_bias))
    stacked = torch.stack(maps, 1).reshape(b, len(maps), c * height * width)
    z = w.restore.to(x.dtype) @ stacked + w.restore_bias.to(x.dtype).unsqueeze(-1)
    return torch.sigmoid(z).view(x.shape)


def priors(x: Tensor, weights: Weights, tuple_sizes: Sequence[int]) -> dict[str, Tensor]:
    """The prior of each part that is on, by the part's name."""
    found = {}
    if weights.three_dem:
        found["3dem"] = three_dem(x, weights.three_dem)
    if weights.cwem:
        found["cwem"] = cwem(x, weights.cwem)
    if weights.hmem:
        found["hmem"] = hmem(x, weights.hmem, tuple_sizes)
    return found


def soap(x: Tensor, weights: Weights, tuple_sizes: Sequence[int], centred: bool = False) -> Tensor:
    """``x`` plus the priors of the parts that are on (Eqn 15), differentiable.

    Args:
        x: floating-point frames ``(B, T, C, H, W)``. fp16 and bf16 frames are computed in fp32.
        weights: of the parts that are on, in any floating dtype.
        tuple_sizes: O, sorted.
        centred: each prior less one half.

    Returns:
        ``(B, T, C, H, W)`` in x's dtype.
    """
    with without_autocast(x):
        y = x.to(compute_dtype(x))
        for prior in priors(y, weights, tuple_sizes).values():
            y = y + (prior - 0.5 if centred else prior)
        return y.to(x.dtype)
