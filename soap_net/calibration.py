"""What the supports say of the answers to come: how sure to be, how often right, and which clips are none of these.

All of it rests on each support's comparison with the others, as if it had been left out; a class of one clip says
nothing. The clips to come are taken to be of the supports' kind, and have one clip a class more to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from soap_net.models.heads import Classes, Compared

ACCEPT = 0.9
"""The share of the classes' own clips that is to be taken for known."""
LEVEL = 0.95


@dataclass(frozen=True)
class Expected:
    """The share of new clips to be told right, in percent, and its 95 % interval over the `clips` left out."""

    accuracy: float
    low: float
    high: float
    clips: int
    chance: float

    @property
    def above_chance(self) -> bool:
        """Whether the classes can be told apart at all, by these clips."""
        return self.low > self.chance

    def __str__(self) -> str:
        return (
            f"about {self.accuracy:.0f} % of new clips told right ({self.low:.0f} to {self.high:.0f} %, from "
            f"{self.clips} clips each left out; chance is {self.chance:.0f} %)"
        )


@dataclass(frozen=True)
class Calibration:
    """How to read a head's answers.

    Attributes:
        sharpness: what to multiply logits by before the softmax; 1 where nothing could be left out.
        threshold: a clip less familiar than this is none of the classes; minus infinity where too few clips were left
            out to tell.
        expected: None where no clip could be left out.
        confusion: ``confusion[i][j]`` counts the left-out clips of class i that were taken for class j.
    """

    sharpness: float
    threshold: float
    expected: Expected | None
    confusion: Sequence[Sequence[int]]


def calibrate(held_out: Compared, classes: Classes, accept: float = ACCEPT) -> Calibration:
    """Reads the left-out comparisons of all supports, ``(S, way)`` and ``(S,)``; ``accept`` 1 takes all for known."""
    way = len(classes.shots)
    own = classes.one_hot(len(held_out.logits)).T
    rows = classes.left_out(own).nonzero().flatten()
    # Not every device has float64.
    labels, logits = own[rows].long().argmax(dim=1).cpu(), held_out.logits[rows].cpu().double()
    confusion = torch.zeros(way, way, dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.ones(len(rows), dtype=torch.int64), True)
    expected = None
    if len(rows):
        low, high = wilson(int(confusion.trace()), len(rows))
        right = 100 * int(confusion.trace()) / len(rows)
        expected = Expected(right, 100 * low, 100 * high, len(rows), 100 / way)
    return Calibration(
        sharpness(logits, labels),
        threshold(held_out.familiar[rows].tolist(), accept),
        expected,
        confusion.tolist(),
    )


def sharpness(logits: Tensor, labels: Tensor) -> float:
    """The factor at which the labels are likeliest, by a log-normal prior around 1; ``(N, way)`` and ``(N,)``."""
    grid = torch.arange(-80, 81, dtype=torch.float64) / 20
    scaled = (logits * grid.exp()[:, None, None]).log_softmax(dim=-1)
    fit = scaled[:, torch.arange(len(labels)), labels].sum(dim=1) - grid.square() / 2
    return float(grid[fit.argmax()].exp())


def threshold(familiar: Sequence[float], accept: float = ACCEPT) -> float:
    """What a share ``accept`` of clips like these exceed, whatever their distribution; it takes `least_clips` of them.

    The rank of split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005, section 2.2):
    of N + 1 exchangeable clips the next falls below the r-th smallest of N with a chance of at most r / (N + 1).
    """
    rank = math.floor((1 - accept) * (len(familiar) + 1) + 1e-9)
    return sorted(familiar)[rank - 1] if rank else -math.inf


def least_clips(accept: float) -> int:
    """How many clips must be left out for a threshold that a share ``accept`` below 1 exceeds."""
    return math.ceil(1 / (1 - accept) - 1e-6) - 1


def wilson(right: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, JASA 22, 1927): what it may be, ``right`` of ``total`` being seen."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)
