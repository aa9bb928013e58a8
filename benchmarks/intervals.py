"""How often the intervals of `soap_net.intervals` hold the truth, where the truth is known.

    python -m benchmarks.intervals [--repeats 1000] [--tasks 2000] [--only 0 1] [--out table.md] [--check]

Classes, clips of classes and trained nets are drawn from a population of each: a clip is a point around its class's
mean, how far depends on the class and on the clip; a net sees it through a distortion, a blur of its own and with a
quality of its own. Tasks are drawn from the clips and answered by the nearest prototype, so that supports, queries and
the other classes of a task all matter, and how hard they are is heavy-tailed. The last lines are of another population,
to which nothing was tuned: how hard a class is follows a beta distribution, how far a clip lies Student's t with 3
degrees of freedom, and the nearest clip answers, by the cosine. `--check` ends with 1 unless each coverage lies within
93 to 97 %, give or take two standard errors of the simulation.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soap_net.files import write_text
from soap_net.intervals import Drawn, beyond

WAY, DIMENSIONS = 5, 8
BLUR = 0.3
"""Of a net; twice that where a better net is compared with a worse one."""
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """A test set and how hard it is."""

    classes: int
    clips: int
    shot: int
    accuracy: float
    seeds: int
    paired: bool = False
    other: bool = False
    """Whether the population is the other one."""

    @property
    def line(self) -> str:
        what = "gain" if self.paired else f"{100 * self.accuracy:.0f} %"
        return f"| {self.classes} x {self.clips}{', other' * self.other} | {self.shot} | {what} | {self.seeds} |"


SETTINGS = [
    *(Setting(*size, accuracy, 1) for size in ((5, 10, 1), (5, 10, 5)) for accuracy in (0.25, 0.6, 0.9)),
    *(Setting(*size, accuracy, 1) for size in ((10, 6, 1), (24, 100, 5)) for accuracy in (0.25, 0.6, 0.9)),
    *(Setting(*size, 0.6, 1) for size in ((6, 20, 5), (10, 6, 5), (100, 50, 1), (100, 50, 5))),
    *(Setting(*size, 0.6, 3) for size in ((5, 10, 1), (5, 10, 5), (10, 6, 1), (24, 100, 5))),
    *(Setting(*size, 0.6, 5) for size in ((5, 10, 5), (10, 6, 1))),
    *(Setting(*size, 0.6, seeds, paired=True) for size in ((5, 10, 5), (24, 100, 5)) for seeds in (1, 3)),
    *(Setting(*size, accuracy, 1, other=True) for size in ((5, 10, 1), (5, 10, 5)) for accuracy in (0.3, 0.6, 0.85)),
    *(Setting(*size, 0.6, 1, other=True) for size in ((6, 20, 5), (10, 20, 1))),
    *(Setting(24, 50, 5, accuracy, 1, other=True) for accuracy in (0.3, 0.6, 0.85)),
    *(Setting(*size, 0.6, 3, other=True) for size in ((5, 10, 1), (5, 10, 5))),
    *(Setting(*size, 0.6, 1, paired=True, other=True) for size in ((5, 10, 5), (24, 50, 5))),
]


@dataclass
class Nets:
    """How each of S nets sees a clip."""

    stretch: Array  # (S, D)
    blur: Array  # (S,)

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, harder: float) -> Nets:
        stretch = np.exp(0.3 * rng.standard_normal((count, DIMENSIONS)))
        return cls(stretch.astype("f4"), (harder * np.exp(0.2 * rng.standard_normal(count))).astype("f4"))


def worlds(rng: np.random.Generator, shape: tuple[int, ...], noise: float, other: bool) -> tuple[Array, Array]:
    """Means ``(*shape, D)`` and widths of classes."""
    if other:
        hard = rng.beta(2, 2, shape)
        widths = noise * hard / (1 - hard)
    else:
        widths = noise * np.exp(0.4 * rng.standard_normal(shape))
    return rng.standard_normal((*shape, DIMENSIONS), dtype="f4"), widths.astype("f4")


def spreads(rng: np.random.Generator, widths: Array, clips: int, other: bool) -> Array:
    """``(..., clips, 1)``: how far each clip may lie from the mean of its class of this width."""
    shape = (*widths.shape, clips, 1)
    own = np.sqrt(3 / rng.chisquare(3, shape)) if other else np.exp(0.4 * rng.standard_normal(shape))
    return widths[..., None, None] * own.astype("f4")


def distinct(rng: np.random.Generator, shape: tuple[int, ...], count: int, among: int) -> NDArray[np.int64]:
    """``(*shape, count)`` different numbers below `among`, drawn one after another."""
    found = np.empty((*shape, 0), dtype=np.int64)
    for known in range(count):
        new = rng.integers(among - known, size=shape)
        for taken in np.moveaxis(np.sort(found, axis=-1), -1, 0):
            new += new >= taken
        found = np.concatenate([found, new[..., None]], axis=-1)
    return found


def answered(support: Array, query: Array, nearest: bool) -> NDArray[np.bool_]:
    """``(T, WAY, Q)``: which of ``(T, WAY, Q, D)`` are told right by the prototypes, or by the `nearest` clip."""
    tasks, _, queries, _ = query.shape
    asked = query.reshape(tasks, WAY * queries, DIMENSIONS)
    if nearest:
        support = support / np.sqrt(np.square(support).sum(-1, keepdims=True))
        known = support.reshape(tasks, -1, DIMENSIONS)
        closeness = (asked @ known.transpose(0, 2, 1)).reshape(tasks, WAY * queries, WAY, -1).max(axis=3)
    else:
        prototypes = support.mean(axis=2)
        closeness = 2 * asked @ prototypes.transpose(0, 2, 1) - np.square(prototypes).sum(-1)[:, None]
    return closeness.argmax(axis=2).reshape(tasks, WAY, queries) == np.arange(WAY)[:, None]


def truth(
    rng: np.random.Generator,
    setting: Setting,
    harder: float,
    noise: float,
    nets: Nets | None = None,
    classes: tuple[Array, Array] | None = None,
    tasks: int = 1500,
) -> float:
    """Accuracy on clips drawn anew, four queries of each class, of classes too unless given, for nets too unless given.

    Each clip is seen once, so that the clip's own distance and the blur of the net are one draw.
    """
    means, widths = worlds(rng, (tasks, WAY), noise, setting.other) if classes is None else classes
    means, widths = np.broadcast_to(means, (tasks, WAY, DIMENSIONS)), np.broadcast_to(widths, (tasks, WAY))
    own = Nets.draw(rng, tasks, harder) if nets is None else nets
    blur, stretch = own.blur[:, None, None, None], own.stretch[:, None, None, :]
    away = np.sqrt(np.square(spreads(rng, widths, setting.shot + 4, setting.other)) + np.square(blur))
    clips = (means[:, :, None] + away * rng.standard_normal((*away.shape[:3], DIMENSIONS), dtype="f4")) * stretch
    return float(answered(clips[:, :, : setting.shot], clips[:, :, setting.shot :], setting.other).mean())


@functools.cache
def noise_for(setting: Setting) -> float:
    """How wide classes are for the setting's accuracy, by bisection."""
    low, high = 0.005, 30.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        easy = truth(np.random.default_rng(0), setting, BLUR, middle, tasks=8000) > setting.accuracy
        low, high = (middle, high) if easy else (low, middle)
    return math.sqrt(low * high)


