"""Which clips belong to which class of a split: by split files (`soap_net.data.lists`), or plain folder trees."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soap_net.data.clips import Clip
from soap_net.data.images import natural
from soap_net.data.lists import SplitLine, SplitList, find_split_file, read_split_file, refuse_shared
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.data.zips import archive_at
from soap_net.errors import UserError

SPLITS = ("train", "val", "test")
# Folders that may stand between the root and the classes.
_STORES = ("frames", "videos", "")


class MissingClipsError(UserError):
    """Clips that a split names and the data set lacks: ``missing`` lists them, ``found`` holds the rest."""

    def __init__(self, message: str, missing: tuple[str, ...], found: ClipSet) -> None:
        super().__init__(message)
        self.missing = missing
        self.found = found


@dataclass(frozen=True)
class ClipSet:
    """A split: ``clips[i]`` belong to ``classes[i]``; classes and clips in natural order of their names.

    ``form`` is that of its list (`SplitList`), None where the folders are the classes.
    """

    split: str
    classes: tuple[str, ...]
    clips: tuple[tuple[Clip, ...], ...]
    form: str | None = None


def load_split(
    root: Path, split: str, split_file: Path | None = None, split_files: Mapping[str, Path | None] | None = None
) -> ClipSet:
    """The clips of one split of the data set in folder (or zip) ``root``.

    ``split_file`` None looks for ``{split}.txt``, ``{split}list*.txt``, ``{split}_few_shot.txt`` or a benchmark's own
    list in ``root/splits`` and ``root``; without any, the folders are the classes: ``root/{split}/<class>/<clip>`` or
    ``root/<class>/<clip>``, also below ``root/frames`` or ``root/videos``, or in a zip. ``split_files`` are those of
    the other splits, where they are not looked for either.

    Raises UserError for a missing or empty data set, a malformed split file, or a benchmark's own lists that share
    classes between training and this split; and MissingClipsError, which names all the clips that a split file lists
    and ``root`` lacks.
    """
    root = Path(root)
    if not root.exists():
        mend = "; say with --data.root where it is" if split in SPLITS else ""
        raise UserError(f"{root}: no such data set folder{mend}")

    source = split_file or find_split_file(root, split)
    if source is None:
        beside = [file.name for name in SPLITS if name != split and (file := find_split_file(root, name))]
        if beside:
            raise UserError(f"{root}: there is no split file for {split!r} beside {', '.join(beside)}")
        return _from_tree(root, split)
    listed = read_split_file(source, split)
    for other in _compared(root, split, split_files or {}):
        refuse_shared(listed, other)
    return _listed(root, listed, split)


def splits_of(root: Path, split_files: Mapping[str, Path | None]) -> list[str]:
    """The splits that the data set in ``root`` tells apart, by lists or by folders; all where it does not."""
    listed = [split for split in SPLITS if split_files.get(split) or find_split_file(root, split)]
    if listed or not root.exists():
        return listed or [*SPLITS]
    names = {child.name for store in _STORES if (root / store).is_dir() for child in _subfolders(root / store)}
    zips = [root] if root.is_file() else [*root.glob("*.zip")]
    names |= {path.stem for path in zips}
    if root.is_file():
        names |= {part for folder in archive_at(root).folders for part in folder.split("/")[:-2]}
    return [split for split in SPLITS if split in names] or [*SPLITS]


def _compared(root: Path, split: str, split_files: Mapping[str, Path | None]) -> list[SplitList]:
    """The list that must hold other classes, if any: that of training, and for training that of the test."""
    others = {"train": ["test"], "val": ["train"], "test": ["train"]}.get(split, [])
    with suppress(UserError):  # that one can't be read or chosen is for those to know who load it
        sources = [(other, split_files.get(other) or find_split_file(root, other)) for other in others]
        return [read_split_file(source, other) for other, source in sources if source]
    return []


def _listed(root: Path, listed: SplitList, split: str) -> ClipSet:
    places = _Places(root, split)
    clips: dict[str, dict[Clip, None]] = {}
    missing: list[str] = []
    for line in listed.lines:
        clip = places.find(line)
        if clip is None:
            missing.append(line.path)
        clips.setdefault(line.label, {}).update({} if clip is None else {clip: None})
    found = _clip_set(split, clips, listed.form)
    if missing:
        count = len(listed.lines)
        nothing = "" if len(missing) < count else f" (looked in {places.looked_in()})"
        raise MissingClipsError(
            f"{listed.path}: {len(missing)} of {count} clips are missing below {root}{nothing}: {', '.join(missing)}",
            tuple(missing),
            found,
        )
    return found


class _Places:
    """Finds the clips that split lines name; lists every folder, and opens every zip, at most once."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.split = split
        self.bases = _bases(root, split)
        self._clips: dict[Path, dict[str, Path]] = {}
        self._folders: dict[Path, dict[str, Path]] = {}
        self._members: dict[str, Clip] | None = None

    def find(self, line: SplitLine) -> Clip | None:
        return next(filter(None, (self._find(line.label, path) for path in (line.path, *line.others))), None)

    def _find(self, label: str, path: str) -> Clip | None:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        video = parts.pop()
        name = f"{label}/{_stem(video)}"
        # As written, below the class alone, and alone, for data sets that keep all files in one folder.
        folders = list(dict.fromkeys(("/".join(parts), parts[-1] if parts else "", label, "")))
        for folder in folders:
            for base in self.bases:
                listed = self._listing(base, folder)
                found = listed.get(_key(video)) or listed.get(_key(_stem(video)))
                if found is not None:
                    return Clip(found, name=name)
        for folder in folders:
            member = self._zipped().get(_key(f"{folder}/{_stem(video)}"))
            if member is not None:
                return Clip(member.path, member=member.member, name=name)
        return None

    def looked_in(self) -> str:
        zips = [str(path) for path in _zips(self.root, self.split)]
        return ", ".join([*(str(base / "<class>") for base in self.bases), *zips])

    def _listing(self, base: Path, folder: str) -> dict[str, Path]:
        place = base / folder
        if place not in self._clips:
            there = self._resolve(base, folder)
            found = {} if there is None else _clips_in(there)
            self._clips[place] = found | {_key(path.name): path for path in found.values()}
        return self._clips[place]

    def _resolve(self, base: Path, folder: str) -> Path | None:
        # Name by name, as macOS and some zips store accented letters decomposed.
        place = base
        for part in folder.split("/") if folder else ():
            if place not in self._folders:
                self._folders[place] = {_key(child.name): child for child in _subfolders(place)}
            found = self._folders[place].get(_key(part))
            if found is None:
                return None
            place = found
        return place

    def _zipped(self) -> dict[str, Clip]:
        if self._members is None:
            self._members = {}
            for path in _zips(self.root, self.split):
                for parts, clip in _members(path, self.split):
                    self._members.setdefault(_key("/".join(parts[1:])), clip)
                    self._members.setdefault(_key("/".join(parts[-2:])), clip)
                    if parts[-2] in (*_STORES, self.split, path.stem):
                        self._members.setdefault(_key(f"/{parts[-1]}"), clip)
        return self._members


