"""Your own few-shot classifier: a few clips of each of your classes, and clips to tell apart.

It needs no training: by default pretrained features (the preset own_clips), or else the model of a checkpoint.
"""

from __future__ import annotations

import itertools
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from soap_net.calibration import ACCEPT, Calibration, calibrate
from soap_net.checkpoint import load_model
from soap_net.config import Config, DataConfig, ModelConfig, from_dict, load_config, to_dict
from soap_net.data.clips import Clip
from soap_net.errors import UserError
from soap_net.evaluate import refuse_non_finite
from soap_net.models import build_model
from soap_net.models.heads import Classes, Compared, Embedded, FewShotHead, build_head, group_by_class
from soap_net.models.soap_net import SOAPNet
from soap_net.ranks import digest, pick_device
from soap_net.supports import Supports, load_supports
from soap_net.tasks import CLIPS_PER_CALL, clip_features

Progress = bool | Callable[[int], object]
"""Whether to show a bar; or what is told how many clips more were read, and may raise to end the work."""

# Shares of their features' size by which clips differ at most: copies of one file; parts or copies of one recording,
# encoded anew. With pretrained features, of isl10, ucf101_9 and ut_interaction: up to 0.48, others from 0.62 on.
COPY, ONE_RECORDING = 1e-3, 0.5

# What of the settings, beside the weights, makes the features of a clip and what is made of them.
SAME_MODEL = ("backbone", "head", "soap")
SAME_DATA = ("frames", "interval", "resize", "crop", "order")


@dataclass(frozen=True)
class Prediction:
    """What a clip was taken for: `probabilities` by class, the likeliest first; empty with an `error`.

    `known` is False where the clip is less like any class than nine in ten of the classes' own clips are. `cut` says of
    a video that is cut short what is left of it.
    """

    clip: str
    probabilities: dict[str, float]
    error: str | None = None
    known: bool = True
    cut: str | None = None

    @property
    def nearest(self) -> str | None:
        """The likeliest class, None for a clip that could not be read."""
        return next(iter(self.probabilities), None)

    @property
    def label(self) -> str | None:
        """The likeliest class; None for a clip that could not be read or is none of the classes."""
        return self.nearest if self.known else None


@dataclass(frozen=True)
class _Learned:
    """What the supports come down to: all that it takes to classify."""

    names: tuple[str, ...]
    embedded: Embedded
    classes: Classes
    compare: Callable[[Embedded], Compared]
    calibration: Calibration


