"""What an experiment's runs found: accuracies with intervals, paired differences, and the lines that show them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soap_net.files import write_text
from soap_net.intervals import Drawn, Interval, beyond, student_t

Result = dict[str, Any]
"""What a run's result.json holds."""


@dataclass(frozen=True)
class Row:
    """One line of the table and one point of the plot."""

    labels: tuple[str, ...]
    """The line's first columns."""
    cell: str
    test: str = "test"
    against: tuple[str, str] | None = None
    """Cell and test whose accuracy is taken from this line's, task by task."""
    paper: float | None = None
    """The paper's accuracy in percent, where it is known."""
    series: str = ""
    """The curve of the plot that this point belongs to."""
    x: float | str = ""
    """Its place on the plot's horizontal axis; numbers make a curve, words stand side by side."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What the cell's training sets over the experiment's config, by dotted key."""


@dataclass(frozen=True)
class Estimate:
    """A mean in percent with the half width of its 95 % interval in points, None of a single task."""

    mean: float
    half: float | None
    seeds: int
    tasks: int
    beyond: Interval | None = None
    """The interval over new clips (and classes and seeds); None where a run's result doesn't tell its tasks."""

    def __str__(self) -> str:
        return self.shown("")

    def shown(self, sign: str) -> str:
        """As in the table; `sign` "+" writes that of a difference."""
        text = f"{self.mean:{sign}.1f} " + ("(one task)" if self.half is None else f"± {self.half:.1f}")
        if self.beyond is None or self.beyond.low is None:
            return text
        return f"{text} ({self.beyond.shown(sign)})"


def estimate(percents: NDArray[np.float64]) -> Estimate:
    """Mean and 95 % interval of accuracies, or of differences of accuracies, ``(seeds, tasks)`` in percent.

    Seeds and tasks are two crossed samples: the same tasks test the nets of all seeds. The variance of the mean is at
    most the variance of the seeds' means over their number plus that of the tasks' means over theirs; Student's t with
    Welch and Satterthwaite's degrees of freedom accounts for the few seeds. With a single seed the interval can speak
    of the tasks alone; with a single task there is none.
    """
    seeds, tasks = percents.shape
    if tasks < 2:
        return Estimate(float(percents.mean()), None, seeds, tasks)
    by_task = float(percents.mean(axis=0).var(ddof=1)) / tasks
    by_seed = float(percents.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = by_task + by_seed
    freedom = math.inf
    if seeds > 1 and by_seed > 0:
        freedom = total**2 / (by_seed**2 / (seeds - 1) + by_task**2 / (tasks - 1))
    return Estimate(float(percents.mean()), student_t(freedom) * math.sqrt(total), seeds, tasks)


class Results:
    """The finished runs, by cell and seed."""

    def __init__(self, finished: dict[tuple[str, int], Result]) -> None:
        self.finished = finished

    def seeds(self, cell: str) -> list[int]:
        """Seeds of the finished runs of a cell."""
        return sorted(seed for name, seed in self.finished if name == cell)

    def accuracies(self, cell: str, test: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """``(seeds, tasks)`` in percent."""
        tests = [self.finished[cell, seed]["tests"][test] for seed in seeds]
        return np.array([100.0 * np.array(one["correct"]) / one["answers"] for one in tests])

    def accuracy(self, cell: str, test: str = "test") -> Estimate | None:
        """Over the seeds there are; None where there is none."""
        seeds = self.seeds(cell)
        if not seeds:
            return None
        found = estimate(self.accuracies(cell, test, seeds))
        drawn, right = self._drawn([(cell, test)], seeds), self._right(cell, test, seeds)
        return found if drawn is None else replace(found, beyond=beyond(right, drawn))

    def difference(self, one: tuple[str, str], other: tuple[str, str]) -> Estimate | None:
        """Accuracy of `one` (cell, test) less that of `other`, paired: the same seeds and, in each, the same tasks."""
        seeds = [seed for seed in self.seeds(one[0]) if seed in self.seeds(other[0])]
        if not seeds:
            return None
        found = estimate(self.accuracies(*one, seeds) - self.accuracies(*other, seeds))
        if (drawn := self._drawn([one, other], seeds)) is None:
            return found
        right = self._right(*one, seeds) - self._right(*other, seeds)
        return replace(found, beyond=beyond(right, drawn, difference=True))

    def _drawn(self, tests: Sequence[tuple[str, str]], seeds: Sequence[int]) -> Drawn | None:
        """The tasks that these tests share; None where a result, of an older version, doesn't tell, or they differ."""
        told = [self.finished[cell, seed]["tests"][test].get("drawn") for cell, test in tests for seed in seeds]
        return Drawn.of(told[0]) if told[0] is not None and all(one == told[0] for one in told) else None

    def _right(self, cell: str, test: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """``(seeds, tasks, way, queries)``."""
        return np.array([self.finished[cell, seed]["tests"][test].get("right", 0) for seed in seeds], dtype=np.float64)

    def write(self, path: Path) -> None:
        """Writes a CSV file with one line for each test of each run."""
        heads = ["cell", "seed", "test", "accuracy", "ci95_of_tasks", "tasks", "train_seconds", "test_seconds"]
        lines = [
            [cell, seed, test, f"{one['accuracy']:.3f}", _text(one["ci95"]), one["tasks"]]
            + [f"{result[key]:.1f}" for key in ("train_seconds", "test_seconds")]
            + [result[key] for key in ("parameters", "soap_parameters")]
            for (cell, seed), result in self.finished.items()
            for test, one in result["tests"].items()
        ]
        write_csv(path, [*heads, "parameters", "soap_parameters"], lines)


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def write_csv(path: Path, heads: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    write_text(path, text.getvalue())
