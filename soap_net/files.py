"""Files that are whole or not there: what is written takes its place at once, or leaves what was there as it was."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends, on disk for good, and goes if the block fails.

    Raises:
        OSError: the disk is full or the folder can't be written; the file at `path` is then as it was.
    """
    # Not by tempfile, whose files only their owner may read: the file would keep that mode.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # where the system lets one open a folder, the rename itself is made durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all. Raises OSError, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
