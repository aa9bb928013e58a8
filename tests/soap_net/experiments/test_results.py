from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from soap_net.experiments.drawing import plot_accuracies
from soap_net.experiments.results import Estimate, Result, Results, Row, estimate
from soap_net.intervals import Drawn, Interval


def test_estimate_of_one_seed_is_the_usual_interval_over_tasks() -> None:
    values = np.random.default_rng(0).normal(50, 10, (1, 400))
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx(1.96 * values.std(ddof=1) / 20)


def test_estimate_counts_the_spread_of_seeds_with_students_t() -> None:
    found = estimate(np.array([[40.0] * 100, [50.0] * 100, [60.0] * 100]))
    assert found == Estimate(50.0, pytest.approx(4.303 * 10 / math.sqrt(3), rel=1e-3), 3, 100)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = 60 + rng.normal(0, 3, (4, 1)) + rng.normal(0, 20, (1, 200)) + rng.normal(0, 15, (4, 200))
        found = estimate(values)
        hits += abs(found.mean - 60) <= found.half
    assert 0.92 <= hits / 200 <= 0.995


def test_difference_pairs_the_seeds_both_have() -> None:
    def one(correct: list[int]) -> Result:
        return {"tests": {"test": {"correct": correct, "answers": 5}}}

    results = Results({("a", 0): one([5, 4]), ("b", 0): one([4, 3]), ("a", 1): one([0, 0])})
    assert results.difference(("a", "test"), ("b", "test")) == Estimate(20.0, 0.0, 1, 2)
    assert results.difference(("a", "test"), ("c", "test")) is None


def test_intervals_over_clips_stand_beside_those_over_tasks_where_results_tell_their_tasks() -> None:
    rng = np.random.default_rng(0)
    classes = np.array([rng.permutation(8)[:3] for _ in range(200)])
    clips = np.zeros((200, 3, 1), dtype=np.int64)
    drawn = Drawn(classes, clips, clips, (6,) * 8)

    def run(level: float, told: bool = True) -> Result:
        hard = np.linspace(-0.2, 0.2, 8)[classes]
        right = (rng.random((200, 3)) < level + hard)[:, :, None].astype(int)
        more = {"drawn": json.loads(json.dumps(drawn.to_dict())), "right": right.tolist()} if told else {}
        return {"tests": {"test": {"correct": right.sum(axis=(1, 2)).tolist(), "answers": 3, **more}}}

    results = Results({("a", 0): run(0.7), ("b", 0): run(0.5), ("old", 0): run(0.5, told=False)})
    one, gain = results.accuracy("a"), results.difference(("a", "test"), ("b", "test"))
    assert one is not None
    assert one.half is not None
    assert gain is not None
    assert one.beyond is not None
    assert one.beyond.over == "new classes and clips"
    assert half(one.beyond) > 2 * one.half, "the classes differ, which tasks alone don't show"
    assert str(one).endswith(f" ({one.beyond.low:.1f} to {one.beyond.high:.1f})")
    assert half(gain.beyond) < half(one.beyond), "paired: both have the same classes"
    old, unpaired = results.accuracy("old"), results.difference(("a", "test"), ("old", "test"))
    assert [found.beyond for found in (old, unpaired) if found] == [None, None]


def half(found: Interval | None) -> float:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return (found.high - found.low) / 2


def test_a_single_task_has_no_interval(tmp_path: Path) -> None:
    one = {"correct": [3], "answers": 5, "accuracy": 60.0, "ci95": None, "tasks": 1}
    times = {"train_seconds": 1.0, "test_seconds": 1.0, "parameters": 10, "soap_parameters": 2}
    results = Results({(cell, seed): {"tests": {"test": one}, **times} for cell in "ab" for seed in (0, 1)})
    found = results.accuracy("a")
    assert found == Estimate(60.0, None, 2, 1)
    assert str(found) == "60.0 (one task)"
    assert results.difference(("a", "test"), ("b", "test")).shown("+") == "+0.0 (one task)"
    results.write(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().splitlines()[1].startswith("a,0,test,60.000,,1,")
    plot_accuracies(tmp_path / "plot.svg", [Row(("a",), "a", x="a")], results, "title", "axis", 20.0)
    assert (tmp_path / "plot.svg").stat().st_size > 1000
