from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.intervals import Setting, repeat
from soap_net.intervals import Drawn, Interval, beyond, excess_kurtosis, inverse_chi_square, student_t, widest


def tasks(rng: np.random.Generator, count: int, classes: int, clips: int, shot: int, way: int = 5) -> Drawn:
    chosen = rng.random((count, classes)).argsort(axis=1)[:, :way]
    own = rng.random((count, way, clips)).argsort(axis=2)[:, :, : shot + 1]
    return Drawn(chosen, own[:, :, :shot], own[:, :, shot:], (clips,) * classes)


def half(found: Interval) -> float:
    assert found.low is not None
    assert found.high is not None
    return (found.high - found.low) / 2


def test_classes_that_add_up_give_the_spread_of_their_means() -> None:
    rng = np.random.default_rng(0)
    drawn, level = tasks(rng, 20_000, 12, 4, 1), np.linspace(0.2, 0.9, 12)
    found = beyond(level[drawn.classes][None, :, :, None] - 0.5, drawn, difference=True)
    expected = student_t(11) * level.std(ddof=1) / np.sqrt(12)
    assert found.over == "new classes and clips"
    assert half(found) == pytest.approx(100 * expected, rel=0.02)


def test_clips_that_add_up_give_the_spread_within_classes() -> None:
    rng = np.random.default_rng(0)
    drawn, level = tasks(rng, 20_000, 5, 12, 1), rng.normal(0, 0.2, (5, 12))
    found = beyond(level[drawn.classes[:, :, None], drawn.query][None], drawn, difference=True)
    expected = student_t(55) * np.sqrt(level.var(axis=1, ddof=1).sum() / 12) / 5
    assert found.over == "new clips of these 5 classes"
    assert half(found) == pytest.approx(100 * expected, rel=0.06)


def test_seeds_that_differ_alone_give_students_interval() -> None:
    rng = np.random.default_rng(0)
    drawn = tasks(rng, 20_000, 12, 4, 1)
    nets = np.array([0.4, 0.5, 0.6])[:, None, None, None] + 1e-3 * rng.random((3, 20_000, 5, 1))
    found = beyond(nets, drawn, difference=True)
    assert found.over.endswith("and training seeds")
    assert half(found) == pytest.approx(100 * 4.303 * 0.1 / np.sqrt(3), rel=0.01)


def test_more_tasks_do_not_narrow_it_to_nothing() -> None:
    rng, widths = np.random.default_rng(0), []
    for count in (2_000, 20_000):
        drawn = tasks(rng, count, 12, 4, 1)
        right = rng.random((1, count, 5, 1)) < np.linspace(0.2, 0.9, 12)[drawn.classes][None, :, :, None]
        found = beyond(right.astype(float), drawn)
        widths.append(half(found))
    assert widths[0] == pytest.approx(widths[1], rel=0.2)
    assert widths[1] > 10


def covered(found: list[Interval], truth: float) -> float:
    return float(np.mean([one.low is not None and one.low <= 100 * truth <= (one.high or 0) for one in found]))


def test_effects_of_classes_pairs_and_seeds_whose_mean_is_known_are_covered_as_often_as_is_said() -> None:
    """Gains, of which a normal part belongs to the class, one to a class and a rival, one to the seed; zero in all."""
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        drawn = tasks(rng, 200, 9, 4, 1)
        level, pair, seed = rng.normal(0, 0.1, 9), rng.normal(0, 0.1, (9, 9)), rng.normal(0, 0.05, (3, 1, 1, 1))
        rivals = pair[drawn.classes[:, :, None], drawn.classes[:, None]].sum(axis=2)
        noise = rng.normal(0, 0.3, (3, 200, 5, 1))
        found.append(beyond((level[drawn.classes] + rivals)[None, :, :, None] + seed + noise, drawn, difference=True))
    assert covered(found, 0) >= 0.89, "95 % less 3.4 standard errors of 150 draws"
    deviation = 100 * np.sqrt(2 * 0.1**2 / 9 + 4**2 * 0.1**2 / 72 + 0.05**2 / 3)
    assert 2 < np.median([half(one) for one in found]) / deviation < 3


def test_supports_and_queries_whose_mean_is_known_are_covered_as_often_as_is_said() -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        drawn = tasks(rng, 200, 5, 10, 5)
        asked, shown = rng.normal(0, 0.2, (5, 10)), rng.normal(0, 0.2, (5, 10))
        helped = shown[drawn.classes[:, :, None], drawn.support].mean(axis=2, keepdims=True)
        right = asked[drawn.classes[:, :, None], drawn.query] + helped + rng.normal(0, 0.3, (200, 5, 1))
        found.append(beyond(right[None], drawn, difference=True))
    assert covered(found, 0) == pytest.approx(0.95, abs=0.043), "3.4 standard errors of 300 draws"


