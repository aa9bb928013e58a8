"""TRX: temporal cross attention over tuples of frames (Perrett et al., CVPR 2021, arXiv 2101.06184)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soap_net.errors import UserError
from soap_net.models.heads.base import Classes, Embedded, FewShotHead, Positions, no_autocast, wide

MOST_FRAMES = 2**20
"""Frames in all tuples of a clip: those of the pairs of 1,000 frames."""


class Attending(NamedTuple):
    """What queries attend to: L tuples of each of K supports of a class.

    ``members`` (L, F) tells which pairs make a tuple; ``factor`` and ``summand`` (way, K, L) make scores of sums of
    products, minus infinity those of padded supports; ``squares`` (way, K * F, K * F) are products of values.
    """

    members: Tensor
    factor: Tensor
    summand: Tensor
    squares: Tensor


class TupleAttention(nn.Module):
    """One cardinality of TRX: each tuple of a query attends to all tuples of a class.

    A tuple is ``cardinality`` frames in ascending order, concatenated. Scores are products of LayerNormed keys over
    ``sqrt(out_dim)``, their softmax runs over all ``K * L`` tuples of a class, L tuples a clip; the result is the
    negated squared distance between the query's own values and the attended ones, over L.

    A linear map of concatenated frames is a sum of one map per slot of the tuple. So keys and values are made of the F
    pairs of a slot and a frame that occurs in it, and what has ``out_dim`` numbers is multiplied for pairs alone:
    products of tuples are sums of products of pairs, and a squared distance is made of three such sums.

    Args:
        dim: features per frame.
        frames: frames per clip.
        cardinality: frames per tuple.
        out_dim: size of keys and values.
        memory_mib: what scores and attention may take at once; beyond it the query's tuples go in chunks, which in
            training are computed anew for backward.

    Raises:
        UserError: a tuple longer than the clip, or more of them than `MOST_FRAMES` allows.
    """

    pairs: Tensor

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
        # As frames ascend, slot a holds one of `spread` frames, the first of them frame a.
        self.slots, self.spread = cardinality, frames - cardinality + 1
        chosen = torch.tensor(list(combinations(range(frames), cardinality)))
        pairs = chosen + torch.arange(cardinality) * (self.spread - 1)
        self.register_buffer("pairs", pairs, persistent=False)  # (L, cardinality): the pairs of each tuple

    def members(self, like: Tensor) -> Tensor:
        """``(L, F)``: which pairs make a tuple, 1 or 0 in the dtype of ``like``."""
        return like.new_zeros(len(self.pairs), self.slots * self.spread).scatter(1, self.pairs, 1.0)

    def embed(self, frames: Tensor) -> Embedded:
        """What a comparison takes of ``(N, T, dim)`` clips with positions added.

        Returns:
            Keys and values of pairs, both ``(N, F, out_dim)``, and what LayerNorm makes of a tuple's summed keys, a
            factor and a summand of its scores, both ``(N, L)``.
        """
        keys, values = (wide(self._per_pair(linear, frames)) for linear in (self.keys, self.values))
        weight, bias, members = wide(self.norm.weight), wide(self.norm.bias), self.members(keys)
        with no_autocast(keys):
            keys = keys - keys.mean(dim=-1, keepdim=True)
            variance = ((members @ (keys @ keys.mT)) * members).sum(dim=-1) / keys.shape[-1]
            factor = (variance.clamp(min=0) + self.norm.eps).rsqrt()
            keys = keys * weight
            summand = factor * (keys @ bias @ members.T)
        return keys, values, factor, summand

    def forward(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        """`embed` of supports and of queries to ``(Q, way)`` logits."""
        keys, values, factor, summand = support
        query_keys, query_values, query_factor, _ = query
        with no_autocast(keys):
            scale = keys.shape[-1] ** -0.5
            # What a query's own tuple adds to all its scores falls out of the softmax.
            summand = (summand[classes.shots] * scale).masked_fill(~classes.present[..., None], -torch.inf)
            factor = factor[classes.shots] * scale
            scores = _by_class(query_keys, keys, classes.shots)
            # In each slot attention sums to one, so any origin of the slot's values does; one of their own keeps the
            # squares from being those of what all clips have in common.
            slots = (self.slots, self.spread)
            origin = values.detach().unflatten(1, slots)[:1, :, :1]
            values, query_values = ((v.unflatten(1, slots) - origin).flatten(1, 2) for v in (values, query_values))
            products = _by_class(query_values, values, classes.shots)
            if classes.shots.shape[1] == 1:
                squares = (values @ values.mT)[classes.shots[:, 0]]  # which copies far less than the values
            else:
                of_class = values[classes.shots].flatten(1, 2)
                squares = of_class @ of_class.mT
            members = self.members(keys)
            attending = Attending(members, factor, summand, squares)
            whole = (attending, members, query_factor, scores, products)
            # A program for export has no loops: all goes at once there, however many queries will come.
            beyond = _beyond_own(*whole) if torch.compiler.is_exporting() else self._in_chunks(*whole)
            own = ((query_values @ query_values.mT) * (members.T @ members)).sum(dim=(1, 2))
        return -(own[:, None] + beyond.T) / len(members)

    def _in_chunks(
        self, attending: Attending, members: Tensor, query_factor: Tensor, scores: Tensor, products: Tensor
    ) -> Tensor:
        """`_beyond_own` in `memory`."""
        way, queries, pairs, shot, _ = scores.shape
        training, most = torch.is_grad_enabled(), len(members)
        # Tasks of an evaluation run side by side and share it. Of scores and of attention there are three at a time.
        memory = self.memory if training else self.memory // FewShotHead.tasks_at_once
        rows = max(1, memory // (3 * way * shot * (most + pairs) * scores.element_size()))
        clips, tuples = max(1, rows // most), min(rows, most)
        summed = []
        for clip in range(0, queries, clips):
            of = slice(clip, clip + clips)
            parts = []
            for first in range(0, most, tuples):
                some = slice(first, first + tuples)
                chunk = (attending, members[some], query_factor[of, some], scores[:, of], products[:, of])
                if training and rows < queries * most:
                    parts.append(checkpoint(_beyond_own, *chunk, use_reentrant=False))
                else:
                    parts.append(_beyond_own(*chunk))
            summed.append(torch.stack(parts).sum(dim=0))
        return torch.cat(summed, dim=1) if summed else scores.new_zeros(way, 0)

    def _per_pair(self, linear: nn.Linear, frames: Tensor) -> Tensor:
        """What each pair adds to ``linear`` of its tuples, ``(N, T, dim)`` to ``(N, F, out_dim)``; bias in slot 0."""
        slots = linear.weight.unflatten(1, (self.slots, frames.shape[-1])).unbind(1)
        return torch.cat(
            [
                F.linear(frames[:, slot : slot + self.spread], weight, None if slot else linear.bias)
                for slot, weight in enumerate(slots)
            ],
            dim=1,
        )


def _by_class(query: Tensor, support: Tensor, shots: Tensor) -> Tensor:
    """Products of all pairs, ``(Q, F, D)`` and ``(S, F, D)`` to ``(way, Q, F, K, F)``."""
    products = query.flatten(0, 1) @ support.flatten(0, 1).mT
    return products.reshape(*query.shape[:2], *support.shape[:2])[:, :, shots].permute(2, 0, 1, 3, 4)


def _beyond_own(attending: Attending, own: Tensor, query_factor: Tensor, scores: Tensor, products: Tensor) -> Tensor:
    """Squared distances of queries' tuples to what they attend to, less the squares of their own: sums ``(way, Q)``.

    Args:
        attending: the supports by class.
        own: ``(R, F)`` rows of ``members``: which of the queries' tuples.
        query_factor: ``(Q, R)``, theirs.
        scores: ``(way, Q, F, K, F)`` products of pairs' keys.
        products: the same of values.
    """
    members, factor, summand, squares = attending
    rows = (own * query_factor[..., None]) @ scores.flatten(3)
    summed = rows.unflatten(-1, scores.shape[3:]) @ members.T
    summed = torch.addcmul(summand[:, None, None], summed, factor[:, None, None])
    attention = summed.flatten(-2).softmax(dim=-1).view(summed.shape)
    # |sum_s a_s v_s|^2 - 2 v . sum_s a_s v_s, with the attention of the pairs in place of that of the tuples.
    attention = (attention @ members).flatten(-2).flatten(1, 2)
    towards = torch.baddbmm((own @ products.flatten(3)).flatten(1, 2), attention, squares, beta=-2)
    return (attention * towards).unflatten(1, query_factor.shape).sum(dim=(2, 3))


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
        each = len(support) // len(self.attentions)
        scores = [
            attention(support[i : i + each], classes, query[i : i + each])
            for attention, i in zip(self.attentions, range(0, len(support), each), strict=True)
        ]
        return torch.stack(scores).mean(dim=0)
