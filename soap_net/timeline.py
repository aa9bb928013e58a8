"""What happens when in a long video: a classifier's answers to a window that slides over it, merged into segments.

The video is decoded once, from end to end, and only what windows to come look at is kept. Where the net looks at frames
one by one, the features of a frame, and of the difference of two, are computed once for all windows.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from soap_net.classify import Classifier, Prediction
from soap_net.data.clips import Clip
from soap_net.data.transforms import FrameSampling, clip_loader
from soap_net.errors import ClipError, UserError
from soap_net.files import replacing
from soap_net.tasks import autocast

NONE = "none of these"
PICTURES = (".png", ".svg", ".pdf")
"""What a picture of a timeline may be, by the ending of its name."""

TOGETHER = 4
"""Windows whose features are computed in one go."""
_NEAR = 1e-6  # seconds: times nearer than this are the same


@dataclass(frozen=True)
class Window:
    """The answer to a part of a video, in seconds from its start."""

    start: float
    end: float
    prediction: Prediction

    @property
    def middle(self) -> float:
        """Its middle, in seconds."""
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Segment:
    """A part of a video of one class, in seconds; `label` None is none of the classes, and has no `confidence`.

    `confidence` is the mean probability of the class over the segment's windows.
    """

    start: float
    end: float
    label: str | None
    confidence: float | None


@dataclass(frozen=True)
class Timeline:
    """What a video of `seconds` shows when; no windows with an `error`. `cut` says what is left of a cut file."""

    clip: str
    seconds: float
    windows: Sequence[Window]
    error: str | None = None
    cut: str | None = None

    @property
    def bounds(self) -> list[float]:
        """Where the say of each window begins, and that of the last ends: midway between the windows' middles."""
        between = [(one.middle + other.middle) / 2 for one, other in pairwise(self.windows)]
        return [0.0, *between, self.seconds] if self.windows else []

    @property
    def segments(self) -> list[Segment]:
        """Runs of windows with the same answer, from the video's start to its end without a gap."""
        found, bounds = [], self.bounds
        numbered = groupby(enumerate(self.windows), key=lambda item: item[1].prediction.label)
        for label, run in ((label, list(run)) for label, run in numbered):
            chances = [window.prediction.probabilities[label] for _, window in run] if label is not None else []
            confidence = sum(chances) / len(chances) if chances else None
            found.append(Segment(bounds[run[0][0]], bounds[run[-1][0] + 1], label, confidence))
        return found


