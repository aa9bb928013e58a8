"""Clips that are video files, read by PyAV. Any frame is that of a full decode, by seeking where that can be known."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from soap_net.data.bitstreams import matroska_end, starts_anew
from soap_net.data.pictures import Turn, checksum, display_turn, upright
from soap_net.errors import ClipError, said

T = TypeVar("T")

# What a data set's videos may be named; to read another container, add its suffix.
VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()  # noqa: SIM905
)
# Codecs of which a packet is a frame, so that frames can be sought by their times. Others are read from the start.
_FRAME_PER_PACKET = frozenset(
    "av1 dnxhd ffv1 flv h263 h264 hevc huffyuv libdav1d mjpeg mpeg1video mpeg2video mpeg4".split()  # noqa: SIM905
    + "png prores qtrle rawvideo vp9 wmv1 wmv2".split()  # noqa: SIM905
)
# Decoders that say where a picture is damaged. Others leave in it what its memory held before, in silence, which
# varies with threads and with what was decoded before.
_TELLING = frozenset(
    "av1 flv h263 h264 hevc libdav1d mjpeg mpeg1video mpeg2video mpeg4 prores vp9 wmv1 wmv2".split()  # noqa: SIM905
)
# Decoders that leave out frames no other frame is predicted from, where that is asked packet by packet.
_SKIPPING = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
# A seek empties the decoder's pipeline, and costs about as much as decoding this many frames in vain.
_SEEK_COST = 8
# Videos of up to so many pixels in all (218 frames of 320x240; small frames count as 2^15) are decoded whole at first
# sight: only that tells the frames of a damaged one. Of longer ones the first few frames must be as the packets say.
_WHOLE, _LEAST, _SAMPLE = 2**24, 2**15, 2**20

MAX_PIXELS = 2**24
"""A video frame's, as the file declares its size; 5.3K fits. A larger one is refused before memory is taken for it."""
PATIENCE = 60
"""Seconds from one packet or frame to the next, after which a video counts as one that hangs its decoder."""

