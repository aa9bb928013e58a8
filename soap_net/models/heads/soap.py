"""The head of SOAP-Net: each query's frames attend to all support frames of a class (arXiv 2407.16344)."""

from __future__ import annotations

from torch import Tensor

from soap_net.models.heads.base import Classes, Embedded, FewShotHead, Positions
from soap_net.models.heads.trx import TupleAttention


class SOAPHead(FewShotHead):
    """SOAP-Net's head, the cross attention of TRX (arXiv 2101.06184) on single frames.

    Positions are added to the features, keys and values are linear maps of them (keys with LayerNorm). The query's keys
    attend, by a softmax over all ``K * T`` frames of a class, to its values, which makes the class's prototype for this
    very query; the logit is the negated squared distance between the query's own values and the prototype, over T.

    Args:
        dim: features per frame.
        frames: frames per clip.
        out_dim: size of keys and values.
        dropout: after the positions.
    """

    def __init__(self, dim: int, frames: int, out_dim: int = 1152, dropout: float = 0.1) -> None:
        super().__init__(dim, frames)
        self.positions = Positions(dim, frames, dropout=dropout)
        self.attention = TupleAttention(dim, frames, cardinality=1, out_dim=out_dim)

    def embed(self, features: Tensor) -> Embedded:
        return self.attention.embed(self.positions(features))

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        return self.attention(support, classes, query)
