from __future__ import annotations

import math

import numpy as np
import pytest

from soap_net.experiments.results import Estimate, Result, Results, estimate, student_t


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


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042), (1e9, 1.96)])
def test_student_t_agrees_with_the_tables(freedom: float, expected: float) -> None:
    assert student_t(freedom) == pytest.approx(expected, abs=2e-3)


def test_difference_pairs_the_seeds_both_have() -> None:
    def one(correct: list[int]) -> Result:
        return {"tests": {"test": {"correct": correct, "answers": 5}}}

    results = Results({("a", 0): one([5, 4]), ("b", 0): one([4, 3]), ("a", 1): one([0, 0])})
    assert results.difference(("a", "test"), ("b", "test")) == Estimate(20.0, 0.0, 1, 2)
    assert results.difference(("a", "test"), ("c", "test")) is None
