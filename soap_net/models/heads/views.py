"""A head that needs no training: it looks at a clip in three ways, and weighs them by what tells the supports apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_net.errors import UserError, did_you_mean
from soap_net.models.heads.base import Classes, Compared, Embedded, FewShotHead, cosines, no_autocast, wide

#: How a named mixture weighs the views appearance, motion and differences.
MIXTURES = {
    "appearance": (1.0, 0.0, 0.0),
    "motion": (0.0, 1.0, 0.0),
    "differences": (0.0, 0.0, 1.0),
    "appearance+differences": (0.75, 0.0, 0.25),
    "motion+differences": (0.0, 0.5, 0.5),
    "both": (1 / 3, 1 / 3, 1 / 3),
}
#: What "auto" weighs: the scene and the things in it tell the class, or only what moves does.
AUTO = ("appearance+differences", "motion+differences")
SHARPNESS = (0.25, 0.5, 1.0, 2.0, 4.0)


class ViewsHead(FewShotHead):
    """Compares clips by what they show, what moves in them, and what changes from frame to frame; nothing is learned.

    - appearance: the mean of the frames' features, which tells a scene, and the person as well;
    - motion: each frame's features less the clip's mean over time, frame by frame: who and where is gone;
    - differences: features of the images' differences less those of no change, frame by frame, as HMEM of SOAP
      (arXiv 2407.16344, section 3.3) looks at motion.

    A class's prototype in a view is the mean of its supports' unit vectors, a query's score the cosine to it. Scores
    of the views are added in units of their spread. ``by="auto"`` averages the class probabilities of the mixtures in
    `AUTO`, each at several sharpnesses of the softmax, by the likelihood of every support's class when it is left out;
    so logits are log probabilities, and a single clip a class leaves both mixtures equal.

    Args:
        dim: features per vector.
        frames: vectors per clip: those of its frames, then of their differences, as many or one less.
        by: "auto", or a mixture of `MIXTURES`.
    """

    takes_differences: ClassVar[bool] = True

    def __init__(self, dim: int, frames: int, by: str = "auto") -> None:
        super().__init__(dim, frames)
        if frames < 2:
            raise UserError(f"the head views looks at changes: it needs clips of at least 2 frames (images: {frames})")
        if str(by) not in ("auto", *MIXTURES):
            near = did_you_mean(str(by), ("auto", *MIXTURES))
            raise UserError(f"by is {by!r}{near} (known: auto, {', '.join(MIXTURES)})")
        self.choices = AUTO if by == "auto" else (by,)
        self.ignores_differences = not any(MIXTURES[name][2] for name in self.choices)

    def embed(self, features: Tensor) -> Embedded:
        """One unit vector a view: ``(N, D)``, ``(N, T D)`` and ``(N, (T - 1) D)``; zeros where nothing moves."""
        frames, differences = wide(features).split([(self.frames + 1) // 2, self.frames // 2], dim=1)
        mean = frames.mean(dim=1)
        views = (mean, (frames - mean[:, None]).flatten(1), differences.flatten(1))
        return tuple(F.normalize(view, dim=-1) for view in views)

    def logits(self, support: Embedded, classes: Classes, query: Embedded) -> Tensor:
        return self.compare(support, classes, query).logits

    def compare(self, support: Embedded, classes: Classes, query: Embedded) -> Compared:
        return self.comparer(support, classes)(query)

    def comparer(self, support: Embedded, classes: Classes) -> Callable[[Embedded], Compared]:
        with no_autocast(support[0]):
            fit, prototypes = self._fit(support, classes), [classes.mean(view) for view in support]

        def compare(query: Embedded) -> Compared:
            with no_autocast(query[0]):
                scores = [cosines(q, p) for q, p in zip(query, prototypes, strict=True)]
                return self._compared(fit, torch.stack(scores))

        return compare

    def held_out(self, support: Embedded, classes: Classes) -> Compared:
        with no_autocast(support[0]):
            fit = self._fit(support, classes)
            return self._compared(fit, fit.held_out)

    def choose(self, support: Embedded, classes: Classes) -> Tensor:
        with no_autocast(support[0]):
            return self._fit(support, classes).posterior.sum(dim=1)

    def _fit(self, support: Embedded, classes: Classes) -> _Fit:
        held_out = torch.stack([leave_one_out(cosines(view, view), classes) for view in support])
        mixtures = held_out.new_tensor([MIXTURES[name] for name in self.choices])
        fit = _Fit(held_out, None, None, mixtures, held_out.new_ones(len(mixtures), len(SHARPNESS)))
        own = classes.one_hot(held_out.shape[1]).T
        known = classes.left_out(own)
        if known.any():
            rows = known.to(held_out)[:, None] / (known.sum() * len(own.T))
            level = (held_out * rows).sum(dim=(1, 2))
            deviation = held_out - held_out.mean(dim=2, keepdim=True)
            fit = fit._replace(level=level, spread=(deviation.square() * rows).sum(dim=(1, 2)).sqrt())
            chances = self._chances(fit, held_out)
            likelihood = (chances * own).sum(dim=-1).where(known, 0).sum(dim=-1)
            fit = fit._replace(posterior=likelihood.flatten().softmax(0).view_as(likelihood))
        return fit._replace(posterior=fit.posterior / fit.posterior.sum())

    def _standard(self, fit: _Fit, scores: Tensor) -> Tensor:
        """``(V, Q, way)`` cosines in units of each view's spread, or of each row's if no support can be left out."""
        if fit.level is None or fit.spread is None:
            deviation = scores - scores.mean(dim=-1, keepdim=True)
            return deviation / deviation.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
        return (scores - fit.level[:, None, None]) / fit.spread.clamp_min(1e-6)[:, None, None]

    def _chances(self, fit: _Fit, scores: Tensor) -> Tensor:
        """Log probabilities ``(mixtures, sharpnesses, Q, way)``."""
        mixed = torch.einsum("mv,vqc->mqc", fit.mixtures, self._standard(fit, scores))
        return (mixed[:, None] * mixed.new_tensor(SHARPNESS)[:, None, None]).log_softmax(dim=-1)

    def _compared(self, fit: _Fit, scores: Tensor) -> Compared:
        weighed = self._chances(fit, scores) + fit.posterior.log()[:, :, None, None]
        views = fit.posterior.sum(dim=1) @ fit.mixtures
        familiar = torch.einsum("v,vqc->qc", views, self._standard(fit, scores)).amax(dim=-1)
        return Compared(weighed.flatten(0, 1).logsumexp(dim=0), familiar, fit.posterior.sum(dim=1))


class _Fit(NamedTuple):
    """What the supports say: V views, S supports, M mixtures, B sharpnesses."""

    held_out: Tensor  # (V, S, way): each support's cosines when it is left out
    level: Tensor | None  # (V,) their mean; None where no support can be left out
    spread: Tensor | None  # (V,) how far classes differ in them
    mixtures: Tensor  # (M, V)
    posterior: Tensor  # (M, B), sums to 1


def leave_one_out(pairs: Tensor, classes: Classes) -> Tensor:
    """Cosines of each support to every class's prototype made without it, ``(S, way)`` from the supports' ``(S, S)``.

    A class that lost none of its supports would have the better prototype, so the others lose one each too: the score
    is the mean over which. A class of a single support keeps it; the row of that support means nothing.
    """
    member = classes.one_hot(len(pairs)).to(pairs)
    own = member.T @ member  # whether two supports share a class
    to_sum = pairs @ member.T
    to_own_sum = (to_sum * member.T).sum(dim=1)  # of each support
    squared = member @ to_own_sum  # the length of each class's sum
    several = (own.sum(dim=1) > 1).to(pairs)
    # Column k: the prototype of k's class without k, its sum less k and that sum's length.
    without = to_sum @ member - pairs * several
    length = squared @ member - several * (2 * to_own_sum - pairs.diagonal())
    scores = without / length.clamp_min(1e-12).sqrt()
    mean = scores @ member.T / member.sum(dim=1)
    return torch.where(member.T > 0, scores.diagonal()[:, None], mean)
