"""Evaluation on many few-shot tasks.

A clip's frames and features don't depend on the task it appears in (evaluation samples the centres), so each clip is
read and goes through SOAP and the backbone once; the tasks then run the head alone.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from soap_net.checkpoint import load_model, non_finite
from soap_net.config import Amp, Config, DataConfig, EvalConfig, flatten, to_dict
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import ClipSet, split_of
from soap_net.errors import UserError, said
from soap_net.files import write_text
from soap_net.intervals import Interval, beyond
from soap_net.models.soap_net import SOAPNet, build_model
from soap_net.ranks import Ranks, digest, join, same_clips
from soap_net.runs import FREE_TO_CHANGE, RunFolder, lists_by_name
from soap_net.tasks import Answers, Tasks


@dataclass
class EvalResult:
    """What `eval.json` holds; accuracies in percent, `ci95` is the half width of the 95 % interval in points.

    `ci95`, the field's, is over tasks on these very clips, and None of a single task, which tells nothing of how tasks
    vary. `beyond` is the 95 % interval over new clips and, where tasks differ in their classes, new classes.
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
    cut_clips: list[str] = field(default_factory=list)
    """Those that were read though their files are cut short."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Of a head that chooses by the supports: the share of tasks, in percent, in which each choice weighed most."""
    beyond: Interval | None = None
    """What is over new clips, or why that can't be said; None in results of older versions."""
    trained_on: str = ""
    """The data set of the training, where there was one."""
    tested_on: str = ""
    """The data set of `split`."""
    shared_classes: list[str] = field(default_factory=list)
    """Classes of another data set than the training's that bear the name of one trained on, as far as can be seen."""
    correct: list[int] = field(default_factory=list, repr=False)
    """Right answers of each task, to compare runs task by task; not written."""
    answers: Answers | None = field(default=None, repr=False, compare=False)
    """All that was answered, likewise not written."""

    @property
    def shown(self) -> str:
        """The accuracy and its interval, for a line of text."""
        interval = "(no interval: a single task)" if self.ci95 is None else f"+- {self.ci95:.2f} %"
        return f"{self.accuracy:.2f} {interval}"

    @property
    def logged(self) -> dict[str, float]:
        """What a training logs of a validation."""
        return {"val_accuracy": self.accuracy} | ({} if self.ci95 is None else {"val_ci95": self.ci95})

    @property
    def shown_beyond(self) -> str:
        """The interval over new clips, or why there is none, for a line of text."""
        if self.beyond is None or self.beyond.low is None:
            return f"no interval over other clips: {self.beyond.over if self.beyond else 'the tasks are not known'}"
        return f"{self.beyond} % over {self.beyond.over} (95 %)"

    def to_dict(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        values = asdict(replace(self, answers=None))
        del values["correct"], values["answers"]
        return values

    def save(self, path: Path) -> None:
        """Writes itself as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def refuse_non_finite(model: nn.Module) -> None:
    """Raises UserError if a weight or statistic of `model` is infinite or not a number, and names it."""
    if (name := non_finite(model.state_dict())) is not None:
        raise UserError(f"{name}: the model's weights are not finite, so that whatever it answers means nothing")


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
    was_training = model.training
    model.eval()
    try:
        tasks = Tasks(
            model, sampler, config.tasks, data, ranks,
            amp=amp, progress=progress and ranks.first, stop=stop, memory=memory,
        )  # fmt: skip
        answers = tasks.answers()
    finally:
        model.train(was_training)
    return _result(clips, model.head.choices, answers, config, time.perf_counter() - began)


def _result(clips: ClipSet, choices: Sequence[str], answers: Answers, config: EvalConfig, seconds: float) -> EvalResult:
    right, classes = answers.right, answers.drawn.classes
    correct = right.sum(axis=(1, 2))
    accuracies = 100.0 * correct / (config.way * config.queries)
    confusion = np.zeros((len(clips.classes),) * 2, dtype=np.int64)
    taken_for = np.take_along_axis(classes, answers.predicted.reshape(len(classes), -1), axis=1)
    np.add.at(confusion, (classes.repeat(config.queries, axis=1), taken_for), 1)
    answered = confusion.sum(axis=1)
    return EvalResult(
        accuracy=float(accuracies.mean()),
        ci95=float(1.96 * accuracies.std() / np.sqrt(config.tasks)) if config.tasks > 1 else None,
        tasks=config.tasks,
        way=config.way,
        shot=config.shot,
        queries=config.queries,
        split=clips.split,
        seed=config.seed,
        episodes_per_second=config.tasks / seconds,
        seconds=seconds,
        per_class={
            name: float(100.0 * confusion[i, i] / answered[i]) if answered[i] else None
            for i, name in enumerate(clips.classes)
        },
        classes=list(clips.classes),
        confusion=confusion.tolist(),
        failed_clips=answers.failures,
        cut_clips=answers.cut,
        chosen={name: float(100.0 * (answers.chosen == i).mean()) for i, name in enumerate(choices)},
        beyond=beyond(right[None].astype(np.float64), answers.drawn),
        correct=correct.tolist(),
        answers=answers,
    )


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
            with the weights that `train` would begin with.
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
        data = config.data
        folder = config.out
        if checkpoint is not None:
            folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        target = out if out is not None and out.suffix == ".json" else RunFolder(out or folder).result
        with ranks.together():
            model, trained = _model(checkpoint, config, ranks.device)
            clips = split_of(data, config.eval.split)
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
        result.tested_on = _where(data)
        if trained is not None:
            result.trained_on = _where(trained)
            result.shared_classes = _shared_classes(trained, result) if ranks.first else []
        if ranks.first:
            try:
                result.save(target)
            except OSError as error:  # hours of evaluation are not to be lost for it
                print(f"warning: {target}: the result can't be written: {said(error)}", file=sys.stderr)
    return result


def _model(checkpoint: Path | None, config: Config, device: torch.device) -> tuple[SOAPNet, DataConfig | None]:
    """The net, and the data that it was trained on."""
    if checkpoint is None:
        return build_model(config.model, config.data.frames, config.episode.seed).to(device).eval(), None
    soap = config.model.soap
    model, trained = load_model(checkpoint, device, backend=soap.backend, precision=soap.precision)
    if config.data.frames != trained.data.frames:
        raise UserError(
            f"data.frames is {config.data.frames}: {checkpoint} was trained on {trained.data.frames} frames"
        )
    return model, trained.data


def _where(data: DataConfig) -> str:
    return ", ".join(str(root.absolute()) for root in data.roots or (data.root,))


def _shared_classes(trained: DataConfig, result: EvalResult) -> list[str]:
    if result.trained_on == result.tested_on:
        return []
    try:
        known = split_of(trained, "train").classes
    except UserError:  # it isn't here any more
        return []
    names = {name.casefold() for name in known}
    return [name for name in result.classes if name.casefold() in names]


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
