"""TRX: temporal cross attention over tuples of frames (Perrett et al., CVPR 2021, arXiv 2101.06184)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soap_net.errors import UserError
from soap_net.models.heads.base import Classes, Embedded, FewShotHead, Positions, wide

MOST_FRAMES = 2**20
"""Frames in all tuples of a clip: those of the pairs of 1,000 frames."""


class TupleAttention(nn.Module):
    """One cardinality of TRX: each tuple of a query attends to all tuples of a class.

    A tuple is ``cardinality`` frames in ascending order, concatenated. Scores are products of LayerNormed keys over
    ``sqrt(out_dim)``, their softmax runs over all ``K * L`` tuples of a class, L tuples a clip; the result is the
    negated squared distance between the query's own values and the attended ones, over L.

    Args:
        dim: features per frame.
        frames: frames per clip.
        cardinality: frames per tuple.
        out_dim: size of keys and values.
        memory_mib: what scores and attended values may take at once; beyond it the query's tuples go in chunks, which
            in training are computed anew for backward.

    Raises:
        UserError: a tuple longer than the clip, or more of them than `MOST_FRAMES` allows.
    """

    tuples: Tensor

    def __init__(self, dim: int, frames: int, cardinality: int, out_dim: int, memory_mib: int = 256) -> None:
        super().__init__()
        if not 1 <= cardinality <= frames:
            raise UserError(f"a tuple of {cardinality} frames can't be drawn from a clip of {frames}")
        # The logarithm of their number, which may be beyond all bounds.
        tuples = math.lgamma(frames + 1) - math.lgamma(cardinality + 1) - math.lgamma(frames - cardinality + 1)
        if tuples + math.log(cardinality) > math.log(MOST_FRAMES):
            raise UserError(f"tuples of {cardinality} frames of {frames} would hold more than {MOST_FRAMES} frames")
        if out_dim < 1 or memory_mib < 1:
            raise UserError(f"out_dim and memory_mib must be at least 1, got {out_dim} and {memory_mib}")
        self.keys = nn.Linear(cardinality * dim, out_dim)
        self.values = nn.Linear(cardinality * dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.memory = memory_mib * 2**20
        chosen = torch.tensor(list(combinations(range(frames), cardinality)))
        self.register_buffer("tuples", chosen, persistent=False)

    def embed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, both ``(N, L, out_dim)``, of ``(N, T, dim)`` clips with positions added."""
        return self.norm(self._per_tuple(self.keys, frames)), self._per_tuple(self.values, frames)

    def forward(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        """Keys and values of supports and of queries to ``(Q, way)`` logits."""
        # Supports by class: (way, K * L, out_dim).
        support_keys, support_values = (tensor[classes.shots].flatten(1, 2) for tensor in support)
        present = classes.present.repeat_interleave(len(self.tuples), dim=1)[:, None]
        query_keys, query_values = (tensor.flatten(0, 1) for tensor in query)
        # A program for export has no loops: all goes at once there, however many queries will come.
        compared = _distances if torch.compiler.is_exporting() else self._in_chunks
        distances = compared(query_keys, query_values, support_keys, support_values, present)
        return -distances.unflatten(1, (query[0].shape[0], len(self.tuples))).mean(dim=2).T

    def _in_chunks(
        self, query_keys: Tensor, query_values: Tensor, support_keys: Tensor, support_values: Tensor, present: Tensor
    ) -> Tensor:
        """`_distances` in `memory`."""
        way, kept, size = support_keys.shape
        rows = max(1, self.memory // (way * (2 * kept + 2 * size) * 4))
        parts = []
        for row in range(0, len(query_keys), rows):
            chunk = (query_keys[row : row + rows], query_values[row : row + rows])
            if len(query_keys) > rows and torch.is_grad_enabled():
                part = checkpoint(_distances, *chunk, support_keys, support_values, present, use_reentrant=False)
            else:
                part = _distances(*chunk, support_keys, support_values, present)
            parts.append(part)
        return torch.cat(parts, dim=1) if parts else query_values.new_zeros(way, 0)

    def _per_tuple(self, linear: nn.Linear, frames: Tensor) -> Tensor:
        """``linear`` of every tuple, ``(N, T, dim)`` to ``(N, L, out_dim)``.

        A linear map of concatenated frames is a sum of one map per slot, so each frame is mapped once per slot, and
        not once per tuple it is in: T maps where there are L tuples.
        """
        cardinality = self.tuples.shape[1]
        slots = linear.weight.unflatten(1, (cardinality, frames.shape[-1])).unbind(1)
        summed = F.linear(frames, slots[0])[:, self.tuples[:, 0]] + linear.bias
        for slot in range(1, cardinality):
            summed = summed + F.linear(frames, slots[slot])[:, self.tuples[:, slot]]
        return summed


def _distances(query_keys: Tensor, query_values: Tensor, keys: Tensor, values: Tensor, present: Tensor) -> Tensor:
    """Squared distances of R query tuples to what they attend to, ``(way, R)``; ``present`` masks padded supports."""
    scores = wide(query_keys @ keys.mT) * keys.shape[-1] ** -0.5
    attention = scores.masked_fill(~present, -torch.inf).softmax(dim=-1)
    attended = attention.to(values.dtype) @ values
    return (wide(query_values) - wide(attended)).square().sum(dim=-1)


class TRXHead(FewShotHead):
    """TRX: the mean of `TupleAttention` over cardinalities, on positioned frames.

    Args:
        dim: features per frame.
        frames: frames per clip.
        cardinalities: the tuple lengths Omega; the paper's are 2 and 3.
        out_dim: size of keys and values.
        dropout: after the positions.
        memory_mib: see `TupleAttention`.

    Raises:
        UserError: no cardinality, one given twice, or a tuple longer than the clip.
    """

    tasks_at_once = 1

    def __init__(
        self,
        dim: int,
        frames: int,
        cardinalities: Sequence[int] = (2, 3),
        out_dim: int = 1152,
        dropout: float = 0.1,
        memory_mib: int = 256,
    ) -> None:
        super().__init__(dim, frames)
        if not cardinalities or len(set(cardinalities)) != len(cardinalities):
            raise UserError(f"cardinalities must be one or more different tuple lengths, got {list(cardinalities)}")
        self.positions = Positions(dim, frames, dropout=dropout)
        self.attentions = nn.ModuleList(
            TupleAttention(dim, frames, cardinality, out_dim, memory_mib) for cardinality in sorted(cardinalities)
        )

    def embed(self, features: Tensor) -> Embedded:
        frames = self.positions(features)
        embedded: list[Tensor] = []
        for attention in self.attentions:
            assert isinstance(attention, TupleAttention)
            embedded += attention.embed(frames)
        return tuple(embedded)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        scores = [
            attention(support[2 * i : 2 * i + 2], classes, query[2 * i : 2 * i + 2])
            for i, attention in enumerate(self.attentions)
        ]
        return torch.stack(scores).mean(dim=0)
