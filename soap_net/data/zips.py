"""Zips of frames: which images are where in them, and clips read from them.

A pack (`soap_net.data.pack`) is a zip of such zips, one for each clip, so that its index grows with the clips alone.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soap_net.data.images import IMAGE_SUFFIXES, MOST_BYTES, decode, in_natural_order, is_image
from soap_net.errors import ClipError, UserError, said

PACK, PACK_VERSION = "soap-net pack", 1
"""What the comment of a pack, a JSON object, says under "format" and "version"."""

_Entries = NDArray[np.void]  # of _ENTRY, a row per member
_ENTRY = np.dtype(
    [("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")]
)
# The fields that are read of a directory's record, and where in it; its name, extra field and comment follow.
_FIELDS: dict[str, tuple[str, int]] = {
    "signature": ("<u4", 0), "needed": ("u1", 6), "flags": ("<u2", 8), "method": ("<u2", 10), "crc": ("<u4", 16),
    "stored": ("<u4", 20), "size": ("<u4", 24), "name": ("<u2", 28), "extra": ("<u2", 30), "offset": ("<u4", 42),
}  # fmt: skip
_RECORD = 46  # bytes
_SIGNATURE = int.from_bytes(b"PK\x01\x02", "little")
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LENGTHS = struct.Struct("<3H")
_ELSEWHERE = 2**32 - 1  # a number beyond 32 bits, which is in the extra field


class Archive:
    """The index of a zip: its images by folder, in natural order. Offsets only, as data sets have millions of frames.

    ``told`` is the zip's comment, where that is a JSON object. Of a pack, ``folders`` are its clips, and ``texts`` its
    text files. Rows of ``entries`` are named by their range.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, int] = {}
        try:
            with open(path, "rb") as file:
                index = _Index(file, 0, file.seek(0, os.SEEK_END))
            self.told = index.told
            self.packed = self.told.get("format") == PACK
            if self.packed and self.told["version"] > PACK_VERSION:
                raise UserError("a pack of a newer soap-net, which this one does not know")
            if self.packed:
                rows, self.entries = index.members()
                clips = in_natural_order(name.removesuffix(".zip") for name in rows if name.endswith(".zip"))
                self.folders = {name: (rows[f"{name}.zip"], rows[f"{name}.zip"] + 1) for name in clips}
                self.texts = {name: row for name, row in rows.items() if name.endswith(".txt")}
            else:
                self.folders, self.entries = index.images()
        except Exception as error:  # a damaged directory fails in as many ways as there are bytes in it
            raise ClipError(path, f"not a readable zip ({said(error)})") from error

    def text(self, name: str) -> str:
        """What a text file of a pack says. Raises ClipError."""
        with open(self.path, "rb") as file:
            return _content(file, self.entries[self.texts[name]], self.path / name, "the file").decode("utf-8")


_archives: dict[tuple[Path, int, int], Archive] = {}


def archive(path: Path, mtime_ns: int, size: int) -> Archive:
    """The index of the zip at ``path`` in its state of that time and size, kept for this process. Raises ClipError."""
    key = (path, mtime_ns, size)
    if key not in _archives:
        keep_archives({key: Archive(path)})
    return _archives[key]


