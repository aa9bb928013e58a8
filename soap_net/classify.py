"""Your own few-shot classifier: a trained model, a few clips of each of your classes, and clips to tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from soap_net.checkpoint import load_model
from soap_net.config import Amp, DataConfig
from soap_net.data.clips import Clip
from soap_net.data.images import is_image, natural
from soap_net.data.splits import load_split
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.errors import UserError
from soap_net.evaluate import CLIPS_PER_CALL, clip_features, refuse_non_finite
from soap_net.models.soap_net import SOAPNet
from soap_net.ranks import pick_device


@dataclass(frozen=True)
class Prediction:
    """What a clip was taken for: `probabilities` by class, the likeliest first; empty with an `error`."""

    clip: str
    probabilities: dict[str, float]
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The likeliest class, None for a clip that could not be read."""
        return next(iter(self.probabilities), None)


class Classifier:
    """Tells apart the classes of which it was shown a few clips, whatever classes the model was trained on.

    >>> classifier = Classifier.from_checkpoint(Path("runs/demo/with_soap/best.pt"))
    >>> classifier.learn(clips_by_class(Path("my_classes")))
    >>> classifier.classify(find_clips(Path("my_clip.mp4")))[0].label
    """

    def __init__(self, model: SOAPNet, data: DataConfig, *, amp: Amp = "none") -> None:
        """Raises UserError for a model whose weights are not finite."""
        refuse_non_finite(model)
        self.model = model.eval()
        self.data = data
        self.amp = amp
        self.device = next(model.parameters()).device
        self.classes: tuple[str, ...] = ()
        self._support = torch.zeros(0)
        self._labels = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def from_checkpoint(cls, path: Path, device: str = "auto") -> Classifier:
        """With the model of a checkpoint, and clips read the way it was trained on.

        Raises:
            UserError: not a checkpoint, or no such device.
        """
        # The best kernels that are here: those it was trained with may be another machine's.
        model, config = load_model(path, pick_device(device), backend="auto")
        return cls(model, config.data, amp=config.train.amp)

    def learn(self, support: Mapping[str, Sequence[Clip]], *, progress: bool = False) -> list[str]:
        """Takes on these classes in place of any before; the number of clips may differ from class to class.

        Returns:
            What was wrong with the clips that could not be read, and were left out.

        Raises:
            UserError: fewer than two classes, or one without a readable clip.
        """
        if len(support) < 2:
            raise UserError(f"a classifier needs at least 2 classes, found {len(support)}: {', '.join(support)}")
        clips = [clip for members in support.values() for clip in members]
        labels = [label for label, members in enumerate(support.values()) for _ in members]
        features, errors = self._features(clips, "support", progress)
        good = [row for row, error in enumerate(errors) if error is None]
        for label, name in enumerate(support):
            if label not in {labels[row] for row in good}:
                reasons = [error for error, owner in zip(errors, labels, strict=True) if owner == label and error]
                raise UserError(f"class {name!r} has no readable clip{f': {reasons[0]}' if reasons else ''}")
        self.classes = tuple(support)
        self._support = features[good]
        self._labels = torch.tensor([labels[row] for row in good], device=self.device)
        return [error for error in errors if error]

    @torch.inference_mode()
    def classify(self, clips: Sequence[Clip], *, progress: bool = False) -> list[Prediction]:
        """One prediction per clip: the softmax of the head's scores over the classes learnt.

        Raises:
            UserError: no classes were learnt.
        """
        if not self.classes:
            raise UserError("the classifier knows no classes yet: call learn() first")
        features, errors = self._features(clips, "query", progress)
        predictions = []
        for clip, query, error in zip(clips, features, errors, strict=True):
            chances: dict[str, float] = {}
            if error is None:
                logits = self.model.head(self._support, self._labels, query[None], len(self.classes))[0].float()
                scores = zip(self.classes, logits.softmax(0).tolist(), strict=True)
                chances = dict(sorted(scores, key=lambda item: -item[1]))
                if not bool(logits.isfinite().all()):
                    chances, error = {}, f"{clip.path / clip.member}: the model's scores of it are not finite"
            predictions.append(Prediction(str(clip.path / clip.member), chances, error))
        return predictions

    def _features(self, clips: Sequence[Clip], what: str, progress: bool) -> tuple[Tensor, list[str | None]]:
        # A few clips are read sooner than processes start.
        data = self.data if len(clips) > 4 * CLIPS_PER_CALL else replace(self.data, workers=0)
        with tqdm(total=len(clips), desc=what, unit="clip", leave=False, disable=None if progress else True) as bar:
            features, errors = clip_features(
                self.model, clips, data, self.device, amp=self.amp, progress=lambda count: bar.update(count)
            )
        return features, [None if error is None else str(error) for error in errors]


def clips_by_class(folder: Path) -> dict[str, list[Clip]]:
    """The clips of ``folder/<class>/<clip>``: videos, folders of frames, zips of frames.

    Raises:
        UserError: no such folder, or nothing of that form in it.
    """
    try:
        found = load_split(folder, "support")
    except UserError as error:
        raise UserError(f"the clips to learn from lie in <folder>/<class>/<clip>: {error}") from error
    return {name: list(clips) for name, clips in zip(found.classes, found.clips, strict=True)}


def find_clips(path: Path) -> list[Clip]:
    """The clip at `path` (a video, a zip or a folder of frames), or all clips in the folder at `path` and below.

    Raises:
        UserError: nothing there, or no clip in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such clip or folder")
    if path.is_file():
        return [Clip(path)]
    clips = _clips_below(path)
    if not clips:
        raise UserError(f"{path}: no clips in this folder (videos, zips, or folders of frames)")
    return clips


def _clips_below(folder: Path) -> list[Clip]:
    children = sorted((c for c in folder.iterdir() if not c.name.startswith(".")), key=lambda c: natural(c.name))
    clips = []
    for child in children:
        if child.is_dir():
            clips += _clips_below(child)
        elif child.suffix.lower() in VIDEO_SUFFIXES | {".zip"}:
            clips.append(Clip(child))
    # Images are frames only where nothing else is: beside videos they are posters and thumbnails.
    return clips or ([Clip(folder)] if any(is_image(child.name) for child in children) else [])
