"""Packs a data set into one zip of frames at the size that is trained on: read several times as fast as its videos.

A pack holds, for each clip, a stored zip of its frames (``jump/01.zip``, its comment ``{"fps": 25.0}``, with ``cut`` of
a video that was cut short), and the splits' lists (``splits/train.txt``); unpacked, it is a data set of an ordinary
layout. Its comment says what it is.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, load
from soap_net.data.splits import SPLITS, ClipSet, MissingClipsError, load_split
from soap_net.data.transforms import resized
from soap_net.data.zips import PACK, PACK_VERSION
from soap_net.errors import ClipError, UserError
from soap_net.files import Appended, publish, writing

_SLACK = 1e-3  # seconds by which containers round the times of frames


@dataclass(frozen=True)
class Packing:
    """How clips are packed: the short side of larger frames becomes ``short``; JPEG of ``quality``, or lossless PNG;
    all frames, or at most ``fps`` a second."""

    short: int = 256
    quality: int = 90
    png: bool = False
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.short < 1:
            raise UserError(f"the short side is at least 1 pixel, not {self.short}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"a JPEG's quality is 1 to 100, not {self.quality}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"frames a second are more than 0, not {self.fps:g}")

    def encode(self, frame: Tensor) -> bytes:
        """An image file of uint8 ``(3, H, W)``."""
        frame = resized(frame[None], min(self.short, *frame.shape[1:]))[0]
        stream = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))
        image.save(stream, "PNG") if self.png else image.save(stream, "JPEG", quality=self.quality)
        return stream.getvalue()

    def numbers(self, clip: Clip) -> Sequence[int]:
        """The frames to keep: all, or those shown at each of ``fps`` moments a second. Raises ClipError."""
        rate, frames = clip.fps(), clip.num_frames()
        if self.fps is None or rate is None:
            return range(frames)
        seconds = np.arange(frames) / rate
        with suppress(ClipError):
            seconds = clip.video().seconds()
        moments = np.arange(0, seconds[-1] + 1 / rate - _SLACK, 1 / self.fps)
        found: list[int] = np.unique(np.searchsorted(seconds, moments + _SLACK, side="right") - 1).tolist()
        return found


@dataclass
class PackReport:
    """What was packed into ``path``, ``cut`` short or whole, and the clips that it lacks: missing in the data set, or
    broken."""

    path: Path
    clips: int = 0
    frames: int = 0
    unrated: int = 0  # clips without a frame rate, all of whose frames were kept
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line for each clip that is not in the pack or not whole, and one on the others."""
        lines = [f"missing: {name}" for name in self.missing] + [f"broken: {reason}" for reason in self.broken]
        lines += [f"cut short: {left}" for left in self.cut]
        if self.unrated:
            lines.append(f"{self.unrated} clips have no frame rate: all of their frames are in the pack")
        wrong = f"; {len(self.missing)} clips missing, {len(self.broken)} broken, {len(self.cut)} cut short"
        lacks = "" if self.sound else wrong
        size = self.path.stat().st_size / 1e6
        return "\n".join(
            [*lines, f"packed: {self.path} ({self.clips} clips, {self.frames} frames, {size:.1f} MB{lacks})"]
        )

    @property
    def sound(self) -> bool:
        """Whether every clip is in the pack, and whole."""
        return not self.missing and not self.broken and not self.cut