def _from_tree(root: Path, split: str) -> ClipSet:
    for base in _bases(root, split):
        others = [child.name for child in _subfolders(base) if child.name in SPLITS]
        if others and split not in others:
            raise UserError(f"{base}: there is no folder {split!r} beside {', '.join(sorted(others))}")
        folders = [child for child in _subfolders(base) if child.name not in ("splits", *_STORES, *SPLITS)]
        tree = {folder.name: _clips_in(folder) for folder in folders}
        if any(tree.values()):
            return _clip_set(
                split,
                {
                    label: [Clip(path, name=f"{label}/{_stem(path.name)}") for path in clips.values()]
                    for label, clips in tree.items()
                },
            )
    zipped: dict[str, list[Clip]] = {}
    for path in _zips(root, split):
        for parts, clip in _members(path, split):
            zipped.setdefault(parts[-2], []).append(clip)
    if not zipped:
        raise UserError(f"{root}: found no clips as <class>/<clip>, nor a split file for {split!r}")
    return _clip_set(split, zipped)


def _clip_set(split: str, clips: Mapping[str, Iterable[Clip]], form: str | None = None) -> ClipSet:
    labels = sorted(clips, key=natural)
    ordered = (tuple(sorted(clips[label], key=lambda clip: natural(clip.name))) for label in labels)
    return ClipSet(split, tuple(labels), tuple(ordered), form)


def _bases(root: Path, split: str) -> list[Path]:
    """Folders below which classes may lie: those of the split first, frames before videos."""
    if not root.is_dir():
        return []
    own = [root / store / split for store in _STORES] + [root / split / store for store in _STORES]
    return [base for base in dict.fromkeys([*own, *(root / store for store in _STORES)]) if base.is_dir()]


def _zips(root: Path, split: str) -> list[Path]:
    if root.is_file():
        return [root]
    found = [path for base in _bases(root, split) for path in sorted(base.glob("*.zip"), key=lambda p: natural(p.name))]
    own = [path for path in found if path.stem == split]
    return own or [path for path in found if path.stem not in SPLITS]


def _members(path: Path, split: str) -> Iterator[tuple[tuple[str, ...], Clip]]:
    """The folders of images in a zip, less those of other splits, as (..., class, video)."""
    for folder in archive_at(path).folders:
        parts = (path.stem, *folder.split("/"))
        if folder and (split in parts[:-2] or not {*SPLITS} & {*parts[:-2]}):
            yield parts, Clip(path, member=folder, name="/".join(parts[-2:]))


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            (Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()),
            key=lambda path: natural(path.name),
        )


def _clips_in(folder: Path) -> dict[str, Path]:
    """The clips of a class folder by name without suffix; folders of frames win over zips, and zips over videos."""
    found: list[tuple[int, str, str]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.append((0, entry.name, entry.path))
            elif suffix == ".zip" or suffix in VIDEO_SUFFIXES:
                found.append((1 if suffix == ".zip" else 2, _stem(entry.name), entry.path))
    clips: dict[str, Path] = {}
    for _, stem, path in sorted(found):
        clips.setdefault(_key(stem), Path(path))
    return clips


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() == ".zip" or suffix.lower() in VIDEO_SUFFIXES else name


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)