@functools.cache
def truth_of_all(setting: Setting, harder: float) -> float:
    """Over classes, clips and nets, which is the same for all test sets."""
    noise, rng = noise_for(setting), np.random.default_rng(1)
    return float(np.mean([truth(rng, setting, harder, noise, tasks=5000) for _ in range(20)]))


def drawn_anew(rng: np.random.Generator, setting: Setting, tasks: int) -> tuple[NDArray[np.float64], Drawn, float]:
    """A test set's answers ``(seeds, tasks, way, 1)``, or their difference, its tasks, and the truth of their mean."""
    noise = noise_for(setting)
    means, widths = classes = worlds(rng, (setting.classes,), noise, setting.other)
    away = spreads(rng, widths, setting.clips, setting.other)
    clips = means[:, None] + away * rng.standard_normal((*away.shape[:2], DIMENSIONS), dtype="f4")
    chosen = distinct(rng, (tasks,), WAY, setting.classes)
    own = distinct(rng, (tasks, WAY), setting.shot + 1, setting.clips)
    support, query = own[:, :, :-1], own[:, :, -1:]
    arms, truths = [], []
    for harder in (BLUR, 2 * BLUR) if setting.paired else (BLUR,):
        nets, right = Nets.draw(rng, setting.seeds, harder), []
        for blur, stretch in zip(nets.blur, nets.stretch, strict=True):
            seen = (clips + blur * rng.standard_normal(clips.shape, dtype="f4")) * stretch
            parts = (seen[chosen[:, :, None], which] for which in (support, query))
            right.append(answered(*parts, setting.other))
        arms.append(np.stack(right).astype(float))
        if setting.seeds > 1 and setting.classes > WAY:
            truths.append(truth_of_all(setting, harder))
        else:
            known = nets if setting.seeds == 1 else None
            truths.append(truth(rng, setting, harder, noise, known, classes if setting.classes == WAY else None))
    drawn = Drawn(chosen, support, query, (setting.clips,) * setting.classes)
    if setting.paired:
        return arms[0] - arms[1], drawn, truths[0] - truths[1]
    return arms[0], drawn, truths[0]


