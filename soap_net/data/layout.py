"""Which frame of a video is which, and where decoding can start: what its packets tell, and what a decode does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soap_net.data.pictures import Turn

# A seek empties the decoder's pipeline, and costs about as much as decoding this many frames in vain.
_SEEK_COST = 8
# Videos of up to so many pixels in all (218 frames of 320x240; small frames count as 2^15) are decoded whole at first
# sight: only that tells the frames of a damaged one.
_WHOLE, _LEAST = 2**24, 2**15
_NEVER = np.iinfo(np.int64).min  # the time of a frame without one


@dataclass(frozen=True)
class Timeline:
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
class Packets:
    """What the packets tell of a video without decoding."""

    count: int
    declared: int  # frames that the file says it has; 0 where it does not
    cut: bool  # whether the file's end is missing
    pixels: int  # of a frame
    fps: float | None
    pts: NDArray[np.int64]  # ascending
    keys: list[tuple[int, int]]  # times of keyframes, and where to seek for them; none where times can't be trusted
    empty: frozenset[int]  # times of packets that may be too small for a picture
    tick: float | None  # seconds of a unit of time; None where times are made up

    def long(self) -> bool:
        """Whether the video is longer than is decoded whole, though its packets can be trusted to be its frames."""
        return bool(self.keys) and not self.empty and self.count * max(self.pixels, _LEAST) > _WHOLE

    def left(self, frames: int) -> str:
        """What is left of a video that is cut short, in words."""
        if frames < self.declared:
            return f"{frames} of its {self.declared} frames are there"
        if self.declared:
            return "it ends within its last frame"
        return f"it ends after {frames} frame{'s' * (frames > 1)}"

    def seconds(self, shown: Sequence[int | None]) -> NDArray[np.float64] | None:
        """When frames with these times are shown, from 0 on; by the rate where times are missing or disordered."""
        if self.tick is not None and None not in shown:
            seconds = np.array(shown, dtype=np.float64) * self.tick
            if (np.diff(seconds) > 0).all():
                return seconds - seconds[0]
        return np.arange(len(shown)) / self.fps if self.fps else None

    def timeline(self, shown: Sequence[int | None]) -> Timeline | None:
        """That of frames with these times; None where only decoding from the start tells which frame is which."""
        pts = np.array([_NEVER if time is None else time for time in shown], dtype=np.int64)
        keys = sorted(key for key in self.keys if key[0] not in self.empty)
        if not (keys and keys[0][0] == pts[0] and set(pts.tolist()) | self.empty == set(self.pts.tolist())):
            return None
        if (np.diff(pts) <= 0).any():
            return None
        key_pts, key_times = np.array(keys, dtype=np.int64).T
        return Timeline(pts, np.searchsorted(pts, key_pts), key_times)


@dataclass(frozen=True)
class Decoded:
    """What one thread decodes from the start on."""

    times: list[int | None]
    sizes: set[tuple[int, int]]
    sums: NDArray[np.uint32]  # where all frames were decoded
    interlaced: bool
    turn: Turn


@dataclass(frozen=True)
class Layout:
    """How many frames there are, and how to find them.

    Of a video that was decoded whole, ``sums`` are what its frames must be however they are reached, and ``sizes``
    their heights and widths. Of others, decoders that tell of damage are believed as long as they tell of none. What is
    ``cut`` short was decoded whole.
    """

    frames: int
    fps: float | None
    turn: Turn
    timeline: Timeline | None  # None: frames are counted from the start
    sums: NDArray[np.uint32] | None
    sizes: set[tuple[int, int]] | None
    telling: bool
    seconds: NDArray[np.float64] | None  # when each frame is shown, from 0 on; None where the file does not say
    cut: str | None  # what is left of a file that is cut short, in words

    def wanted(self, numbers: Sequence[int], by_time: bool = True) -> list[Wanted]:
        """How to know frames; their times come before their numbers."""
        timeline = self.timeline if by_time else None
        return [
            Wanted(
                number if timeline is None else int(timeline.pts[number]),
                None if self.sums is None else int(self.sums[number]),
                self.turn,
            )
            for number in numbers
        ]


@dataclass(frozen=True)
class Wanted:
    label: int  # the frame's time, or its number
    sum: int | None
    turn: Turn