def pack_data(
    root: Path,
    out: Path,
    splits: Mapping[str, Path | None],
    how: Packing | None = None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> list[PackReport]:
    """Packs the data set in ``root`` into the file ``out``; or, where that does not end in .zip, each split into a
    file of the folder ``out``. What was begun before is gone on with.

    Args:
        root: of the data set, in any layout.
        out: to write; it is there whole, or not at all.
        splits: names to split files; None is the data set's own.
        how: size and kind of the images.
        workers: processes that read; 0 is this one.
        progress: show a bar where somebody watches.

    Raises:
        UserError: there is a file at ``out``, or one begun otherwise; no data set or split at ``root``; no clip of it
            can be read; or what was written can't be read back. Missing, broken and cut clips are reported.
        WriteError: the disk is full, or the folder can't be written; the next call goes on from there.
    """
    how = how or Packing()
    sets: list[ClipSet] = []
    missing: dict[str, list[str]] = {}
    for split, split_file in splits.items():
        try:
            sets.append(load_split(Path(root), split, split_file, splits))
        except MissingClipsError as error:
            sets.append(error.found)
            missing[split] = [f"{name} ({split})" for name in error.missing]
    packs = {out: sets} if out.suffix.lower() == ".zip" else {out / f"{one.split}.zip": [one] for one in sets}
    if all(one.form is None and one.clips == sets[0].clips for one in sets[1:]) and out not in packs and len(sets) > 1:
        packs = {out / "all.zip": sets}  # the same for all of them
    reports = []
    for path, inside in packs.items():
        report = PackReport(path, missing=[name for one in inside for name in missing.get(one.split, [])])
        _pack(path, _Plan.of(path, inside), how, report, workers, progress)
        reports.append(report)
    return reports


@dataclass(frozen=True)
class _Plan:
    """What a pack is to hold: clips by their names in it, and of each split that has a list the names."""

    clips: dict[str, Clip]
    lists: dict[str, list[str]]
    forms: dict[str, str]

    @classmethod
    def of(cls, path: Path, sets: Sequence[ClipSet]) -> _Plan:
        if path.stem in SPLITS and [one.split for one in sets] != [path.stem]:
            raise UserError(
                f"{path}: a pack of that name would be taken for one of {path.stem} alone; name it otherwise"
            )
        listed = any(one.form is not None for one in sets)
        apart = not listed and any(one.clips != sets[0].clips for one in sets)
        clips: dict[str, Clip] = {}
        lists: dict[str, list[str]] = {}
        for one in sets:
            names = lists.setdefault(one.split, [])
            for label, members in zip(one.classes, one.clips, strict=True):
                for clip in members:
                    wanted = f"{one.split}/" * apart + f"{label}/{clip.name.rpartition('/')[2]}"
                    same = (f"{wanted} ({count})" if count > 1 else wanted for count in itertools.count(1))
                    name = next(name for name in same if clips.setdefault(name, clip) == clip)
                    names.append(name)
        return cls(clips, lists if listed else {}, {one.split: one.form or "" for one in sets} if listed else {})


def _pack(path: Path, plan: _Plan, how: Packing, report: PackReport, workers: int, progress: bool) -> None:
    if path.exists():
        raise UserError(f"{path} is there already; delete it to pack anew")
    told = {"format": PACK, "version": PACK_VERSION, **asdict(how), "forms": plan.forms}
    begun = _Begun(path, {**told, "clips": zlib.crc32(json.dumps([[*plan.clips], plan.lists]).encode())})
    left = [name for name in plan.clips if name not in begun.notes]
    silent = None if progress else True  # None: silent where nobody watches
    with begun, tqdm(desc=path.name, unit="clip", total=len(plan.clips), leave=False, disable=silent) as bar:
        bar.update(len(begun.notes))
        packed = load(PerClip([plan.clips[name] for name in left], partial(_pack_clip, how=how)), workers)
        for name, result in zip(left, packed, strict=True):
            if isinstance(result, ClipError):
                report.broken.append(str(result))
            else:
                begun.add(name, *result)
            bar.update()
        if not begun.notes:
            raise UserError(
                f"{path}: no clip can be read" + (f"; the first: {report.broken[0]}" if report.broken else "")
            )
        lists = {split: [name for name in names if name in begun.notes] for split, names in plan.lists.items()}
        begun.finish(json.dumps(told).encode(), {f"splits/{split}.txt": names for split, names in lists.items()})
    report.clips = len(begun.notes)
    report.frames = sum(note["frames"] for note in begun.notes.values())
    cut = {name: note["cut"] for name, note in begun.notes.items() if note.get("cut")}
    report.cut = [f"{plan.clips[name].path / plan.clips[name].member}: {there}" for name, there in cut.items()]
    report.unrated = sum(note["fps"] is None for note in begun.notes.values()) if how.fps else 0


def _pack_clip(clip: Clip, how: Packing) -> tuple[bytes, dict[str, Any]]:
    """A clip's zip, and what to note of it. Raises ClipError."""
    numbers, rate, cut = how.numbers(clip), clip.fps(), clip.cut()
    fps = rate if rate is None or how.fps is None else min(rate, how.fps)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for number, frame in zip(numbers, clip.each(numbers), strict=True):
            file.writestr(zipfile.ZipInfo(f"{number + 1:08d}.{'png' if how.png else 'jpg'}"), how.encode(frame))
        told = {name: value for name, value in (("fps", fps), ("cut", cut)) if value}
        file.comment = json.dumps(told).encode() if told else b""
    return stream.getvalue(), {"frames": len(numbers), "fps": fps, "cut": cut}


class _Begun:
    """A pack that is being written, beside where it is to be: its clips, and ``notes`` on those that are in it."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.notes: dict[str, dict[str, Any]] = {}
        self._end = 0
        data, notes = (path.with_name(f".{path.name}.{kind}") for kind in ("packing", "notes"))
        lines = notes.read_bytes().splitlines(keepends=True) if data.exists() and notes.exists() else []
        if lines and json.loads(lines[0] if lines[0].endswith(b"\n") else b"null") not in (head, None):
            raise UserError(f"{notes}: packing was begun with other options or clips; take those, or delete {data}")
        size, kept = data.stat().st_size if lines else 0, b"".join(lines[:1])
        with suppress(ValueError, KeyError):  # where power fails, the end of either file may be lost
            for line in lines[1:]:
                note = json.loads(line)
                if not line.endswith(b"\n") or note["end"] > size:
                    break
                self.notes[note.pop("name")] = note
                self._end, kept = note["end"], kept + line
        for file, length in ((data, self._end), (notes, len(kept) if self.notes else 0)):
            with writing(file), suppress(FileNotFoundError):
                os.truncate(file, length)
        self._data, self._notes = Appended(data), Appended(notes)
        if not self.notes:
            self._notes.write(_line(head))

    def __enter__(self) -> _Begun:
        return self

    def __exit__(self, *exception: object) -> None:
        self._data.close()
        self._notes.close()

    def add(self, name: str, content: bytes, about: dict[str, Any]) -> None:
        """Writes a clip, and then its note, with what is to be noted ``about`` it. Raises WriteError."""
        info = zipfile.ZipInfo(f"{name}.zip")
        info.CRC, info.file_size, info.compress_size = zlib.crc32(content), len(content), len(content)
        block = info.FileHeader() + content
        self._data.write(block)
        self._data.flush()
        note = {"crc": info.CRC, "size": len(content), "begin": self._end, "end": self._end + len(block)}
        self.notes[name] = {**note, **about}
        self._end += len(block)
        self._notes.write(_line({"name": name, **self.notes[name]}))
        self._notes.flush()

    def finish(self, comment: bytes, lists: Mapping[str, Sequence[str]]) -> None:
        """Adds the lists and the directory, reads all of it back, and puts it in its place. Raises UserError."""
        with writing(self._data.path), open(self._data.path, "r+b") as file:
            file.seek(self._end)
            with zipfile.ZipFile(file, "w") as pack:
                pack.filelist = [_info(name, note) for name, note in self.notes.items()]
                pack.comment = comment
                for name, clips in lists.items():
                    pack.writestr(zipfile.ZipInfo(name), "".join(f"{clip}\n" for clip in clips))
            file.flush()
            os.fsync(file.fileno())
            with zipfile.ZipFile(file) as pack:
                try:
                    damaged = pack.testzip()
                except (OSError, zipfile.BadZipFile) as error:
                    damaged = str(error)
        if damaged:
            raise UserError(f"{self._data.path}: what was written reads back otherwise ({damaged}); delete it")
        publish(self._data.path, self.path)
        self._notes.path.unlink()


def _info(name: str, note: dict[str, Any]) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.zip")
    info.CRC, info.file_size, info.compress_size = note["crc"], note["size"], note["size"]
    info.header_offset = note["begin"]
    return info


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
