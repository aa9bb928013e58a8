"""Reads a whole data set once, to find out before training what is missing, broken or cut short."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soap_net.data.clips import Clip, ClipInfo
from soap_net.data.loading import PerClip, load
from soap_net.data.splits import ClipSet, MissingClipsError, load_split
from soap_net.errors import ClipError, UserError, said
from soap_net.files import Appended

_COLUMNS = ("split", "classes", "clips", "per class", "frames", "size", "fps", "missing", "broken", "cut short")


@dataclass
class SplitReport:
    """One split: what its readable clips hold, and what is wrong with the others.

    ``missing`` are clips that the split file names and the data set lacks, ``broken`` the messages of those that
    cannot be read, ``cut`` what is left of those whose files are cut short, which count among the readable.
    """

    split: str
    clips_per_class: dict[str, int]
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    infos: list[ClipInfo] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every clip is there, whole, and can be read."""
        return not self.missing and not self.broken and not self.cut

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
            "cut_short": self.cut,
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
            str(len(self.cut)),
        )


@dataclass
class DataReport:
    """All splits that were read."""

    root: Path | tuple[Path, ...]
    splits: list[SplitReport]

    @property
    def sound(self) -> bool:
        """Whether every clip of every split is there, whole, and can be read."""
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
            "root": [*map(str, self.root)] if isinstance(self.root, tuple) else str(self.root),
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
            lines += [f"cut short in {report.split}: {left}" for left in report.cut]
        for pair, labels in self.shared_classes().items():
            named = ", ".join(labels[:5]) + (" ..." if len(labels) > 5 else "")
            lines.append(f"warning: {pair} share {len(labels)} classes ({named}), so that they are not unseen")
        missing = sum(len(report.missing) for report in self.splits)
        broken = sum(len(report.broken) for report in self.splits)
        cut = sum(len(report.cut) for report in self.splits)
        wrong = f"{missing} clips missing, {broken} broken, {cut} cut short"
        lines.append("every clip is there and can be read" if self.sound else wrong)
        return "\n".join(lines)


def _spread(values: Sequence[Any]) -> str:
    if not values:
        return "-"
    least, most = (
        "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" for value in (min(values), max(values))
    )
    return least if least == most else f"{least} to {most}"


def check_data(
    root: Path | tuple[Path, ...],
    splits: Mapping[str, Path | None],
    *,
    findings: Path | None = None,
    workers: int = 0,
    progress: bool = True,
) -> DataReport:
    """Reads every frame, which training may ask for, of every clip of ``splits``, once.

    Args:
        root: of the data set, or of each of several.
        splits: names to split files; None is the data set's own.
        findings: file for what each clip holds, or what is wrong with it: a JSON object a line, as they come. Clips
            that it says can be read are not read again until their file changes.
        workers: processes that read; 0 is this one.
        progress: show a bar where somebody watches.

    Raises:
        UserError: no data set or split there, a malformed split file, or ``findings`` is no such file. Missing,
            broken and cut clips are reported.
        WriteError: ``findings`` can't be written.
    """
    report = DataReport(root if isinstance(root, tuple) else Path(root), [])
    clip_sets: list[ClipSet] = []
    for split, split_file in splits.items():
        missing: list[str] = []
        try:
            clip_set = load_split(root, split, split_file, splits)
        except MissingClipsError as error:
            clip_set, missing = error.found, list(error.missing)
        counts = {label: len(clips) for label, clips in zip(clip_set.classes, clip_set.clips, strict=True)}
        clip_sets.append(clip_set)
        report.splits.append(SplitReport(split, counts, missing))
    clips = {_place(clip): clip for one in clip_sets for members in one.clips for clip in members}
    found = _read(clips, findings, workers, progress)
    for clip_set, split_report in zip(clip_sets, report.splits, strict=True):
        for clip in (clip for members in clip_set.clips for clip in members):
            result = found[_place(clip)]
            if isinstance(result, ClipError):
                split_report.broken.append(str(result))
                continue
            split_report.infos.append(result)
            if result.cut:
                split_report.cut.append(f"{clip.path / clip.member}: {result.cut}")
    return report


_Place = tuple[str, str]  # of a clip: its file, from the root of the system, and its member


def _place(clip: Clip) -> _Place:
    return os.path.abspath(clip.file), clip.member


def _read(
    clips: Mapping[_Place, Clip], findings: Path | None, workers: int, progress: bool
) -> dict[_Place, ClipInfo | ClipError]:
    found: dict[_Place, ClipInfo | ClipError] = {}
    if findings is not None:
        found.update(_known(findings, clips))
    left = [place for place in clips if place not in found]
    results = load(PerClip([clips[place] for place in left], Clip.check), workers)
    silent = None if progress else True  # None: silent where nobody watches
    notes = Appended(findings) if findings is not None else None
    try:
        bar = tqdm(
            results, desc="reading", unit="clip", total=len(clips), initial=len(found), leave=False, disable=silent
        )
        for place, result in zip(left, bar, strict=True):
            found[place] = result
            if notes is not None:
                wrong = {"broken": str(result)} if isinstance(result, ClipError) else asdict(result)
                note = {"path": place[0], "member": place[1], "changed": _changed(place[0]), **wrong}
                notes.write(json.dumps(note, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
                notes.flush()
    finally:
        if notes is not None:
            notes.close()
    return found


def _known(findings: Path, clips: Mapping[_Place, Clip]) -> dict[_Place, ClipInfo]:
    """What a file of findings says of those of the clips that can be read, and are as they were."""
    known: dict[_Place, ClipInfo] = {}
    try:
        lines = findings.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return known
    for number, line in enumerate(lines, 1):
        try:
            note = json.loads(line.decode("utf-8", "surrogateescape"))
            place = note["path"], note["member"]
            if "broken" in note or place not in clips or note["changed"] != _changed(place[0]):
                known.pop(place, None)
            else:
                size = note["height"], note["width"]
                known[place] = ClipInfo(note["frames"], *size, note["fps"], note.get("cut"))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                os.truncate(findings, findings.stat().st_size - len(line))  # it was written when the power failed
                break
            raise UserError(
                f"{findings}:{number}: not a finding of a check ({said(error)}); name another file"
            ) from error
    return known


def _changed(path: str) -> int | None:
    """When a file was last changed, in nanoseconds; None where it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
