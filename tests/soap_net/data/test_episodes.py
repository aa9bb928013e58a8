from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeDataset, EpisodeSampler, shard
from soap_net.data.splits import ClipSet, load_split
from soap_net.data.transforms import ClipLoader, FrameSampling
from soap_net.errors import UserError

Make = Callable[..., Path]


def clip_set(split: str = "train", sizes: tuple[int, ...] = (9, 7, 8, 12, 7, 10)) -> ClipSet:
    labels = tuple(f"class {i}" for i in range(len(sizes)))
    clips = tuple(
        tuple(Clip(Path(f"/nowhere/{c}/{v}.mp4"), name=f"{c}/{v}") for v in range(n))
        for c, n in zip(labels, sizes, strict=True)
    )
    return ClipSet(split, labels, clips)


def test_episode_is_a_pure_function_of_seed_split_index() -> None:
    clips = clip_set()
    forwards = [EpisodeSampler(clips, 3, 2, 4, seed=5)[i] for i in range(20)]
    sampler = EpisodeSampler(clip_set(), 3, 2, 4, seed=5)
    assert [sampler[i] for i in reversed(range(20))][::-1] == forwards
    assert EpisodeSampler(clips, 3, 2, 4, seed=6)[0] != forwards[0]
    assert EpisodeSampler(clip_set("val"), 3, 2, 4, seed=5)[0] != forwards[0]
    assert len(set(forwards)) == 20


def test_episodes_of_a_seed_stay_the_same_between_releases() -> None:
    # A change here would make published numbers of a given seed unrepeatable.
    sampler = EpisodeSampler(clip_set(), 3, 1, 2, seed=0)
    text = repr([(e.classes, e.support, e.query, e.spare) for e in map(sampler.__getitem__, (0, 1, 1000))])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "945bd64414959f7d"


def test_an_episode_holds_distinct_classes_and_every_clip_once() -> None:
    clips = clip_set()
    sampler = EpisodeSampler(clips, 4, 2, 3, seed=1)
    for index in range(50):
        episode = sampler[index]
        assert episode.index == index
        assert len(set(episode.classes)) == 4
        for c, support, query, spare in zip(
            episode.classes, episode.support, episode.query, episode.spare, strict=True
        ):
            assert (len(support), len(query)) == (2, 3)
            assert sorted(support + query + spare) == list(range(len(clips.clips[c])))


def test_classes_and_clips_are_drawn_equally_often() -> None:
    sampler = EpisodeSampler(clip_set(sizes=(8,) * 6), 2, 1, 1, seed=0)
    episodes = [sampler[i] for i in range(3000)]
    classes = Counter(c for e in episodes for c in e.classes)
    first_class = Counter(e.classes[0] for e in episodes)
    support = Counter(s[0] for e in episodes for s in e.support)
    for counter, each in ((classes, 1000), (first_class, 500), (support, 750)):
        assert all(abs(n - each) < 5 * each**0.5 for n in counter.values())


def test_shards_share_all_episodes_without_overlap() -> None:
    for size in (1, 2, 3, 7):
        shares = [shard(range(3, 20), rank, size) for rank in range(size)]
        assert sorted(i for share in shares for i in share) == list(range(3, 20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match=f"rank {rank} of {size}"):
            shard(range(4), rank, size)


def test_a_class_with_too_few_clips_is_named_with_the_counts() -> None:
    with pytest.raises(UserError) as caught:
        EpisodeSampler(clip_set(sizes=(9, 5, 7, 2)), 2, 3, 4, seed=0)
    for words in ("3-shot", "7 clips", "'class 1' has 5", "'class 3' has 2", "train"):
        assert words in str(caught.value)
    assert "class 0" not in str(caught.value)


def test_a_way_above_the_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match="5-way episodes need 5 classes, and the val split has 2"):
        EpisodeSampler(clip_set("val", (9, 9)), 5, 1, 1, seed=0)


@pytest.mark.parametrize("bad", [{"way": 1}, {"shot": 0}, {"queries": 0}, {"seed": -1}])
def test_sizes_that_make_no_episode_are_refused(bad: dict[str, int]) -> None:
    name = next(iter(bad))
    with pytest.raises(UserError, match=f"{name} must be at least"):
        EpisodeSampler(clip_set(), **{"way": 2, "shot": 1, "queries": 1, "seed": 0, **bad})


@pytest.fixture
def frames_on_disk(tmp_path: Path, write_frames: Make) -> Path:
    for label in ("a", "b", "c"):
        for video in range(5):
            write_frames(tmp_path / "data" / label / f"v{video}", 4)
    return tmp_path / "data"


def dataset(root: Path, train: bool = True, count: int = 4) -> EpisodeDataset:
    sampler = EpisodeSampler(load_split(root, "train"), 2, 1, 2, seed=3)
    return EpisodeDataset(sampler, ClipLoader(FrameSampling(3), resize=14, crop=12, train=train), range(count))


