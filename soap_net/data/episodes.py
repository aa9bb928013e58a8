"""N-way K-shot episodes: which clips (a pure function of seed, split and index), and their frames."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from soap_net.data.splits import ClipSet
from soap_net.data.transforms import ClipLoader
from soap_net.errors import ClipError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Episode:
    """The clips of one few-shot task: class numbers and, per way, clip numbers within the class.

    ``draw_spare`` gives `spare`, which few episodes need and which may be most of a class.
    """

    index: int
    classes: tuple[int, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]
    draw_spare: Callable[[], tuple[tuple[int, ...], ...]] = field(repr=False, compare=False)

    @property
    def spare(self) -> tuple[tuple[int, ...], ...]:
        """Per way, the class's other clips in the order in which they step in for unreadable ones; drawn anew."""
        return self.draw_spare()

    def fill(
        self, take: Callable[[int, int, int], T | None], exhausted: Callable[[int], Exception]
    ) -> tuple[list[T], list[T]]:
        """What ``take(class, clip, slot)`` makes of the support's and of the query's clips, grouped by way.

        Slots number the episode's places, each way's support before its query. Where ``take`` gives None, the next
        spare clip steps in; raises ``exhausted(class)`` where the class has none left.
        """
        filled: tuple[list[T], list[T]] = ([], [])
        slot = 0
        for way, (class_id, support, query) in enumerate(zip(self.classes, self.support, self.query, strict=True)):
            left = self._spares(way)
            for role, chosen in enumerate((support, query)):
                for clip_id in chosen:
                    taken = (take(class_id, candidate, slot) for candidate in chain([clip_id], left))
                    found = next((item for item in taken if item is not None), None)
                    if found is None:
                        raise exhausted(class_id)
                    filled[role].append(found)
                    slot += 1
        return filled

    def _spares(self, way: int) -> Iterator[int]:
        yield from self.spare[way]


