"""What all backbones share: their interface, what a builder returns, and weights of torchvision's by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soap_net.errors import UserError

State = Mapping[str, Tensor]
Statistics = tuple[float, float, float]
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)


def at_least(number: int, step: int = 1) -> range:
    """``number`` and every ``step`` after it."""
    return range(number, sys.maxsize, step)


def only(number: int) -> range:
    """``number`` alone."""
    return range(number, number + 1)


ANY = at_least(1)


class Backbone(nn.Module):
    """A net without its classifier: of images, or of whole clips where ``takes_clips`` is set.

    ``forward`` takes float images ``(N, 3, H, W)``, normalised by ``mean`` and ``std`` (in units of 0..1), and returns
    ``(N, dim)``; of clips it takes ``(B, T, 3, H, W)`` and returns ``(B, vectors(T), dim)``.

    Args:
        name: what it is called in messages.
        net: does the work.
        dim: features of a vector.
        mean, std: per channel, what the net's weights were trained with.
        takes_clips: whether the net sees whole clips.
        frames: how many frames a clip may have.
        height, width: the sides that images may have.
        frames_per_vector: how many frames a feature vector of a clip stands for; ``None`` is all of them.

    Raises:
        UserError: images of a size, or clips of a number of frames, that the net does not take.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        dim: int,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
        takes_clips: bool = False,
        frames: range = ANY,
        height: range = ANY,
        width: range = ANY,
        frames_per_vector: int | None = 1,
    ) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self.dim = dim
        self.mean = mean
        self.std = std
        self.takes_clips = takes_clips
        self.frames = frames
        self.height = height
        self.width = width
        self.frames_per_vector = frames_per_vector

    def vectors(self, frames: int) -> int:
        """How many feature vectors a clip of ``frames`` frames has: for a net of images one a frame.

        Raises:
            UserError: the net does not take that number of frames.
        """
        if frames not in self.frames:
            raise UserError(
                f"backbone {self.name} takes clips of {_named(self.frames)} frames, got {frames}: "
                f"set data.frames to {_nearest(frames, self.frames)}"
            )
        return 1 if self.frames_per_vector is None else -(-frames // self.frames_per_vector)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height not in self.height or width not in self.width:
            raise UserError(
                f"backbone {self.name} takes frames of {_named(self.height)} x {_named(self.width)} pixels, "
                f"got {height} x {width}: set data.crop to {_nearest(min(height, width), self.height)}"
            )
        if self.takes_clips:
            self.vectors(images.shape[1])
        return self.net(images)

    def blocks(self) -> Iterator[nn.Module]:
        """The net's repeated blocks (residual blocks, transformer layers), in order: the units of checkpointing.

        Found by form: the modules below a container that are no containers themselves, and sequences of plain layers.
        A net without any is one block.
        """
        yield from list(_blocks(self.net, inside=False)) or [self.net]


def _blocks(module: nn.Module, inside: bool) -> Iterator[nn.Module]:
    for child in module.children():
        container = isinstance(child, (nn.Sequential, nn.ModuleList))
        plain = isinstance(child, nn.Sequential) and any(_is_layer(layer) for layer in child)
        if container and not plain:
            yield from _blocks(child, inside=True)
        elif (inside or plain) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, inside=False)


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


def _named(numbers: range) -> str:
    if len(numbers) == 1:
        return str(numbers.start)
    if numbers.step > 1:
        return f"a multiple of {numbers.step}"
    return f"at least {numbers.start}"


def _nearest(number: int, numbers: range) -> int:
    place = round((number - numbers.start) / numbers.step)
    return numbers[min(max(place, 0), len(numbers) - 1)]


@dataclass(frozen=True)
class Built:
    """A backbone with random weights, and where it may take others from.

    Attributes:
        backbone: what `build_backbone` returns.
        net: the part of it whose names weights files use.
        classifier: what the names of tensors begin with that a backbone has no use for.
        published: weights that come by name, each with the function that gets them.
        renamed: takes a file's tensors to the net's names, where a file in use has its own.
    """

    backbone: Backbone
    net: nn.Module
    classifier: tuple[str, ...] = ()
    published: Mapping[str, Callable[[], State]] = field(default_factory=dict)
    renamed: Callable[[State], State] = dict


def torchvision_weights(name: str, first: str) -> dict[str, Callable[[], State]]:
    """By name, what gets each of the weights that torchvision has for its net ``name``; ``first`` names the first.

    Each raises UserError where they can't be had, with the file to put and where.
    """
    from torchvision import models

    entries = models.get_model_weights(name).__members__
    published = {entry: partial(_from_hub, weights) for entry, weights in entries.items()}
    return {first: next(iter(published.values())), **published}


def _from_hub(entry: Any) -> State:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        return entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no room, a damaged file: urllib, http, OSError, RuntimeError, pickle
        raise UserError(
            f"cannot get {entry.url} ({one_line(error)}): put that file at {path}, "
            "or set model.weights to a local .pth or .safetensors file or to random"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text, which other libraries' may have many of."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
