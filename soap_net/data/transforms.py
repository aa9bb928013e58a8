"""From a clip to the uint8 frames a model sees: which frames, then resize, crop and flip, the same for all of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from soap_net.config import DataConfig
from soap_net.data.clips import Clip
from soap_net.data.memory import ClipMemory
from soap_net.errors import UserError


@dataclass(frozen=True)
class FrameSampling:
    """Chooses ``frames`` frame numbers of a clip, in ascending order.

    ``interval=None`` cuts the clip into ``frames`` equal segments and takes one frame of each: its centre in
    evaluation, a random one in training (the sampling of TSN, which few-shot action recognition uses). Otherwise the
    frames lie ``interval`` apart in a window that is centred in evaluation and placed at random in training; a
    window longer than the clip is cut to it first. Where that leaves fewer than ``frames`` distinct frames, they
    are repeated evenly.
    """

    frames: int = 8
    interval: int | None = None

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"frames must be at least 1, not {self.frames}")
        if self.interval is not None and self.interval < 1:
            raise UserError(f"interval must be at least 1 frame, or none for uniform segments, not {self.interval}")

    def indices(self, num_frames: int, rng: np.random.Generator | None) -> list[int]:
        """The frame numbers to read of a clip of ``num_frames`` frames; ``rng`` None is evaluation.

        Raises UserError where ``num_frames`` is below 1.
        """
        if num_frames < 1:
            raise UserError(f"a clip needs at least one frame to sample from, not {num_frames}")
        if self.interval is None:
            return _segments(num_frames, self.frames, rng)
        inside = min(self.frames, 1 + (num_frames - 1) // self.interval)
        room = num_frames - (inside - 1) * self.interval
        start = (room - 1) // 2 if rng is None else int(rng.random() * room)
        return [start + self.interval * step for step in _segments(inside, self.frames, None)]


def _segments(num_frames: int, count: int, rng: np.random.Generator | None) -> list[int]:
    if rng is None or num_frames <= count:  # below one frame per segment, centres repeat the frames evenly
        return [(2 * segment + 1) * num_frames // (2 * count) for segment in range(count)]
    # Segments end between frames, so that no frame is drawn twice.
    bounds = [segment * num_frames // count for segment in range(count + 1)]
    draws = rng.random(count)
    return [low + int(draw * (high - low)) for low, high, draw in zip(bounds, bounds[1:], draws, strict=False)]


@dataclass(frozen=True)
class ClipLoader:
    """Reads a clip as ``(frames, 3, crop, crop)`` uint8: short side to ``resize``, then a ``crop`` square.

    In training the frames, the crop's place and (with ``flip``) the mirroring are drawn from the generator passed to
    the call; in evaluation everything is centred and no generator is used. Leave ``flip`` off where left and right
    are the label, as in Something-Something.

    ``order`` is how the frames are handed over, to study what a model makes of time: in their own order,
    ``"reversed"``, or ``"shuffled"``, anew for each load in training, by the clip's name in evaluation.

    Clips are read through ``memory``, which by default keeps none.
    """

    sampling: FrameSampling = FrameSampling()
    resize: int = 256
    crop: int = 224
    flip: bool = True
    train: bool = False
    order: Literal["forward", "reversed", "shuffled"] = "forward"
    memory: ClipMemory = field(default_factory=ClipMemory, compare=False)

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise UserError(f"crop must be at least 1 pixel, not {self.crop}")
        if self.resize < self.crop:
            raise UserError(f"resize {self.resize} is smaller than crop {self.crop}: a crop must fit into the frame")

    def __call__(self, clip: Clip, rng: np.random.Generator | None = None) -> Tensor:
        """uint8 ``(frames, 3, crop, crop)``; raises ClipError, and UserError for training without a generator."""
        if self.train and rng is None:
            raise UserError("loading a clip for training needs a random generator")
        draw = rng if self.train else None
        frames = self.memory.read(clip, self.sampling.indices(clip.num_frames(), draw))
        frames = self.transform(frames, draw)
        if self.order == "reversed":
            return frames.flip(0)
        if self.order == "shuffled":
            shuffle = draw or np.random.default_rng(zlib.crc32(clip.name.encode()))
            return frames[torch.from_numpy(shuffle.permutation(len(frames)))]
        return frames

    def transform(self, frames: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Resizes, crops and flips ``(T, 3, H, W)``, every frame alike; ``rng`` None is evaluation."""
        frames = resized(frames, self.resize)
        spare_rows, spare_columns = frames.shape[-2] - self.crop, frames.shape[-1] - self.crop
        mirrored = False
        if rng is None:
            top, left = spare_rows // 2, spare_columns // 2
        else:
            across, down, side = rng.random(3)
            top, left = int(down * (spare_rows + 1)), int(across * (spare_columns + 1))
            mirrored = self.flip and side < 0.5
        frames = frames[..., top : top + self.crop, left : left + self.crop]
        pixels = frames.numpy()
        # NumPy turns pixels into planes twice as fast as torch.
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if mirrored else pixels))


def resized(frames: Tensor, short: int) -> Tensor:
    """uint8 ``(T, 3, H, W)`` with the shorter side ``short``."""
    height, width = frames.shape[-2:]
    scale = short / min(height, width)
    size = [max(short, round(height * scale)), max(short, round(width * scale))]
    return frames if size == [height, width] else F.resize(frames, size, antialias=True)


def clip_loader(data: DataConfig, train: bool, memory: ClipMemory | None = None) -> ClipLoader:
    """How the config reads a clip: at random in training, if `augment` is on, at the centre in evaluation."""
    sampling = FrameSampling(data.frames, data.interval)
    memory, random = memory or ClipMemory(), train and data.augment
    return ClipLoader(sampling, data.resize, data.crop, flip=data.flip, train=random, order=data.order, memory=memory)