class EpisodeSampler:
    """``sampler[index]`` is the episode of that index: a pure function of ``seed``, the split's name and ``index``.

    Of several data sets, each episode is of one, all of them equally often. With ``fewer`` an episode of a set that has
    less than ``way`` classes is of all that it has.

    Raises UserError where the split (or a set, without ``fewer``) has fewer classes than ``way``, or a class fewer
    clips than ``shot + queries``, naming the classes and their counts.
    """

    def __init__(self, clips: ClipSet, way: int, shot: int, queries: int, seed: int, *, fewer: bool = False) -> None:
        for name, value, least in (("way", way, 2), ("shot", shot, 1), ("queries", queries, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        self._sets = clips.by_set
        least = min(map(len, self._sets), default=0)
        if least < (2 if fewer else way):
            one = f" of {clips.classes[min(self._sets, key=len)[0]].partition('/')[0]}" if len(self._sets) > 1 else ""
            raise UserError(
                f"{way}-way episodes need {2 if fewer else way} classes, and the {clips.split} split{one} has {least}"
            )
        short = [
            f"{name!r} has {len(members)}"
            for name, members in zip(clips.classes, clips.clips, strict=True)
            if len(members) < shot + queries
        ]
        if short:
            raise UserError(
                f"{shot}-shot episodes with {queries} queries need {shot + queries} clips of each class, and in the "
                f"{clips.split} split {', '.join(short)}"
            )
        self.clips = clips
        self.way = way
        self.shot = shot
        self.queries = queries
        self.seed = seed
        self._key = (seed, zlib.crc32(clips.split.encode()))

    def __getitem__(self, index: int) -> Episode:
        if index < 0:
            raise IndexError(f"an episode's index is at least 0, not {index}")
        taken = self.shot + self.queries
        classes, orders = self._draw(index, slice(taken))
        return Episode(
            index=index,
            classes=classes,
            support=tuple(order[: self.shot] for order in orders),
            query=tuple(order[self.shot :] for order in orders),
            draw_spare=partial(self._spare, index, taken),
        )

    def _spare(self, index: int, taken: int) -> tuple[tuple[int, ...], ...]:
        return self._draw(index, slice(taken, None))[1]

    def _draw(self, index: int, places: slice) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """An episode's classes, and of the order in which it takes the clips of each these places."""
        draws = np.random.PCG64(np.random.SeedSequence((*self._key, index)))
        every = slice(None)
        own = self._sets[_order(draws, len(self._sets), every)[0] if len(self._sets) > 1 else 0]
        classes = tuple(own[i] for i in _order(draws, len(own), slice(self.way)))
        return classes, tuple(_order(draws, len(self.clips.clips[c]), places) for c in classes)

    def generator(self, index: int, slot: int) -> np.random.Generator:
        """The random numbers of one clip's place in one episode (frames, crop, flip), whichever clip lands there."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((*self._key, index, 1 + slot))))


def _order(draws: np.random.PCG64, count: int, places: slice) -> tuple[int, ...]:
    # Sorted raw words, not Generator.permutation: NumPy may change the latter between releases, and with it every
    # episode of a given seed.
    order: list[int] = np.argsort(draws.random_raw(count), kind="stable")[places].tolist()
    return tuple(order)


@dataclass
class EpisodeClips:
    """An episode's frames: clips grouped by way, labels 0..way-1.

    ``support`` is uint8 ``(S, T, 3, H, W)`` with int64 labels ``(S,)``, ``query`` likewise ``(Q, ...)``;
    ``class_ids[label]`` is the class's number in the split. ``failures`` are the unreadable clips that were replaced,
    ``cut`` lines on clips that are cut short.
    """

    index: int
    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    support_names: list[str]
    query_names: list[str]
    class_ids: tuple[int, ...]
    failures: list[ClipError] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """A line for each of its clips that could not be read or is cut short."""
        return [*(f"{failure}; another clip of its class takes its place" for failure in self.failures), *self.cut]

    def pin_memory(self) -> EpisodeClips:
        """Moves the frames into page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        self.support, self.query = self.support.pin_memory(), self.query.pin_memory()
        return self

    def to(self, device: torch.device) -> EpisodeClips:
        """The same with frames and the queries' labels on a device; a head takes the supports' from the CPU."""
        names = ("support", "query", "query_labels")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def on_device(tasks: Generator[EpisodeClips, None, None], device: torch.device) -> Generator[EpisodeClips, None, None]:
    """The tasks on a device. To a GPU they are copied beside what it computes, and wait for nothing.

    Closes `tasks` with itself.
    """
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None
    with contextlib.closing(tasks):
        for task in tasks:
            if beside is None:
                yield task.to(device)
                continue
            with torch.cuda.stream(beside):
                moved = task.to(device)
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(beside)
            for tensor in (moved.support, moved.query, moved.query_labels):
                tensor.record_stream(computing)  # so that its memory is not given to another copy too soon
            yield moved


class EpisodeDataset(Dataset[EpisodeClips]):
    """The episodes of ``indices``, frames included; use with ``DataLoader(..., batch_size=None)``.

    An unreadable clip is recorded in ``failures`` and replaced by the next spare clip of its class; one that is cut
    short is told of in ``cut``. Raises UserError where a class has none left.
    """

    def __init__(self, sampler: EpisodeSampler, loader: ClipLoader, indices: Sequence[int]) -> None:
        self.sampler = sampler
        self.loader = loader
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> EpisodeClips:
        episode = self.sampler[self.indices[position]]
        clips = self.sampler.clips
        failures: list[ClipError] = []
        cut: list[str] = []

        def load(class_id: int, clip_id: int, slot: int) -> tuple[str, Tensor] | None:
            clip = clips.clips[class_id][clip_id]
            try:
                frames = self.loader(clip, self.sampler.generator(episode.index, slot))
                cut.extend(filter(None, [clip.remark()]))
            except ClipError as failure:
                failures.append(failure)
                return None
            return clip.name, frames

        def exhausted(class_id: int) -> UserError:
            return UserError(
                f"episode {episode.index}: class {clips.classes[class_id]!r} has no readable clip left; "
                f"the last failure was {failures[-1]}"
            )

        support, query = episode.fill(load, exhausted)
        labels = torch.arange(len(episode.classes))
        return EpisodeClips(
            index=episode.index,
            support=torch.stack([frames for _, frames in support]),
            support_labels=labels.repeat_interleave(self.sampler.shot),
            query=torch.stack([frames for _, frames in query]),
            query_labels=labels.repeat_interleave(self.sampler.queries),
            support_names=[name for name, _ in support],
            query_names=[name for name, _ in query],
            class_ids=episode.classes,
            failures=failures,
            cut=cut,
        )


def shard(indices: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The share of ``rank`` out of ``world_size``: disjoint, together all, sizes equal to within one."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size} is not a share: ranks run from 0 to world_size - 1")
    return list(indices[rank::world_size])
