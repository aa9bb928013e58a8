"""Reads a whole data set once, to find out before training what is missing or broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soap_net.data.clips import Clip, ClipError, ClipInfo
from soap_net.data.loading import PerClip, load
from soap_net.data.splits import ClipSet, MissingClipsError, load_split

_COLUMNS = ("split", "classes", "clips", "per class", "frames", "size", "fps", "missing", "broken")


@dataclass
class SplitReport:
    """One split: what its readable clips hold, and what is wrong with the others.

    ``missing`` are clips that the split file names and the data set lacks, ``broken`` the messages of those that
    cannot be read.
    """

    split: str
    clips_per_class: dict[str, int]
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    infos: list[ClipInfo] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every clip is there and can be read."""
        return not self.missing and not self.broken

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, the spread of frames, how many clips of each size and rate, and what is wrong."""
        frames = sorted(info.frames for info in self.infos)
        sizes = Counter(f"{info.width}x{info.height}" for info in self.infos)
        rates = Counter("none" if info.fps is None else f"{info.fps:.6g}" for info in self.infos)
        return {
            "split": self.split,
            "sound": self.sound,
            "classes": len(self.clips_per_class),
            "clips": sum(self.clips_per_class.values()),
            "clips_per_class": self.clips_per_class,
            "frames": {"least": frames[0], "median": frames[len(frames) // 2], "most": frames[-1]} if frames else None,
            "sizes": dict(sizes.most_common()),
            "fps": dict(rates.most_common()),
            "missing": self.missing,
            "broken": self.broken,
        }

    def row(self) -> tuple[str, ...]:
        """The split's line of the summary, a text for each of its columns."""
        counts = list(self.clips_per_class.values())
        return (
            self.split,
            str(len(counts)),
            str(sum(counts)),
            _spread(counts),
            _spread([info.frames for info in self.infos]),
            _spread([(info.width, info.height) for info in self.infos]),
            _spread([round(info.fps, 2) for info in self.infos if info.fps is not None]),
            str(len(self.missing)),
            str(len(self.broken)),
        )


@dataclass
class DataReport:
    """All splits that were read."""

    root: Path
    splits: list[SplitReport]

    @property
    def sound(self) -> bool:
        """Whether every clip of every split is there and can be read."""
        return all(report.sound for report in self.splits)

    def shared_classes(self) -> dict[str, list[str]]:
        """The classes that two splits have in common, by "split and split": few-shot splits should share none."""
        return {
            f"{one.split} and {two.split}": shared
            for one, two in combinations(self.splits, 2)
            if (shared := [label for label in one.clips_per_class if label in two.clips_per_class])
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "root": str(self.root),
            "sound": self.sound,
            "shared_classes": self.shared_classes(),
            "splits": [report.as_dict() for report in self.splits],
        }

    def summary(self) -> str:
        """A table, a row per split, and a line for everything that is wrong."""
        rows = [_COLUMNS, *(report.row() for report in self.splits)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for report in self.splits:
            lines += [f"missing in {report.split}: {name}" for name in report.missing]
            lines += [f"broken in {report.split}: {reason}" for reason in report.broken]
        for pair, labels in self.shared_classes().items():
            named = ", ".join(labels[:5]) + (" ..." if len(labels) > 5 else "")
            lines.append(f"warning: {pair} share {len(labels)} classes ({named}), so that they are not unseen")
        missing = sum(len(report.missing) for report in self.splits)
        broken = sum(len(report.broken) for report in self.splits)
        lines.append(
            "every clip is there and can be read" if self.sound else f"{missing} clips missing, {broken} broken"
        )
        return "\n".join(lines)


def _spread(values: Sequence[Any]) -> str:
    if not values:
        return "-"
    least, most = (
        "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" for value in (min(values), max(values))
    )
    return least if least == most else f"{least} to {most}"


def check_data(
    root: Path,
    splits: Mapping[str, Path | None],
    *,
    workers: int = 0,
    progress: bool = True,
) -> DataReport:
    """Reads every frame, which training may ask for, of every clip of ``splits``.

    Args:
        root: of the data set.
        splits: names to split files; None is the data set's own.
        workers: processes that read; 0 is this one.
        progress: show a bar where somebody watches.

    Raises:
        UserError: no data set or split there, or a malformed split file. Missing and broken clips are reported.
    """
    report = DataReport(Path(root), [])
    found: list[tuple[ClipSet, SplitReport]] = []
    for split, split_file in splits.items():
        missing: list[str] = []
        try:
            clip_set = load_split(root, split, split_file, splits)
        except MissingClipsError as error:
            clip_set, missing = error.found, list(error.missing)
        counts = {label: len(clips) for label, clips in zip(clip_set.classes, clip_set.clips, strict=True)}
        found.append((clip_set, SplitReport(split, counts, missing)))
        report.splits.append(found[-1][1])
    for clip_set, split_report in found:
        clips = [clip for members in clip_set.clips for clip in members]
        probes = load(PerClip(clips, Clip.check), workers)
        silent = None if progress else True  # None: silent where nobody watches
        for result in tqdm(probes, desc=f"reading {clip_set.split}", unit="clip", leave=False, disable=silent):
            if isinstance(result, ClipError):
                split_report.broken.append(str(result))
            else:
                split_report.infos.append(result)
    return report
