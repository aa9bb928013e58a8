"""What all few-shot heads share: their interface, the grouping of supports by class, positions in time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_net.errors import UserError


class Classes(NamedTuple):
    """The supports of an episode by class, padded to the class with the most shots.

    ``shots`` (way, K) int64 picks supports (padding picks support 0); ``present`` (way, K) bool tells which are real.
    """

    shots: Tensor
    present: Tensor

    def to(self, device: torch.device) -> Classes:
        """The same on a device."""
        return Classes(*(tensor.to(device, non_blocking=True) for tensor in self))

    def mean(self, per_support: Tensor, dim: int = 0) -> Tensor:
        """Mean over each class's shots: dimension ``dim`` of size S becomes one of size way."""
        weight = self.one_hot(per_support.shape[dim]).to(per_support.dtype)
        weight = weight / weight.sum(dim=1, keepdim=True)
        with no_autocast(per_support):
            return (per_support.movedim(dim, -1) @ weight.T).movedim(-1, dim)

    def one_hot(self, supports: int) -> Tensor:
        """``(way, S)`` bool: which support belongs to which class."""
        member = torch.zeros(len(self.shots), supports, dtype=torch.int64, device=self.shots.device)
        return member.scatter_add(1, self.shots, self.present.long()) > 0

    def left_out(self, own: Tensor) -> Tensor:
        """``(S,)`` bool: whether a support can be left out, as its class has others; ``own`` (S, way) tells classes."""
        return own[:, self.present.sum(dim=1) > 1].any(dim=1)


def group_by_class(labels: Tensor, way: int) -> Classes:
    """Group supports by class, whatever their order and however many shots each class has.

    Raises:
        UserError: a label out of ``0 .. way - 1``, or a class without a support.
    """
    if way < 1 or len(labels) < way:
        raise UserError(f"{way} classes can't be told from {len(labels)} supports: each needs at least one")
    counts = (labels == torch.arange(way, device=labels.device)[:, None]).sum(dim=1)
    # One wait for the device, whatever the outcome.
    fewest, most, total = torch.stack([counts.min(), counts.max(), counts.sum()]).tolist()
    if total != len(labels):
        raise UserError(f"support labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to {way - 1}")
    if fewest == 0:
        raise UserError(f"class {int(counts.argmin())} of {way} has no support")
    order = labels.argsort(stable=True)
    first = counts.cumsum(0) - counts
    shot = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    index = torch.zeros(way, most, dtype=torch.int64, device=labels.device)
    index[labels[order], shot] = order
    present = torch.arange(most, device=labels.device) < counts[:, None]
    return Classes(index, present)


Embedded = tuple[Tensor, ...]
"""N clips as a head compares them: tensors with N first."""


class Compared(NamedTuple):
    """Clips compared with the supports: ``logits`` (N, way), and how much each is like any class, ``familiar`` (N,).

    ``chosen`` is what `FewShotHead.choose` gives of the supports.
    """

    logits: Tensor
    familiar: Tensor
    chosen: Tensor = torch.zeros(0)