def test_where_only_tasks_differ_it_is_no_wider_than_theirs_by_more_than_is_unknown() -> None:
    rng, found, over_tasks = np.random.default_rng(2), [], 100 * 1.96 * np.sqrt(0.25 * 0.75 / 5 / 500)
    for _ in range(200):
        right = rng.random((1, 500, 5, 1)) < 0.25
        found.append(beyond(right.astype(float), tasks(rng, 500, 24, 20, 5)))
    assert covered(found, 0.25) >= 0.9
    assert 1 <= np.median([half(one) for one in found]) / over_tasks < 2
    assert max(half(one) for one in found) / over_tasks < 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [Setting(5, 10, 1, 0.6, 1), Setting(5, 10, 5, 0.25, 1), Setting(24, 20, 1, 0.6, 3)],
    ids=lambda s: s.line,
)
def test_the_truth_lies_within_as_often_as_is_said(setting: Setting) -> None:
    found = np.array([repeat(np.random.default_rng((7, again)), setting, 500) for again in range(200)])
    outside = np.nanmean(found[:, :2], axis=0).sum()
    assert outside == pytest.approx(0.05, abs=0.052), "3.4 standard errors of 200 draws"


def test_what_cannot_be_had_is_not_given_and_said() -> None:
    rng = np.random.default_rng(0)

    def why(drawn: Drawn, right: float | None = None) -> str:
        answers = (
            rng.random((1, *drawn.query.shape)) < 0.5 if right is None else np.full((1, *drawn.query.shape), right)
        )
        found = beyond(answers.astype(float), drawn)
        assert (found.low, found.high, str(found)) == (None, None, "-")
        return found.over

    assert why(tasks(rng, 50, 5, 6, 5)).endswith("a class has but the 6 clips that each of them takes")
    assert why(tasks(rng, 5, 9, 10, 1)) == "5 tasks are too few"
    assert why(tasks(rng, 50, 9, 10, 1), right=1.0) == "all answers are right, or all wrong"


def test_sets_whose_classes_never_meet_are_not_taken_for_classes_that_differ() -> None:
    rng = np.random.default_rng(0)
    drawn = tasks(rng, 100, 5, 10, 1)
    two = Drawn(drawn.classes + 5 * rng.integers(0, 2, (100, 1)), drawn.support, drawn.query, (10,) * 10)
    assert two.over == "new clips of these 10 classes"
    found = beyond((rng.random((1, 100, 5, 1)) < 0.5).astype(float), two)
    assert found.low is not None


@pytest.mark.parametrize(("classes", "clips"), [(5, 10), (9, 10)])
def test_what_a_result_keeps_gives_the_same_interval(classes: int, clips: int) -> None:
    rng = np.random.default_rng(0)
    drawn = tasks(rng, 100, classes, clips, 1)
    right = (rng.random((2, 100, 5, 1)) < 0.5).astype(float)
    assert beyond(right, Drawn.of(json.loads(json.dumps(drawn.to_dict())))) == beyond(right, drawn)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042), (1e9, 1.96)])
def test_student_t_agrees_with_the_tables(freedom: float, expected: float) -> None:
    assert student_t(freedom) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3.5, 9, 45, 400])
def test_one_sample_without_noise_gives_students_t(freedom: float) -> None:
    assert widest(*inverse_chi_square(freedom)) == pytest.approx(student_t(freedom), rel=1e-3)


def test_a_mixture_of_two_samples_is_as_wide_as_draws_of_it() -> None:
    rng = np.random.default_rng(0)
    many, few = inverse_chi_square(9), inverse_chi_square(2)
    found = widest((many[0] + 2 * few[0][:, None]).ravel(), (many[1] * few[1][:, None]).ravel())
    draws = np.sqrt(9 / rng.chisquare(9, 400_000) + 2 * 2 / rng.chisquare(2, 400_000)) * rng.normal(size=400_000)
    assert found == pytest.approx(np.quantile(np.abs(draws), 0.95), rel=0.01)


def test_the_excess_is_the_ratio_of_cumulants_whose_estimates_are_unbiased() -> None:
    """Fisher's k-statistics, from sums of powers."""
    values = np.random.default_rng(0).exponential(size=10)
    n, (s1, s2, s3, s4) = 10, (float((values**power).sum()) for power in (1, 2, 3, 4))
    k2 = (n * s2 - s1**2) / (n * (n - 1))
    k4 = -6 * s1**4 + 12 * n * s1**2 * s2 - 3 * n * (n - 1) * s2**2 - 4 * n * (n + 1) * s1 * s3 + n**2 * (n + 1) * s4
    k4 /= n * (n - 1) * (n - 2) * (n - 3)
    assert excess_kurtosis(values) == pytest.approx(k4 / k2**2)
    assert [excess_kurtosis(np.array(few)) for few in ([0.0, 1.0, 5.0], [2.0] * 9)] == [0, 0]
