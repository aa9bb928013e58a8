"""Real data sets made ready for experiments: clips decoded once into a zip of small frames, classes dealt to folds."""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_jpeg
from tqdm import tqdm

from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, cores, load
from soap_net.data.splits import SPLITS, ClipSet, MissingClipsError, load_split
from soap_net.data.transforms import ClipLoader, FrameSampling
from soap_net.errors import ClipError, UserError
from soap_net.files import replacing, write_text

FOLDS = 2
"""With two, as many sets as can be have five classes in a fold; a net trains on one half of them and is tested on the
other."""
FRAMES, SIDE, QUALITY = 16, 112, 90
"""What is kept of a clip: at most so many frames, evenly spaced, a centred square of so many pixels, as JPEGs."""


def packed(root: Path, folder: Path) -> Path:
    """The zip in `folder` that `pack` makes of a data set; one that tells no splits apart stands for itself."""
    root = root.absolute()
    return (
        root
        if root.suffix == ".zip" and not _divided(root)
        else folder / f"{root.stem if root.suffix == '.zip' else root.name}.zip"
    )


def _divided(root: Path) -> bool:
    """Whether the training split lacks clips of the others."""
    try:
        return len(_whole(root)) > sum(map(len, load_split(root, "train").clips))
    except UserError:
        return True


def pack(root: Path, path: Path) -> None:
    """Writes the clips of all splits of the data set in `root` as one zip, ``<class>/<video>/0000.jpg``, if need be.

    Clips that can't be read are named on stderr and left out; so named are those that are cut short.

    Raises:
        UserError: no data set there, or clips of its lists are missing.
    """
    if path.exists():
        return
    clips = _whole(root)
    reading = load(PerClip(clips, _small), cores())
    with replacing(path) as file, zipfile.ZipFile(file, "w") as pack, closing(reading):
        for clip, found in zip(clips, tqdm(reading, f"packing {root.name}", len(clips), unit="clip"), strict=True):
            if isinstance(found, ClipError):
                tqdm.write(f"warning: {found}; it is left out", file=sys.stderr)
                continue
            frames, remark = found
            if remark:
                tqdm.write(f"warning: {remark}", file=sys.stderr)
            for number, frame in enumerate(frames):
                name = zipfile.ZipInfo(f"{clip.name}/{number:04d}.jpg")  # without the time: the same bytes each time
                pack.writestr(name, encode_jpeg(frame, QUALITY).numpy().tobytes())


def _small(clip: Clip) -> tuple[Tensor, str | None]:
    frames = min(FRAMES, clip.num_frames())
    return ClipLoader(FrameSampling(frames), resize=SIDE, crop=SIDE)(clip), clip.remark()


def _whole(root: Path) -> list[Clip]:
    """The clips of all splits, each once."""
    found: dict[str, Clip] = {}
    failures: list[UserError] = []
    for split in SPLITS:
        try:
            clips = load_split(root, split)
        except MissingClipsError:
            raise
        except UserError as error:  # not every set has all splits
            failures.append(error)
        else:
            found.update({clip.name: clip for members in clips.clips for clip in members})
    if not found:
        raise failures[0]
    return list(found.values())


def deal(classes: Sequence[str]) -> list[list[str]]:
    """The test classes of each fold: every class "set/class" in one, each set spread over all as evenly as can be.

    Which of a set's classes fall into the same fold hangs on nothing but their names.
    """
    sets = dict.fromkeys(name.partition("/")[0] for name in classes)
    order = [
        name
        for one in sets
        for name in sorted((c for c in classes if c.partition("/")[0] == one), key=lambda c: zlib.crc32(c.encode()))
    ]
    return [order[fold::FOLDS] for fold in range(FOLDS)]


def fold_list(folder: Path, fold: int, split: str) -> Path:
    """The split file of a fold's "train" or "test" classes."""
    return folder / f"fold{fold}-{split}.txt"


def write_folds(packs: tuple[Path, ...], folder: Path) -> None:
    """Writes the split files of all folds of packed data sets.

    Raises:
        UserError: a set has too few classes for two on each side of every fold.
    """
    clips = load_split(packs, "train")
    for name, own in by_set(clips):
        if len(own.classes) < 2 * FOLDS:
            raise UserError(
                f"{name}: {len(own.classes)} classes can't be dealt to {FOLDS} folds: each needs 2 of a set"
            )
    lines = {
        label: "".join(f"{label}/{clip.name.rpartition('/')[2]}\n" for clip in members)
        for label, members in zip(clips.classes, clips.clips, strict=True)
    }
    for fold, test in enumerate(deal(clips.classes)):
        write_text(fold_list(folder, fold, "test"), "".join(lines[label] for label in clips.classes if label in test))
        rest = "".join(lines[label] for label in clips.classes if label not in test)
        write_text(fold_list(folder, fold, "train"), rest)


def by_set(clips: ClipSet) -> Iterator[tuple[str, ClipSet]]:
    """The data sets in `clips`, by name."""
    for own in clips.by_set:
        name = clips.classes[own[0]].partition("/")[0]
        yield name, ClipSet(clips.split, tuple(clips.classes[i] for i in own), tuple(clips.clips[i] for i in own))
