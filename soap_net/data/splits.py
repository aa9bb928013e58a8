"""Which clips belong to which class of a split: by split files (`soap_net.data.lists`), or plain folder trees."""

from __future__ import annotations

import gc
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from soap_net.config import DataConfig
from soap_net.data.clips import Clip
from soap_net.data.images import in_natural_order, natural
from soap_net.data.lists import SplitLine, SplitList, find_split_file, read_split_file, refuse_shared
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.data.zips import archive_at
from soap_net.errors import UserError

SPLITS = ("train", "val", "test")
# Folders that may stand between the root and the classes.
_STORES = ("frames", "videos", "")
# Kinetics' clips, which some name by the video alone.
_TIMED = re.compile(r"(?P<name>.*/.{11})_\d{6}_\d{6}")


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

    Of several data sets, one set's classes come after another's, and ``sets[i]`` is the number of class i's; empty for
    one.
    """

    split: str
    classes: tuple[str, ...]
    clips: tuple[tuple[Clip, ...], ...]
    form: str | None = None
    sets: tuple[int, ...] = ()

    @property
    def by_set(self) -> list[list[int]]:
        """The numbers of each set's classes."""
        sets = self.sets or (0,) * len(self.classes)
        return [[i for i, one in enumerate(sets) if one == number] for number in sorted({*sets})]


def load_split(
    root: Path | tuple[Path, ...],
    split: str,
    split_file: Path | None = None,
    split_files: Mapping[str, Path | None] | None = None,
) -> ClipSet:
    """The clips of one split of the data set in folder (or zip) ``root``, or of the data sets in several.

    ``split_file`` None looks for ``{split}.txt``, ``{split}list*.txt``, ``{split}_few_shot.txt`` or a benchmark's own
    list in ``root/splits`` and ``root``; without any, the folders are the classes: ``root/{split}/<class>/<clip>`` or
    ``root/<class>/<clip>``, also below ``root/frames`` or ``root/videos``, or in a zip. ``split_files`` are those of
    the other splits, where they are not looked for either.

    Raises UserError for a missing or empty data set, a malformed split file, or a benchmark's own lists that share
    classes between training and this split; and MissingClipsError, which names all the clips that a split file lists
    and ``root`` lacks.

    Several sets are named as their folders, and their classes "set/class". ``split_file`` then holds lines
    ``set/class/video``; None takes each set's own.
    """
    if isinstance(root, tuple):
        return _union(root, split, split_file)
    with _uncollected():
        return _load(Path(root), split, split_file, split_files or {})


def split_of(data: DataConfig, split: str) -> ClipSet:
    """The clips of one split of the data that the settings name; see `load_split`."""
    return load_split(data.place, split, data.split_file(split), data.split_files)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collecting garbage, which would go over hundreds of thousands of new clips again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _load(root: Path, split: str, split_file: Path | None, split_files: Mapping[str, Path | None]) -> ClipSet:
    if not root.exists():
        mend = "; say with --data.root where it is" if split in SPLITS else ""
        raise UserError(f"{root}: no such data set folder{mend}")

    source = split_file or find_split_file(root, split)
    if source is None:
        others = [name for name in SPLITS if name != split]
        beside = [file.name for name in others if (file := find_split_file(root, name))]
        if not beside and split != "test" and split not in _splits_in_tree(root):
            # All folders would be the split's: the classes of the other lists too, of the test among them.
            beside = [file.name for name in others if (file := split_files.get(name))]
        if beside:
            mend = ", or --train.val_every 0 to do without" if split == "val" else ""
            raise UserError(
                f"{root}: there is no split file for {split!r} beside {', '.join(beside)}; "
                f"name it with --data.{split}_split{mend}"
            )
        return _from_tree(root, split)
    listed = read_split_file(source, split)
    for other in _compared(root, split, split_files):
        refuse_shared(listed, other)
    return _listed(root, listed, split)


def splits_of(root: Path, split_files: Mapping[str, Path | None]) -> list[str]:
    """The splits that the data set in ``root`` tells apart, by lists or by folders; all where it does not."""
    listed = [split for split in SPLITS if split_files.get(split) or find_split_file(root, split)]
    if listed or not root.exists():
        return listed or [*SPLITS]
    return _splits_in_tree(root) or [*SPLITS]


def _splits_in_tree(root: Path) -> list[str]:
    """The splits that folders or zips are named after."""
    names = {child.name for store in _STORES if (root / store).is_dir() for child in _subfolders(root / store)}
    zips = [root] if root.is_file() else [*root.glob("*.zip")]
    names |= {path.stem for path in zips}
    if root.is_file():
        names |= {part for folder in archive_at(root).folders for part in folder.split("/")[:-2]}
    return [split for split in SPLITS if split in names]


def _union(roots: tuple[Path, ...], split: str, split_file: Path | None) -> ClipSet:
    places = [Path(root).absolute() for root in roots]
    names = [place.stem if place.suffix == ".zip" else place.name for place in places]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"data.roots has several data sets of the name {doubled[0]!r}: their folders' names must differ"
        )
    if split_file is None:
        found = [load_split(place, split) for place in places]
    else:
        parts = _by_set(read_split_file(split_file, split), names)
        # A set without a line has no part in the split.
        found = [
            _listed(place, parts[name], split) if parts[name].lines else ClipSet(split, (), ())
            for place, name in zip(places, names, strict=True)
        ]
    return ClipSet(
        split,
        tuple(f"{name}/{label}" for name, one in zip(names, found, strict=True) for label in one.classes),
        tuple(clips for one in found for clips in one.clips),
        sets=tuple(number for number, one in enumerate(found) for _ in one.classes),
    )