def archive_at(path: Path) -> Archive:
    """The index of the zip at ``path`` as it is now. Raises ClipError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ClipError(path, said(error)) from error
    return archive(path, stat.st_mtime_ns, stat.st_size)


def list_in_pack(root: Path, split: str) -> Path | None:
    """The list of ``split`` in a pack: that at ``root``, or in the folder ``root`` that of the split, or of all."""
    zips = [root]
    if root.is_dir():
        zips = [root / f"{split}.zip"] if (root / f"{split}.zip").is_file() else [*root.glob("*.zip")]
    name = f"splits/{split}.txt"
    return zips[0] / name if len(zips) == 1 and name in archive_at(zips[0]).texts else None


def read_list(path: Path) -> tuple[str, str] | None:
    """The text of a list in a pack, and the form of the list that it was made of; None for another file."""
    pack = path.parent.parent
    if not pack.is_file():
        return None
    told = archive_at(pack)
    return told.text(f"{path.parent.name}/{path.name}"), str(told.told.get("forms", {}).get(path.stem, ""))


def kept_archives() -> dict[tuple[Path, int, int], Archive]:
    """What this process has read, for one that it starts."""
    return dict(_archives)


def keep_archives(read: dict[tuple[Path, int, int], Archive]) -> None:
    """Has `archive` give these, and forget the oldest where there are many."""
    _archives.update(read)
    for old in [*_archives][:-64]:
        del _archives[old]


class Zipped:
    """The images of a zip, or of one folder in it; or a clip of a pack."""

    def __init__(self, path: Path, member: str, index: Archive) -> None:
        folder = member.strip("/")
        self.path = path
        self.shown = path / folder
        self._told = index.told
        begin, end = index.folders.get(folder, (0, 0 if folder or index.packed else len(index.entries)))
        self.entries = index.entries[begin:end]
        if index.packed and begin < end:
            self._open_packed(self.entries[0])
        if not len(self.entries):
            raise ClipError(self.shown, f"the zip holds no images there ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def _open_packed(self, entry: np.void) -> None:
        try:
            with open(self.path, "rb") as file:
                index = _Index(file, _start(file, entry, self.shown, "the clip"), int(entry["stored"]))
            self._told, (_, self.entries) = index.told, index.images()
        except ClipError:
            raise
        except Exception as error:
            raise ClipError(self.shown, f"not a readable zip ({said(error)})") from error

    def num_frames(self) -> int:
        return len(self.entries)

    def read(self, wanted: Sequence[int]) -> list[Tensor]:
        frames = []
        try:
            # Opened for each read: a handle kept across the fork of a loader's worker would share its file position.
            with open(self.path, "rb") as file:
                for number in wanted:
                    data = _content(file, self.entries[number], self.shown, f"frame {number}")
                    frames.append(decode(data, self.shown, number))
        except OSError as error:
            raise ClipError(self.shown, str(error)) from error
        return frames

    def fps(self) -> float | None:
        fps = self._told.get("fps")
        return float(fps) if isinstance(fps, int | float) and fps > 0 else None

    def cut(self) -> str | None:
        cut = self._told.get("cut")
        return cut if isinstance(cut, str) and cut.isprintable() else None


# ------------------------------------------------------------------------------------------------ members


def _start(file: BinaryIO, entry: np.void, shown: Path, what: str) -> int:
    """Where a member's bytes begin."""
    file.seek(int(entry["offset"]))
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ClipError(shown, f"{what} is not where the zip's directory says")
    return int(entry["offset"]) + 30 + sum(struct.unpack("<HH", header[26:]))