def timeline(
    classifier: Classifier, clip: Clip, window: float, every: float | None = None, *, progress: bool = False
) -> Timeline:
    """Classifies what a window of `window` seconds shows, every `every` seconds of a video (by default a third of it).

    A video shorter than that is one window. One that can't be read has its `error` said in the result.

    Raises:
        UserError: a window or step that is no time or shorter than a frame, no classes learnt, or a net that was
            trained on frames out of order.
    """
    every = window / 3 if every is None else every
    for name, value in (("window", window), ("every", every)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: it is a time in seconds, above 0")
    if classifier.data.order != "forward":
        raise UserError(f"data.order is {classifier.data.order}: a timeline takes frames as they follow each other")
    name = str(clip.path)
    try:
        times, cut = clip.video().seconds(), clip.remark()
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        if min(window, every) < step - _NEAR:
            raise UserError(f"a frame of {name} lasts {step:.3g} s: a window and its steps must be that long at least")
        looks = look(times, float(times[-1]) + step, window, every, _sampling(classifier))
        predictions = []
        bar = tqdm(total=len(looks.starts), desc=name, leave=False, disable=None if progress else True)
        with bar, contextlib.closing(_features(classifier, clip, looks.frames)) as features:
            for row in features:
                predictions.append(classifier.predict(name, row))
                bar.update()
    except ClipError as error:
        return Timeline(name, 0.0, (), str(error))
    wrong = next((prediction.error for prediction in predictions if prediction.error), None)
    if wrong:
        return Timeline(name, looks.seconds, (), wrong, cut)
    ends = np.minimum(looks.starts + window, looks.seconds).tolist()
    return Timeline(name, looks.seconds, [*map(Window, looks.starts.tolist(), ends, predictions)], cut=cut)


@dataclass(frozen=True)
class Looks:
    """Which ``frames`` (W, T) each of W windows looks at, from ``starts`` (W,) on, in a video of so many seconds."""

    seconds: float
    starts: NDArray[np.float64]
    frames: NDArray[np.int64]


def _sampling(classifier: Classifier) -> FrameSampling:
    return FrameSampling(classifier.data.frames, classifier.data.interval)


def look(times: NDArray[np.float64], seconds: float, window: float, every: float, sampling: FrameSampling) -> Looks:
    """Lays windows over a video whose frames are shown at `times`; the last one ends with it.

    A window looks at one frame of each of T equal segments. Where windows overlap, it is not the segment's centre but
    what lies nearest to it on a grid that is the same in all windows and no wider than a segment, so that they share
    frames. With ``sampling.interval``, frames lie that far apart in the middle of each window, as in a clip.
    """
    if window >= seconds - _NEAR:
        every_frame = sampling.indices(len(times), None)
        return Looks(seconds, np.zeros(1), np.array([every_frame], dtype=np.int64))
    starts = np.arange(math.floor((seconds - window) / every + _NEAR) + 1, dtype=np.float64) * every
    if starts[-1] + window < seconds - _NEAR:
        starts = np.append(starts, seconds - window)

    def shown(at: NDArray[np.float64]) -> NDArray[np.int64]:
        # Rounded, lest two windows find two frames for one time.
        return np.searchsorted(times, at.round(6) + _NEAR, side="right") - 1

    if sampling.interval is not None:
        firsts, ends = shown(starts), np.searchsorted(times, starts + window - _NEAR)
        rows = [first + np.array(sampling.indices(end - first, None)) for first, end in zip(firsts, ends, strict=True)]
        return Looks(seconds, starts, np.stack(rows))
    segment = window / sampling.frames
    offsets = (np.arange(sampling.frames) + 0.5) * segment
    if every < window:
        grid = every / math.ceil(every / segment - _NEAR)
        offsets = (np.floor(offsets / grid + _NEAR) + 0.5) * grid
    return Looks(seconds, starts, shown(starts[:, None] + offsets))


def _features(classifier: Classifier, clip: Clip, looks: NDArray[np.int64]) -> Generator[Tensor, None, None]:
    """Features ``(N, D)`` of each window, as `SOAPNet.features` has them of its frames alone."""
    model, device = classifier.model, classifier.device
    transform = clip_loader(classifier.data, train=False).transform
    of_windows = _Shared(classifier) if model.by_frame else _Whole(classifier)
    # The first frame that a window or any after it looks at: what lies before it can go.
    needed = np.minimum.accumulate(looks.min(axis=1)[::-1])[::-1]
    numbers = np.unique(looks)
    pixels: dict[int, Tensor] = {}
    read = 0
    with contextlib.closing(clip.video().stream(numbers.tolist())) as stream:
        for first in range(0, len(looks), TOGETHER):
            windows = looks[first : first + TOGETHER]
            pixels = {number: frame for number, frame in pixels.items() if number >= needed[first]}
            while read < len(numbers) and numbers[read] <= windows.max():
                pixels[int(numbers[read])] = transform(next(stream)[None], None)[0]
                read += 1
            with torch.inference_mode(), autocast(device, classifier.config.train.amp):
                features = of_windows(pixels, windows.tolist())
            yield from features.float()


class _Whole:
    """Features of windows of a net that looks at them as wholes."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def __call__(self, pixels: dict[int, Tensor], windows: list[list[int]]) -> Tensor:
        clips = torch.stack([_stacked(pixels, window) for window in windows])
        return self.classifier.model.features(clips.to(self.classifier.device))


class _Shared:
    """Features of windows of a net that looks at frames one by one: each frame and difference is computed once."""

    def __init__(self, classifier: Classifier) -> None:
        self.model, self.device = classifier.model, classifier.device
        self.frames: dict[int, Tensor] = {}
        self.changes: dict[tuple[int, int], Tensor] = {}

    def __call__(self, pixels: dict[int, Tensor], windows: list[list[int]]) -> Tensor:
        oldest = min(map(min, windows))
        self.frames = {number: row for number, row in self.frames.items() if number >= oldest}
        self.changes = {pair: row for pair, row in self.changes.items() if pair[0] >= oldest}
        if new := sorted({number for window in windows for number in window} - self.frames.keys()):
            frames = _stacked(pixels, new).to(self.device)
            self.frames.update(zip(new, self.model.frame_features(frames), strict=True))
        if not self.model.head.takes_differences:
            return torch.stack([torch.stack([self.frames[number] for number in window]) for window in windows])
        if pairs := sorted({pair for window in windows for pair in pairwise(window)} - self.changes.keys()):
            before, after = (_stacked(pixels, side).to(self.device) for side in zip(*pairs, strict=True))
            self.changes.update(zip(pairs, self.model.change_features(before, after), strict=True))
        rows = [
            [*(self.frames[number] for number in window), *(self.changes[pair] for pair in pairwise(window))]
            for window in windows
        ]
        return torch.stack([torch.stack(row) for row in rows])


def _stacked(pixels: dict[int, Tensor], numbers: Sequence[int]) -> Tensor:
    return torch.stack([pixels[number] for number in numbers])


def as_rows(found: Sequence[Timeline]) -> list[dict[str, Any]]:
    """For JSON: all segments and windows, times in seconds."""
    return [
        {
            "clip": each.clip,
            "seconds": each.seconds,
            "segments": [
                {"start": s.start, "end": s.end, "class": s.label, "confidence": s.confidence} for s in each.segments
            ],
            "windows": [
                {
                    "start": w.start,
                    "end": w.end,
                    "class": w.prediction.label,
                    "known": w.prediction.known,
                    "probabilities": w.prediction.probabilities,
                }
                for w in each.windows
            ],
            "error": each.error,
            "cut": each.cut,
        }
        for each in found
    ]


def as_csv(found: Sequence[Timeline]) -> str:
    """A row for each segment, times in seconds; no class is none of the classes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["clip", "start", "end", "class", "confidence", "error", "cut"])
    for each in found:
        if each.error:
            table.writerow([each.clip, "", "", "", "", each.error, each.cut or ""])
        for s in each.segments:
            confidence = "" if s.confidence is None else f"{s.confidence:.6f}"
            table.writerow([each.clip, f"{s.start:.3f}", f"{s.end:.3f}", s.label or "", confidence, "", each.cut or ""])
    return text.getvalue()


