"""SOAP written out one equation at a time (arXiv 2407.16344, section 3): the oracle every backend is held to.

Nothing here is folded or fused. Each function reads like its equation and is as fast as plain PyTorch code gets
without rearranging the maths, so that it is a fair baseline too. Shapes throughout: ``x`` is ``(B, T, C, H, W)``,
B clips of T frames with C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = ("3dem", "cwem", "hmem")


@dataclass(frozen=True)
class ThreeDEMWeights:
    conv: Tensor  # (1, 1, 3, 3, 3)


@dataclass(frozen=True)
class CWEMWeights:
    expand: Tensor  # (C_r, C, 1, 1)
    temporal: Tensor  # (C_r, C_r, 3)
    temporal_bias: Tensor  # (C_r,)
    squeeze: Tensor  # (C, C_r, 1, 1)


@dataclass(frozen=True)
class HMEMWeights:
    """One entry per tuple size o in each list, in the order of the sorted tuple sizes."""

    motion: Sequence[Tensor]  # (oC, oC, 3, 3)
    motion_bias: Sequence[Tensor]  # (oC,)
    project: Sequence[Tensor]  # (C, oC, 1, 1)
    project_bias: Sequence[Tensor]  # (C,)
    restore: Tensor  # (T, M), M = the sum of T - o over the tuple sizes
    restore_bias: Tensor  # (T,)


@dataclass(frozen=True)
class Weights:
    """The weights of the parts that are on; a part that is off is None."""

    three_dem: ThreeDEMWeights | None
    cwem: CWEMWeights | None
    hmem: HMEMWeights | None

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor], parts: Sequence[str], sizes: int) -> Weights:
        """From one tensor after another in state_dict order, as the op takes them; ``sizes`` tuple sizes."""
        rest = list(flat)
        take = iter(rest).__next__
        three_dem = ThreeDEMWeights(take()) if "3dem" in parts else None
        cwem = CWEMWeights(take(), take(), take(), take()) if "cwem" in parts else None
        hmem = None
        if "hmem" in parts:
            motion = [take() for _ in range(2 * sizes)]
            project = [take() for _ in range(2 * sizes)]
            hmem = HMEMWeights(motion[::2], motion[1::2], project[::2], project[1::2], take(), take())
        return cls(three_dem, cwem, hmem)

    def flatten(self) -> list[Tensor]:
        """The tensors in state_dict order: the inverse of :meth:`unflatten`."""
        flat: list[Tensor] = []
        if self.three_dem:
            flat.append(self.three_dem.conv)
        if self.cwem:
            flat += [self.cwem.expand, self.cwem.temporal, self.cwem.temporal_bias, self.cwem.squeeze]
        if self.hmem:
            h = self.hmem
            flat += [w for pair in zip(h.motion, h.motion_bias, strict=True) for w in pair]
            flat += [w for pair in zip(h.project, h.project_bias, strict=True) for w in pair]
            flat += [h.restore, h.restore_bias]
        return flat


def count_weights(parts: Sequence[str], sizes: int) -> int:
    """How many tensors the parts hold together, for ``sizes`` tuple sizes."""
    return ("3dem" in parts) + 4 * ("cwem" in parts) + (4 * sizes + 2) * ("hmem" in parts)


def count_maps(frames: int, tuple_sizes: Sequence[int]) -> int:
    """M, how many difference maps HMEM makes of ``frames`` frames: 7 + 6 + 5 for T = 8 and O = {1, 2, 3}."""
    return sum(frames - o for o in tuple_sizes)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What priors are computed in: fp64 for fp64 frames, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class without_autocast:
    """Autocast off: y has x's dtype under autocast too, and accumulation stays in fp32."""

    def __init__(self, x: Tensor) -> None:
        # Only where it is on: there is none for some devices, such as meta.
        kind = x.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.off = torch.autocast(kind, enabled=False) if on else None

    def __enter__(self) -> None:
        if self.off:
            self.off.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.off:
            self.off.__exit__(*error)


def as_float(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Frames in the dtype of the computation; with ``mean`` and ``std`` (units of 0..1) uint8 frames, normalised."""
    if mean is None or std is None:
        return x.to(compute_dtype(x))
    shape = (1, 1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=x.device).view(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=x.device).view(shape)
    return (x.to(torch.float32) / 255 - centre) / scale


def as_output(y: Tensor, out_dtype: torch.dtype, channels_last: bool) -> Tensor:
    """``y`` as ``out_dtype``, contiguous, or with ``y.flatten(0, 1)`` contiguous in channels_last."""
    if not channels_last:
        return y.to(out_dtype).contiguous()
    return y.to(out_dtype).movedim(2, -1).contiguous().movedim(-1, 2)


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


def soap(x: Tensor, weights: Weights, tuple_sizes: Sequence[int]) -> Tensor:
    """``x`` plus the priors of the parts that are on (Eqn 15), differentiable.

    Args:
        x: floating-point frames ``(B, T, C, H, W)``. fp16 and bf16 frames are computed in fp32.
        weights: of the parts that are on, in any floating dtype.
        tuple_sizes: O, sorted.

    Returns:
        ``(B, T, C, H, W)`` in x's dtype.
    """
    with without_autocast(x):
        y = x.to(compute_dtype(x))
        for prior in priors(y, weights, tuple_sizes).values():
            y = y + prior
        return y.to(x.dtype)