def repeat(rng: np.random.Generator, setting: Setting, tasks: int) -> tuple[float, float, float, float]:
    """Of one test set: whether the truth lies below, and above, the interval, its half width; whether the field's errs.

    The first three are nan where there is no interval. In points.
    """
    right, drawn, true = drawn_anew(rng, setting, tasks)
    found = beyond(right, drawn, difference=setting.paired)
    by_task = right.mean(axis=(0, 2, 3))
    field = float(abs(by_task.mean() - true) > 1.96 * by_task.std() / math.sqrt(tasks))
    if found.low is None or found.high is None:
        return math.nan, math.nan, math.nan, field
    return float(100 * true < found.low), float(100 * true > found.high), (found.high - found.low) / 2, field


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings")
    parser.add_argument("--out", type=Path, help="the table, as Markdown (by default it is printed)")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    heads = ["classes x clips", "shots", "accuracy", "seeds", "coverage, %", "truth below / above, %"]
    heads += ["half width, points", "none given, %", "field's, %"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    wrong = False
    for number, setting in enumerate(SETTINGS):
        if options.only and number not in options.only:
            continue
        rngs = (np.random.default_rng((number, again)) for again in range(options.repeats))
        found = np.array([repeat(rng, setting, options.tasks) for rng in rngs])
        below, above, width = np.nanmean(found[:, :3], axis=0) * (100, 100, 1)
        none, field = 100 * np.isnan(found[:, 0]).mean(), 100 - 100 * found[:, 3].mean()
        covered, error = 100 - below - above, 100 * math.sqrt(0.95 * 0.05 / options.repeats)
        wrong |= not 93 - 2 * error <= covered <= 97 + 2 * error
        cells = f"{covered:.1f} | {below:.1f} / {above:.1f} | {width:.1f} | {none:.1f} | {field:.1f} |"
        lines.append(f"{setting.line} {cells}")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    if options.out:
        write_text(options.out, text)
    else:
        print(text)
    return int(options.check and wrong)


if __name__ == "__main__":
    sys.exit(main())