def _by_set(listed: SplitList, names: list[str]) -> dict[str, SplitList]:
    """The lines of each set, less its name."""
    lines: dict[str, list[SplitLine]] = {name: [] for name in names}
    for line in listed.lines:
        name, _, label = line.label.partition("/")
        if name not in lines or not label:
            raise UserError(
                f"{listed.path}: {line.path!r} is not <set>/<class>/<video> with one of the sets {', '.join(names)}"
            )
        lines[name].append(SplitLine(label, line.path.partition("/")[2]))
    return {name: replace(listed, lines=tuple(own)) for name, own in lines.items()}


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
        members = clips.setdefault(line.label, {})
        clip = places.find(line)
        if clip is None:
            missing.append(line.path)
        else:
            members[clip] = None
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


class _Near(NamedTuple):
    """Where clips may be that a list names in one folder: folders, and the paths of the clips in those there are."""

    folders: list[str]
    listings: list[dict[str, str]]


class _Places:
    """Finds the clips that split lines name; lists every folder, and opens every zip, at most once."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.split = split
        self.bases = _bases(root, split)
        self._listed: dict[str, list[dict[str, str]]] = {}  # of each base that has the folder, its clips' paths
        self._near: dict[tuple[str, str], _Near] = {}
        self._folders: dict[Path, dict[str, Path]] = {}
        self._members: dict[str, Clip] | None = None

    def find(self, line: SplitLine) -> Clip | None:
        for path in (line.path, *line.others):
            if (clip := self._find(line.label, path)) is not None:
                return clip
        timed = _TIMED.fullmatch(_stem(line.path))
        return self._find(line.label, timed["name"]) if timed else None

    def _find(self, label: str, path: str) -> Clip | None:
        folder, _, video = path.rpartition("/")
        if video in ("", ".", ".."):
            folder, _, video = "/".join(part for part in path.split("/") if part not in ("", ".")).rpartition("/")
        if (near := self._near.get((label, folder))) is None:
            near = self._near[label, folder] = self._look_near(label, folder)
        stem = _stem(video)
        for listed in near.listings:
            if (found := listed.get(_key(video)) or listed.get(_key(stem))) is not None:
                return Clip(found, name=f"{label}/{stem}")
        members = self._zipped()
        for named in near.folders if members else ():
            if (member := members.get(_key(f"{named}/{stem}"))) is not None:
                return Clip(member.file, member=member.member, name=f"{label}/{stem}")
        return None

    def _look_near(self, label: str, folder: str) -> _Near:
        """As written, below the class alone (blanks may be underscores), and, for data sets of one folder, alone."""
        parts = [part for part in folder.split("/") if part not in ("", ".")]
        if ".." in parts:
            return _Near([], [])
        named = ("/".join(parts), parts[-1] if parts else "", label)
        folders = [*dict.fromkeys((*named, *(name.replace(" ", "_") for name in named), ""))]
        return _Near(folders, [listed for named in folders for listed in self._listing(named)])

    def looked_in(self) -> str:
        zips = [str(path) for path in _zips(self.root, self.split)]
        return ", ".join([*(str(base / "<class>") for base in self.bases), *zips])

    def _listing(self, folder: str) -> list[dict[str, str]]:
        if folder not in self._listed:
            there = [place for base in self.bases if (place := self._resolve(base, folder)) is not None]
            self._listed[folder] = [_clips_by_name(place) for place in there]
        return self._listed[folder]

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
            named = {
                label: [Clip(path, name=f"{label}/{name}") for name, path in clips.items()]
                for label, clips in tree.items()
            }
            return _clip_set(split, named)
    zipped: dict[str, list[Clip]] = {}
    for path in _zips(root, split):
        for parts, clip in _members(path, split):
            zipped.setdefault(parts[-2], []).append(clip)
    if not zipped:
        raise UserError(f"{root}: found no clips as <class>/<clip>, nor a split file for {split!r}")
    return _clip_set(split, zipped)


def _clip_set(split: str, clips: Mapping[str, Iterable[Clip]], form: str | None = None) -> ClipSet:
    labels = in_natural_order(clips)
    ordered = (tuple(in_natural_order(clips[label], attrgetter("name"))) for label in labels)
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


def _clips_in(folder: Path) -> dict[str, str]:
    """The paths of a class folder's clips by name; folders of frames win over zips, and zips over videos."""
    folders: dict[str, str] = {}
    zips: dict[str, str] = {}
    videos: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                kind = folders
            elif (stem := _stem(name)) != name:
                kind, name = zips if name[-4:].lower() == ".zip" else videos, stem
            else:
                continue
            if kind.setdefault(key := _key(name), path := entry.path) > path:
                kind[key] = path
    return {**videos, **zips, **folders} if zips or folders else videos


def _clips_by_name(folder: Path) -> dict[str, str]:
    """As `_clips_in`; where a file's whole name is another clip's without suffix, it is that file's."""
    clips = _clips_in(folder)
    whole: dict[str, str] = {}
    for name in (name for name in clips if "." in name):
        file = clips.get(stem := _stem(name))
        if file is not None and stem != name and _key(Path(file).name) == name:
            whole[_key(Path(clips[name]).name)] = clips[name]
            whole[name] = file
    return clips | whole if whole else clips


def _stem(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return stem if stem and _is_clips(suffix) else name


@lru_cache(maxsize=64)
def _is_clips(suffix: str) -> bool:
    return suffix.lower() == "zip" or f".{suffix.lower()}" in VIDEO_SUFFIXES


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)
