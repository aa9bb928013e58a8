"""Clips whose frames are images: in a folder, or in a zip."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from soap_net.errors import ClipError, said

try:  # a third faster than Pillow, and due to leave torchvision
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

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
            frames.append(_decode_image(data, path))
        return frames

    def fps(self) -> float | None:
        return None


_Entries = NDArray[np.void]  # of _ENTRY, a row per image
_ENTRY = np.dtype(
    [("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")]
)


class Archive:
    """The images of a zip by folder, in natural order: offsets only, as data sets have millions of frames."""

    def __init__(self, path: Path) -> None:
        members: dict[str, dict[str, zipfile.ZipInfo]] = {}
        self.path = path
        self.folders: dict[str, _Entries] = {}
        try:
            with zipfile.ZipFile(path) as opened:
                for info in opened.infolist():
                    folder, _, name = _zip_name(info).rpartition("/")
                    if is_image(name) and not folder.startswith("__MACOSX"):
                        members.setdefault(folder.strip("/"), {})[name] = info
            for folder in in_natural_order(members):
                infos = members[folder]
                chosen = [infos[name] for name in in_natural_order(infos)]
                rows = [
                    (i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, i.flag_bits) for i in chosen
                ]
                self.folders[folder] = np.array(rows, dtype=_ENTRY)
        except Exception as error:  # a damaged directory fails in as many ways as there are bytes in it
            raise ClipError(path, f"not a readable zip ({said(error)})") from error


@lru_cache(maxsize=64)
def archive(path: Path, mtime_ns: int, size: int) -> Archive:
    """The index of the zip at ``path`` in its state of that time and size. Raises ClipError."""
    return Archive(path)


class Zipped:
    """The images of a zip, or of one folder in it."""

    def __init__(self, path: Path, member: str, index: Archive) -> None:
        folder = member.strip("/")
        if folder:
            entries = index.folders.get(folder)
        else:
            entries = np.concatenate(list(index.folders.values())) if index.folders else None
        self.path = path
        self.shown = path / folder
        if entries is None:
            raise ClipError(self.shown, f"the zip holds no images there ({_listed(IMAGE_SUFFIXES)})")
        self.entries = entries

    def num_frames(self) -> int:
        return len(self.entries)

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        frames = []
        try:
            # Opened for each read: a handle kept across the fork of a loader's worker would share its file position.
            with open(self.path, "rb") as file:
                for number in wanted:
                    frames.append(_decode_image(self._member(file, self.entries[number], number), self.shown, number))
        except OSError as error:
            raise ClipError(self.shown, str(error)) from error
        return frames

    def _member(self, file: io.BufferedReader, entry: np.void, number: int) -> bytes:
        stored, size = int(entry["stored"]), int(entry["size"])
        if entry["flags"] & 1:
            raise ClipError(self.shown, f"frame {number} is encrypted")
        if entry["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ClipError(self.shown, f"frame {number} is packed by a method other than store and deflate")
        if max(stored, size) > MOST_BYTES:
            raise ClipError(
                self.shown, f"frame {number} has {max(stored, size)} bytes, and an image may have {MOST_BYTES}"
            )
        file.seek(int(entry["offset"]))
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ClipError(self.shown, f"frame {number} is not where the zip's directory says")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        data = file.read(stored)
        if entry["method"] == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # whatever it holds
            except zlib.error as error:
                raise ClipError(self.shown, f"frame {number} cannot be unpacked ({error})") from error
        if zlib.crc32(data) != entry["crc"]:
            raise ClipError(self.shown, f"frame {number} is damaged (its checksum differs)")
        return data

    def fps(self) -> float | None:
        return None


def _zip_name(info: zipfile.ZipInfo) -> str:
    # Many tools store UTF-8 without setting the flag that says so, and Python then reads it as cp437.
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


# JPEG and WebP by their first bytes, whatever the name says. Not PNG: a damaged one ends the process in torchvision.
_FOR_TORCHVISION = re.compile(rb"\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


def _decode_image(data: bytes, path: Path, number: int | None = None) -> Tensor:
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


def natural(text: str) -> tuple[tuple[int, str, str], ...]:
    """Sort key that orders runs of digits by value; one form for composed and decomposed letters."""
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", text))
    return tuple(_number(part) if position % 2 else (-1, "", part) for position, part in enumerate(parts))


def _number(digits: str) -> tuple[int, str, str]:
    # By their length, as Python turns no text of thousands of digits into a number.
    value = digits.lstrip("0")
    return len(value), value, digits


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted by ``natural``; numbers padded to one length, as frames mostly are, take a tenth of the time."""
    plain = sorted(names)
    if plain and len({*map(len, plain)}) == 1:
        start = len(os.path.commonprefix([plain[0], plain[-1]]))  # noqa: RUF071 (by character is what is meant)
        end = plain[0].rfind(".")
        suffix = plain[0][end:]
        if all(name.isascii() and name[start:end].isdecimal() and name.endswith(suffix) for name in plain):
            return plain
    return sorted(plain, key=natural)


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))
