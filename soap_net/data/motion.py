"""The embedded data set "motion": clips of limited-lifetime random dots, told apart by their motion alone.

Every dot lives for a fixed time and drifts along one of 28 flow patterns. Births are a homogeneous Poisson process in
space and time, on a canvas that reaches as far beyond the frame as a dot can travel in its life, and their rate is set
so that the density inside the frame is the same for every pattern. All 28 velocity fields are linear in the position,
under which a uniform cloud stays uniform; so each single frame, whichever the pattern, is a draw from one and the same
process: a homogeneous Poisson cloud of dots. The class is in the differences between frames alone.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from soap_net.data.loading import cores
from soap_net.errors import UserError
from soap_net.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Array = NDArray[np.float64]

MARKER = "motion.json"
# Counts up whenever the same config renders to other clips, so that cached ones are written anew.
FORMAT = 1
_Clips = dict[tuple[str, str], tuple[int, ...]]  # the seed of each clip, by pattern and name
_Encoder = tuple[str, str, dict[str, str]]  # codec, pixel format and options
# The first that the installed FFmpeg can encode. Every frame is a keyframe: predicted frames would carry traces of the
# motion, and with them the class, in their compression artefacts.
CODECS: tuple[_Encoder, ...] = (
    ("libx264", "yuv444p", {"crf": "10", "preset": "fast"}),
    ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "2"}),
)


@dataclass(frozen=True)
class Pattern:
    """One class: the velocity field ``sign * speed * (direction + gradient @ p)``.

    ``p`` is the place in half frames from the frame's centre, x to the right and y down. ``direction`` (2,) and
    ``gradient`` (2, 2) are scaled so that the root mean square of the velocity over the frame is ``speed``. ``sign`` is
    +1, or for a ``counterflow`` +1 for one half of the dots and -1 for the other. ``split`` is the one it belongs to.
    """

    name: str
    split: str
    direction: Array
    gradient: Array
    counterflow: bool = False

    def velocity(self, places: Array, speed: float, size: int) -> Array:
        """Velocities (N, 2) in pixels per second at pixel coordinates ``places`` (N, 2), for sign +1."""
        half = size / 2
        return speed * (self.direction + (places - half) / half @ self.gradient.T)


def _straight(name: str, split: str, degrees: float, counterflow: bool = False) -> Pattern:
    angle = math.radians(degrees)  # anticlockwise from the right as one sees it, y pointing down in the frame
    return Pattern(name, split, np.array([math.cos(angle), -math.sin(angle)]), np.zeros((2, 2)), counterflow)


def _linear(name: str, split: str, rows: tuple[tuple[float, float], tuple[float, float]]) -> Pattern:
    gradient = np.array(rows, dtype=np.float64)
    # The mean of |gradient @ p|^2 over the frame, p in [-1, 1]^2, is a third of the squared Frobenius norm.
    return Pattern(name, split, np.zeros(2), gradient * math.sqrt(3.0) / np.linalg.norm(gradient))


# Each split holds single directions and patterns with several directions in them; val and test hold no mere pair of
# neighbouring directions, and what a test class does as a whole no train class does.
_SPLITS_OF_DIRECTIONS = ("train", "train", "test", "train", "train", "val") * 2
PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        *(
            _straight(f"direction-{degrees:03d}", split, degrees)
            for degrees, split in zip(range(0, 360, 30), _SPLITS_OF_DIRECTIONS, strict=True)
        ),
        _linear("rotation-clockwise", "train", ((0, -1), (1, 0))),
        _linear("rotation-anticlockwise", "test", ((0, 1), (-1, 0))),
        _linear("expansion", "test", ((1, 0), (0, 1))),
        _linear("contraction", "train", ((-1, 0), (0, -1))),
        _linear("spiral-out-clockwise", "train", ((1, -1), (1, 1))),
        _linear("spiral-out-anticlockwise", "test", ((1, 1), (-1, 1))),
        _linear("spiral-in-clockwise", "val", ((-1, -1), (1, -1))),
        _linear("spiral-in-anticlockwise", "train", ((-1, 1), (-1, -1))),
        _linear("shear-top-left", "train", ((0, 1), (0, 0))),
        _linear("shear-top-right", "test", ((0, -1), (0, 0))),
        _linear("shear-left-up", "val", ((0, 0), (1, 0))),
        _linear("shear-left-down", "train", ((0, 0), (-1, 0))),
        _linear("stretch-horizontal", "train", ((1, 0), (0, -1))),
        _linear("stretch-vertical", "val", ((-1, 0), (0, 1))),
        _straight("counterflow-horizontal", "test", 0, counterflow=True),
        _straight("counterflow-vertical", "train", 90, counterflow=True),
    )
}
PATTERNS_OF: dict[str, tuple[str, ...]] = {
    split: tuple(pattern.name for pattern in PATTERNS.values() if pattern.split == split)
    for split in ("train", "val", "test")
}


@dataclass(frozen=True)
class MotionConfig:
    """What the motion data set looks like; times in seconds, so that the frame rate can change alone.

    Raises ``UserError`` for values that describe no clip.
    """

    size: int = 48
    """Height and width of a frame in pixels (even)."""
    frame_rate: float = 16.0
    """Frames per second."""
    seconds: float = 0.75
    """Length of a clip."""
    speed: float = 24.0
    """Root mean square of the dots' speed over the frame, in pixels per second."""
    speed_spread: float = 0.2
    """Each clip has its own speed, uniform within this share of ``speed``."""
    lifetime: float = 0.375
    """How long a dot lives."""
    dots: float = 60.0
    """Mean number of dots in a frame."""
    dot_radius: float = 0.9
    """Standard deviation of a dot's Gaussian profile in pixels."""
    contrast: float = 110.0
    """Height of a dot over, or its depth under, the mid-grey ground, in grey levels."""
    noise: float = 2.0
    """Standard deviation of the noise on every pixel, in grey levels."""
    train_clips: int = 40
    """Clips per class in the train split."""
    val_clips: int = 20
    """Clips per class in the val split."""
    test_clips: int = 40
    """Clips per class in the test split."""
    seed: int = 0
    """Seeds every clip."""

    def __post_init__(self) -> None:
        for name in ("size", "frame_rate", "seconds", "lifetime", "dots", "dot_radius"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"motion data: {name} is {getattr(self, name)}, expected a number above 0")
        for name in ("speed", "contrast", "noise", "train_clips", "val_clips", "test_clips", "seed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"motion data: {name} is {getattr(self, name)}, expected a number of at least 0")
        if self.size % 2:
            raise UserError(f"motion data: size is {self.size}, expected an even number of pixels")
        if not 0 <= self.speed_spread < 1:
            raise UserError(f"motion data: speed_spread is {self.speed_spread}, expected a share in [0, 1)")

    @property
    def frames(self) -> int:
        """Frames in a clip."""
        return max(1, round(self.frame_rate * self.seconds))


def _flow_maps(gradient: Array, times: Array) -> Array:
    """exp(gradient * t) for each of ``times`` (N,): (N, 2, 2), by the closed form for two by two matrices."""
    mean = np.trace(gradient) / 2
    turn = gradient - mean * np.eye(2)  # turn @ turn = square * identity
    square = float(-np.linalg.det(turn))
    rate = math.sqrt(abs(square))
    if square > 1e-12:
        even, odd = np.cosh(rate * times), np.sinh(rate * times) / rate
    elif square < -1e-12:
        even, odd = np.cos(rate * times), np.sin(rate * times) / rate
    else:
        even, odd = np.ones_like(times), times
    return np.exp(mean * times)[:, None, None] * (even[:, None, None] * np.eye(2) + odd[:, None, None] * turn)


def render_clip(pattern: str, seed: int | tuple[int, ...], config: MotionConfig) -> Tensor:
    """Draw one clip of a pattern.

    Args:
        pattern: a name in ``PATTERNS``.
        seed: seeds the clip; the same seed gives the same bytes.
        config: what the clip looks like.

    Returns:
        uint8 (frames, 3, size, size), grey.

    Raises:
        UserError: for an unknown pattern.
    """
    flow = PATTERNS.get(pattern)
    if flow is None:
        raise UserError(f"motion data: unknown pattern {pattern!r}, expected one of {', '.join(PATTERNS)}")
    rng = np.random.default_rng(seed)
    half = config.size / 2
    speed = config.speed * (1 + config.speed_spread * rng.uniform(-1, 1))
    velocity, gradient = speed * flow.direction, speed / half * flow.gradient

    # Who is ever seen was born within the frame's preimages under the flow, up to one lifetime back.
    backward = np.abs(_flow_maps(gradient, -np.linspace(0, config.lifetime, 33))).sum(2).max()
    reach = backward * (half + 4 * config.dot_radius) + np.abs(velocity).max() * config.lifetime
    # A divergent flow thins the dots as they age. At birth they are as much denser, so that the frame shows `dots`.
    spread = float(np.trace(gradient))
    lives = -math.expm1(-spread * config.lifetime) / spread if spread else config.lifetime
    births = config.dots / config.size**2 / lives * (2 * reach) ** 2 * (config.lifetime + config.seconds)
    count = rng.poisson(births)
    born_at = rng.uniform(-reach, reach, (count, 2))
    born_when = rng.uniform(-config.lifetime, config.seconds, count)
    height = config.contrast * rng.choice([-1.0, 1.0], count)
    sign = rng.choice([-1.0, 1.0], count) if flow.counterflow else np.ones(count)

    # Every dot at every frame it lives through, by frame.
    ages = np.arange(config.frames)[:, None] / config.frame_rate - born_when
    at_frame, dot = np.nonzero((ages >= 0) & (ages < config.lifetime))
    age = ages[at_frame, dot]
    places = np.einsum("nij,nj->ni", _flow_maps(gradient, age), born_at[dot]) + (sign[dot] * age)[:, None] * velocity
    seen = (np.abs(places) < half + 4 * config.dot_radius).all(1)
    at_frame, dot, places = at_frame[seen], dot[seen], places[seen]
    pixels = np.arange(config.size) + 0.5 - half
    across, down = (np.exp(-0.5 * ((pixels - axis[:, None]) / config.dot_radius) ** 2) for axis in places.T)
    down *= height[dot, None]
    images = 128 + config.noise * rng.standard_normal((config.frames, config.size, config.size))
    bounds = np.searchsorted(at_frame, np.arange(config.frames + 1))
    for image, start, end in zip(images, bounds[:-1], bounds[1:], strict=True):
        image += down[start:end].T @ across[start:end]
    clip = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    return torch.from_numpy(clip)[:, None].repeat(1, 3, 1, 1)


def write_motion(root: Path, config: MotionConfig | None = None, *, progress: bool = True) -> Path:
    """Write the data set below ``root``: ``videos/<class>/<clip>.mp4`` and ``splits/{train,val,test}.txt``.

    A folder that holds all of the data set of this very config is left as it is; one that holds another, or an
    incomplete one, is replaced. Everything is written to a folder beside ``root`` first, so that ``root`` never holds
    half a data set; what killed processes left of theirs goes.

    Args:
        root: where to write.
        config: what to write, by default ``MotionConfig()``.
        progress: whether to show a progress bar.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` holds other files, or FFmpeg lacks an encoder.
        WriteError: there the folder can't be made.
        OSError: the disk is full or fails; ``root`` stays as it was.
    """
    config = config or MotionConfig()
    root = Path(root)
    clips: _Clips = {
        (pattern, f"{pattern}-{number:04d}"): (config.seed, list(PATTERNS).index(pattern), number)
        for split, patterns in PATTERNS_OF.items()
        for pattern in patterns
        for number in range(getattr(config, f"{split}_clips"))
    }
    settings = dataclasses.asdict(config)
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()
    _remove_stale(root)
    if _complete(root, digest, clips):
        return root
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: not a folder, so the motion data can't be written there")
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise UserError(f"{root}: holds other files than the motion data; choose another folder, or empty it")
    encoder = _encoder()

    with writing(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.TemporaryDirectory(prefix=f".{root.name}.part-", dir=root.parent)
    with part as scratch, ExitStack() as held:
        with suppress(OSError):  # on a file system without locks nothing is taken for stale
            held.enter_context(_locked(Path(scratch)))
        fresh = Path(scratch) / "fresh"
        for pattern in PATTERNS:
            (fresh / "videos" / pattern).mkdir(parents=True)
        (fresh / "splits").mkdir()
        for split, patterns in PATTERNS_OF.items():
            lines = [f"{pattern}/{clip}\n" for pattern, clip in clips if pattern in patterns]
            (fresh / "splits" / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
        _write_clips(fresh / "videos", clips, config, encoder, progress)
        marker = {"hash": digest, "config": settings}
        (fresh / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        if root.exists():
            root.rename(Path(scratch) / "replaced")
        fresh.rename(root)
    return root


def is_motion(root: Path) -> bool:
    """Whether the folder holds the motion data set, which shows dots and nothing else."""
    return (root / MARKER).is_file()


def _remove_stale(root: Path) -> None:
    """Removes the folders that killed processes left beside ``root``; one that another is writing to stays."""
    for folder in root.parent.glob(f".{glob.escape(root.name)}.part-*"):
        with suppress(OSError), _locked(folder):
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder, as long as this process lives at the most; raises OSError where another one holds it."""
    if fcntl is None:
        raise OSError("folders can't be locked here")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _write_clips(folder: Path, clips: _Clips, config: MotionConfig, encoder: _Encoder, progress: bool) -> None:
    def write(clip: tuple[str, str]) -> None:
        pattern, name = clip
        _write_clip(folder / pattern / f"{name}.mp4", render_clip(pattern, clips[clip], config), config, *encoder)

    # Threads: most of the time goes into NumPy and FFmpeg, which let others run. Each clip has its own seed, so that
    # their number changes nothing.
    pool = ThreadPoolExecutor(cores())
    try:
        work = pool.map(write, clips)
        for _ in tqdm(work, "writing clips", len(clips), unit="clip", leave=False, disable=not progress):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _write_clip(
    path: Path, frames: Tensor, config: MotionConfig, codec: str, pixels: str, options: dict[str, str]
) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(config.frame_rate).limit_denominator(1001))
        stream.width = stream.height = config.size
        stream.pix_fmt = pixels
        stream.options = options
        stream.codec_context.gop_size = 1
        stream.codec_context.thread_count = 1
        for image in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _complete(root: Path, digest: str, clips: Iterable[tuple[str, str]]) -> bool:
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = [*(root / "videos" / pattern / f"{clip}.mp4" for pattern, clip in clips)]
    files += [root / "splits" / f"{split}.txt" for split in PATTERNS_OF]
    return isinstance(marker, dict) and marker.get("hash") == digest and all(file.is_file() for file in files)


def _encoder() -> _Encoder:
    for name, pixels, options in CODECS:
        if name in av.codecs_available:
            return name, pixels, options
    names = " nor ".join(name for name, _, _ in CODECS)
    raise UserError(f"the motion data can't be written: this build of PyAV can encode neither {names}")
