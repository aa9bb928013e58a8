"""How often the intervals of `soap_net.intervals` hold the truth, where the truth is known.

    python -m benchmarks.intervals [--repeats 1000] [--tasks 2000] [--out table.md] [--check]

Classes, clips of classes and trained nets are drawn from a population of each: a clip is a point around its class's
mean, how far depends on the class and on the clip; a net sees it through a distortion, a blur of its own and with a
quality of its own. Tasks are drawn from the clips and answered by the nearest prototype, so that supports, queries and
the other classes of a task all matter, and how hard they are is heavy-tailed. `--check` ends with 1 unless each
coverage lies within 93 to 97 %, give or take two standard errors of the simulation.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soap_net.files import write_text
from soap_net.intervals import Drawn, beyond

WAY, DIMENSIONS = 5, 8
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

    @property
    def line(self) -> str:
        what = "gain" if self.paired else f"{100 * self.accuracy:.0f} %"
        return f"| {self.classes} x {self.clips} | {self.shot} | {what} | {self.seeds} |"


SETTINGS = [
    *(Setting(*size, accuracy, 1) for size in ((5, 10, 1), (5, 10, 5)) for accuracy in (0.25, 0.6, 0.9)),
    *(Setting(*size, accuracy, 1) for size in ((10, 6, 1), (24, 100, 5)) for accuracy in (0.25, 0.6, 0.9)),
    *(Setting(*size, 0.6, 1) for size in ((6, 20, 5), (10, 6, 5), (100, 50, 1), (100, 50, 5))),
    *(Setting(*size, 0.6, seeds) for size in ((5, 10, 5), (10, 6, 1), (24, 100, 5)) for seeds in (3, 5)),
    *(Setting(*size, 0.6, seeds, paired=True) for size in ((5, 10, 5), (24, 100, 5)) for seeds in (1, 3)),
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


def points(rng: np.random.Generator, means: Array, widths: Array, clips: int) -> Array:
    """``(..., clips, D)`` clips of classes with these means and widths."""
    own = np.exp(0.4 * rng.standard_normal((*widths.shape, clips, 1), dtype="f4"))
    noise = rng.standard_normal((*widths.shape, clips, DIMENSIONS), dtype="f4")
    return means[..., None, :] + widths[..., None, None] * own * noise


def worlds(rng: np.random.Generator, shape: tuple[int, ...], noise: float) -> tuple[Array, Array]:
    """Means ``(*shape, D)`` and widths of classes."""
    widths = noise * np.exp(0.4 * rng.standard_normal(shape, dtype="f4"))
    return rng.standard_normal((*shape, DIMENSIONS), dtype="f4"), widths.astype("f4")


def seen(rng: np.random.Generator, nets: Nets, which: NDArray[np.int64] | int, clips: Array) -> Array:
    """The clips as nets see them, each with a blur of its own."""
    shape = (-1,) + (1,) * (clips.ndim - 1) if isinstance(which, np.ndarray) else ()
    blur = nets.blur[which].reshape(shape) if shape else nets.blur[which]
    stretch = nets.stretch[which].reshape(*shape[:-1], DIMENSIONS) if shape else nets.stretch[which]
    return (clips + blur * rng.standard_normal(clips.shape, dtype="f4")) * stretch


def answered(tasks: Array, shot: int) -> NDArray[np.bool_]:
    """``(T, WAY, 1)``: which queries of tasks ``(T, WAY, shot + 1, D)`` are nearest to their class's prototype."""
    prototypes, queries = tasks[:, :, :shot].mean(axis=2), tasks[:, :, shot]
    distances = np.square(prototypes).sum(-1)[:, None] - 2 * queries @ prototypes.transpose(0, 2, 1)
    return (distances.argmin(axis=2) == np.arange(WAY))[:, :, None]