def as_lines(found: Sequence[Timeline]) -> list[str]:
    """A line for each segment, for people."""
    lines = []
    for each in found:
        lines.append(f"error: {each.error}" if each.error else f"{each.clip}  {clock(each.seconds)}")
        for s in each.segments:
            chance = f"{100 * s.confidence:5.1f} % " if s.confidence is not None else 8 * " "
            lines.append(f"  {clock(s.start):>9} - {clock(s.end):<9}  {chance}{s.label or NONE}")
    return lines


def clock(seconds: float) -> str:
    """A time as m:ss.s, or h:mm:ss.s."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    shown = f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{shown:0>7}" if hours else shown


def _ticks() -> Iterator[int]:
    """Seconds from tick to tick that read well on a clock, ascending."""
    yield from (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)
    yield from count(3600, 3600)


def check_picture(path: Path) -> None:
    """Raises UserError where `path` names no kind of picture."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path}: a picture's name ends in {', '.join(PICTURES)}")


def draw(path: Path, found: Timeline, classes: Sequence[str]) -> None:
    """Draws a row for each class: its probability over time as a heat, and its segments as bars with their confidence.

    Raises:
        UserError: `path` names no kind of picture.
        OSError: it can't be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    chances = np.array([[w.prediction.probabilities[name] for w in found.windows] for name in classes])
    rows = [*classes, NONE]
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(len(classes) + 1) - 0.5
    heat = axes.pcolormesh(found.bounds, edges, chances, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    for segment in found.segments:
        row = len(classes) if segment.label is None else classes.index(segment.label)
        length = segment.end - segment.start
        hatch = "///" if segment.label is None else None
        axes.broken_barh([(segment.start, length)], (row - 0.36, 0.72), fc="none", ec="C1", lw=1.6, hatch=hatch)
        if segment.confidence is not None and length > 0.04 * found.seconds:
            text = f"{100 * segment.confidence:.0f} %"
            box = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1}
            axes.text(segment.start + length / 2, row, text, ha="center", va="center", fontsize="small", bbox=box)
    axes.set(xlim=(0, found.seconds), ylim=(len(rows) - 0.5, -0.5), xlabel="time, m:ss")
    axes.set_title(Path(found.clip).name, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.xaxis.set_major_locator(MultipleLocator(next(step for step in _ticks() if 10 * step >= found.seconds)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: clock(at).removesuffix(".0")))
    figure.colorbar(heat, ax=axes, label="probability", pad=0.01)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)
