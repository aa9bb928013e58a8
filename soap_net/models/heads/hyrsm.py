"""HyRSM: hybrid relations and set matching (Wang et al., CVPR 2022, arXiv 2204.13423)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_net.errors import UserError
from soap_net.models.heads.base import Classes, Embedded, FewShotHead, Positions, cosine_distances, cosines


def mean_hausdorff(distances: Tensor) -> Tensor:
    """The bidirectional mean Hausdorff metric of frame distances ``(..., T, U)``: ``(...)``.

    Each frame is matched with the nearest one of the other clip; the matches' distances are averaged over the frames
    of either clip, and the two averages added.
    """
    return distances.amin(dim=-1).mean(dim=-1) + distances.amin(dim=-2).mean(dim=-1)


class BiMHMHead(FewShotHead):
    """Set matching by the bidirectional mean Hausdorff metric (Bi-MHM) with cosine distances.

    Logits are negated distances, averaged over a class's shots.

    Args:
        dim: features per frame.
        frames: frames per clip.
        scale: the logits' factor; by default ``frames``, since the field trains with sums over the frames where the
            paper writes averages.
    """

    def __init__(self, dim: int, frames: int, scale: float | None = None) -> None:
        super().__init__(dim, frames)
        self.scale = float(frames if scale is None else scale)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        return -self.scale * classes.mean(mean_hausdorff(cosine_distances(query[0], support[0])), dim=1)


class HyRSMHead(FewShotHead):
    """HyRSM's hybrid relation module under Bi-MHM.

    Intra-relation: each clip's frames attend to one another (residual, ReLU), after positions were added to the
    features times ``sqrt(dim / 10)``: the authors' code has the factor, and without it the positions, the same in every
    clip, outweigh the features. A class is then the mean of its clips. Inter-relation: the time averages of all classes
    and of one query attend to one another (residual, LayerNorm, ReLU). What a clip so learns of its task is set beside
    each of its frames' features, and a linear map takes the two back to ``dim``. Thus every query sees class features
    of its own.

    Args:
        dim: features per frame.
        frames: frames per clip.
        attention_heads: of both relations; must divide ``dim``.
        dropout: after the positions.
        intra_dropout, inter_dropout: on the attention weights of the two relations.
        scale: see `BiMHMHead`.
    """

    def __init__(
        self,
        dim: int,
        frames: int,
        attention_heads: int = 8,
        dropout: float = 0.1,
        intra_dropout: float = 0.2,
        inter_dropout: float = 0.05,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, frames)
        if attention_heads < 1 or dim % attention_heads:
            raise UserError(f"attention_heads is {attention_heads}, which doesn't divide {dim} features")
        self.feature_scale = math.sqrt(dim / 10)
        self.positions = Positions(dim, frames, scale=1.0, dropout=dropout)
        self.intra_norm = nn.LayerNorm(dim)
        self.intra = nn.MultiheadAttention(dim, attention_heads, dropout=intra_dropout, batch_first=True)
        self.inter = nn.MultiheadAttention(dim, attention_heads, dropout=inter_dropout, batch_first=True)
        self.inter_norm = nn.LayerNorm(dim)
        self.blend = nn.Linear(2 * dim, dim)
        self.scale = float(frames if scale is None else scale)

    def embed(self, features: Tensor) -> Embedded:
        clips = self.positions(features * self.feature_scale)
        normed = self.intra_norm(clips)
        related, _ = self.intra(normed, normed, normed, need_weights=False)
        return (F.relu(clips + related),)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        prototypes, (clips,) = classes.mean(support[0]), query  # (way, T, dim) and (Q, T, dim)
        way, queries = prototypes.shape[0], clips.shape[0]
        # One task per query: the way classes and the query itself, (Q, way + 1, dim).
        shared = prototypes.mean(dim=1).expand(queries, way, -1)
        task = torch.cat([shared, clips.mean(dim=1, keepdim=True).to(shared.dtype)], dim=1)
        related, _ = self.inter(task, task, task, need_weights=False)
        related = F.relu(self.inter_norm(task + related))
        # A map of two halves is a sum of two maps; the frames' half is the same for all queries.
        of_frame, of_task = self.blend.weight.chunk(2, dim=1)
        relation = F.linear(related, of_task, self.blend.bias)
        class_frames = F.linear(prototypes, of_frame) + relation[:, :way, None]  # (Q, way, T, dim)
        query_frames = F.linear(clips, of_frame) + relation[:, way:]  # (Q, T, dim)
        return -self.scale * mean_hausdorff(1 - cosines(query_frames[:, None], class_frames))
