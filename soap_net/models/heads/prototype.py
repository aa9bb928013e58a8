"""Heads without order in time: prototypes (arXiv 1703.05175) and the average of frame scores (arXiv 1608.00859)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_net.errors import UserError
from soap_net.models.heads.base import Classes, Embedded, FewShotHead, cosines, no_autocast, wide


class PrototypeHead(FewShotHead):
    """Prototypical networks (Snell et al., NeurIPS 2017, arXiv 1703.05175, equations 1 and 2) on clip features.

    A clip is the mean of its frames, a class's prototype the mean of its clips. Logits are negated squared Euclidean
    distances, or cosines times a learned scale.

    Args:
        dim: features per frame.
        frames: frames per clip.
        metric: ``"cosine"`` or ``"euclidean"``.
        scale: what the cosine's learned scale starts from.
    """

    def __init__(self, dim: int, frames: int, metric: str = "cosine", scale: float = 10.0) -> None:
        super().__init__(dim, frames)
        if metric not in ("cosine", "euclidean"):
            raise UserError(f"metric is {metric!r}, expected cosine or euclidean")
        self.metric = metric
        if metric == "cosine":
            self.scale = nn.Parameter(torch.tensor(float(scale)))

    def embed(self, features: Tensor) -> Embedded:
        return (wide(features).mean(dim=1),)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        prototypes, clips = classes.mean(support[0]), query[0]
        if self.metric == "cosine":
            return self.scale * cosines(clips, prototypes)
        return -(clips[:, None] - prototypes).square().sum(dim=-1)


class FrameAverageHead(FewShotHead):
    """The segmental consensus of TSN (Wang et al., ECCV 2016, arXiv 1608.00859, section 3.1) over frame scores.

    Each frame of a query is scored by itself, by its cosine to the class's prototype (the mean over frames and shots)
    times a learned scale; the clip's score is the average over its frames.

    Args:
        dim: features per frame.
        frames: frames per clip.
        scale: what the learned scale starts from.
    """

    def __init__(self, dim: int, frames: int, scale: float = 10.0) -> None:
        super().__init__(dim, frames)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def embed(self, features: Tensor) -> Embedded:
        # The prototype is the same for all frames, so the average of cosines is a product with the average direction.
        frames = wide(features)
        return frames.mean(dim=1), F.normalize(frames, dim=-1).mean(dim=1)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        prototypes = F.normalize(classes.mean(support[0]), dim=-1)
        directions = query[1]
        with no_autocast(directions):
            return self.scale * (directions @ prototypes.T)
