"""The clips that a classifier was shown, as features: added to, taken from, and kept in a file.

The file is safetensors: `features` (S, N, D) float32 and `labels` (S,) int64, and as metadata JSON with `format`,
`classes`, `clips`, and what the classifier says of itself. Reading it runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from soap_net.errors import UserError, did_you_mean, said
from soap_net.files import replacing

FORMAT = 1
KEY = "soap-net classifier"


@dataclass(frozen=True)
class Supports:
    """S supports of some classes.

    Attributes:
        features: ``(S, N, D)`` float32, what the model makes of each clip.
        labels: ``(S,)`` int64, places in `classes`.
        classes: their names; each has a support.
        clips: S names ``class/clip``, for people and to take one away again.
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    clips: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """How many supports each class has."""
        return {name: int((self.labels == label).sum()) for label, name in enumerate(self.classes)}

    def alike(self, share: float) -> list[tuple[int, int]]:
        """Pairs of rows of one class whose features differ by less than that share of their size, in order."""
        pairs: list[tuple[int, int]] = []
        for label in range(len(self.classes)):
            rows = (self.labels == label).nonzero()[:, 0]
            features = self.features[rows].flatten(1)
            sizes = features.norm(dim=1)
            apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
            near = (apart < share * torch.maximum(sizes[:, None], sizes)).triu(1).nonzero()
            pairs += [(int(rows[first]), int(rows[second])) for first, second in near.tolist()]
        return pairs

    def joined(self, more: Supports) -> Supports:
        """These and `more`; classes of the same name become one, and a clip known by name is replaced."""
        kept = [row for row, clip in enumerate(self.clips) if clip not in more.clips]
        classes = (*self.classes, *(name for name in more.classes if name not in self.classes))
        places = torch.tensor(
            [classes.index(name) for name in more.classes], dtype=torch.int64, device=self.labels.device
        )
        return Supports(
            torch.cat([self.features[kept], more.features]),
            torch.cat([self.labels[kept], places[more.labels]]),
            classes,
            (*(self.clips[row] for row in kept), *more.clips),
        )

    def without(self, name: str) -> Supports:
        """All but the class or the clip (as ``class/clip``) of that name; a class goes with its last clip.

        Raises:
            UserError: there is neither.
        """
        if name not in self.classes and name not in self.clips:
            near = did_you_mean(name, (*self.classes, *self.clips))
            raise UserError(f"no class or clip {name!r} to drop{near} (classes: {', '.join(self.classes)})")
        gone = [
            clip == name or self.classes[label] == name for clip, label in zip(self.clips, self.labels, strict=True)
        ]
        return self.of_rows([row for row, drop in enumerate(gone) if not drop])

    def of_rows(self, kept: Sequence[int]) -> Supports:
        """Those alone, and their classes."""
        left = sorted({int(self.labels[row]) for row in kept})
        places = torch.tensor([left.index(int(self.labels[row])) for row in kept], dtype=torch.int64)
        return Supports(
            self.features[kept],
            places.to(self.labels.device),
            tuple(self.classes[label] for label in left),
            tuple(self.clips[row] for row in kept),
        )

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes them with `about`, plain values, whole or not at all.

        Raises:
            WriteError: the disk is full or the folder can't be written.
        """
        written = {"format": FORMAT, "classes": self.classes, "clips": self.clips, **about}
        tensors = {"features": self.features.cpu().contiguous(), "labels": self.labels.cpu().contiguous()}
        data = safetensors.torch.save(tensors, {KEY: json.dumps(written, ensure_ascii=False)})
        with replacing(path) as file:
            file.write(data)


def load_supports(path: Path) -> tuple[Supports, dict[str, Any]]:
    """What `Supports.save` wrote: the supports and what was said about them.

    Raises:
        UserError: no such file, damaged, not a classifier, or of another format.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            if about["format"] != FORMAT:
                raise UserError(f"{path}: a classifier of format {about['format']!r}, this version reads {FORMAT}")
            features, labels = file.get_tensor("features"), file.get_tensor("labels")
        supports = Supports(features, labels, tuple(map(str, about["classes"])), tuple(map(str, about["clips"])))
        sound = (
            features.ndim == 3
            and features.dtype == torch.float32
            and labels.dtype == torch.int64
            and len(features) == len(labels) == len(supports.clips) == len(set(supports.clips))
            and sorted(set(labels.tolist())) == list(range(len(set(supports.classes))))
            and len(set(supports.classes)) == len(supports.classes)
            and bool(features.isfinite().all())
        )
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such classifier") from error
    except OSError as error:
        raise UserError(f"{path}: the classifier can't be read: {said(error)}") from error
    except Exception as error:  # damaged files fail in safetensors and json in many ways
        raise UserError(f"{path}: not a classifier of soap-net, or damaged") from error
    if not sound:
        raise UserError(f"{path}: damaged: its features, labels, classes and clips don't fit each other")
    return supports, about
