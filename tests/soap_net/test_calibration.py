"""What the supports say of answers to come, against brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from soap_net.calibration import Expected, calibrate, least_clips, sharpness, threshold, wilson
from soap_net.models.heads import Compared, group_by_class


def test_the_sharpness_makes_overconfident_logits_as_likely_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    assert sharpness(8 * true, labels) == pytest.approx(1 / 8, rel=0.1)
    assert sharpness(true / 3, labels) == pytest.approx(3, rel=0.1)


def test_few_clips_leave_the_sharpness_near_one() -> None:
    assert sharpness(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 1.0
    right = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert 1 < sharpness(right, torch.tensor([0, 1])) < 3  # infinite without the prior


@pytest.mark.parametrize("count", [9, 15, 25, 50])
def test_nine_in_ten_clips_of_the_same_kind_exceed_the_threshold(count: int) -> None:
    rng = np.random.default_rng(count)
    share = np.mean([rng.exponential() >= threshold(rng.exponential(size=count).tolist(), 0.9) for _ in range(20_000)])
    assert 0.9 - 0.007 <= share <= 0.9 + 1 / (count + 1) + 0.007  # the rank's own granularity


@pytest.mark.parametrize("accept", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_least_number_of_clips_is_the_first_with_a_threshold(accept: float) -> None:
    count = least_clips(accept)
    assert math.isfinite(threshold([1.0] * count, accept))
    assert math.isinf(threshold([1.0] * (count - 1), accept))


def test_too_few_clips_or_accepting_all_set_no_threshold() -> None:
    assert threshold([1.0] * 8, 0.9) == -math.inf
    assert threshold([1.0] * 9, 0.9) == 1.0
    assert threshold([1.0] * 1000, 1.0) == -math.inf


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 25, 0.4074, 0.7660), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_has_its_published_values(right: int, total: int, low: float, high: float) -> None:
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(right, total) == pytest.approx((low, high), abs=2e-4)


def test_only_classes_of_several_clips_count() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [9, 9, 9], [0, 0, 2], [0, 0, 2]])
    familiar = torch.arange(5.0)
    found = calibrate(Compared(logits, familiar), group_by_class(labels, 3))
    assert found.confusion == [[1, 1, 0], [0, 0, 0], [0, 0, 2]]
    assert found.expected is not None
    assert (found.expected.accuracy, found.expected.clips) == (75.0, 4)
    assert found.expected.chance == pytest.approx(100 / 3)
    assert found.threshold == -math.inf


def test_one_clip_a_class_lets_one_expect_nothing() -> None:
    found = calibrate(Compared(torch.eye(3), torch.zeros(3)), group_by_class(torch.arange(3), 3))
    assert (found.expected, found.sharpness, found.threshold) == (None, 1.0, -math.inf)


def test_expectations_are_words_with_their_interval() -> None:
    text = str(Expected(80.0, 60.9, 91.1, 25, 20.0))
    assert text == "about 80 % of new clips told right (61 to 91 %, from 25 clips each left out; chance is 20 %)"
    assert Expected(80.0, 60.9, 91.1, 25, 20.0).above_chance
    assert not Expected(40.0, 19.0, 60.0, 25, 20.0).above_chance
