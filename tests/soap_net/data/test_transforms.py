from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from soap_net.data.clips import Clip
from soap_net.data.transforms import ClipLoader, FrameSampling
from soap_net.errors import UserError

Make = Callable[..., Path]
lengths, counts, intervals = st.integers(1, 400), st.integers(1, 32), st.integers(1, 40)


@given(lengths, counts, st.none() | intervals, st.none() | st.integers(0, 9))
def test_frame_numbers_ascend_and_lie_in_the_clip(n: int, frames: int, interval: int | None, seed: int | None) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    indices = FrameSampling(frames, interval).indices(n, rng)
    assert len(indices) == frames
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < n
    assert all(type(i) is int for i in indices)


@given(lengths, counts)
def test_evaluation_takes_each_segments_centre(n: int, frames: int) -> None:
    assert FrameSampling(frames).indices(n, None) == [(2 * i + 1) * n // (2 * frames) for i in range(frames)]


@given(lengths, counts, st.integers(0, 9))
def test_training_takes_another_frame_of_each_segment(n: int, frames: int, seed: int) -> None:
    indices = FrameSampling(frames).indices(n, np.random.default_rng(seed))
    for i, index in enumerate(indices):
        # The frame overlaps the segment [i n / T, (i + 1) n / T).
        assert index * frames < (i + 1) * n
        assert (index + 1) * frames > i * n
    assert len(set(indices)) == min(n, frames)


def test_training_reaches_every_frame_equally() -> None:
    rng, sampling = np.random.default_rng(0), FrameSampling(4)
    seen = Counter(i for _ in range(2000) for i in sampling.indices(20, rng))
    assert sorted(seen) == list(range(20))
    assert min(seen.values()) > 300
    assert max(seen.values()) < 500


@given(lengths, counts, st.none() | intervals)
def test_frames_are_repeated_evenly_and_only_where_there_are_too_few(n: int, frames: int, interval: int | None) -> None:
    distinct = min(frames, n if interval is None else 1 + (n - 1) // interval)
    for rng in (None, np.random.default_rng(0)):
        times = Counter(FrameSampling(frames, interval).indices(n, rng)).values()
        assert len(times) == distinct
        assert max(times) - min(times) <= 1


@given(lengths, counts, intervals)
def test_a_window_of_fixed_interval_is_cut_to_the_clip_and_centred(n: int, frames: int, interval: int) -> None:
    indices = FrameSampling(frames, interval).indices(n, None)
    distinct = sorted(set(indices))
    assert {b - a for a, b in pairwise(distinct)} <= {interval}
    fits = max(m for m in range(1, frames + 1) if (m - 1) * interval < n)
    assert len(distinct) == fits
    assert 0 <= (n - 1 - distinct[-1]) - distinct[0] <= 1


def test_a_window_of_fixed_interval_lands_everywhere_in_training() -> None:
    rng, sampling = np.random.default_rng(0), FrameSampling(4, 3)
    starts = Counter(sampling.indices(16, rng)[0] for _ in range(700))
    assert sorted(starts) == list(range(7))
    assert min(starts.values()) > 60


@pytest.mark.parametrize("bad", [{"frames": 0}, {"interval": 0}])
def test_impossible_samplings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be at least 1"):
        FrameSampling(**bad)
    with pytest.raises(UserError, match="at least one frame"):
        FrameSampling().indices(0, None)


def test_a_crop_larger_than_the_frame_is_refused() -> None:
    with pytest.raises(UserError, match="resize 200 is smaller than crop 224"):
        ClipLoader(resize=200)
    with pytest.raises(UserError, match="crop must be at least 1"):
        ClipLoader(resize=4, crop=0)


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(
        torch.rand(frames, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255,
        size=(height, width),
        mode="bilinear",
    ).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (20, 33), (32, 32), (33, 500), (1, 1)])
def test_evaluation_resizes_the_short_side_and_crops_the_centre(height: int, width: int) -> None:
    frames = smooth(2, height, width)
    got = ClipLoader(resize=32, crop=28).transform(frames, None)
    scale = 32 / min(height, width)
    size = (max(32, round(height * scale)), max(32, round(width * scale)))
    resized = functional.interpolate(frames.float(), size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - 28) // 2, (size[1] - 28) // 2
    assert got.shape == (2, 3, 28, 28)
    assert got.is_contiguous()
    assert (got.float() - resized[:, :, top : top + 28, left : left + 28]).abs().max() <= 1.01


def test_training_crops_and_flips_all_frames_alike_and_everywhere() -> None:
    # Pixel values tell where a pixel comes from: row in the first channel, column in the second.
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    frames = torch.stack([rows, columns, rows]).to(torch.uint8).expand(3, 3, 12, 10)
    loader, rng = ClipLoader(resize=10, crop=8, train=True), np.random.default_rng(0)
    places = Counter()
    for _ in range(600):
        got = loader.transform(frames, rng)
        assert got.is_contiguous()
        assert torch.equal(got[0], got[1])
        assert torch.equal(got[0], got[2])
        top, first, last = int(got[0, 0, 0, 0]), int(got[0, 1, 0, 0]), int(got[0, 1, 0, -1])
        assert abs(first - last) == 7
        assert torch.equal(got[0, 0], torch.arange(top, top + 8).to(torch.uint8)[:, None].expand(8, 8))
        places[top, min(first, last), last < first] += 1
    assert len(places) == 5 * 3 * 2
    loader = ClipLoader(resize=10, crop=8, flip=False, train=True)
    assert all(int(loader.transform(frames, rng)[0, 1, 0].diff().min()) == 1 for _ in range(50))


def test_loading_depends_on_the_generator_alone(tmp_path: Path, write_frames: Make) -> None:
    clip = Clip(write_frames(tmp_path, 20, size=(40, 32)))
    train, evaluate = (ClipLoader(FrameSampling(4), resize=30, crop=24, train=t) for t in (True, False))
    first, again, other = (train(clip, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (4, 3, 24, 24)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(evaluate(clip), evaluate(clip, np.random.default_rng(3)))
    with pytest.raises(UserError, match="random generator"):
        train(clip)
