"""The work of an evaluation: each clip read once and through SOAP and the backbone once, then tasks of the head alone.

What a head compares of a clip doesn't depend on the task that the clip appears in, as evaluation samples the centres of
its segments. So of each clip one row is kept, and a task is a choice of rows.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from soap_net.config import Amp, DataConfig
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.loading import PerClip, load
from soap_net.data.memory import ClipMemory
from soap_net.data.transforms import ClipLoader, clip_loader
from soap_net.errors import ClipError, UserError
from soap_net.interrupts import Interrupted
from soap_net.intervals import Drawn
from soap_net.models.heads import Compared, Embedded, group_by_class
from soap_net.models.soap_net import SOAPNet
from soap_net.ranks import Ranks

CLIPS_PER_CALL = 8
ROWS_PER_SUM = 1024
EMBEDDED_LIMIT = 2 * 2**30
"""Bytes that what a head compares may take of all clips, where features take less; beyond it features are kept."""


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """The config's mixed precision on `device`."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def features_by_batch(
    model: SOAPNet,
    clips: Sequence[Clip],
    data: DataConfig,
    device: torch.device,
    *,
    amp: Amp = "none",
    memory: ClipMemory | None = None,
) -> Generator[tuple[list[int], Tensor, dict[int, ClipError], dict[int, str]]]:
    """Reads clips, `CLIPS_PER_CALL` at a time: for each batch its rows, their features, and what is wrong with clips.

    Take it in `torch.inference_mode`.

    Yields:
        Numbers of B clips that were read, ``(B, T, D)`` float32 on `device`; and by number of clip the errors of those
        that can't be read, and lines on those that are cut short.
    """
    dataset = PerClip(clips, partial(_load, clip_loader(data, train=False, memory=memory)))
    with contextlib.closing(load(dataset, data.workers, batch_size=CLIPS_PER_CALL)) as batches:
        for number, batch in enumerate(batches):
            frames: dict[int, Tensor] = {}
            errors: dict[int, ClipError] = {}
            cut: dict[int, str] = {}
            for row, item in enumerate(batch, number * CLIPS_PER_CALL):
                if isinstance(item, ClipError):
                    errors[row] = item
                else:
                    frames[row], remark = item
                    cut |= {row: remark} if remark else {}
            features = torch.zeros(0, model.head.frames, model.head.dim, device=device)
            if frames:
                with autocast(device, amp):
                    features = model.features(torch.stack(list(frames.values())).to(device)).float()
            yield list(frames), features, errors, cut


def _load(loader: ClipLoader, clip: Clip) -> tuple[Tensor, str | None]:
    return loader(clip), clip.remark()


@torch.inference_mode()
def clip_features(
    model: SOAPNet,
    clips: Sequence[Clip],
    data: DataConfig,
    device: torch.device,
    *,
    amp: Amp = "none",
    progress: Callable[[int], object] = lambda count: None,
    memory: ClipMemory | None = None,
) -> tuple[Tensor, list[ClipError | None], list[str | None]]:
    """Features of each clip, and for each the error that kept it from being read (its features are zero then).

    Returns:
        ``(len(clips), T, D)`` float32 on `device`, and lists of the same length: errors, and lines on cut clips.
    """
    whole = torch.zeros(len(clips), model.head.frames, model.head.dim, device=device)
    errors: list[ClipError | None] = [None] * len(clips)
    remarks: list[str | None] = [None] * len(clips)
    with contextlib.closing(features_by_batch(model, clips, data, device, amp=amp, memory=memory)) as batches:
        for rows, features, failed, cut in batches:
            whole[rows] = features
            for row, error in failed.items():
                errors[row] = error
            for row, remark in cut.items():
                remarks[row] = remark
            progress(len(rows) + len(failed))
    return whole, errors, remarks


@dataclass
class Answers:
    """What the tasks came to.

    Attributes:
        drawn: their classes and clips, those included that stepped in for unreadable ones.
        predicted: ``(T, way, queries)`` the way that each query was taken for.
        chosen: ``(T,)`` which of the head's choices weighed most.
        failures: the clips that can't be read, in words.
        cut: those that are cut short, in words.
    """

    drawn: Drawn
    predicted: np.ndarray
    chosen: np.ndarray
    failures: list[str]
    cut: list[str]

    @property
    def right(self) -> np.ndarray:
        """``(T, way, queries)`` bool."""
        return np.asarray(self.predicted == np.arange(self.predicted.shape[1])[:, None])


