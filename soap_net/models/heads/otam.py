"""OTAM: ordered temporal alignment (Cao et al., CVPR 2020, arXiv 1906.11415)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soap_net.errors import UserError
from soap_net.models.heads.base import Classes, Embedded, FewShotHead, cosine_distances


class OTAMHead(FewShotHead):
    """Aligns each query with each support in order, at the least cost of the matched frames' cosine distances.

    Logits are negated alignment costs, both directions (query along support, support along query) added, averaged over
    a class's shots.

    Args:
        dim: features per frame.
        frames: frames per clip.
        smoothing: lambda of the relaxed minimum; the paper's is 0.1.
    """

    def __init__(self, dim: int, frames: int, smoothing: float = 0.1) -> None:
        super().__init__(dim, frames)
        if not smoothing > 0:
            raise UserError(f"smoothing is {smoothing}, expected more than 0")
        self.smoothing = smoothing

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        distances = cosine_distances(query[0], support[0])
        both = alignment_cost(torch.stack([distances, distances.mT]), self.smoothing)
        return -classes.mean(both.sum(dim=0), dim=1)


def alignment_cost(distances: Tensor, smoothing: float) -> Tensor:
    """Relaxed cost of the best ordered alignment, ``(..., L, M)`` frame distances to ``(...)``.

    The paper's recursion, with a column of zeros before and after the M frames, so that frames of the
    first clip may stay unmatched at its start and end::

        c[l, m] = d[l, m] + min(c[l-1, m-1], c[l, m-1])                  inside
        c[l, m] = d[l, m] + min(c[l-1, m-1], c[l, m-1], c[l-1, m])       in the first and the last column

    where ``min`` is ``-lambda log sum exp(-x / lambda)``, the zeros before cost nothing, and the first row can only
    come from the left. The result is the last row's last entry.

    In ``p = -c / lambda`` each step adds exponentials. Inside, a column depends on the one before it alone, so a whole
    column is one step. In the first column the recursion is a cumulated sum, and the last one's end is a plain sum.
    """
    scores = -distances / smoothing
    rows, columns = scores.shape[-2:]
    log2 = math.log(2.0)
    # First column: a path may begin at any row; below the first it does so from two of the zeros.
    begin = scores.new_full((rows,), log2)
    begin[0] = 0.0
    passed = scores[..., 0].cumsum(dim=-1)
    before = torch.cat([torch.zeros_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    column = passed + (begin - before).logcumsumexp(dim=-1)
    for m in range(1, columns):
        above = torch.cat([torch.full_like(column[..., :1], -torch.inf), column[..., :-1]], dim=-1)
        column = scores[..., m] + torch.logaddexp(above, column)
    # Last column: every row but the last is reached from twice, straight and diagonally.
    end = scores.new_full((rows,), log2)
    end[-1] = 0.0
    return -smoothing * (column + end).logsumexp(dim=-1)
