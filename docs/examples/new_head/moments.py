"""A few-shot head: clips are compared by the mean and the deviation of their features over time.

pip install docs/examples/new_head
soap-net train --data.root DATA --model.head moments --model.head_options '{scale: 8}'
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_net.models.heads import Classes, Embedded, FewShotHead


class MomentsHead(FewShotHead):
    """Cosine of a query's moments with the mean of those of each class's shots, times a learned scale.

    Args:
        dim: features of a frame; given by the backbone.
        frames: feature vectors of a clip.
        scale: what the cosines are multiplied with at first; one of ``--model.head_options``.
    """

    def __init__(self, dim: int, frames: int, scale: float = 10.0) -> None:
        super().__init__(dim, frames)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def embed(self, features: Tensor) -> Embedded:
        """What a clip needs by itself, computed once per clip: ``(N, T, D)`` features to ``(N, 2 D)`` moments."""
        mean = features.mean(dim=1)
        deviation = (features - mean[:, None]).square().mean(dim=1)
        return (torch.cat([mean, (deviation + 1e-6).sqrt()], dim=1),)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        """``(Q, way)``, higher for likelier classes; ``classes.mean`` averages each class's shots, however many."""
        prototypes = classes.mean(support[0])
        return self.scale * F.normalize(query[0], dim=1) @ F.normalize(prototypes, dim=1).T
