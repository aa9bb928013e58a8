"""Finds clips of one's own: a folder of classes to learn, and clips to tell apart."""

from __future__ import annotations

from pathlib import Path

from soap_net.data.clips import Clip
from soap_net.data.images import is_image, natural
from soap_net.data.splits import load_split
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.errors import UserError


def clips_by_class(folder: Path) -> dict[str, list[Clip]]:
    """The clips of ``folder/<class>/<clip>``: videos, folders of frames, zips of frames.

    Raises:
        UserError: no such folder, or nothing of that form in it.
    """
    try:
        found = load_split(folder, "support")
    except UserError as error:
        raise UserError(f"the clips to learn from lie in <folder>/<class>/<clip>: {error}") from error
    return {name: list(clips) for name, clips in zip(found.classes, found.clips, strict=True)}


def find_clips(path: Path) -> list[Clip]:
    """The clip at `path` (a video, a zip or a folder of frames), or all clips in the folder at `path` and below.

    Raises:
        UserError: nothing there, or no clip in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such clip or folder")
    if path.is_file():
        return [Clip(path)]
    clips = _clips_below(path)
    if not clips:
        raise UserError(f"{path}: no clips in this folder (videos, zips, or folders of frames)")
    return clips


def _clips_below(folder: Path) -> list[Clip]:
    children = sorted((c for c in folder.iterdir() if not c.name.startswith(".")), key=lambda c: natural(c.name))
    clips = []
    for child in children:
        if child.is_dir():
            clips += _clips_below(child)
        elif child.suffix.lower() in VIDEO_SUFFIXES | {".zip"}:
            clips.append(Clip(child))
    # Images are frames only where nothing else is: beside videos they are posters and thumbnails.
    return clips or ([Clip(folder)] if any(is_image(child.name) for child in children) else [])
