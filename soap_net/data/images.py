"""Images: decoding them within bounds, the order of their names, and clips that are folders of them."""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from soap_net.errors import ClipError, said

try:  # a third faster than Pillow, and due to leave torchvision
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

T = TypeVar("T")

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# What a file may be, whatever its name says: Pillow knows others, one of which (EPS) it has a program run.
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")

MOST_PIXELS = 2**24
"""Of an image, by its header: twice a 4K frame. Eight such frames, read and stacked, stay below 1 GiB."""
LONGEST_SIDE = 2**14
"""Of an image, by its header: a format's decoder may take memory for whole rows."""
MOST_BYTES = 8 * MOST_PIXELS
"""Of an image's file, packed in a zip or unpacked: the most pixels, stored plain with four times 16 bits."""
MOST_SCANS = 128
"""Of a progressive JPEG, each of which goes over the whole image: encoders write a dozen."""
MOST_PACKED = 2**23
"""Bytes of a bitmap packed by run lengths, which Pillow reads byte by byte in Python."""


class Folder:
    """The images of a folder; hidden files and others are left out."""

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
                found = path.stat()
                if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, and a device has no end
                    raise ClipError(path, "not a file")
                if found.st_size > MOST_BYTES:
                    raise ClipError(path, f"{found.st_size} bytes, and an image may have {MOST_BYTES}")
                data = path.read_bytes()
            except OSError as error:
                raise ClipError(path, said(error)) from error
            frames.append(decode(data, path))
        return frames

    def fps(self) -> float | None:
        return None

    def cut(self) -> str | None:
        return None


# JPEG and WebP by their first bytes, whatever the name says. Not PNG: a damaged one ends the process in torchvision.
_FOR_TORCHVISION = re.compile(rb"\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


def decode(data: bytes, path: Path, number: int | None = None) -> Tensor:
    """An image's pixels, uint8 RGB ``(3, H, W)``. Raises ClipError, which names ``path`` and the frame's number."""
    frame = "" if number is None else f"frame {number}: "
    if not data:
        raise ClipError(path, f"{frame}the image is empty (0 bytes)")
    try:
        with _opened(data) as opened:
            excess = _excess(opened, data)
            if not excess:
                opened.verify()  # a PNG's checksums, which decoding does not look at
        if not excess:
            return _pixels(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's bound is a higher one
        excess = f"far more than {MOST_PIXELS} pixels"
    except Exception as error:  # a damaged image fails in as many ways as there are bytes in it
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else said(error)
        raise ClipError(path, f"{frame}the image cannot be decoded ({reason})") from error
    raise ClipError(path, f"{frame}the image has {excess}; scale the frames down")


def _opened(data: bytes) -> Image.Image:
    """Read up to its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def _excess(image: Image.Image, data: bytes) -> str:
    """What an image would take too much memory or time by, going by its header; empty where it is sound."""
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        return f"{width} x {height} pixels, and {MOST_PIXELS} are the most, {LONGEST_SIDE} in a row"
    scans = data.count(b"\xff\xda") if image.info.get("progressive") else 0
    if scans > MOST_SCANS:
        return f"{scans} scans, and {MOST_SCANS} are the most"
    packed = len(data) if image.format == "BMP" and image.info["compression"] in (1, 2) else 0
    return f"{packed} bytes of run lengths, and {MOST_PACKED} are the most" if packed > MOST_PACKED else ""


def _pixels(data: bytes) -> Tensor:
    if decode_image is not None and _FOR_TORCHVISION.match(data):
        # A broken image is left to Pillow, which says in words what is wrong.
        with suppress(RuntimeError):
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    with _opened(data) as opened:
        opened.info.pop("transparency", None)  # a palette's would be warned of, and is dropped anyway
        if opened.mode.startswith("I"):  # 16 bits a pixel, by Pillow's version "I;16" or "I"
            grey = (np.array(opened) >> 8).astype(np.uint8)
            pixels = np.repeat(grey[..., None], 3, -1)
        else:
            pixels = np.array(opened.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_image(name: str) -> bool:
    """Whether a file of that name is a frame; hidden files (``._1.jpg`` of macOS) are not."""
    return not name.startswith(".") and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


_DIGITS = re.compile("([0-9]+)")


def natural(text: str) -> tuple[tuple[int, str, str], ...]:
    """Sort key that orders runs of digits by value; one form for composed and decomposed letters."""
    parts = _DIGITS.split(text if text.isascii() else unicodedata.normalize("NFC", text))
    return tuple(_number(part) if position % 2 else (-1, "", part) for position, part in enumerate(parts))


def _number(digits: str) -> tuple[int, str, str]:
    # By their length, as Python turns no text of thousands of digits into a number.
    value = digits.lstrip("0")
    return len(value), value, digits


_SHAPE = bytes.maketrans(b"123456789", b"000000000")


def in_natural_order(items: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
    """Sorted by ``natural`` of their names; names that differ in digits alone, as most do, take a tenth of the time."""
    plain = sorted(items, key=name)
    if len({name(item).encode("utf-8", "surrogatepass").translate(_SHAPE) for item in plain}) <= 1:
        return plain
    return sorted(plain, key=lambda item: natural(name(item)))


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))
