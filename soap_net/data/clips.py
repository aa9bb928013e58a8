"""One interface to a clip, "these frames as a uint8 tensor", for video files, folders of images and zips of images."""

from __future__ import annotations

import io
import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from soap_net.errors import ClipError, said

try:  # a third faster than Pillow, and due to leave torchvision
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".asf",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    }
)
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class ClipInfo:
    """What a clip holds; ``fps`` is None for images."""

    frames: int
    height: int
    width: int
    fps: float | None


@dataclass(frozen=True)
class Clip:
    """A video file, a folder of images, or images in a zip (those directly in its folder ``member``, or all of them).

    ``name`` ("class/video") is for messages. Frames are numbered from 0 in the order shown: a video's as a full
    decode gives them, images by natural order of their names (``2.jpg`` before ``10.jpg``). What is learnt about the
    file (its images, its frame count) is kept per process until the file changes.
    """

    path: Path
    _: KW_ONLY
    member: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            shown = Path(self.path, self.member)
            object.__setattr__(self, "name", f"{shown.parent.name}/{shown.stem}")

    def num_frames(self) -> int:
        """How many frames the clip has, at least 1. Raises ClipError."""
        return self._source().num_frames()

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames ``indices`` (any order, repeats allowed) as uint8 RGB ``(len(indices), 3, H, W)``, channels last.

        Videos with rotation metadata are turned upright, alpha is dropped, grey becomes RGB. Raises ClipError where
        the file is missing or broken, a frame does not exist, or frames differ in size.
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
        sizes = {frame.shape for frame in frames}
        if len(sizes) > 1:
            found = " and ".join(f"{width}x{height}" for _, height, width in sorted(sizes))
            raise ClipError(self._shown(), f"its frames differ in size: {found}")
        place = {number: position for position, number in enumerate(wanted)}
        # Decoders give pixels with their channels together; resizing is fastest so, and cropping leaves less to turn.
        return torch.stack([frames[place[number]].permute(1, 2, 0) for number in indices]).permute(0, 3, 1, 2)

    def probe(self) -> ClipInfo:
        """Frame count, size and rate; decodes the first frame. Raises ClipError."""
        source = self._source()
        frames = source.num_frames()
        _, height, width = source.read([0])[0].shape
        return ClipInfo(frames, height, width, source.fps())

    def _shown(self) -> Path:
        return Path(self.path, self.member)

    def _source(self) -> _Source:
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise ClipError(self._shown(), said(error)) from error
        return _open_source(self.path, self.member, stat.st_mtime_ns, stat.st_size)


class _Source(Protocol):
    def num_frames(self) -> int: ...

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        """The frames ``wanted`` (ascending, distinct, in range), each uint8 ``(3, H, W)``."""

    def fps(self) -> float | None: ...


@lru_cache(maxsize=8192)
def _open_source(path: Path, member: str, mtime_ns: int, size: int) -> _Source:
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() == ".zip":
        return _Zipped(path, member, archive(path, mtime_ns, size))
    if size == 0:
        raise ClipError(path, "the file is empty (0 bytes)")
    return _Video(path)


# Images: folders and zips


class _Folder:
    def __init__(self, path: Path) -> None:
        try:
            names = [entry.name for entry in os.scandir(path) if is_image(entry.name)]
        except OSError as error:
            raise ClipError(path, said(error)) from error
        if not names:
            raise ClipError(path, f"the folder holds no images ({_listed(IMAGE_SUFFIXES)})")
        self.path = path
        self.names = in_natural_order(names)

    def num_frames(self) -> int:
        return len(self.names)

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        frames = []
        for number in wanted:
            path = self.path / self.names[number]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ClipError(path, said(error)) from error
            frames.append(_decode_image(data, path))
        return frames

    def fps(self) -> float | None:
        return None


_Entries = NDArray[np.void]  # of _ENTRY, a row per image
_ENTRY = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")])


class Archive:
    """The images of a zip by folder, in natural order: offsets only, as data sets have millions of frames."""

    def __init__(self, path: Path) -> None:
        members: dict[str, dict[str, zipfile.ZipInfo]] = {}
        try:
            with zipfile.ZipFile(path) as opened:
                for info in opened.infolist():
                    folder, _, name = _zip_name(info).rpartition("/")
                    if is_image(name) and not folder.startswith("__MACOSX"):
                        members.setdefault(folder, {})[name] = info
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ClipError(path, f"not a readable zip ({error})") from error
        self.path = path
        self.folders: dict[str, _Entries] = {}
        for folder in in_natural_order(members):
            infos = members[folder]
            chosen = [infos[name] for name in in_natural_order(infos)]
            self.folders[folder] = np.array(
                [(i.header_offset, i.compress_size, i.CRC, i.compress_type, i.flag_bits) for i in chosen], dtype=_ENTRY
            )