_NEVER = np.iinfo(np.int64).min  # the time of a frame without one
_LIMITS = {"max_pixels": str(MAX_PIXELS)}
_STRICT = {**_LIMITS, "err_detect": "crccheck+bitstream+buffer+explode"}
# Before PyAV 19, metadata that is not UTF-8 is an error where nothing else is said.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True)
class _Timeline:
    """The frames' presentation times, ascending, and where decoding can start."""

    pts: NDArray[np.int64]
    keys: NDArray[np.int64]  # frame numbers of the keyframes that nothing shown later looks behind, ascending
    key_times: NDArray[np.int64]  # the time to seek to for each of them

    def start_of(self, number: int) -> int:
        """The position among the keyframes of the last one up to a frame."""
        return int(np.searchsorted(self.keys, number, side="right")) - 1

    def stretch(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Where to start for the first frame, and for how many of them to go on rather than to seek anew."""
        count = 1
        while count < len(numbers) and self.keys[self.start_of(numbers[count])] <= numbers[count - 1] + _SEEK_COST:
            count += 1
        return self.start_of(numbers[0]), count


@dataclass(frozen=True)
class _Packets:
    """What the packets tell of a video without decoding."""

    count: int
    pixels: int  # of a frame
    fps: float | None
    pts: NDArray[np.int64]  # ascending
    keys: list[tuple[int, int]]  # times of keyframes, and where to seek for them; none where times can't be trusted
    empty: frozenset[int]  # times of packets that may be too small for a picture

    def long(self) -> bool:
        """Whether the video is longer than is decoded whole, though its packets can be trusted to be its frames."""
        return bool(self.keys) and not self.empty and self.count * max(self.pixels, _LEAST) > _WHOLE

    def timeline(self, shown: Sequence[int | None]) -> _Timeline | None:
        """That of frames with these times; None where only decoding from the start tells which frame is which."""
        pts = np.array([_NEVER if time is None else time for time in shown], dtype=np.int64)
        keys = sorted(key for key in self.keys if key[0] not in self.empty)
        if not (keys and keys[0][0] == pts[0] and set(pts.tolist()) | self.empty == set(self.pts.tolist())):
            return None
        if (np.diff(pts) <= 0).any():
            return None
        key_pts, key_times = np.array(keys, dtype=np.int64).T
        return _Timeline(pts, np.searchsorted(pts, key_pts), key_times)


@dataclass(frozen=True)
class _Frames:
    """What one thread decodes from the start on."""

    times: list[int | None]
    sizes: set[tuple[int, int]]
    sums: NDArray[np.uint32]  # where all frames were decoded
    interlaced: bool
    turn: Turn


@dataclass(frozen=True)
class _Layout:
    """How many frames there are, and how to find them.

    Of a video that was decoded whole, ``sums`` are what its frames must be however they are reached, and ``sizes``
    their heights and widths. Of others, decoders that tell of damage are believed as long as they tell of none.
    """

    frames: int
    fps: float | None
    turn: Turn
    timeline: _Timeline | None  # None: frames are counted from the start
    sums: NDArray[np.uint32] | None
    sizes: set[tuple[int, int]] | None
    telling: bool

    def wanted(self, numbers: Sequence[int], by_time: bool = True) -> list[_Wanted]:
        """How to know frames; their times come before their numbers."""
        timeline = self.timeline if by_time else None
        return [
            _Wanted(
                number if timeline is None else int(timeline.pts[number]),
                None if self.sums is None else int(self.sums[number]),
                self.turn,
            )
            for number in numbers
        ]


@dataclass(frozen=True)
class _Wanted:
    label: int  # the frame's time, or its number
    sum: int | None
    turn: Turn


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

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of the frames, all of which are decoded for that."""
        layout = self._layout()
        if layout.sizes is not None or layout.timeline is None:
            return layout.sizes or set()
        frames = self._patiently(self._decode)
        if frames.times != layout.timeline.pts.tolist():
            raise ClipError(
                self.path, f"the video is damaged: {len(frames.times)} of its {layout.frames} frames can be decoded"
            )
        return frames.sizes

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        layout = self._layout()

        def decode() -> list[Tensor]:
            if layout.sums is not None or layout.telling:
                with suppress(ClipError):
                    return self._read_fast(layout, wanted)
            return self._read_alike(layout, wanted)

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
        """Reads the packets, and decodes as much as it takes to know that they are the frames, or which are."""
        packets, telling = self._list_packets()
        if packets.long():
            first = min(32, max(4, _SAMPLE // max(1, packets.pixels)))
            with suppress(ClipError):
                frames = self._decode(strict=True, first=first)
                timeline = packets.timeline(packets.pts.tolist())
                # Of interlaced pictures the fields may come in packets of their own, in some parts of a video only.
                if timeline and frames.times == packets.pts[:first].tolist() and not frames.interlaced:
                    return _Layout(packets.count, packets.fps, frames.turn, timeline, None, None, telling)
        frames = self._decode()
        if not frames.times:
            raise ClipError(self.path, "no frame of the video stream can be decoded")
        timeline = packets.timeline(frames.times)
        return _Layout(len(frames.times), packets.fps, frames.turn, timeline, frames.sums, frames.sizes, telling)

    def _list_packets(self) -> tuple[_Packets, bool]:
        pts: list[int] = []
        keys: list[tuple[int, int]] = []
        empty: set[int] = set()
        count = 0
        last: Packet | None = None
        end = 0  # when the last frame has been shown
        regular = True
        with self._opened() as (container, stream):
            formats = container.format.name.split(",")
            codec = stream.codec_context
            pixels = codec.width * codec.height
            sought_by_pts = not {"mov", "matroska"}.isdisjoint(formats)
            # AVI stores no presentation times, and those that FFmpeg makes up are wrong where frames are reordered.
            # MPEG program and elementary streams store few or none; the others are made up anew after a seek.
            untimed = not {"mpeg", "mpegvideo"}.isdisjoint(formats) or ("avi" in formats and codec.has_b_frames)
            timed = not untimed and codec.name in _FRAME_PER_PACKET
            for packet in self._moving(container.demux(stream)):
                if packet.size == 0:
                    # The packet at the end, which has no time, flushes the decoder; others are frames an AVI dropped.
                    regular = regular and packet.dts is None
                    continue
                count += 1
                last = packet
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
                if packet.pts is None or packet.is_discard:
                    regular = False
                    continue
                pts.append(packet.pts)
                if codec.name == "mpeg4" and packet.size <= max(10, pixels // 2048):  # a header, a bit a macroblock
                    empty.add(packet.pts)
                if packet.is_keyframe and (codec.name != "h264" or starts_anew(bytes(packet), codec.extradata)):
                    keys.append((packet.pts, packet.pts if sought_by_pts or packet.dts is None else packet.dts))
            if last is None:
                raise ClipError(self.path, "the video stream holds no frames")
            # MPEG streams flag each gap in their counters, which pieces that were joined have too.
            if last.is_corrupt and {"mpeg", "mpegts"}.isdisjoint(formats):
                raise ClipError(self.path, f"the file is cut short after {_counted(count - 1)}")
            if "mov" in formats and regular and count < stream.frames:
                raise ClipError(self.path, f"the file is cut short: {count} of its {stream.frames} frames are there")
            self._check_length(container, stream, end)
            fps = float(stream.average_rate) if stream.average_rate else None
            telling = codec.name in _TELLING
        times = np.unique(np.array(pts, dtype=np.int64))
        timed = timed and regular and len(times) == count
        return _Packets(count, pixels, fps, times, keys if timed else [], frozenset(empty)), telling

    def _check_length(self, container: InputContainer, stream: VideoStream, shown: int) -> None:
        """Refuses a Matroska or WebM file that is cut short, which FFmpeg reads as a shorter clip without a word."""
        try:
            with open(self.path, "rb") as file:
                end = matroska_end(file.read(4096))
                size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ClipError(self.path, said(error)) from error
        if end is None or size >= end:
            return
        # If the last frame is there, to half a frame, bytes were lost before it or after all frames.
        if container.duration and stream.time_base and stream.average_rate:
            missing = Fraction(container.duration, av.time_base) - shown * stream.time_base
            if missing < 1 / (2 * stream.average_rate):
                return
        raise ClipError(self.path, f"the file is cut short: {size} of its {end} bytes are there")

    def _decode(self, *, strict: bool = False, first: int | None = None) -> _Frames:
        times: list[int | None] = []
        sizes = set()
        sums = []
        interlaced = False
        turn = Turn()
        with self._opened(strict=strict) as (container, stream):
            for frame in islice(self._frames(container, stream, strict=strict), first):
                if not times:
                    turn = self._turn(frame)
                times.append(frame.pts)
                sizes.add((frame.height, frame.width))
                if first is None:
                    sums.append(checksum(frame))
                interlaced = interlaced or frame.interlaced_frame
        return _Frames(times, sizes, np.array(sums, dtype=np.uint32), interlaced, turn)

    def _turn(self, frame: av.VideoFrame) -> Turn:
        try:
            return display_turn(frame)
        except ValueError as error:
            raise ClipError(self.path, str(error)) from None

    def _read_fast(self, layout: _Layout, numbers: Sequence[int]) -> list[Tensor]:
        """In one go, in threads; a ClipError where other ways of reading might give other frames."""
        wanted = layout.wanted(numbers)
        strict = layout.sums is None
        found: list[Tensor] = []
        with self._opened(strict=strict, threads=True) as (container, stream):
            while len(found) < len(wanted):
                group = wanted[len(found) :]
                if layout.timeline is None:
                    taken = _taken(enumerate(self._frames(container, stream, strict=strict)), group)
                else:
                    start, count = layout.timeline.stretch(numbers[len(found) :])
                    if start > 0:
                        container.seek(int(layout.timeline.key_times[start]), stream=stream)
                    group = group[:count]
                    needed = {frame.label for frame in group}
                    taken = _taken(_timed(self._frames(container, stream, strict=strict, needed=needed)), group)
                if len(taken) < len(group):
                    raise ClipError(self.path, "a frame is damaged, or its time is not kept")
                found += taken
        return found

    def _read_alike(self, layout: _Layout, numbers: Sequence[int]) -> list[Tensor]:
        """Each frame as if it were read alone, by one thread of a new decoder: from its keyframe, or from the start."""
        timeline = layout.timeline
        found: list[Tensor] = []
        if timeline is None or layout.sums is not None:
            with self._opened() as (container, stream):
                found = _taken(enumerate(self._frames(container, stream)), layout.wanted(numbers, by_time=False))
        else:
            for start, group in groupby(numbers, timeline.start_of):
                wanted = layout.wanted(list(group))
                taken = self._take_from(timeline, start, wanted)
                if start > 0 and len(taken) < len(wanted):  # it is no place to start from, then
                    taken += self._take_from(timeline, 0, wanted[len(taken) :])
                found += taken
                if len(taken) < len(wanted):
                    break
        if len(found) < len(numbers):
            raise ClipError(self.path, f"the video is damaged: frame {numbers[len(found)]} cannot be decoded for sure")
        return found

    def _take_from(self, timeline: _Timeline, start: int, wanted: Sequence[_Wanted]) -> list[Tensor]:
        with self._opened() as (container, stream):
            if start > 0:
                with suppress(av.FFmpegError):  # a damaged index; then the frames' times will not fit
                    container.seek(int(timeline.key_times[start]), stream=stream)
            return _taken(_timed(self._frames(container, stream)), wanted)

    def _frames(
        self, container: InputContainer, stream: VideoStream, *, strict: bool = False, needed: set[int] | None = None
    ) -> Iterator[av.VideoFrame]:
        """What the decoder gives from here on; where times are `needed`, others are left out if that saves work."""
        codec = stream.codec_context
        skipping = codec.name in _SKIPPING
        for packet in self._moving(container.demux(stream)):
            if needed is not None and skipping:
                codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in needed else "NONREF"
            for frame in self._moving(packet.decode()):
                if strict and frame.is_corrupt:
                    raise ClipError(self.path, "a frame is damaged")
                yield frame

    @contextmanager
    def _opened(self, *, strict: bool = False, threads: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
        """`strict`: whatever the decoder finds amiss is an error, where else it would do what it can."""
        # Where PyAV logs (torchvision has it do so), FFmpeg's threads wait for Python's lock, and Python for them.
        av.logging.set_level(None)
        try:
            # Without the scheme, "10:30.avi" would be a file of a protocol named 10.
            container = av.open(f"file:{self.path}", options=_LIMITS, **_LENIENT)
        except av.FFmpegError as error:
            raise ClipError(self.path, f"not a video that FFmpeg can read ({said(error)})") from error
        with container:
            if not container.streams.video:
                raise ClipError(self.path, "the file holds no video stream")
            stream = container.streams.video[0]
            codec = stream.codec_context
            if codec is None:
                raise ClipError(self.path, "the video stream is of a kind that FFmpeg cannot decode, or damaged")
            codec.options = _STRICT if strict else _LIMITS
            # In a loader's worker the processes are the parallelism; elsewhere the codec's threads are.
            stream.thread_type = "AUTO"
            codec.thread_count = 0 if threads and get_worker_info() is None else 1
            try:
                yield container, stream
            except av.FFmpegError as error:
                # FFmpeg forgets the size of frames that are too large, or calls it an invalid argument.
                large = not codec.width or isinstance(error, av.ArgumentError)
                hint = f", or has frames of more than {MAX_PIXELS} pixels" if large else ""
                raise ClipError(self.path, f"the video cannot be decoded{hint} ({said(error)})") from error


def _timed(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[int | None, av.VideoFrame]]:
    return ((frame.pts, frame) for frame in frames)


def _taken(frames: Iterable[tuple[int | None, av.VideoFrame]], wanted: Sequence[_Wanted]) -> list[Tensor]:
    """The wanted frames, up to the first that does not come in its turn or is another."""
    found: list[Tensor] = []
    for label, frame in frames:
        here = wanted[len(found)]
        if label is None or label > here.label:
            break
        if label == here.label:
            if here.sum is not None and here.sum != checksum(frame):
                break
            found.append(upright(frame, here.turn))
            if len(found) == len(wanted):
                break
    return found


def _counted(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"
