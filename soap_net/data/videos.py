"""Clips that are video files, read by PyAV. Any frame is that of a full decode, by seeking where that can be known."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from soap_net.errors import ClipError, said

T = TypeVar("T")

# What a data set's videos may be named; to read another container, add its suffix.
VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()  # noqa: SIM905
)
# Codecs of which every packet is one frame. Others (VP8 with its hidden frames) are counted and read by decoding.
_FRAME_PER_PACKET = frozenset(
    "av1 dnxhd ffv1 flv h263 h264 hevc huffyuv libdav1d mjpeg mpeg1video mpeg2video mpeg4".split()  # noqa: SIM905
    + "png prores qtrle rawvideo vp9 wmv1 wmv2".split()  # noqa: SIM905
)
# Decoders that leave out frames no other frame is predicted from, where that is asked packet by packet.
_SKIPPING = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
# A seek empties the decoder's pipeline, and costs about as much as decoding this many frames in vain.
_SEEK_COST = 8

PATIENCE = 60
"""Seconds from one packet or frame to the next, after which a video counts as one that hangs its decoder."""

# Before PyAV 19, metadata that is not UTF-8 is an error where nothing else is said.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


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
    seconds: NDArray[np.float64] | None  # when each frame is shown, from 0; None where the file does not say


class Video:
    """A video file. What hangs FFmpeg is a ClipError after `PATIENCE`, and from then on at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: _Layout | None = None
        self._moved = 0  # packets and frames that came
        self._hangs = False

    def num_frames(self) -> int:
        return self._layout().frames

    def fps(self) -> float | None:
        return self._layout().fps

    def seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, ascending from 0. Raises ClipError where the file does not say."""
        if (seconds := self._layout().seconds) is None:
            raise ClipError(self.path, "the file does not say when its frames are shown")
        return seconds

    def stream(self, wanted: Iterable[int]) -> Generator[Tensor, None, None]:
        """The frames ``wanted`` (ascending, distinct, in range), each uint8 ``(3, H, W)``, of a single decode.

        Nothing but the frame handed over is kept. Raises ClipError.
        """
        with self._opened() as (container, stream):
            decoded = enumerate(self._moving(container.decode(stream)))
            for number in wanted:
                yield self._patiently(partial(self._next, decoded, number))

    def _next(self, decoded: Iterator[tuple[int, av.VideoFrame]], wanted: int) -> Tensor:
        for number, frame in decoded:
            if number == wanted:
                return _upright(frame)
        raise ClipError(self.path, f"frame {wanted} cannot be decoded")

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        timeline = self._layout().timeline

        def decode() -> list[Tensor]:
            frames = None if timeline is None else self._read_by_time(timeline, wanted)
            return self._read_by_count(wanted) if frames is None else frames

        return self._patiently(decode)

    def _layout(self) -> _Layout:
        if self._known is None:
            self._known = self._patiently(self._scan)
        return self._known

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. It runs in a thread of its own, to be left alone where it hangs."""
        done: Future[T] = Future()

        def fulfil() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        if not self._hangs:
            threading.Thread(target=fulfil, daemon=True).start()
        idle = 0  # seconds, counted one by one, so that a process that was stopped for a while takes none for idle
        while not done.done():
            if self._hangs:
                raise ClipError(self.path, "FFmpeg hangs in it: no frame came for a while")
            moved = self._moved
            wait((done,), 1.0)
            idle = idle + 1 if moved == self._moved else 0
            self._hangs = idle >= PATIENCE and not done.done()
        return done.result()

    def _moving(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._moved += 1
            yield item

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
            for packet in self._moving(container.demux(stream)):
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
            tick = float(stream.time_base or 0)
        shown = np.unique(np.array(pts, dtype=np.int64))
        if not (regular and timed and len(shown) == packets and keys and keys[0][0] == shown[0]):
            times = self._decoded_times()
            return _Layout(len(times), fps, None, _from_zero([] if untimed else times, len(times), fps))
        key_pts, key_times = np.array(sorted(keys), dtype=np.int64).T
        timeline = _Timeline(shown, np.searchsorted(shown, key_pts), key_times)
        return _Layout(packets, fps, timeline, _from_zero(shown.astype(np.float64) * tick, packets, fps))

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

    def _decoded_times(self) -> list[float | None]:
        """Of each frame that decoding gives."""
        with self._opened() as (container, stream):
            times: list[float | None] = [frame.time for frame in self._moving(container.decode(stream))]
        if not times:
            raise ClipError(self.path, "no frame of the video stream can be decoded")
        return times

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
        for packet in self._moving(container.demux(stream)):
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
            for number, frame in enumerate(self._moving(container.decode(stream))):
                decoded = number + 1
                if number == wanted[len(found)]:
                    found.append(_upright(frame))
                    if len(found) == len(wanted):
                        return found
        raise ClipError(self.path, f"frame {wanted[len(found)]} cannot be decoded; {_counted(decoded)} can")

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        # Where PyAV logs (torchvision has it do so), FFmpeg's threads wait for Python's lock, and Python for them.
        av.logging.set_level(None)
        try:
            # Without the scheme, "10:30.avi" would be a file of a protocol named 10.
            container = av.open(f"file:{self.path}", **_LENIENT)
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


def _from_zero(
    times: NDArray[np.float64] | Sequence[float | None], frames: int, fps: float | None
) -> NDArray[np.float64] | None:
    """When each frame is shown, by the file's times where they are there and ascend, or else evenly by its rate."""
    seconds = np.array([np.nan if time is None else time for time in times])
    if len(seconds) == frames and np.isfinite(seconds).all() and (np.diff(seconds) > 0).all():
        return seconds - seconds[0]
    return np.arange(frames) / fps if fps else None


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
