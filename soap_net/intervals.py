"""How far an accuracy may lie from that on other classes, clips and training seeds: 95 % intervals.

The field's interval is over tasks, which are drawn from one fixed set of test clips: more tasks make it as narrow as
one likes, and it says nothing of other clips. `beyond` gives the interval that does; `docs/intervals.md` tells how
often it holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEWEST_TASKS = 20
"""Of fewer, the noise of drawing them hides all else."""
MOST_ROWS = 1500
"""Above so many clips, how a clip does as a support is seen class by class, and not with each query clip."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval in percent, or points of a difference; or why there is none."""

    low: float | None
    high: float | None
    over: str
    """What is drawn anew in it; where there is none, why."""

    def __str__(self) -> str:
        return self.shown("")

    def shown(self, sign: str) -> str:
        """As ``41.2 to 78.0``; `sign` "+" writes those of a difference."""
        if self.low is None or self.high is None:
            return "-"
        return f"{self.low:{sign}.1f} to {self.high:{sign}.1f}"


@dataclass(frozen=True)
class Drawn:
    """The classes and clips of T tasks.

    Attributes:
        classes: ``(T, way)`` numbers of each task's classes.
        support: ``(T, way, shot)`` numbers of their clips, each within its class.
        query: ``(T, way, queries)`` likewise.
        sizes: how many clips each class of the test set has.
    """

    classes: Ints
    support: Ints
    query: Ints
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Drawn:
        """From what `to_dict` gave."""
        classes, support, query = (np.array(values[name], dtype=np.int64) for name in ("classes", "support", "query"))
        return cls(classes, support, query, tuple(values["sizes"]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; clips are left out where classes alone count."""
        used = slice(0 if self.classes_differ else None)
        return {
            "classes": self.classes.tolist(),
            "support": self.support[used].tolist(),
            "query": self.query[used].tolist(),
            "sizes": list(self.sizes),
        }

    @cached_property
    def classes_differ(self) -> bool:
        """Whether a class meets others in one task than in another, so that it can be left out."""
        kinds = np.unique(np.sort(self.classes, axis=1), axis=0)
        return kinds.size > len(np.unique(kinds))

    @property
    def over(self) -> str:
        """What the test set is a sample of, as far as these tasks can tell."""
        if self.classes_differ:
            return "new classes and clips"
        return f"new clips of these {len(np.unique(self.classes))} classes"

    @property
    def problem(self) -> str | None:
        """Why no interval can be had, if so: what takes part in all tasks can't be left out."""
        if len(self.classes) < FEWEST_TASKS:
            return f"{len(self.classes)} tasks are too few"
        if self.classes_differ:
            return None
        taken = self.support.shape[2] + self.query.shape[2]
        if min(self.sizes[row] for row in np.unique(self.classes)) <= taken:
            return f"the tasks differ in no class, and a class has but the {taken} clips that each of them takes"
        return None


def beyond(right: Floats, drawn: Drawn, *, difference: bool = False) -> Interval:
    """The interval of a mean over what test set and training seeds are a sample of.

    Units are the classes, with their clips, where tasks differ in their classes, else the clips. The variance over
    units is the jackknife's: each in turn is left out. That counts what two of them do together twice, and the noise
    of drawing few tasks several times; what it should give of either is taken off, and the noise put in once. Units
    and seeds are crossed samples: variances over both are added, less that of their interaction, which both hold.

    Student's t, generalised: the jackknife's sum and the spread of the seeds are known but as well as their degrees of
    freedom allow, so the mean's error is a mixture of normal ones over what the true variance may be (fiducial, as
    Behrens and Fisher have it), of which none is below that of drawing tasks. With one sample and no noise it is t. An
    accuracy's interval is made on the scale of its logit, where it is nearly symmetric.

    Args:
        right: ``(seeds, T, way, queries)``, 1 for each right answer and 0 for a wrong one; of a `difference` of two
            nets on the same tasks, one less the other.
    """
    if drawn.problem:
        return Interval(None, None, drawn.problem)
    if (right == right.flat[0]).all():
        return Interval(None, None, "all answers are alike" if difference else "all answers are right, or all wrong")
    seeds, mean = len(right), float(right.mean())
    layout = _Layout.of(drawn, right.shape[3])
    spread = layout.spread(right.mean(axis=0))
    ratios, weights = inverse_chi_square(spread.freedom)
    sums = spread.total * ratios
    possible = sums > spread.noise  # a smaller one would have been the noise's alone
    if possible.any():
        sums, weights = sums[possible], weights[possible]
    variances = spread.variance(sums)
    if seeds > 1:
        by_seed = float(right.mean(axis=(1, 2, 3)).var(ddof=1)) / seeds
        alone = sum(float(one.variance(one.total)) for one in map(layout.spread, right)) / seeds
        shared = max(alone - float(spread.variance(spread.total)), 0.0) / (seeds - 1)
        ratios, chances = inverse_chi_square(seeds - 1)
        of_seeds = by_seed * ratios[:, None]
        variances = np.maximum(np.maximum(variances, of_seeds), variances + of_seeds - shared).ravel()
        weights = (chances[:, None] * weights).ravel()
    half = widest(variances, weights)
    over = drawn.over + (" and training seeds" if seeds > 1 else "")
    if difference:
        return Interval(100 * (mean - half), 100 * (mean + half), over)
    odds, reach = math.log(mean / (1 - mean)), min(half / (mean * (1 - mean)), 600.0)
    low, high = (100 / (1 + math.exp(-end)) for end in (odds - reach, odds + reach))
    return Interval(low, high, over)


@dataclass(frozen=True)
class _Spread:
    """What leaving out each unit in turn tells of the variance of a mean."""

    total: float
    """The jackknife's sum of squares."""
    noise: float
    """What of it comes of drawing few tasks."""
    pairwise: float
    """What two units do together, which it counts twice."""
    drawn: float
    """The variance of drawing tasks, which it should count once."""
    freedom: float
    """Degrees of freedom of the sum."""

    def variance(self, total: Floats | float) -> Floats:
        """Of the mean, were this the jackknife's sum; pairs can't make up more than all of what is counted twice."""
        units = np.maximum(np.asarray(total, dtype=np.float64) - self.noise, 0.0)
        return np.maximum(units - self.pairwise, units / 2) + self.drawn


@dataclass(frozen=True)
class _Layout:
    """Which units ask and answer: of A answers, which unit asked, and which others took part."""

    asked: Ints  # (A,) the unit of the query
    row: Ints  # (A,) the unit of the query, or its stratum where there are too many
    others: Ints  # (A, K) the units that it was compared with
    strata: tuple[int, ...]  # units are samples of these sizes, one after another

    @classmethod
    def of(cls, drawn: Drawn, queries: int) -> _Layout:
        tasks, way = drawn.classes.shape
        if drawn.classes_differ:
            asked = np.repeat(drawn.classes, queries, axis=1)
            every = np.repeat(drawn.classes[:, None], way * queries, axis=1)
            others = every[every != asked[:, :, None]].reshape(-1, way - 1)
            return cls(asked.ravel(), asked.ravel(), others, (len(drawn.sizes),))
        starts = np.cumsum([0, *drawn.sizes[:-1]])[drawn.classes][:, :, None]
        asked = (starts + drawn.query).ravel()
        others = np.repeat((starts + drawn.support).reshape(tasks, -1), way * queries, axis=0)
        few = sum(drawn.sizes) <= MOST_ROWS
        return cls(asked, asked if few else np.repeat(drawn.classes, queries, axis=1).ravel(), others, drawn.sizes)

    def spread(self, right: Floats) -> _Spread:
        """Of the mean of ``(T, way, queries)``."""
        units, rows, scores = sum(self.strata), int(self.row.max()) + 1, right.ravel()
        by_task = right.mean(axis=(1, 2))
        drawn = float(by_task.var(ddof=1)) / len(right)
        asked = np.bincount(self.asked, minlength=units)
        own = np.bincount(self.asked, scores, units) / np.maximum(asked, 1)  # how each unit's queries did
        in_row = np.bincount(self.row, minlength=rows)
        rest = scores - (np.bincount(self.row, scores, rows) / np.maximum(in_row, 1))[self.row]
        within = float(np.square(rest).sum()) / max(int((in_row - 1).clip(0).sum()), 1)
        pairs = (self.row[:, None] * units + self.others).ravel()
        both = np.bincount(pairs, minlength=rows * units).reshape(rows, units)
        together = np.bincount(pairs, np.repeat(rest, self.others.shape[1]), rows * units).reshape(rows, units)
        without = in_row[:, None] - both
        seen = (without > 0) & (both > 0)
        # By how much the mean over rows falls when a unit is left out, query by query; and the variance of its noise.
        fall = np.where(seen, together / np.maximum(without, 1), 0.0) / (in_row > 0).sum()
        doubt = np.where(seen, both / np.maximum(without * in_row[:, None], 1), 0.0) * within / (in_row > 0).sum() ** 2
        pairwise = 0.0
        if rows == units:
            own_share = fall - self._mean_of_strata(fall, seen)
            pairwise = float(np.square(own_share + own_share.T).sum()) / 2 - float(doubt.sum())
        total, noise, normal, heavy, start = 0.0, 0.0, 0.0, 0.0, 0
        for size in self.strata:
            part = slice(start, start + size)
            start += size
            met = asked[part] > 0
            scale = (size - 1) * len(self.strata)
            influence = fall[:, part].sum(axis=0)
            influence[met] += (own[part][met] - own[part][met].mean()) / scale
            raw = (size - 1) / size * float(np.square(influence - influence.mean()).sum())
            doubts = float(doubt[:, part].sum()) + float((within / asked[part][met]).sum()) / scale**2
            total += raw
            noise += (size - 1) / size * doubts
            normal += raw**2 / (size - 1)
            heavy += raw**2 * excess_kurtosis(influence) / size
        # A few units see too little of a heavy tail: their excess counts twice. Below 3 degrees t says next to nothing.
        freedom = total**2 / normal if normal else 1.0
        if heavy > 0:
            freedom = max(total**2 / (normal + heavy), min(freedom, 3.0))
        return _Spread(total, noise, max(pairwise, 0.0), drawn, freedom)

    def _mean_of_strata(self, values: Floats, known: NDArray[np.bool_]) -> Floats:
        """In each column the mean over a stratum's rows, where known; zero elsewhere."""
        found, start = np.zeros_like(values), 0
        for size in self.strata:
            part = slice(start, start + size)
            start += size
            counts = known[part].sum(axis=0)
            found[part] = np.where(known[part], values[part].sum(axis=0) / np.maximum(counts, 1), 0.0)
        return found


def excess_kurtosis(values: Floats) -> float:
    """Of what they are a sample of, as k-statistics have it; zero where they are too few, or alike."""
    count = len(values)
    squares = np.square(values - values.mean())
    if count < 4 or squares.mean() < 1e-24:
        return 0.0
    plain = float(np.square(squares).mean() / squares.mean() ** 2) - 3
    return (count - 1) / ((count - 2) * (count - 3)) * ((count + 1) * plain + 6)


def inverse_chi_square(freedom: float, count: int = 60) -> tuple[Floats, Floats]:
    """Values of ``freedom / chi^2`` and the weight of each, which add up to 1."""
    reach = 6 * math.sqrt(2 / freedom)
    logs = np.linspace(-36 / freedom - reach, reach, count)  # of chi^2 / freedom
    weights = np.exp(freedom / 2 * (logs - np.exp(logs) + 1))
    return np.exp(-logs), weights / weights.sum()


def widest(variances: Floats, weights: Floats, coverage: float = 0.95) -> float:
    """How far from zero `coverage` of a mixture of normal errors lies, whose variances have these weights."""
    grid = np.linspace(0.0, 9.0, 3001)
    density = np.exp(-np.square(grid) / 2)
    within = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    within /= within[-1]
    deviations = np.sqrt(np.maximum(variances, 1e-300))
    low, high = 0.0, 40.0 * float(deviations.max())
    for _ in range(45):
        middle = (low + high) / 2
        enough = float(weights @ np.interp(middle / deviations, grid, within)) >= coverage * float(weights.sum())
        low, high = (low, middle) if enough else (middle, high)
    return high


def student_t(freedom: float, coverage: float = 0.95) -> float:
    """The two-sided quantile of Student's t: with ``t = sqrt(freedom) tan(a)``, `a` has the density cos^(freedom-1)."""
    if freedom > 1000:
        return 1.96
    angles = np.linspace(0.0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    if freedom < 1:
        density[-1] = density[-2]
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = float(np.interp(coverage, mass / mass[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
