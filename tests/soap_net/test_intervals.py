from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.intervals import Setting, noise_for, repeat
from soap_net.intervals import Drawn, Interval, beyond, student_t


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


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting(5, 10, 1, 0.6, 1), Setting(24, 20, 1, 0.6, 3)], ids=lambda s: s.line)
def test_the_truth_lies_within_as_often_as_is_said(setting: Setting) -> None:
    noise = noise_for(setting)
    found = [repeat(np.random.default_rng((7, again)), setting, noise, 500)[0] for again in range(150)]
    assert np.nanmean(found) >= 0.89, "95 % less 3.4 standard errors of 150 draws"


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
