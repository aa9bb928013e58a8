"""Errors that the command line shows as a single line, and what such lines share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: a bad file, setting or data set. Its text is one line that names it."""


class ClipError(UserError):
    """A clip that cannot be read: ``path`` names it, ``reason`` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClipError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


class WriteError(UserError, OSError):
    """A file that can't be written, which it names; what was there before is whole. ``errno`` is the system's."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: {said(error)}")
        self.path = path
        self.error = error
        self.errno, self.strerror = error.errno, error.strerror

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[WriteError], tuple[Path, OSError]]:
        return type(self), (self.path, self.error)


def said(error: Exception) -> str:
    """The reason for an error of the system or of FFmpeg, in lower case, as the end of a line."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message on an unknown `name`: ``"; did you mean tiny?"``, or nothing where none is near."""
    close = nearest(name, known, cutoff)
    return f"; did you mean {close}?" if close else ""