class FewShotHead(nn.Module, ABC):
    """Classifies queries by comparing their frame features with those of a few labelled supports.

    Subclasses take ``(dim, frames, **options)`` and implement `logits`, and `embed` where much of the work is a clip's
    own; they hold no state of an episode.
    """

    tasks_at_once: ClassVar[int] = 16
    """How many tasks evaluation may run side by side, which takes as many times the memory of one."""
    takes_differences: ClassVar[bool] = False
    """Whether a clip's vectors are followed by those of the differences of neighbouring frames, see
    `soap_net.models.SOAPNet.features`; ``frames`` counts both."""
    ignores_differences: bool = False
    """Whether it takes those, and no answer of its own hangs on them: zeros will do."""
    choices: tuple[str, ...] = ()
    """Names of what the head chooses among by looking at the supports, if it does."""

    def __init__(self, dim: int, frames: int) -> None:
        super().__init__()
        if dim < 1 or frames < 1:
            raise UserError(f"a head needs dim >= 1 and frames >= 1, got dim={dim} and frames={frames}")
        self.dim = dim
        self.frames = frames

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Scores of each query for each class.

        Args:
            support: ``(S, T, D)`` features of the supports' frames; any number of shots per class, at least one.
            support_labels: ``(S,)`` int64 in ``0 .. way - 1``, in any order; on the CPU they cost no wait for a GPU.
            query: ``(Q, T, D)`` features of the queries' frames.
            way: the number of classes.

        Returns:
            ``(Q, way)`` logits, in the features' dtype or float32, whichever is the wider.

        Raises:
            UserError: shapes that don't fit, a label out of range, a class without a support.
        """
        for name, features in (("support", support), ("query", query)):
            if features.ndim != 3 or tuple(features.shape[1:]) != (self.frames, self.dim):
                raise UserError(
                    f"{type(self).__name__}: {name} features are {tuple(features.shape)}, "
                    f"expected (clips, {self.frames} frames, {self.dim} features)"
                )
        if support_labels.shape != support.shape[:1]:
            raise UserError(
                f"{type(self).__name__}: {len(support)} supports, but labels of shape {tuple(support_labels.shape)}"
            )
        classes = group_by_class(support_labels, way).to(support.device)
        return self.logits(self.embed(support), classes, self.embed(query))

    def embed(self, features: Tensor) -> Embedded:
        """What a comparison needs of ``(N, T, D)`` clips, each clip's by itself: evaluation computes it once per clip.

        By default the features as they are.
        """
        return (features,)

    @abstractmethod
    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        """``(Q, way)`` from S embedded supports, whose grouping is ``classes``, and Q embedded queries."""

    def compare(self, support: Embedded, classes: Classes, query: Embedded) -> Compared:
        """`logits`, and how much each query is like any class: by default the largest logit."""
        logits = self.logits(support, classes, query)
        return Compared(logits, logits.amax(dim=1))

    def comparer(self, support: Embedded, classes: Classes) -> Callable[[Embedded], Compared]:
        """`compare` with these supports; a head may work out beforehand what queries have no part in."""
        return partial(self.compare, support, classes)

    def held_out(self, support: Embedded, classes: Classes) -> Compared:
        """`compare` of each of the S supports with the others; rows of classes with one support mean nothing."""
        labels = classes.one_hot(len(support[0])).long().argmax(dim=0)
        found = []
        for row in range(len(labels)):
            rest = torch.arange(len(labels), device=labels.device) != row
            if not (labels[rest] == labels[row]).any():
                rest[row] = True
            grouped = group_by_class(labels[rest], len(classes.shots))
            found.append(self.compare(tuple(t[rest] for t in support), grouped, tuple(t[row, None] for t in support)))
        return Compared(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))

    def choose(self, support: Embedded, classes: Classes) -> Tensor:
        """``(len(choices),)``: the weight of each of `choices`, in a sum of 1; empty where there are none."""
        return support[0].new_zeros(0)


class Positions(nn.Module):
    """Adds sinusoidal positions (Vaswani et al., arXiv 1706.03762, section 3.5), scaled, then applies dropout.

    ``(N, T, D)`` to the same. The positions are no parameters and enter no state_dict.
    """

    table: Tensor

    def __init__(self, dim: int, frames: int, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        time = torch.arange(frames, dtype=torch.float64)[:, None]
        rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
        table = torch.zeros(frames, dim, dtype=torch.float64)
        table[:, 0::2] = torch.sin(time * rate)
        table[:, 1::2] = torch.cos(time * rate)[:, : dim // 2]
        self.register_buffer("table", (scale * table).float(), persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(features + self.table.to(features.dtype))


def wide(x: Tensor) -> Tensor:
    """At least float32: distances are differences of near numbers, which 16 bits can't hold."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keeps products of `wide` tensors wide under autocast: here they are comparisons, and small."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def cosines(query: Tensor, support: Tensor) -> Tensor:
    """Cosines of all pairs of vectors: ``(..., N, D)`` and ``(..., M, D)`` to ``(..., N, M)``."""
    with no_autocast(query):
        return F.normalize(wide(query), dim=-1) @ F.normalize(wide(support), dim=-1).mT


def cosine_distances(query: Tensor, support: Tensor) -> Tensor:
    """One minus the cosine of every pair of frames: ``(Q, T, D)`` and ``(S, U, D)`` to ``(Q, S, T, U)``."""
    pairs = cosines(query.flatten(0, 1), support.flatten(0, 1))
    return 1 - pairs.reshape(*query.shape[:2], *support.shape[:2]).transpose(1, 2)