@lru_cache(maxsize=64)
def archive(path: Path, mtime_ns: int, size: int) -> Archive:
    """The index of the zip at ``path`` in its state of that time and size. Raises ClipError."""
    return Archive(path)


class _Zipped:
    def __init__(self, path: Path, member: str, index: Archive) -> None:
        folder = member.strip("/")
        if folder:
            entries = index.folders.get(folder)
        else:
            entries = np.concatenate(list(index.folders.values())) if index.folders else None
        self.path = path
        self.shown = path / folder
        if entries is None:
            raise ClipError(self.shown, f"the zip holds no images there ({_listed(IMAGE_SUFFIXES)})")
        self.entries = entries

    def num_frames(self) -> int:
        return len(self.entries)

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        frames = []
        try:
            # Opened for each read: a handle kept across the fork of a loader's worker would share its file position.
            with open(self.path, "rb") as file:
                for number in wanted:
                    frames.append(_decode_image(self._member(file, self.entries[number], number), self.shown, number))
        except OSError as error:
            raise ClipError(self.shown, str(error)) from error
        return frames

    def _member(self, file: io.BufferedReader, entry: np.void, number: int) -> bytes:
        file.seek(int(entry["offset"]))
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ClipError(self.shown, f"frame {number} is not where the zip's directory says")
        if entry["flags"] & 1:
            raise ClipError(self.shown, f"frame {number} is encrypted")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        data = file.read(int(entry["stored"]))
        if entry["method"] == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise ClipError(self.shown, f"frame {number} cannot be unpacked ({error})") from error
        elif entry["method"] != zipfile.ZIP_STORED:
            raise ClipError(self.shown, f"frame {number} is packed by a method other than store and deflate")
        if zlib.crc32(data) != entry["crc"]:
            raise ClipError(self.shown, f"frame {number} is damaged (its checksum differs)")
        return data

    def fps(self) -> float | None:
        return None


def _zip_name(info: zipfile.ZipInfo) -> str:
    # Many tools store UTF-8 without setting the flag that says so, and Python then reads it as cp437.
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