class Classifier:
    """Tells apart the classes of which it was shown a few clips.

    >>> classifier = Classifier.from_config()
    >>> classifier.learn(clips_by_class(Path("my_classes")))
    >>> classifier.classify(find_clips(Path("my_clip.mp4")))[0].label

    Args:
        model: in evaluation mode from here on.
        config: what it was built or trained with; `data` says how clips are read.
        checkpoint: where its weights come from, if not from the names in `config`.
        accept: the share of the classes' own clips to take for known; 1 takes every clip for one of the classes.

    Raises:
        UserError: the model's weights are not finite, or `accept` is no share.
    """

    def __init__(
        self, model: SOAPNet, config: Config, *, checkpoint: Path | None = None, accept: float = ACCEPT
    ) -> None:
        refuse_non_finite(model)
        if not 0 < accept <= 1:
            raise UserError(f"accept is {accept}: it is the share of clips to take for known, above 0 and at most 1")
        self.model = model.eval()
        self.config = config
        self.checkpoint = checkpoint
        self.accept = accept
        self.supports: Supports | None = None
        self.cut: list[str | None] = []  # of the clips read last, a line on each that is cut short
        self._learned: _Learned | None = None

    @classmethod
    def from_config(cls, config: Config | None = None, device: str = "auto", *, accept: float = ACCEPT) -> Classifier:
        """With the net that `config` describes, as it is without training; by default the preset own_clips.

        Raises:
            UserError: the weights can't be had, or no such device.
        """
        config = config or load_config("own_clips")
        model = build_model(config.model, config.data.frames, config.episode.seed)
        return cls(model.to(pick_device(device)), config, accept=accept)

    @classmethod
    def from_checkpoint(cls, path: Path, device: str = "auto", *, accept: float = ACCEPT) -> Classifier:
        """With the model of a checkpoint, and clips read the way it was trained on.

        Raises:
            UserError: not a checkpoint, or no such device.
        """
        # The best kernels that are here: those it was trained with may be another machine's.
        model, config = load_model(path, pick_device(device), backend="auto")
        return cls(model, config, checkpoint=path.absolute(), accept=accept)

    @classmethod
    def load(
        cls,
        path: Path,
        device: str = "auto",
        *,
        checkpoint: Path | None = None,
        backbone: str | None = None,
        weights: str | None = None,
    ) -> Classifier:
        """What `save` wrote; it answers as it did.

        Args:
            checkpoint: of a classifier that stands on one, where it lies now, if that has changed.
            backbone: of one that stands on a folder (``hf:<folder>``), likewise.
            weights: of one that stands on a weights file, likewise.

        Raises:
            UserError: not a classifier, or the weights that it was made with are not to be had or have changed.
        """
        supports, about = load_supports(path)
        config, accept, origin = *_settings(path, about), about.get("checkpoint")
        if not (origin is None or (isinstance(origin, str) and (checkpoint or Path(origin)).exists())):
            raise UserError(
                f"{path}: stands on the checkpoint {origin!r}, which is not there: say where with --checkpoint"
            )
        if origin is None:
            if checkpoint is not None:
                raise UserError(f"{path}: was made without a checkpoint; leave out {checkpoint}")
            model = config.model
            moved = replace(model, backbone=backbone or model.backbone, weights=weights or model.weights)
            classifier = cls.from_config(replace(config, model=moved), device, accept=accept)
        elif backbone or weights:
            raise UserError(
                f"{path}: stands on a checkpoint, which has its own weights; leave out {backbone or weights}"
            )
        else:
            classifier = cls.from_checkpoint(checkpoint or Path(origin), device, accept=accept)
        if digest(classifier.model.state_dict()) != about.get("weights"):
            source = classifier.checkpoint or f"backbone {config.model.backbone} with weights {config.model.weights}"
            raise UserError(f"{path}: was made with other weights than those of {source}: learn it anew")
        classifier._take(supports)
        return classifier

    @property
    def data(self) -> DataConfig:
        """How clips are read."""
        return self.config.data

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    @property
    def classes(self) -> tuple[str, ...]:
        """Those learnt; none at first."""
        return self.supports.classes if self.supports else ()

    def counts(self) -> dict[str, int]:
        """How many clips of each class it was shown."""
        return self.supports.counts() if self.supports else {}

    @property
    def calibration(self) -> Calibration:
        """How often to expect right answers, and what is confused with what. Raises UserError before `learn`."""
        return self._known().calibration

    @property
    def chosen(self) -> dict[str, float]:
        """Of a head that chooses by the supports: the weight of each choice; empty for others."""
        learned, head = self._known(), self.model.head
        weights = head.choose(learned.embedded, learned.classes).tolist()
        return dict(zip(head.choices, weights, strict=True))

    def learn(self, support: Mapping[str, Sequence[Clip]], *, progress: Progress = False) -> list[str]:
        """Takes on these classes in place of any before; the number of clips may differ from class to class.

        Returns:
            What was wrong with the clips that were left out: those that could not be read, and copies of others.

        Raises:
            UserError: fewer than two classes, or one without a readable clip.
        """
        return self._take_read(*self._read(support, progress))

    def add(
        self, support: Mapping[str, Sequence[Clip]], *, drop: Sequence[str] = (), progress: Progress = False
    ) -> list[str]:
        """As `learn`, beside what was learnt before and is not read again; a clip takes the place of its namesake.

        What `drop` names is forgotten first; see there.
        """
        kept = self._without(drop) if drop else self.supports
        supports, errors = self._read(support, progress)
        return self._take_read(kept.joined(supports) if kept else supports, errors)

    def drop(self, *names: str) -> None:
        """Forgets classes, and clips named ``class/clip``.

        Raises:
            UserError: there is none of a name, or fewer than two classes would be left.
        """
        self._take(self._without(names))

    def _without(self, names: Sequence[str]) -> Supports:
        self._known()
        assert self.supports is not None
        kept = self.supports
        for name in names:
            kept = kept.without(unicodedata.normalize("NFC", name))
        return kept

    def look_at(self, by: str) -> None:
        """Has the head views look at something else: "auto" or a mixture, see `ViewsHead`. No clip is read again.

        Raises:
            UserError: another head, no such mixture, or one of differences where clips are read without.
        """
        head, config = self._looking_at(by)
        if self.model.head.ignores_differences and not head.ignores_differences:
            raise UserError(f"{by} looks at differences, and clips are read without here: begin with --by {by}")
        # Clips are read as before, to look otherwise again.
        self.model, self.config = self.model.with_head(head, same_features=True), config
        if self.supports is not None:
            self._take(self.supports)

    def _looking_at(self, by: str) -> tuple[FewShotHead, Config]:
        model, head = self.config.model, self.model.head
        if model.head != "views":
            raise UserError(f"what to look at is for the head views to choose, not for {model.head}")
        options = {**model.head_options, "by": by}
        config = replace(self.config, model=replace(model, head_options=options))
        return build_head("views", head.dim, head.frames, **options), config

    def restore(self, path: Path) -> None:
        """Takes on what `save` wrote, in place of any classes learnt; the model stays, and is to be the file's own.

        What the head views looks at becomes the file's, see `look_at`.

        Raises:
            UserError: not a classifier, or made with another model or another way to read clips.
        """
        supports, about = load_supports(path)
        its, accept = _settings(path, about)
        before = self.model, self.config
        try:
            if its.model.head == self.config.model.head == "views":
                head, self.config = self._looking_at(str(its.model.head_options.get("by", "auto")))
                self.model = self.model.with_head(head)
            its, mine = its.portable(), self.config.portable()
            same = all(getattr(its.model, key) == getattr(mine.model, key) for key in SAME_MODEL)
            same = same and _other_options(its.model) == _other_options(mine.model)
            same = same and all(getattr(its.data, key) == getattr(mine.data, key) for key in SAME_DATA)
            if not same or about.get("weights") != digest(self.model.state_dict()):
                raise UserError(f"{path}: was made with other weights or settings than those in use")
            self._take(supports, accept)
        except UserError:
            self.model, self.config = before
            raise

    def save(self, path: Path, *, paths: bool = True) -> None:
        """Writes all that was learnt, and what it was learnt with, as safetensors, whole or not at all.

        Without `paths` the file tells the names alone of what it stands on, for those who have no business to know
        where that lies.
        """
        self._known()
        assert self.supports is not None
        checkpoint = self.checkpoint and (self.checkpoint if paths else self.checkpoint.name)
        about: dict[str, Any] = {
            "config": to_dict(self.config if paths else self.config.portable()),
            "checkpoint": checkpoint and str(checkpoint),
            "weights": digest(self.model.state_dict()),
            "accept": float(self.accept),
        }
        self.supports.save(path, about)

    @torch.inference_mode()
    def classify(self, clips: Sequence[Clip], *, progress: Progress = False) -> list[Prediction]:
        """One prediction per clip.

        Raises:
            UserError: no classes were learnt.
        """
        self._known()
        features, errors = self._features(clips, "query", progress)
        names = [str(clip.path / clip.member) for clip in clips]
        rows = zip(names, features, errors, strict=True)
        found = (Prediction(name, {}, error) if error else self.predict(name, row) for name, row, error in rows)
        return [replace(prediction, cut=remark) for prediction, remark in zip(found, self.cut, strict=True)]

    @torch.inference_mode()
    def predict(self, name: str, features: Tensor) -> Prediction:
        """What the clip of that name is taken for, by its ``(N, D)`` features: see `SOAPNet.features`.

        Raises:
            UserError: no classes were learnt.
        """
        learned = self._known()
        head, calibration = self.model.head, learned.calibration
        compared = learned.compare(head.embed(features[None]))
        logits, familiar = compared.logits[0].float(), float(compared.familiar[0])
        if not bool(logits.isfinite().all()):
            return Prediction(name, {}, f"{name}: the model's scores of it are not finite")
        chances = (calibration.sharpness * logits).softmax(0).tolist()
        ordered = sorted(zip(learned.names, chances, strict=True), key=lambda item: -item[1])
        return Prediction(name, dict(ordered), known=familiar >= calibration.threshold)

    @property
    def one_recording(self) -> list[tuple[str, str]]:
        """Clips of a class that look like one recording, by pretrained features: they make one expect too much."""
        if self.supports is None or self.config.model.weights in (None, "random"):
            return []
        clips = self.supports.clips
        return [(clips[first], clips[second]) for first, second in self.supports.alike(ONE_RECORDING)]

    def _known(self) -> _Learned:
        if self._learned is None:
            raise UserError("the classifier knows no classes yet: call learn() first")
        return self._learned

    @torch.inference_mode()
    def _take(self, supports: Supports, accept: float | None = None) -> None:
        if len(supports.classes) < 2:
            raise UserError(
                f"a classifier needs at least 2 classes, found {len(supports.classes)}: {', '.join(supports.classes)}"
            )
        head = self.model.head
        if tuple(supports.features.shape[1:]) != (head.frames, head.dim):
            raise UserError(
                f"the supports' features are {tuple(supports.features.shape[1:])}, the model's are "
                f"{(head.frames, head.dim)}: learn them anew"
            )
        supports = replace(supports, features=supports.features.to(self.device), labels=supports.labels.to(self.device))
        classes = group_by_class(supports.labels, len(supports.classes))
        embedded = head.embed(supports.features)
        accept = self.accept if accept is None else accept
        calibration = calibrate(head.held_out(embedded, classes), classes, accept)
        self.accept, self.supports = accept, supports
        compare = head.comparer(embedded, classes)
        self._learned = _Learned(supports.classes, embedded, classes, compare, calibration)

    def _take_read(self, supports: Supports, errors: Sequence[str]) -> list[str]:
        """Takes supports without copies, which would tell that all is right; returns what was left out, and why."""
        copies = {second: first for first, second in reversed(supports.alike(COPY))}
        self._take(supports.of_rows([row for row in range(len(supports.clips)) if row not in copies]))
        clips = supports.clips
        return [*errors, *(f"{clips[one]}: a copy of {clips[other]}" for one, other in sorted(copies.items()))]

    def _read(self, given: Mapping[str, Sequence[Clip]], progress: Progress) -> tuple[Supports, list[str]]:
        support: dict[str, list[Clip]] = {}
        for name, members in given.items():  # some file systems write é as two characters
            support.setdefault(unicodedata.normalize("NFC", name), []).extend(members)
        clips = [clip for members in support.values() for clip in members]
        labels = [label for label, members in enumerate(support.values()) for _ in members]
        features, errors = self._features(clips, "support", progress)
        good = [row for row, error in enumerate(errors) if error is None]
        for label, name in enumerate(support):
            if label not in {labels[row] for row in good}:
                reasons = [error for error, owner in zip(errors, labels, strict=True) if owner == label and error]
                raise UserError(f"class {name!r} has no readable clip{f': {reasons[0]}' if reasons else ''}")
        classes = tuple(support)
        names = _distinct(f"{classes[labels[row]]}/{(clips[row].path / clips[row].member).name}" for row in good)
        kept = torch.tensor([labels[row] for row in good], dtype=torch.int64, device=self.device)
        return Supports(features[good], kept, classes, tuple(names)), [error for error in errors if error]

    def _features(self, clips: Sequence[Clip], what: str, progress: Progress) -> tuple[Tensor, list[str | None]]:
        # A few clips are read sooner than processes start, and beside other threads they can't be started safely.
        serial = len(clips) <= 4 * CLIPS_PER_CALL or threading.current_thread() is not threading.main_thread()
        data = replace(self.data, workers=0) if serial else self.data
        hidden = None if progress is True else True
        with tqdm(total=len(clips), desc=what, unit="clip", leave=False, disable=hidden) as bar:
            told = progress if callable(progress) else bar.update
            features, errors, self.cut = clip_features(
                self.model, clips, data, self.device, amp=self.config.train.amp, progress=told
            )
        return features, [None if error is None else str(error) for error in errors]


def _settings(path: Path, about: Mapping[str, Any]) -> tuple[Config, float]:
    """The config and the share to accept that a file tells; raises UserError where they can't be."""
    config, accept = about.get("config"), about.get("accept")
    if not isinstance(config, dict) or not isinstance(accept, float) or not 0 < accept <= 1:
        raise UserError(f"{path}: damaged: it does not say with which settings it was made")
    return from_dict(config, str(path)), accept


def _other_options(model: ModelConfig) -> dict[str, Any]:
    """Those of the head but for what `Classifier.look_at` sets."""
    return {key: value for key, value in model.head_options.items() if (model.head, key) != ("views", "by")}


def _distinct(names: Iterator[str]) -> list[str]:
    """The names, with a number behind those that are there already."""
    found: dict[str, None] = {}
    for name in names:
        free = (name if number == 1 else f"{name} ({number})" for number in itertools.count(1))
        found[next(one for one in free if one not in found)] = None
    return [*found]
