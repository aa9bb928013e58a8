"""SOAP's weights by part, in state_dict order: what travels between modules, op, folds and backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in another dtype."""
        parts = [part for part, on in zip(PARTS, (self.three_dem, self.cwem, self.hmem), strict=True) if on]
        flat = [w.to(dtype) for w in self.flatten()]
        return Weights.unflatten(flat, parts, len(self.hmem.motion) if self.hmem else 0)


def sum_at_rest(parts: Sequence[str]) -> float:
    """What the parts' priors add up to where their weights say nothing: a sigmoid of 0 each."""
    return 0.5 * len(parts)


def count_weights(parts: Sequence[str], sizes: int) -> int:
    """How many tensors the parts hold together, for ``sizes`` tuple sizes."""
    return ("3dem" in parts) + 4 * ("cwem" in parts) + (4 * sizes + 2) * ("hmem" in parts)


def count_maps(frames: int, tuple_sizes: Sequence[int]) -> int:
    """M, how many difference maps HMEM makes of ``frames`` frames: 7 + 6 + 5 for T = 8 and O = {1, 2, 3}."""
    return sum(frames - o for o in tuple_sizes)