def test_an_episodes_frames_labels_and_names_belong_together(frames_on_disk: Path) -> None:
    data = dataset(frames_on_disk, train=False)
    assert len(data) == 4
    for index in range(4):
        got, episode = data[index], data.sampler[index]
        assert got.index == index
        assert got.class_ids == episode.classes
        assert got.failures == []
        assert got.support.shape == (2, 3, 3, 12, 12)
        assert got.query.shape == (4, 3, 3, 12, 12)
        assert got.support.dtype == got.query.dtype == torch.uint8
        assert got.support_labels.tolist() == [0, 1]
        assert got.query_labels.tolist() == [0, 0, 1, 1]
        assert got.query_labels.dtype == torch.int64
        for role, names, frames, labels in (
            (episode.support, got.support_names, got.support, got.support_labels),
            (episode.query, got.query_names, got.query, got.query_labels),
        ):
            chosen = [(c, v) for c, videos in zip(episode.classes, role, strict=True) for v in videos]
            for (c, v), name, clip_frames, label in zip(chosen, names, frames, labels.tolist(), strict=True):
                clip = data.sampler.clips.clips[c][v]
                assert name == clip.name
                assert episode.classes[label] == c
                assert torch.equal(clip_frames, data.loader(clip))


@pytest.mark.parametrize("workers", [0, 2])
def test_frames_repeat_whatever_the_workers(workers: int, frames_on_disk: Path) -> None:
    data = dataset(frames_on_disk)
    torch.manual_seed(workers)
    np.random.seed(workers)
    loaded = list(DataLoader(data, batch_size=None, num_workers=workers))
    for index, got in enumerate(loaded):
        expected = dataset(frames_on_disk)[index]
        assert torch.equal(got.support, expected.support)
        assert torch.equal(got.query, expected.query)
        assert got.query_names == expected.query_names


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_clip_is_replaced_by_the_next_spare_of_its_class(workers: int, frames_on_disk: Path) -> None:
    whole = dataset(frames_on_disk)
    episode = whole.sampler[0]
    label, c = 1, episode.classes[1]
    broken = [episode.query[label][0], episode.spare[label][0]]
    for video in broken:
        (whole.sampler.clips.clips[c][video].path / "00000002.png").write_bytes(b"")
    got = next(iter(DataLoader(dataset(frames_on_disk), batch_size=None, num_workers=workers)))
    names = [clip.name for clip in whole.sampler.clips.clips[c]]
    assert [failure.path.parent.name for failure in got.failures] == [names[v].split("/")[1] for v in broken]
    assert got.query_names[2:] == [names[episode.spare[label][1]], names[episode.query[label][1]]]
    assert got.query_labels.tolist() == [0, 0, 1, 1]
    # The other clips keep their random numbers.
    expected = dataset(frames_on_disk)
    assert torch.equal(got.support, expected[0].support)
    rng = expected.sampler.generator(0, 5)
    assert torch.equal(got.query[3], expected.loader(whole.sampler.clips.clips[c][episode.query[label][1]], rng))


def test_a_class_without_a_readable_clip_left_ends_in_one_line_that_names_it(frames_on_disk: Path) -> None:
    data = dataset(frames_on_disk)
    label = data.sampler.clips.classes[data.sampler[0].classes[0]]
    for image in (frames_on_disk / label).glob("*/*.png"):
        image.write_bytes(b"")
    with pytest.raises(UserError, match=f"episode 0: class '{label}' has no readable clip left") as caught:
        data[0]
    assert "\n" not in str(caught.value)


def union(sizes: tuple[int, ...], *classes: int) -> ClipSet:
    """Sets of so many classes, ``sizes`` being the clips of all their classes in turn."""
    sets = tuple(number for number, count in enumerate(classes) for _ in range(count))
    return replace(clip_set(sizes=sizes), sets=sets)


def test_an_episode_of_several_sets_is_of_one_and_each_set_comes_equally_often() -> None:
    clips = union((5,) * 12, 7, 3, 2)
    sampler = EpisodeSampler(clips, 5, 1, 2, seed=0, fewer=True)
    episodes = [sampler[index] for index in range(600)]
    drawn = [{clips.sets[c] for c in episode.classes} for episode in episodes]
    assert all(len(one) == 1 for one in drawn)
    counts = Counter(one.pop() for one in drawn)
    assert all(150 < counts[number] < 250 for number in range(3))
    assert {len(e.classes) for e in episodes} == {5, 3, 2}
    assert {c for e in episodes for c in e.classes} == set(range(12))


def test_a_set_of_too_few_classes_is_named_unless_fewer_ways_will_do() -> None:
    clips = replace(union((5,) * 8, 5, 3), classes=(*(f"many/{i}" for i in range(5)), *(f"few/{i}" for i in range(3))))
    with pytest.raises(UserError, match="5-way episodes need 5 classes, and the train split of few has 3"):
        EpisodeSampler(clips, 5, 1, 1, seed=0)
    with pytest.raises(UserError, match="need 2 classes, and the train split of class 5 has 1"):
        EpisodeSampler(union((5,) * 6, 5, 1), 5, 1, 1, seed=0, fewer=True)
