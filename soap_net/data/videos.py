"""Clips that are video files, read by PyAV. Any frame is that of a full decode, by seeking where that can be known."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from soap_net.data.bitstreams import declared_end, starts_anew
from soap_net.data.layout import Decoded, Layout, Packets, Timeline, Wanted
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
# Of longer videos the first few frames, of so many pixels in all, must be as the packets say.
_SAMPLE = 2**20

MAX_PIXELS = 2**24
"""A video frame's, as the file declares its size; 5.3K fits. A larger one is refused before memory is taken for it."""
PATIENCE = 60
"""Seconds from one packet or frame to the next, after which a video counts as one that hangs its decoder."""

_LIMITS = {"max_pixels": str(MAX_PIXELS)}
# FFmpeg goes by a file's content, and some formats, such as playlists, have it open other files.
_FORMATS = "3gp,asf,asf_o,avi,flv,gif,m4v,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
_STRICT = {**_LIMITS, "err_detect": "crccheck+bitstream+buffer+explode"}
# Before PyAV 19, metadata that is not UTF-8 is an error where nothing else is said.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class Video:
    """A video file. What hangs FFmpeg is a ClipError after `PATIENCE`, and from then on at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: Layout | None = None
        self._moved = 0  # packets and frames that came
        self._hangs = False

    def num_frames(self) -> int:
        return self._layout().frames

    def fps(self) -> float | None:
        return self._layout().fps

    def cut(self) -> str | None:
        return self._layout().cut

    def seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, ascending from 0. Raises ClipError where the file does not say."""
        if (seconds := self._layout().seconds) is None:
            raise ClipError(self.path, "the file does not say when its frames are shown")
        return seconds

    def each(self, wanted: Sequence[int]) -> Generator[Tensor, None, None]:
        """The frames ``wanted``, as `read` gives them, one by one: of a single decode where nothing is amiss."""
        layout = self._layout()
        given = 0
        if layout.sums is not None or layout.telling:
            with suppress(ClipError):
                for frame in self.stream(wanted, sure=True):
                    yield frame
                    given += 1
        for number in wanted[given:]:
            yield from self.read([number])

    def stream(self, wanted: Sequence[int], sure: bool = False) -> Generator[Tensor, None, None]:
        """The frames ``wanted`` (ascending, distinct, in range), each uint8 ``(3, H, W)``, of a single decode.

        Nothing but the frame handed over is kept. Of damaged frames what the decoder makes of them; with ``sure`` they
        are a ClipError. Raises ClipError.
        """
        layout = self._layout()
        strict = sure and layout.sums is None
        # What several threads make of a cut file's last frames may vary.
        with self._opened(strict=strict, threads=sure or layout.cut is None) as (container, stream):
            frames = self._frames(container, stream, strict=strict)
            labelled = enumerate(frames) if layout.timeline is None else _timed(frames)
            for number, frame in zip(wanted, layout.wanted(wanted), strict=True):
                known = frame if sure else replace(frame, sum=None)
                taken = self._patiently(partial(_taken, labelled, [known]))
                if not taken:
                    raise ClipError(self.path, f"the video is damaged: frame {number} cannot be decoded")
                yield taken[0]

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

    def _layout(self) -> Layout:
        if self._known is None:
            self._known = self._patiently(self._scan)
        return self._known

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. It runs in a thread of its own, to be left alone where it hangs."""
        answers: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

        def answer() -> None:
            try:
                answers.put((work(), None))
            except BaseException as error:
                answers.put((None, error))

        if not self._hangs:
            threading.Thread(target=answer, daemon=True).start()
        idle = 0  # seconds, counted one by one, so that a process that was stopped for a while takes none for idle
        while not self._hangs:
            moved = self._moved
            try:
                # Nothing waits here without an end: a lock that is waited for may be one that a fork left locked.
                value, error = answers.get(timeout=1.0)
            except Empty:
                idle = idle + 1 if moved == self._moved else 0
                self._hangs = idle >= PATIENCE
                continue
            if error is not None:
                raise error
            return cast(T, value)
        raise ClipError(self.path, "FFmpeg hangs in it: no frame came for a while")

    def _moving(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._moved += 1
            yield item

    def _scan(self) -> Layout:
        """Reads the packets, and decodes as much as it takes to know that they are the frames, or which are."""
        packets, telling = self._list_packets()
        if packets.long() and not packets.cut:
            first = min(32, max(4, _SAMPLE // max(1, packets.pixels)))
            with suppress(ClipError):
                frames = self._decode(strict=True, first=first)
                pts = packets.pts.tolist()
                timeline = packets.timeline(pts)
                # Of interlaced pictures the fields may come in packets of their own, in some parts of a video only.
                if timeline and frames.times == pts[:first] and not frames.interlaced:
                    seconds = packets.seconds(pts)
                    return Layout(packets.count, packets.fps, frames.turn, timeline, None, None, telling, seconds, None)
        try:
            frames = self._decode()
            if not frames.times:
                raise ClipError(self.path, "no frame of the video stream can be decoded")
        except ClipError as error:
            raise ClipError(self.path, f"{'the file is cut short, and ' * packets.cut}{error.reason}") from error
        timeline = packets.timeline(frames.times)
        seconds, count = packets.seconds(frames.times), len(frames.times)
        cut = packets.left(count) if packets.cut else None
        return Layout(count, packets.fps, frames.turn, timeline, frames.sums, frames.sizes, telling, seconds, cut)

    def _list_packets(self) -> tuple[Packets, bool]:
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
            cut = last.is_corrupt and {"mpeg", "mpegts"}.isdisjoint(formats)
            cut = cut or ("mov" in formats and regular and count < stream.frames)
            cut = cut or self._lacks_its_end(container, stream, count, min(pts, default=0), end)
            declared = stream.frames
            fps = float(stream.average_rate) if stream.average_rate else None
            tick = None if untimed or stream.time_base is None else float(stream.time_base)
            telling = codec.name in _TELLING
        times = np.unique(np.array(pts, dtype=np.int64))
        timed = timed and regular and len(times) == count
        keys = keys if timed else []
        return Packets(count, declared, cut, pixels, fps, times, keys, frozenset(empty), tick), telling

    def _lacks_its_end(
        self, container: InputContainer, stream: VideoStream, count: int, first: int, shown: int
    ) -> bool:
        """Whether a Matroska, WebM or AVI file is cut short, of which FFmpeg may make a shorter clip without a word."""
        try:
            with open(self.path, "rb") as file:
                end = declared_end(file.read(4096))
                size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ClipError(self.path, said(error)) from error
        if end is None or size >= end:
            return False
        if stream.frames:
            return count < stream.frames
        # If the last frame is there, to half a frame, bytes were lost before it or after all frames; but for frames
        # that are shown before it and stored after it.
        if container.duration and stream.time_base and stream.average_rate:
            half = 1 / (2 * stream.average_rate)
            behind = Fraction(container.duration, av.time_base) - shown * stream.time_base
            between = (shown - first) * stream.time_base - count / stream.average_rate
            return behind >= half or (stream.codec_context.has_b_frames and between >= half)
        return True

    def _decode(self, *, strict: bool = False, first: int | None = None) -> Decoded:
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
        return Decoded(times, sizes, np.array(sums, dtype=np.uint32), interlaced, turn)

    def _turn(self, frame: av.VideoFrame) -> Turn:
        try:
            return display_turn(frame)
        except ValueError as error:
            raise ClipError(self.path, str(error)) from None

    def _read_fast(self, layout: Layout, numbers: Sequence[int]) -> list[Tensor]:
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

    def _read_alike(self, layout: Layout, numbers: Sequence[int]) -> list[Tensor]:
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

    def _take_from(self, timeline: Timeline, start: int, wanted: Sequence[Wanted]) -> list[Tensor]:
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
            container = av.open(f"file:{self.path}", options={**_LIMITS, "format_whitelist": _FORMATS}, **_LENIENT)
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


def _taken(frames: Iterable[tuple[int | None, av.VideoFrame]], wanted: Sequence[Wanted]) -> list[Tensor]:
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