def truth(
    rng: np.random.Generator,
    shot: int,
    harder: float,
    noise: float,
    count: int,
    nets: Nets | None = None,
    classes: tuple[Array, Array] | None = None,
) -> float:
    """Accuracy on `count` tasks of clips drawn anew, of classes too unless given, for nets drawn anew unless given."""
    total, every = 0, 4000
    for _ in range(0, count, every):
        if classes is None:
            means, widths = worlds(rng, (every, WAY), noise)
        else:
            means, widths = (np.broadcast_to(part, (every, *part.shape)) for part in classes)
        clips = points(rng, means, widths, shot + 1)
        own = Nets.draw(rng, every, harder) if nets is None else nets
        total += int(answered(seen(rng, own, np.arange(every) if nets is None else 0, clips), shot).sum())
    return total / (math.ceil(count / every) * every * WAY)


def noise_for(setting: Setting) -> float:
    """How wide classes are for the setting's accuracy, by bisection."""
    low, high = 0.02, 30.0
    for _ in range(11):
        middle = math.sqrt(low * high)
        rng = np.random.default_rng(0)
        easy = truth(rng, setting.shot, 0.3, middle, 12_000) > setting.accuracy
        low, high = (middle, high) if easy else (low, middle)
    return math.sqrt(low * high)


def repeat(rng: np.random.Generator, setting: Setting, noise: float, tasks: int) -> tuple[float, float, float]:
    """Whether the interval of one test set holds the truth, its half width, and whether the field's does: 0 or 1.

    The first two are nan where there is no interval.
    """
    classes = worlds(rng, (setting.classes,), noise)
    clips = points(rng, *classes, setting.clips)
    chosen = rng.random((tasks, setting.classes), dtype="f4").argsort(axis=1)[:, :WAY]
    own = rng.random((tasks, WAY, setting.clips), dtype="f4").argsort(axis=2)[:, :, : setting.shot + 1]
    fixed = classes if setting.classes == WAY else None
    arms, truths = [], []
    for harder in (0.3, 0.6) if setting.paired else (0.3,):
        nets = Nets.draw(rng, setting.seeds, harder)
        arms.append(np.stack([
            answered(seen(rng, nets, net, clips)[chosen[:, :, None], own], setting.shot) for net in range(setting.seeds)
        ]).astype(float))  # fmt: skip
        known = nets if setting.seeds == 1 else None
        truths.append(truth(rng, setting.shot, harder, noise, 8_000, known, fixed))
    true = 100 * (truths[0] - truths[1] if setting.paired else truths[0])
    scores = arms[0] - arms[1] if setting.paired else arms[0]
    drawn = Drawn(chosen, own[:, :, :-1], own[:, :, -1:], (setting.clips,) * setting.classes)
    found = beyond(scores, drawn, difference=setting.paired)
    by_task = 100 * scores.mean(axis=(0, 2, 3))
    field = 1.96 * by_task.std() / math.sqrt(tasks)
    if found.low is None or found.high is None:
        return math.nan, math.nan, abs(by_task.mean() - true) <= field
    return float(found.low <= true <= found.high), (found.high - found.low) / 2, abs(by_task.mean() - true) <= field


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings")
    parser.add_argument("--out", type=Path, help="the table, as Markdown (by default it is printed)")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    heads = [
        "classes x clips",
        "shots",
        "accuracy",
        "seeds",
        "coverage, %",
        "half width",
        "none given, %",
        "field's, %",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    wrong = False
    for number, setting in enumerate(SETTINGS):
        if options.only and number not in options.only:
            continue
        noise = noise_for(setting)
        rngs = (np.random.default_rng((number, again)) for again in range(options.repeats))
        found = np.array([repeat(rng, setting, noise, options.tasks) for rng in rngs])
        covered, width = np.nanmean(found[:, :2], axis=0) * (100, 1)
        none, field = 100 * np.isnan(found[:, 0]).mean(), 100 * found[:, 2].mean()
        error = 100 * math.sqrt(0.95 * 0.05 / options.repeats)
        wrong |= not 93 - 2 * error <= covered <= 97 + 2 * error
        lines.append(f"{setting.line} {covered:.1f} | {width:.1f} | {none:.1f} | {field:.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    if options.out:
        write_text(options.out, text)
    else:
        print(text)
    return int(options.check and wrong)


if __name__ == "__main__":
    sys.exit(main())
