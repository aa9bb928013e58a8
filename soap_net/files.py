"""Files that are whole or not there: what is written takes its place at once, or leaves what was there as it was."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from soap_net.errors import UserError, WriteError

try:
    import fcntl
except ImportError:  # Windows, where a file that is being written can't be removed anyway
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends, on disk for good, and goes if the block fails.

    Its folder is made if need be.

    Raises:
        WriteError: the disk is full or the folder can't be written; the file at `path` is then as it was.
    """
    remove_stale(path.parent, path.name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sink, temporary = _begun(path)
    try:
        with io.BufferedWriter(sink) as file:
            yield file
            with writing(path):
                file.flush()
                if sink.failure is not None:
                    raise sink.failure
                os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, path: Path) -> None:
    """Puts a file that is on disk for good in the place of `path`.

    Raises:
        WriteError: the folder can't be written.
    """
    with writing(path):
        os.replace(temporary, path)
    with contextlib.suppress(OSError):  # where the system lets one open a folder, the rename itself is made durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all; leaves a file alone that holds it already.

    Raises:
        WriteError: see `replacing`.
    """
    content = text.encode("utf-8")
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    with replacing(path) as file:
        file.write(content)


def remove_stale(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left of files that they were writing in `folder`: all, or those of file `name`.

    A file that another process is still writing stays.
    """
    pattern = name if name == "*" else glob.escape(name)
    for part in folder.glob(f".{pattern}.*.part"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", part.name):
            with contextlib.suppress(OSError), part.open("r+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that one of our own JSON files holds, None where there is no file.

    Raises:
        UserError: it holds something else; as such files are written whole, it was damaged since.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to have it made anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object); delete it to have it made anew")
    return content


class Appended:
    """A file that grows at its end. What can't be written is kept, so that with it nothing is missing or there twice.

    Raises:
        WriteError: from all methods but `write`, where the disk is full or the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._end = os.fstat(self._file.fileno()).st_size
        self._kept = b""

    def write(self, data: bytes) -> None:
        """Adds `data` to what is kept."""
        self._kept += data

    def flush(self) -> None:
        """Writes what is kept, for who watches the file."""
        with writing(self.path):
            # By the file's size: so nothing is written twice where Ctrl-C came between a write and its noting.
            while (done := os.fstat(self._file.fileno()).st_size - self._end) < len(self._kept):
                self._file.write(self._kept[done:])
        self._end, self._kept = self._end + len(self._kept), b""

    def sync(self) -> None:
        """Writes what is kept, and sees to it that all is on disk for good."""
        self.flush()
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, without what is kept."""
        self._file.close()


class _Sink(io.FileIO):
    """Keeps the first error of writing for the end, as PyTorch's writer makes a text of its own of it, and prints."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def _begun(path: Path) -> tuple[_Sink, Path]:
    """A new file beside `path`, locked against `remove_stale` for as long as this process has it open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        sink = _Sink(temporary, "xb")  # not by tempfile, whose files only their owner may read
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is taken for stale
                fcntl.flock(sink, fcntl.LOCK_EX)
        if os.fstat(sink.fileno()).st_nlink:  # else it was taken for stale before the lock
            return sink, temporary
        sink.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the system is one of writing `path`, a WriteError, meanwhile."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error) from error