class Tasks:
    """The first `count` tasks of a sampler, for a model; `answers` runs them."""

    def __init__(
        self,
        model: SOAPNet,
        sampler: EpisodeSampler,
        count: int,
        data: DataConfig,
        ranks: Ranks,
        *,
        amp: Amp,
        progress: bool,
        stop: Callable[[], bool],
        memory: ClipMemory | None,
    ) -> None:
        """See `soap_net.evaluate.evaluate`."""
        self.model, self.sampler, self.data, self.ranks = model, sampler, data, ranks
        self.amp, self.progress, self.stop, self.memory = amp, progress, stop, memory
        sizes = tuple(len(members) for members in sampler.clips.clips)
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.total = sum(sizes)
        self.drawn = Drawn(
            np.empty((count, sampler.way), dtype=np.int64),
            np.empty((count, sampler.way, sampler.shot), dtype=np.int64),
            np.empty((count, sampler.way, sampler.queries), dtype=np.int64),
            sizes,
        )
        for index in range(count):
            episode = sampler[index]
            self.drawn.classes[index] = episode.classes
            self.drawn.support[index] = episode.support
            self.drawn.query[index] = episode.query
        self.row = np.full(self.total, -1)  # of each clip of the split, numbered class by class
        self.broken = np.zeros(self.total, dtype=bool)
        self.failures: list[str] = []
        self.cut: list[str] = []
        self.kept: Embedded = ()
        self.rows = 0  # of `kept` in use

    @contextlib.contextmanager
    def advancing(self, what: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar; what is called as the work goes moves it, and raises `Interrupted` once it is to be stopped."""
        with tqdm(total=total, desc=what, unit=unit, leave=False, disable=None if self.progress else True) as bar:

            def advance(count: int) -> None:
                if self.stop():
                    raise Interrupted
                bar.update(count)

            yield advance

    @torch.inference_mode()
    def answers(self) -> Answers:
        """Reads the clips that the tasks need, and runs the tasks.

        Raises:
            UserError: no readable clip left in a class, or scores that are not finite.
            Interrupted: `stop` said so.
        """
        while (fresh := self._unread()).size:
            self._read(fresh)
        predicted, chosen = self._run()
        return Answers(self.drawn, predicted.reshape(self.drawn.query.shape), chosen, self.failures, self.cut)

    # Clips

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """``(T, way, shot)`` and ``(T, way, queries)``: the numbers of the tasks' clips in the whole split."""
        start = self.starts[self.drawn.classes][:, :, None]
        return start + self.drawn.support, start + self.drawn.query

    def _unread(self) -> np.ndarray:
        """Puts the next spare clips in the places of broken ones; returns which clips are still to be read."""
        touched = np.zeros(len(self.drawn.classes), dtype=bool)
        if self.broken.any():
            for numbers in self._numbers():
                touched |= self.broken[numbers].any(axis=(1, 2))
        for index in np.flatnonzero(touched):
            self._replace(int(index))
        wanted = np.zeros(self.total, dtype=bool)
        for numbers in self._numbers():
            wanted[numbers] = True
        return np.flatnonzero(wanted & (self.row < 0))

    def _replace(self, index: int) -> None:
        clips = self.sampler.clips

        def take(class_id: int, clip_id: int, slot: int) -> int | None:
            return None if self.broken[self.starts[class_id] + clip_id] else clip_id

        def exhausted(class_id: int) -> UserError:
            return UserError(
                f"task {index}: class {clips.classes[class_id]!r} has no readable clip left; "
                f"{int(self.broken.sum())} clips could not be read"
            )

        support, query = self.sampler[index].fill(take, exhausted)
        self.drawn.support[index] = np.reshape(support, self.drawn.support.shape[1:])
        self.drawn.query[index] = np.reshape(query, self.drawn.query.shape[1:])

    def _read(self, fresh: np.ndarray) -> None:
        """Makes the rows of these clips, with several processes a share in each."""
        ranks, first = self.ranks, self.rows
        self._make_room(len(fresh))
        mine = fresh[ranks.rank :: ranks.size]
        labels = np.searchsorted(self.starts, mine, side="right") - 1
        clips = [self.sampler.clips.clips[c][i] for c, i in zip(labels, mine - self.starts[labels], strict=True)]
        failed: dict[int, str] = {}
        short: dict[int, str] = {}
        reading = features_by_batch(self.model, clips, self.data, ranks.device, amp=self.amp, memory=self.memory)
        with self.advancing("features", "clip", len(mine)) as advance, contextlib.closing(reading) as batches:
            for rows, features, errors, cut in batches:
                places = [first + ranks.rank + ranks.size * row for row in rows]
                for tensor, part in zip(self.kept, self._kept(features), strict=True):
                    tensor[places] = part
                failed |= {int(mine[row]): str(error) for row, error in errors.items()}
                short |= {int(mine[row]): remark for row, remark in cut.items()}
                advance(len(rows) + len(errors))
        for start in range(first, first + len(fresh), ROWS_PER_SUM):
            ranks.sum([tensor[start : min(start + ROWS_PER_SUM, first + len(fresh))] for tensor in self.kept])
        replaced = (f"{text}; another clip of its class takes its place" for text in failed.values())
        for text in [*replaced, *short.values()]:
            tqdm.write(f"warning: {text}", file=sys.stderr)
        failed = ranks.gather(failed)
        self.cut += ranks.gather(short).values()
        self.row[fresh] = np.arange(first, first + len(fresh))
        self.rows = first + len(fresh)
        self.broken[list(failed)] = True
        self.failures += failed.values()

    def _make_room(self, more: int) -> None:
        """Lets `kept` have `more` rows beyond those in use, zero where several processes will add up theirs.

        Whole tensors, made once: a few rows to spare take the clips that step in for broken ones.
        """
        head = self.model.head
        if not self.kept:
            features = torch.zeros(1, head.frames, head.dim, device=self.ranks.device)
            one = head.embed(features)
            size, limit = sum(tensor.nbytes for tensor in one), max(EMBEDDED_LIMIT / more, features.nbytes)
            self.embeds = size <= limit
            self.kept = tuple(
                tensor.new_empty(0, *tensor.shape[1:]) for tensor in (one if self.embeds else (features,))
            )
        if self.rows + more > len(self.kept[0]):
            room = min(self.total, self.rows + more + more // 16)
            grown = []
            for tensor in self.kept:
                new = tensor.new_empty(room, *tensor.shape[1:])
                new[: self.rows] = tensor[: self.rows]
                grown.append(new)
            self.kept = tuple(grown)
        if self.ranks.size > 1:
            for tensor in self.kept:
                tensor[self.rows : self.rows + more] = 0

    def _kept(self, features: Tensor) -> Embedded:
        return self.model.head.embed(features) if self.embeds else (features,)

    # Tasks

    def _run(self) -> tuple[np.ndarray, np.ndarray]:
        """``(T, way * queries)`` and ``(T,)``, see `Answers`."""
        ranks, (count, way, shot), head = self.ranks, self.drawn.support.shape, self.model.head
        support, query = (torch.from_numpy(self.row[numbers].reshape(count, -1)) for numbers in self._numbers())
        labels = torch.arange(way, device=ranks.device).repeat_interleave(shot)
        classes = group_by_class(labels, way)
        predicted = torch.zeros(query.shape, dtype=torch.int64, device=ranks.device)
        chosen = torch.zeros(count, dtype=torch.int64, device=ranks.device)

        def compare(support: Embedded, query: Embedded) -> Compared:
            return head.compare(support, classes, query)

        batched = torch.vmap(compare)
        mine = torch.arange(count)[ranks.rank :: ranks.size]
        with warnings.catch_warnings(), self.advancing("tasks", "task", len(mine)) as advance:
            # Some heads hold an operation that vmap runs task by task; the rest of them still gains.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            for tasks in mine.split(head.tasks_at_once) if len(mine) else ():  # of none, split would give one, empty
                compared = batched(self._sides(support[tasks]), self._sides(query[tasks]))
                finite = compared.logits.isfinite().all(dim=-1)
                predicted[tasks] = torch.where(finite, compared.logits.argmax(dim=-1), -1)
                if head.choices:
                    chosen[tasks] = compared.chosen.argmax(dim=-1)
                advance(len(tasks))
        ranks.sum([predicted, chosen])
        if (unknown := (predicted < 0).any(dim=1)).any():
            raise UserError(
                f"task {int(unknown.nonzero()[0])}: the model's scores are not finite, so that its answers mean nothing"
                + (f"; try --train.amp none in place of {self.amp}" if self.amp != "none" else "")
            )
        return predicted.cpu().numpy(), chosen.cpu().numpy()

    def _sides(self, rows: Tensor) -> Embedded:
        """What the head compares of ``(tasks, clips)`` rows."""
        rows = rows.to(self.ranks.device)
        if self.embeds:
            # Several times as fast as `tensor[rows]`.
            return tuple(tensor.index_select(0, rows.flatten()).unflatten(0, rows.shape) for tensor in self.kept)
        embedded = self.model.head.embed(self.kept[0][rows.flatten()])
        return tuple(tensor.unflatten(0, rows.shape) for tensor in embedded)
