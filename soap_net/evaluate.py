"""Evaluation on many few-shot tasks.

A clip's frames and features don't depend on the task it appears in (evaluation samples the centres), so each clip is
read and goes through SOAP and the backbone once; the tasks then run the head alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from soap_net.checkpoint import load_model, non_finite
from soap_net.config import Amp, Config, DataConfig, EvalConfig, flatten, to_dict
from soap_net.data.clips import Clip
from soap_net.data.episodes import Episode, EpisodeSampler
from soap_net.data.loading import PerClip, load
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import ClipSet, load_split
from soap_net.data.transforms import clip_loader
from soap_net.errors import ClipError, UserError, said
from soap_net.files import write_text
from soap_net.interrupts import Interrupted
from soap_net.models.heads import Embedded, FewShotHead, group_by_class
from soap_net.models.soap_net import SOAPNet, build_model
from soap_net.ranks import Ranks, digest, join, same_clips
from soap_net.runs import FREE_TO_CHANGE, RunFolder, lists_by_name

CLIPS_PER_CALL = 8
EMBEDDED_LIMIT = 2 * 2**30
"""Bytes that the embedded clips of an evaluation may take; beyond it each task embeds its own."""


@dataclass
class EvalResult:
    """What `eval.json` holds; accuracies in percent, `ci95` is the half width of the 95 % interval in points.

    `ci95` is None of a single task, which tells nothing of how tasks vary.
    `confusion[i][j]` counts the queries of `classes[i]` that were taken for `classes[j]`.
    """

    accuracy: float
    ci95: float | None
    tasks: int
    way: int
    shot: int
    queries: int
    split: str
    seed: int
    episodes_per_second: float
    seconds: float
    per_class: dict[str, float | None]
    classes: list[str]
    confusion: list[list[int]]
    failed_clips: list[str]
    chosen: dict[str, float] = field(default_factory=dict)
    """Of a head that chooses by the supports: the share of tasks, in percent, in which each choice weighed most."""
    correct: list[int] = field(default_factory=list, repr=False)
    """Right answers of each task, to compare runs task by task; not written."""

    @property
    def shown(self) -> str:
        """The accuracy and its interval, for a line of text."""
        interval = "(no interval: a single task)" if self.ci95 is None else f"+- {self.ci95:.2f} %"
        return f"{self.accuracy:.2f} {interval}"

    @property
    def logged(self) -> dict[str, float]:
        """What a training logs of a validation."""
        return {"val_accuracy": self.accuracy} | ({} if self.ci95 is None else {"val_ci95": self.ci95})

    def to_dict(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        values = asdict(self)
        del values["correct"]
        return values

    def save(self, path: Path) -> None:
        """Writes itself as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """The config's mixed precision on `device`."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def refuse_non_finite(model: nn.Module) -> None:
    """Raises UserError if a weight or statistic of `model` is infinite or not a number, and names it."""
    if (name := non_finite(model.state_dict())) is not None:
        raise UserError(f"{name}: the model's weights are not finite, so that whatever it answers means nothing")


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
) -> tuple[Tensor, list[ClipError | None]]:
    """Features of each clip, and for each the error that kept it from being read (its features are zero then).

    Returns:
        ``(len(clips), T, D)`` float32 on `device`, and a list of the same length.
    """
    features = torch.zeros(len(clips), model.head.frames, model.head.dim, device=device)
    errors: list[ClipError | None] = [None] * len(clips)
    dataset = PerClip(clips, clip_loader(data, train=False, memory=memory))
    with contextlib.closing(load(dataset, data.workers, batch_size=CLIPS_PER_CALL)) as batches:
        for number, batch in enumerate(batches):
            rows, frames = [], []
            for row, item in enumerate(batch, number * CLIPS_PER_CALL):
                if isinstance(item, ClipError):
                    errors[row] = item
                else:
                    rows.append(row)
                    frames.append(item)
            if frames:
                with autocast(device, amp):
                    features[rows] = model.features(torch.stack(frames).to(device)).float()
            progress(len(batch))
    return features, errors


def evaluate(
    model: SOAPNet,
    clips: ClipSet,
    data: DataConfig,
    config: EvalConfig,
    *,
    ranks: Ranks | None = None,
    amp: Amp = "none",
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    memory: ClipMemory | None = None,
) -> EvalResult:
    """Classification accuracy over `config.tasks` tasks drawn from `clips`.

    Task n is episode n of the sampler with `config.seed`. A clip that can't be read is named, and replaced in each of
    its tasks by the next of its class in the task's own order. With several processes, each computes the features of
    a share of the clips and runs a share of the tasks.

    Args:
        ranks: processes and device, by default this one on the model's device; `model` is on that device.
        amp: mixed precision of SOAP and backbone.
        progress: whether to show a progress bar.
        stop: asked now and then; when it returns True, `Interrupted` is raised.
        memory: keeps decoded clips from call to call; by default none are kept.

    Raises:
        UserError: no tasks, too few classes or clips for such tasks, no readable clip left in a class, or weights or
            scores that are not finite.
    """
    if config.tasks < 1:
        raise UserError(f"tasks must be at least 1, not {config.tasks}")
    refuse_non_finite(model)
    began = time.perf_counter()
    ranks = ranks or Ranks(next(model.parameters()).device)
    sampler = EpisodeSampler(clips, config.way, config.shot, config.queries, config.seed)
    episodes = [sampler[index] for index in range(config.tasks)]
    was_training = model.training
    model.eval()
    try:
        store = _Store(model, clips, data, ranks, amp, progress and ranks.first, stop, memory)
        chosen = store.fill(episodes)
        answers = _run_tasks(store, episodes, chosen, config)
    finally:
        model.train(was_training)
    return _result(store, config, answers, time.perf_counter() - began)


@dataclass
class _Answers:
    correct: np.ndarray  # right answers per task
    confusion: np.ndarray  # over all classes of the split
    chosen: np.ndarray  # per task: which of the head's choices weighed most


def _result(store: _Store, config: EvalConfig, answers: _Answers, seconds: float) -> EvalResult:
    correct, confusion, names = answers.correct, answers.confusion, store.model.head.choices
    accuracies = 100.0 * correct / (config.way * config.queries)
    answered = confusion.sum(axis=1)
    return EvalResult(
        accuracy=float(accuracies.mean()),
        ci95=float(1.96 * accuracies.std() / np.sqrt(config.tasks)) if config.tasks > 1 else None,
        tasks=config.tasks,
        way=config.way,
        shot=config.shot,
        queries=config.queries,
        split=store.clips.split,
        seed=config.seed,
        episodes_per_second=config.tasks / seconds,
        seconds=seconds,
        per_class={
            name: float(100.0 * confusion[i, i] / answered[i]) if answered[i] else None
            for i, name in enumerate(store.clips.classes)
        },
        classes=list(store.clips.classes),
        confusion=confusion.tolist(),
        failed_clips=store.failures,
        chosen={name: float(100.0 * (answers.chosen == i).mean()) for i, name in enumerate(names)},
        correct=correct.tolist(),
    )


@dataclass
class _Store:
    """The features of the clips met so far, one row each, and the clips that can't be read."""

    model: SOAPNet
    clips: ClipSet
    data: DataConfig
    ranks: Ranks
    amp: Amp
    progress: bool
    stop: Callable[[], bool]
    memory: ClipMemory | None
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    broken: set[tuple[int, int]] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        head = self.model.head
        self.features = torch.zeros(0, head.frames, head.dim, device=self.ranks.device)

    @contextlib.contextmanager
    def advancing(self, what: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar; what is called as the work goes moves it, and raises `Interrupted` once it is to be stopped."""
        with tqdm(total=total, desc=what, unit=unit, leave=False, disable=None if self.progress else True) as bar:

            def advance(count: int) -> None:
                if self.stop():
                    raise Interrupted
                bar.update(count)

            yield advance

    def fill(self, episodes: Sequence[Episode]) -> list[tuple[list[int], list[int]]]:
        """Reads what the episodes need; returns the rows of each one's support and query, grouped by way."""
        while True:
            chosen = [_readable(episode, self.clips, self.broken) for episode in episodes]
            wanted = {pair for support, query in chosen for pair in (*support, *query)}
            fresh = sorted(wanted - self.rows.keys())
            if not fresh:
                return [([self.rows[p] for p in support], [self.rows[p] for p in query]) for support, query in chosen]
            self._read(fresh)

    def _read(self, fresh: list[tuple[int, int]]) -> None:
        ranks = self.ranks
        mine = range(ranks.rank, len(fresh), ranks.size)
        clips = [self.clips.clips[fresh[i][0]][fresh[i][1]] for i in mine]
        with self.advancing("features", "clip", len(mine)) as advance:
            own, errors = clip_features(
                self.model, clips, self.data, ranks.device, amp=self.amp, progress=advance, memory=self.memory
            )
        features = torch.zeros(len(fresh), *own.shape[1:], device=ranks.device)
        features[ranks.rank :: ranks.size] = own
        ranks.sum([features])
        failed = {i: str(error) for i, error in zip(mine, errors, strict=True) if error is not None}
        for text in failed.values():
            tqdm.write(f"warning: {text}; another clip of its class takes its place", file=sys.stderr)
        failed = ranks.gather(failed)
        start = len(self.features)
        self.features = torch.cat([self.features, features])
        for i, pair in enumerate(fresh):
            self.rows[pair] = start + i
        self.broken.update(fresh[i] for i in failed)
        self.failures += failed.values()


def _readable(
    episode: Episode, clips: ClipSet, broken: set[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The (class, clip) pairs of an episode, each broken one replaced by the next spare, as `EpisodeDataset` does."""

    def take(class_id: int, clip_id: int, slot: int) -> tuple[int, int] | None:
        return None if (class_id, clip_id) in broken else (class_id, clip_id)

    def exhausted(class_id: int) -> UserError:
        return UserError(
            f"task {episode.index}: class {clips.classes[class_id]!r} has no readable clip left; "
            f"{len(broken)} clips could not be read"
        )

    return episode.fill(take, exhausted)


@torch.inference_mode()
def _run_tasks(
    store: _Store,
    episodes: Sequence[Episode],
    chosen: list[tuple[list[int], list[int]]],
    config: EvalConfig,
) -> _Answers:
    ranks, way = store.ranks, config.way
    device = ranks.device
    support_labels = torch.arange(way, device=device).repeat_interleave(config.shot)
    truth = np.repeat(np.arange(way), config.queries)
    class_ids = np.array([episode.classes for episode in episodes])
    predicted = torch.zeros(len(episodes), len(truth), dtype=torch.int64, device=device)
    weighed_most = torch.zeros(len(episodes), dtype=torch.int64, device=device)
    head, features = store.model.head, store.features
    classes = group_by_class(support_labels, way)
    embedded = _embed_all(head, features)

    def score(support: Embedded, query: Embedded) -> Tensor:
        return head.logits(support, classes, query)

    def choose(support: Embedded) -> Tensor:
        return head.choose(support, classes)

    batched = torch.vmap(score)
    mine = range(ranks.rank, len(episodes), ranks.size)
    with warnings.catch_warnings(), store.advancing("tasks", "task", len(mine)) as advance:
        # Some heads hold an operation that vmap runs task by task; the rest of them still gains.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for start in range(0, len(mine), head.tasks_at_once):
            tasks = list(mine[start : start + head.tasks_at_once])
            sides = []
            for role in (0, 1):
                rows = torch.tensor([chosen[task][role] for task in tasks], device=device)
                if embedded is None:
                    flat = head.embed(features[rows.flatten()])
                    sides.append(tuple(tensor.unflatten(0, rows.shape) for tensor in flat))
                else:
                    sides.append(tuple(tensor[rows] for tensor in embedded))
            scores = batched(*sides)
            predicted[tasks] = torch.where(scores.isfinite().all(dim=-1), scores.argmax(dim=-1), -1)
            if head.choices:
                weighed_most[tasks] = torch.vmap(choose)(sides[0]).argmax(dim=-1)
            advance(len(tasks))
    ranks.sum([predicted, weighed_most])
    answers = predicted.cpu().numpy()
    if (answers < 0).any():
        task = int(np.flatnonzero((answers < 0).any(axis=1))[0])
        raise UserError(
            f"task {task}: the model's scores are not finite, so that its answers mean nothing"
            + (f"; try --train.amp none in place of {store.amp}" if store.amp != "none" else "")
        )
    confusion = np.zeros((len(store.clips.classes),) * 2, dtype=np.int64)
    np.add.at(confusion, (class_ids[:, truth], np.take_along_axis(class_ids, answers, axis=1)), 1)
    return _Answers((answers == truth).sum(axis=1), confusion, weighed_most.cpu().numpy())


def _embed_all(head: FewShotHead, features: Tensor) -> Embedded | None:
    """What `head` compares of each clip, ``(N, T, D)``; None where that would take more than `EMBEDDED_LIMIT`."""
    first = head.embed(features[:1])
    if len(features) * sum(tensor.nbytes for tensor in first) > EMBEDDED_LIMIT:
        return None
    whole = tuple(tensor.new_empty(len(features), *tensor.shape[1:]) for tensor in first)
    for start in range(0, len(features), CLIPS_PER_CALL):
        for tensor, part in zip(whole, head.embed(features[start : start + CLIPS_PER_CALL]), strict=True):
            tensor[start : start + CLIPS_PER_CALL] = part
    return whole


def evaluate_run(
    checkpoint: Path | None,
    config: Config,
    *,
    out: Path | None = None,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Evaluates a checkpoint, or the net that the config describes as it is, and writes `eval.json`.

    A result that can't be written after all is returned all the same, with a warning on stderr.

    Args:
        checkpoint: a run's `best.pt` or `last.pt`, or a folder that stands for one; None leaves the net untrained,
            with the weights it is built with.
        config: of a checkpoint's its `data`, `eval`, `device`, `train.amp`, `model.soap.backend` and
            `model.soap.precision` count; all else of the model is the checkpoint's own.
        out: a .json file, or a folder to put `eval.json` in; by default the checkpoint's folder, or the config's.
        progress: whether to show progress bars.
        stop: see `evaluate`; `Interrupted` leaves what was written as it was.

    Raises:
        UserError: bad checkpoint or data set, impossible values, a number of frames that the model can't take, or a
            place that can't be written to.
    """
    config.check()
    with join(config.device) as ranks:
        data, split = config.data, config.eval.split
        folder = config.out
        if checkpoint is not None:
            folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        target = out if out is not None and out.suffix == ".json" else RunFolder(out or folder).result
        with ranks.together():
            model = _model(checkpoint, config, ranks.device)
            clips = load_split(data.root, split, data.split_file(split), data.split_files)
            if ranks.first:
                _refuse_unwritable(target)
        if ranks.size > 1:
            keys = lists_by_name(flatten(to_dict(config)))
            facts = {"digest of the weights": digest(model.state_dict())[:12], **same_clips(clips)}
            facts |= {key: keys[key] for key in keys if key not in FREE_TO_CHANGE}
            ranks.agree(facts, "all need the same command, data and checkpoint")
        result = evaluate(
            model, clips, data, config.eval, ranks=ranks, amp=config.train.amp, progress=progress, stop=stop
        )
        if ranks.first:
            try:
                result.save(target)
            except OSError as error:  # hours of evaluation are not to be lost for it
                print(f"warning: {target}: the result can't be written: {said(error)}", file=sys.stderr)
    return result


def _model(checkpoint: Path | None, config: Config, device: torch.device) -> SOAPNet:
    if checkpoint is None:
        return build_model(config.model, config.data.frames).to(device).eval()
    soap = config.model.soap
    model, trained = load_model(checkpoint, device, backend=soap.backend, precision=soap.precision)
    if config.data.frames != trained.data.frames:
        raise UserError(
            f"data.frames is {config.data.frames}: {checkpoint} was trained on {trained.data.frames} frames"
        )
    return model


def _refuse_unwritable(target: Path) -> None:
    """Makes the folder of `target`; raises `UserError` if no file of that name can be written."""
    try:
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{target}: the result can't be written there: {said(error)}; choose another place with --out"
        ) from error
