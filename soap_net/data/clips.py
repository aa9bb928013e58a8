"""One interface to a clip, "these frames as a uint8 tensor", for video files, folders of images and zips of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from soap_net.data.images import Folder
from soap_net.data.videos import Video
from soap_net.data.zips import Zipped, archive
from soap_net.errors import ClipError, said


@dataclass(frozen=True)
class ClipInfo:
    """What a clip holds; ``fps`` is None where nothing says. ``cut``: what is left of a file that is cut short."""

    frames: int
    height: int
    width: int
    fps: float | None
    cut: str | None = None


@dataclass(frozen=True, init=False, slots=True)
class Clip:
    """A video file, a folder of images, or images in a zip (those directly in its folder ``member``, or all of them).

    ``name`` ("class/video") is for messages. Frames are numbered from 0 in the order shown: a video's as a full
    decode gives them, images by natural order of their names (``2.jpg`` before ``10.jpg``). What is learnt about the
    file (its images, its frame count) is kept per process until the file changes.
    """

    file: str  # a text, as data sets have hundreds of thousands of clips, and a Path takes microseconds to make
    member: str
    name: str

    def __init__(self, path: str | os.PathLike[str], *, member: str = "", name: str = "") -> None:
        if not name:
            shown = Path(path, member)
            name = f"{shown.parent.name}/{shown.stem}"
        object.__setattr__(self, "file", os.fspath(path))
        object.__setattr__(self, "member", member)
        object.__setattr__(self, "name", name)

    @property
    def path(self) -> Path:
        """The video file, folder or zip."""
        return Path(self.file)

    def num_frames(self) -> int:
        """How many frames the clip has, at least 1. Raises ClipError."""
        return self._source().num_frames()

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames ``indices`` (any order, repeats allowed) as uint8 RGB ``(len(indices), 3, H, W)``, channels last.

        Videos with a display matrix are turned and mirrored as players show them, alpha is dropped, grey becomes RGB.
        Raises ClipError where the file is missing or broken, a frame does not exist, or frames differ in size. Of a
        damaged video the frames are the same in every read and process, or it is a ClipError.
        """
        if not indices:
            raise ClipError(self._shown(), "no frame numbers were asked for")
        source = self._source()
        wanted = sorted(set(indices))
        count = source.num_frames()
        if wanted[0] < 0 or wanted[-1] >= count:
            outside = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise ClipError(self._shown(), f"frame {outside} was asked for, and it has frames 0 to {count - 1}")
        frames = source.read(wanted)
        self._check_sizes({(frame.shape[1], frame.shape[2]) for frame in frames})
        place = {number: position for position, number in enumerate(wanted)}
        # Decoders give pixels with their channels together; resizing is fastest so, and cropping leaves less to turn.
        return torch.stack([frames[place[number]].permute(1, 2, 0) for number in indices]).permute(0, 3, 1, 2)

    def fps(self) -> float | None:
        """Frames a second; None where nothing says. Raises ClipError."""
        return self._source().fps()

    def cut(self) -> str | None:
        """What is left of a video whose file is cut short, in words; None of others. Raises ClipError."""
        return self._source().cut()

    def remark(self) -> str | None:
        """That the clip is cut short, in a line that names it; None of others. Raises ClipError."""
        return (left := self.cut()) and f"{self._shown()}: the file is cut short: {left}"

    def each(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The frames ``indices`` (ascending, distinct), each uint8 ``(3, H, W)``, as `read` gives them; one is kept.

        Raises ClipError as `read` does.
        """
        source = self._source()
        sizes = set()
        for frame in source.each(indices) if isinstance(source, Video) else (source.read([n])[0] for n in indices):
            sizes.add((frame.shape[1], frame.shape[2]))
            self._check_sizes(sizes)
            yield frame

    def probe(self) -> ClipInfo:
        """Frame count, size and rate; decodes the first frame. Raises ClipError."""
        source = self._source()
        frames = source.num_frames()
        _, height, width = source.read([0])[0].shape
        return ClipInfo(frames, height, width, source.fps(), source.cut())

    def video(self) -> Video:
        """The clip as a video, to read by time or from end to end. Raises ClipError where it is images."""
        source = self._source()
        if not isinstance(source, Video):
            raise ClipError(self._shown(), "images have no times: it takes a video file")
        return source

    def check(self) -> ClipInfo:
        """As `probe`, once every frame has been decoded. Raises ClipError where any `read` may."""
        source = self._source()
        info = self.probe()
        if isinstance(source, Video):
            sizes = source.sizes()
        else:
            sizes = {(frame.shape[1], frame.shape[2]) for n in range(info.frames) for frame in source.read([n])}
        self._check_sizes(sizes)
        return info

    def _check_sizes(self, sizes: set[tuple[int, int]]) -> None:
        if len(sizes) > 1:
            found = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise ClipError(self._shown(), f"its frames differ in size: {found}")

    def _shown(self) -> Path:
        return Path(self.file, self.member)

    def _source(self) -> _Source:
        try:
            stat = os.stat(self.file)
        except OSError as error:
            raise ClipError(self._shown(), said(error)) from error
        return _open_source(self.file, self.member, stat.st_mtime_ns, stat.st_size)


class _Source(Protocol):
    def num_frames(self) -> int: ...

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        """The frames ``wanted`` (ascending, distinct, in range), each uint8 ``(3, H, W)``."""

    def fps(self) -> float | None: ...

    def cut(self) -> str | None:
        """What is left of a file that is cut short, in words; None of others."""


@lru_cache(maxsize=8192)
def _open_source(file: str, member: str, mtime_ns: int, size: int) -> _Source:
    path = Path(file)
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() == ".zip":
        return Zipped(path, member, archive(path, mtime_ns, size))
    if size == 0:
        raise ClipError(path, "the file is empty (0 bytes)")
    return Video(path)