# JPEG and WebP by their first bytes, whatever the name says. Not PNG: a damaged one ends the process in torchvision.
_FOR_TORCHVISION = re.compile(rb"\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


def _decode_image(data: bytes, path: Path, number: int | None = None) -> Tensor:
    frame = "" if number is None else f"frame {number}: "
    if not data:
        raise ClipError(path, f"{frame}the image is empty (0 bytes)")
    if decode_image is not None and _FOR_TORCHVISION.match(data):
        # A broken image is left to Pillow, which says in words what is wrong.
        with suppress(RuntimeError):
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.verify()  # a PNG's checksums, which decoding does not look at
        with Image.open(io.BytesIO(data)) as opened:
            opened.info.pop("transparency", None)  # a palette's would be warned of, and is dropped anyway
            if opened.mode.startswith("I;16"):
                grey = (np.array(opened) >> 8).astype(np.uint8)
                pixels = np.repeat(grey[..., None], 3, -1)
            else:
                pixels = np.array(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if "cannot identify" in str(error) else str(error)
        raise ClipError(path, f"{frame}the image cannot be decoded ({reason})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_image(name: str) -> bool:
    """Whether a file of that name is a frame; hidden files (``._1.jpg`` of macOS) are not."""
    return not name.startswith(".") and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sort key that orders runs of digits by value; one form for composed and decomposed letters."""
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", text))
    return tuple((int(part), part) if position % 2 else (-1, part) for position, part in enumerate(parts))


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted by ``natural``; numbers padded to one length, as frames mostly are, take a tenth of the time."""
    plain = sorted(names)
    if plain and len({*map(len, plain)}) == 1:
        start = len(os.path.commonprefix([plain[0], plain[-1]]))  # noqa: RUF071 (by character is what is meant)
        end = plain[0].rfind(".")
        suffix = plain[0][end:]
        if all(name.isascii() and name[start:end].isdecimal() and name.endswith(suffix) for name in plain):
            return plain
    return sorted(plain, key=natural)


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))


# Videos

# Codecs of which every packet is one frame. Others (VP8 with its hidden frames) are counted and read by decoding.
_FRAME_PER_PACKET = frozenset(
    {
        "av1",
        "dnxhd",
        "ffv1",
        "flv",
        "h263",
        "h264",
        "hevc",
        "huffyuv",
        "libdav1d",
        "mjpeg",
        "mpeg1video",
        "mpeg2video",
        "mpeg4",
        "png",
        "prores",
        "qtrle",
        "rawvideo",
        "vp9",
        "wmv1",
        "wmv2",
    }
)
# Decoders that leave out frames no other frame is predicted from, where that is asked packet by packet.
_SKIPPING = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
# A seek empties the decoder's pipeline, and costs about as much as decoding this many frames in vain.
_SEEK_COST = 8


@dataclass(frozen=True)
class _Timeline:
    """Where every packet is one frame: the frames' presentation times, ascending, and where decoding can start."""

    pts: NDArray[np.int64]
    keys: NDArray[np.int64]  # frame numbers of the keyframes that nothing shown later looks behind, ascending
    key_times: NDArray[np.int64]  # the time to seek to for each of them


@dataclass(frozen=True)
class _Layout:
    frames: int
    fps: float | None
    timeline: _Timeline | None  # None: only decoding from the start tells which frame is which


class _Video:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: _Layout | None = None

    def num_frames(self) -> int:
        return self._layout().frames

    def fps(self) -> float | None:
        return self._layout().fps

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        timeline = self._layout().timeline
        frames = None if timeline is None else self._read_by_time(timeline, wanted)
        return self._read_by_count(wanted) if frames is None else frames

    def _layout(self) -> _Layout:
        if self._known is None:
            self._known = self._scan()
        return self._known

    def _scan(self) -> _Layout:
        """Reads the packets without decoding them; decodes (to count) only where packets do not tell the frames."""
        pts: list[int] = []
        keys: list[tuple[int, int]] = []
        packets = 0
        regular = True
        self._check_length()
        with self._opened() as (container, stream):
            formats = container.format.name.split(",")
            codec = stream.codec_context
            sought_by_pts = not {"mov", "matroska"}.isdisjoint(formats)
            for packet in container.demux(stream):
                if packet.size == 0:
                    # The packet at the end, which has no time, flushes the decoder; others are frames an AVI dropped.
                    regular = regular and packet.dts is None
                    continue
                if packet.is_corrupt:
                    raise ClipError(self.path, f"the file is damaged or cut short after {_counted(packets)}")
                packets += 1
                if packet.pts is None or packet.is_discard:
                    regular = False
                    continue
                pts.append(packet.pts)
                if packet.is_keyframe and (codec.name != "h264" or _starts_anew(bytes(packet), codec.extradata)):
                    keys.append((packet.pts, packet.pts if sought_by_pts or packet.dts is None else packet.dts))
            if packets == 0:
                raise ClipError(self.path, "the video stream holds no frames")
            if "mov" in formats and regular and packets < stream.frames:
                raise ClipError(self.path, f"the file is cut short: {packets} of its {stream.frames} frames are there")
            # AVI stores no presentation times, and those that FFmpeg makes up are wrong where frames are reordered.
            # MPEG program and elementary streams store few or none; the others are made up anew after a seek.
            untimed = not {"mpeg", "mpegvideo"}.isdisjoint(formats) or ("avi" in formats and codec.has_b_frames)
            timed = not untimed and codec.name in _FRAME_PER_PACKET
            fps = float(stream.average_rate) if stream.average_rate else None
        shown = np.unique(np.array(pts, dtype=np.int64))
        if not (regular and timed and len(shown) == packets and keys and keys[0][0] == shown[0]):
            return _Layout(self._count(), fps, None)
        key_pts, key_times = np.array(sorted(keys), dtype=np.int64).T
        return _Layout(packets, fps, _Timeline(shown, np.searchsorted(shown, key_pts), key_times))

    def _check_length(self) -> None:
        # FFmpeg reads a Matroska or WebM file that is cut short without a word, as a shorter clip.
        try:
            with open(self.path, "rb") as file:
                end = _matroska_end(file.read(4096))
                size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ClipError(self.path, said(error)) from error
        if end is not None and size < end:
            raise ClipError(self.path, f"the file is cut short: {size} of its {end} bytes are there")

    def _count(self) -> int:
        with self._opened() as (container, stream):
            frames = sum(1 for _ in container.decode(stream))
        if frames == 0:
            raise ClipError(self.path, "no frame of the video stream can be decoded")
        return frames

    def _read_by_time(self, timeline: _Timeline, wanted: Sequence[int]) -> list[Tensor] | None:
        """Seeks to the keyframe before each group of wanted frames; None where the decoder's times do not fit."""
        start_of = np.searchsorted(timeline.keys, wanted, side="right") - 1
        found: list[Tensor] = []
        with self._opened() as (container, stream):
            first = 0
            while first < len(wanted):
                # One group, decoded in one go, up to where skipping ahead to a later keyframe is worth a seek.
                last = first + 1
                while last < len(wanted) and timeline.keys[start_of[last]] <= wanted[last - 1] + _SEEK_COST:
                    last += 1
                if start_of[first] > 0:
                    container.seek(int(timeline.key_times[start_of[first]]), stream=stream)
                group = self._decode_times(container, stream, [int(t) for t in timeline.pts[list(wanted[first:last])]])
                if group is None:
                    return None
                found += group
                first = last
        return found

    def _decode_times(self, container: InputContainer, stream: VideoStream, times: list[int]) -> list[Tensor] | None:
        found: list[Tensor] = []
        wanted = set(times)
        codec = stream.codec_context
        skipping = codec.name in _SKIPPING
        for packet in container.demux(stream):
            if skipping:
                codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                if frame.pts is None or frame.pts > times[len(found)] or (frame.is_corrupt and frame.pts in wanted):
                    return None
                if frame.pts == times[len(found)]:
                    found.append(_upright(frame))
                    if len(found) == len(times):
                        return found
        return None

    def _read_by_count(self, wanted: Sequence[int]) -> list[Tensor]:
        found: list[Tensor] = []
        decoded = 0
        with self._opened() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                decoded = number + 1
                if number == wanted[len(found)]:
                    found.append(_upright(frame))
                    if len(found) == len(wanted):
                        return found
        raise ClipError(self.path, f"frame {wanted[len(found)]} cannot be decoded; {_counted(decoded)} can")

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            # Without the scheme, "10:30.avi" would be a file of a protocol named 10.
            container = av.open(f"file:{self.path}", metadata_errors="ignore")
        except av.FFmpegError as error:
            raise ClipError(self.path, f"not a video that FFmpeg can read ({said(error)})") from error
        with container:
            if not container.streams.video:
                raise ClipError(self.path, "the file holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ClipError(self.path, "the video stream is of a kind that FFmpeg cannot decode, or damaged")
            # In a loader's worker the processes are the parallelism; elsewhere the codec's threads are.
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = 0 if get_worker_info() is None else 1
            try:
                yield container, stream
            except av.FFmpegError as error:
                raise ClipError(self.path, f"the video cannot be decoded ({said(error)})") from error


def _starts_anew(packet: bytes, extradata: bytes | None) -> bool:
    """Whether decoding from this H.264 picture on gives it and all that is shown after it as a full decode does.

    That is so of IDR pictures and of recovery points with nothing to wait for (open GOPs). Containers also flag the
    recovery points of intra refresh, from which on the picture becomes whole bit by bit.
    """
    return any(
        unit[0] & 31 == 5 or (unit[0] & 31 == 6 and _recovers_at_once(unit))
        for unit in _h264_units(packet, extradata)
        if unit
    )


def _h264_units(packet: bytes, extradata: bytes | None) -> Iterator[bytes]:
    if extradata is None or len(extradata) < 5 or extradata[0] != 1:
        yield from packet.split(b"\x00\x00\x01")[1:]
        return
    width = (extradata[4] & 3) + 1  # of the length before each unit, as MP4 and Matroska have it
    at = 0
    while at + width < len(packet):
        start = at + width
        at = start + int.from_bytes(packet[at:start], "big")
        yield packet[start:at]


_SEI_HEAD = re.compile(rb"(\xff*)([^\xff])(\xff*)([^\xff])")  # type and size, each a sum of bytes that a non-255 ends


def _recovers_at_once(sei: bytes) -> bool:
    body = sei[1:].replace(b"\x00\x00\x03", b"\x00\x00")  # 3 is put there so that no unit holds a start code
    at = 0
    while head := _SEI_HEAD.match(body, at):
        kind, size = (255 * len(head[n]) + head[n + 1][0] for n in (1, 3))
        if kind == 6:
            # A 1 for no frames to wait for (Exp-Golomb), and a 1 for an exact match from there on.
            return body[head.end() : head.end() + 1] >= b"\xc0"
        at = head.end() + size
    return False


def _matroska_end(head: bytes) -> int | None:
    """Where a Matroska or WebM file says that it ends; None where it does not say, or is something else."""

    def size(at: int) -> tuple[int, int]:
        length = 9 - head[at].bit_length()
        unknown = (1 << 7 * length) - 1
        value = int.from_bytes(head[at : at + length], "big") & unknown
        return (-1 if value == unknown else value), at + length

    try:
        if head[:4] != b"\x1aE\xdf\xa3":
            return None
        header, at = size(4)
        at += header
        if head[at : at + 4] != b"\x18\x53\x80\x67":
            return None
        segment, at = size(at + 4)
    except IndexError:
        return None
    return None if segment < 0 else at + segment


def _upright(frame: av.VideoFrame) -> Tensor:
    pixels = frame.to_ndarray(format="rgb24")
    # The metadata's angle is counter-clockwise, as is rot90's.
    turns = round(frame.rotation / 90) % 4
    return torch.from_numpy(np.rot90(pixels, turns).copy() if turns else pixels).permute(2, 0, 1)


def _counted(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"