def _content(file: BinaryIO, entry: np.void, shown: Path, what: str) -> bytes:
    stored, size = int(entry["stored"]), int(entry["size"])
    if entry["flags"] & 1:
        raise ClipError(shown, f"{what} is encrypted")
    if entry["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ClipError(shown, f"{what} is packed by a method other than store and deflate")
    if max(stored, size) > MOST_BYTES:
        raise ClipError(shown, f"{what} has {max(stored, size)} bytes, and an image may have {MOST_BYTES}")
    file.seek(_start(file, entry, shown, what))
    data = file.read(stored)
    if entry["method"] == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # whatever it holds
        except zlib.error as error:
            raise ClipError(shown, f"{what} cannot be unpacked ({error})") from error
    if zlib.crc32(data) != entry["crc"]:
        raise ClipError(shown, f"{what} is damaged (its checksum differs)")
    return data


# ---------------------------------------------------------------------------------------------- directory


class _Index:
    """The directory of a zip of ``size`` bytes, which begins at ``start`` of ``file``; ``told`` is its comment.

    Not by zipfile, which takes 650 bytes a member, and three times as long.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._data, self._shift, comment = _directory(file, start, size)
        self.told = _object(comment)
        places, numbers, known = _records(self._data)
        order = places[np.argsort(numbers, kind="stable")]
        ends = np.cumsum(np.bincount(numbers, minlength=len(known))).tolist()
        self._groups: dict[str, NDArray[np.int64]] = {}  # where the records of each folder are, in their order
        for folder, begin, end in zip(known, [0, *ends], ends, strict=False):
            name = self._decoded(folder, order[begin])
            if not name.startswith("__MACOSX"):
                name = name.strip("/")
                before = self._groups.get(name, order[:0])
                self._groups[name] = np.concatenate([before, order[begin:end]]) if len(before) else order[begin:end]

    def images(self) -> tuple[dict[str, tuple[int, int]], _Entries]:
        """The ranges of the folders that hold images, and the rows."""
        folders: dict[str, tuple[int, int]] = {}
        chosen = array("q")
        for folder in in_natural_order(self._groups):
            members = self._members(folder)
            names = in_natural_order(filter(is_image, members))
            if names:
                folders[folder] = len(chosen), len(chosen) + len(names)
                chosen.extend([members[name] for name in names])
        return folders, self._entries(chosen)

    def members(self) -> tuple[dict[str, int], _Entries]:
        """The rows of all members, by their names with folders."""
        rows: dict[str, int] = {}
        chosen = array("q")
        for folder in self._groups:
            for name, place in self._members(folder).items():
                rows[f"{folder}/{name}".lstrip("/")] = len(chosen)
                chosen.append(place)
        return rows, self._entries(chosen)

    def _members(self, folder: str) -> dict[str, int]:
        """The places of a folder's records by name; of one name the last."""
        data, places, names = self._data, self._groups[folder].tolist(), []
        for place in places:
            begin = place + _RECORD
            end = begin + _LENGTHS.unpack_from(data, place + 28)[0]
            names.append(data[max(begin, data.rfind(b"/", begin, end) + 1) : end])
        try:
            decoded = b"/".join(names).decode("utf-8").split("/")  # all at once: a million calls take a while
        except UnicodeDecodeError:
            decoded = [self._decoded(name, place) for name, place in zip(names, places, strict=True)]
        return dict(zip(decoded, places, strict=False))

    def _decoded(self, name: bytes, place: int) -> str:
        # Many tools store UTF-8 without setting the flag that says so.
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            if self._data[place + 9] & 8:
                raise
            return name.decode("cp437")

    def _entries(self, chosen: array[int]) -> _Entries:
        places = np.frombuffer(chosen, dtype=np.int64)
        entries = np.empty(len(places), dtype=_ENTRY)
        for field in _ENTRY.names or ():
            entries[field] = _field(self._data, field, places)
        for row in np.flatnonzero((entries["offset"] == _ELSEWHERE) | (entries["size"] == _ELSEWHERE)
                                  | (entries["stored"] == _ELSEWHERE)).tolist():  # fmt: skip
            numbers = _beyond(self._data, int(places[row]))
            for field in ("size", "stored", "offset"):
                if entries[field][row] == _ELSEWHERE:
                    entries[field][row] = next(numbers)
        entries["offset"] += self._shift
        return entries


def _object(comment: bytes) -> dict[str, Any]:
    try:
        told = json.loads(comment or b"null")
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _directory(file: BinaryIO, start: int, size: int) -> tuple[bytes, int, bytes]:
    """A zip's directory, what to add to the places that it names, and the zip's comment."""
    read = min(size, 2**16 + _END.size + _END64.size + 20)
    file.seek(start + size - read)
    tail = file.read(read)
    end = tail.rfind(b"PK\x05\x06", 0, len(tail) - _END.size + 4)
    if end < 0:
        raise zipfile.BadZipFile("File is not a zip file")
    *_, length, offset, said_bytes = _END.unpack_from(tail, end)
    comment = tail[end + _END.size : end + _END.size + said_bytes]
    large = end - 20 - _END64.size
    if large >= 0 and tail[end - 20 :].startswith(b"PK\x06\x07") and tail[large:].startswith(b"PK\x06\x06"):
        *_, length, offset = _END64.unpack_from(tail, large)
        end = large
    begin = size - read + end - length  # within the zip; more may stand before it than it knows of
    if begin < offset:
        raise zipfile.BadZipFile("its directory is not there")
    if length <= end:
        data = tail[end - length : end]
    else:
        file.seek(start + begin)
        data = file.read(length)
    return data, start + begin - offset, comment


def _records(data: bytes) -> tuple[NDArray[np.int64], NDArray[np.int32], dict[bytes, int]]:
    """Where the directory's records are, and the folder of each by number; the folders' numbers."""
    places, numbers = array("q"), array("i")
    known: dict[bytes, int] = {}
    place = 0
    while place < len(data):
        name, extra, comment = _LENGTHS.unpack_from(data, place + 28)
        following = place + _RECORD + name
        folder = data[place + _RECORD : data.rfind(b"/", place + _RECORD, following) + 1]
        places.append(place)
        numbers.append(known.setdefault(folder, len(known)))
        place = following + extra + comment
    found = np.frombuffer(places, dtype=np.int64)
    if place > len(data) or (_field(data, "signature", found) != _SIGNATURE).any():
        raise zipfile.BadZipFile("its directory is damaged")
    if (_field(data, "needed", found) > zipfile.MAX_EXTRACT_VERSION).any():
        raise zipfile.BadZipFile("it is of a newer version of the format")
    return found, np.frombuffer(numbers, dtype=np.int32), known


def _field(data: bytes, field: str, places: NDArray[np.int64]) -> NDArray[Any]:
    form, offset = _FIELDS[field]
    dtype = np.dtype(form)
    room = len(data) - offset - dtype.itemsize + 1
    everywhere: NDArray[Any] = np.ndarray((max(0, room),), dtype, data, min(offset, len(data)), (1,))
    return everywhere[places]


def _beyond(data: bytes, place: int) -> Iterator[int]:
    """The numbers beyond 32 bits of a record, from its extra field."""
    name, length, _ = _LENGTHS.unpack_from(data, place + 28)
    extra = data[place + _RECORD + name : place + _RECORD + name + length]
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            return iter(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
        extra = extra[4 + size :]
    raise zipfile.BadZipFile("its directory lacks numbers beyond 32 bits")
