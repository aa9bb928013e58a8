"""A decoded video frame's pixels: as players show them, and their checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple, cast

import av
import numpy as np
import torch
from av.buffer import Buffer
from torch import Tensor


class Turn(NamedTuple):
    """How stored pixels become a shown picture: one of the eight ways to lay it down upright."""

    swapped: bool = False  # rows and columns change places, before all else
    down: int = 1  # -1: from the last row up
    across: int = 1  # -1: from the last column back


def upright(frame: av.VideoFrame, turn: Turn) -> Tensor:
    """uint8 RGB ``(3, H, W)``, channels last in memory, as players show it."""
    pixels = frame.to_ndarray(format="rgb24")
    if turn != Turn():
        pixels = pixels.swapaxes(0, 1) if turn.swapped else pixels
        pixels = np.ascontiguousarray(pixels[:: turn.down, :: turn.across])
    return torch.from_numpy(pixels).permute(2, 0, 1)


def display_turn(frame: av.VideoFrame) -> Turn:
    """What the frame's display matrix asks for; raises ValueError where that lays its edges at an angle."""
    matrix = _display_matrix(frame)
    # The pixel (p, q) is shown at matrix @ (p, q), apart from where the whole picture lies and from its scale.
    scale = np.hypot(*matrix.T)[:, None]
    if not scale.all():
        return Turn()  # it shows nothing; players ignore it
    exact = matrix / scale
    near = exact.round()
    if abs(exact - near).max() > 0.02 or abs(np.linalg.det(near)) != 1:  # a degree
        raise ValueError(f"its display matrix turns frames by {frame.rotation} degrees, not a multiple of 90")
    across, down = near.sum(axis=1).astype(int).tolist()
    return Turn(bool(near[0, 1]), down, across)


def _display_matrix(frame: av.VideoFrame) -> np.ndarray:
    # PyAV's side data and its frame hold each other, for the garbage collector to find; a tiny copy can wait for it.
    tiny = frame.reformat(width=16, height=16, format="gray")
    try:
        stored = cast(Mapping[str, Buffer], tiny.side_data).get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data unknown to PyAV is beside it; then the angle is all that can be had
        angle = np.radians(frame.rotation)
        return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    if stored is None:
        return np.eye(2)
    a, b, _, c, d = np.frombuffer(bytes(stored), np.int32)[:5].astype(float)
    return np.array([[a, c], [b, d]])


def checksum(frame: av.VideoFrame) -> int:
    """Of the decoded pixels, before any conversion."""
    kind = frame.format
    if kind.has_palette or kind.is_bit_stream or any(plane.line_size < 0 for plane in frame.planes):
        return zlib.crc32(frame.to_ndarray(format="rgb24").tobytes())
    bits = -(-kind.components[0].bits // 8) * 8 if kind.is_planar else kind.padded_bits_per_pixel
    total = 0
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
        total = zlib.crc32(rows[:, : plane.width * bits // 8].tobytes(), total)  # beyond lies padding: anything
    return total
