"""Split files: lists that say which clips belong to which class of a split, in the forms in which they are published.

A list is told by its form, `_FORMS` one by one. Few-shot lists keep the classes of training and test apart; the
benchmarks' own lists, made for ordinary classification, do not. These are understood, but not together:
`refuse_shared` keeps a net from being tested on classes that it was trained on.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.data.zips import list_in_pack, read_list
from soap_net.errors import UserError, said

FEW_SHOT_LISTS = (
    "take few-shot lists, such as those of CMN, OTAM and ARN in the folder splits of github.com/tobyperrett/trx"
)
_WORDS = {"train": "train(ing|list)?", "val": "val(id|idate|idation|list)?", "test": "test(ing|list)?"}


class SplitLine(NamedTuple):
    """A clip named in a split file: the class to show, and its path below the root ("class/video", suffix or not).

    ``others`` are paths where it may lie instead.
    """

    label: str
    path: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitList:
    """What a split file says; ``form`` names a benchmark's own list, and is empty for a few-shot list."""

    path: Path
    split: str
    form: str
    lines: tuple[SplitLine, ...]


# ----------------------------------------------------------------------------------------------------- finding a list


def find_split_file(root: Path, split: str) -> Path | None:
    """The split file that belongs to ``root``, None without one. Raises UserError where several could be meant."""
    inside = list_in_pack(root, split) if root.is_file() else None
    if inside is not None:
        return inside
    home = root if root.is_dir() else root.parent
    for folder in (home / "splits", home):
        listable = _listable(folder)
        usual = (f"{split}.txt", f"{split}list*.txt", f"{split}_few_shot.txt")
        fitting = ([path for path in listable if fnmatch(path.name, pattern)] for pattern in usual)
        files = next(filter(None, fitting), None) or _lists_of_other_names(listable, split)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"{folder}: several split files for {split!r} ({names}); take one with --data.{split}_split"
            )
        if files:
            return files[0]
    return list_in_pack(root, split) if root.is_dir() else None


def _listable(folder: Path) -> list[Path]:
    """What may be lists by their suffixes: all clips of a data set may lie beside them."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith((".txt", ".csv", ".json")))
        return [folder / name for name in names]
    return []


def _lists_of_other_names(listable: Sequence[Path], split: str) -> list[Path]:
    """Lists of other names that speak of ``split``. Files that are no lists do so too: the form tells.

    Outside a folder ``splits`` only a benchmark's own form is sure to be a list.
    """
    found: dict[str, Path] = {}
    for path in listable:
        family = _HMDB51.fullmatch(path.name)
        key = f"of HMDB51, {family['number']}" if family else path.name  # a class's file stands for its fellows
        named = ("train", "test") if family else _splits_named(path.stem.lower())
        if split in named and key not in found:
            with suppress(UserError):
                lines = _read_lines(path)
                form = _form(path, lines)
                if form.name or (path.parent.name == "splits" and form.parse(path, lines, "")):
                    found[key] = path
    return [*found.values()]


def _splits_named(stem: str) -> tuple[str, ...]:
    named = [split for split, word in _WORDS.items() if re.search(f"(?<![a-z]){word}(?![a-z])", stem)]
    return tuple(named) if len(named) == 1 else ()


# ---------------------------------------------------------------------------------------------------- reading a list


def read_split_file(path: Path, split: str = "") -> SplitList:
    """The clips that a split file names, repeated lines once, in its order; those of ``split`` if it tells splits.

    Raises UserError for a missing or empty file, one in a form that does not tell the classes, and naming the line
    for one without a class.
    """
    packed = read_list(path)
    if packed is not None:
        text, form_name = packed
        return SplitList(path, split, form_name, tuple(_few_shot(path, text.splitlines(), split)))
    lines = _read_lines(path, f"; say with --data.{split}_split where it is" if split in _WORDS else "")
    form = _form(path, lines)
    clips = tuple(dict.fromkeys(form.parse(path, lines, split)))
    if not clips:
        raise UserError(f"{path}: the split file names no clips{f' for {split}' if any(lines) else ''}")
    return SplitList(path, split, form.name, clips)


def refuse_shared(one: SplitList, other: SplitList) -> None:
    """Raises UserError where training's and another split's list share classes and one is a benchmark's own."""
    labels = dict.fromkeys(line.label for line in one.lines)
    shared = labels.keys() & {line.label for line in other.lines}
    if shared and (one.form or other.form):
        named = ", ".join(sorted(shared)[:3]) + (", ..." if len(shared) > 3 else "")
        raise UserError(
            f"{one.path}: {len(shared)} of the {len(labels)} classes of {one.split} are in {other.split} too ({named}; "
            f"{other.path}): {one.form or other.form} is made for tests on the classes of training, and few-shot "
            f"learning tests on others; {FEW_SHOT_LISTS}"
        )


def _read_lines(path: Path, mend: str = "") -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: the split file cannot be read ({said(error)}){mend}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the split file is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if "/" not in text:  # written on Windows
        text = text.replace("\\", "/")
    return [line.strip() for line in text.splitlines()]


def _names(numbered: Sequence[SplitLine]) -> dict[str, str]:
    """What to show for numbers of classes: the folder's name, where classes and folders correspond one to one."""
    folders: dict[str, set[str]] = {}
    for line in numbered:
        folders.setdefault(line.label, set()).add(_folder(line.path))
    shown = {label: next(iter(names)) for label, names in folders.items() if len(names) == 1}
    if len(shown) < len(folders) or len({*shown.values()}) < len(shown) or "" in shown.values():
        return {}
    return shown


def _with_names(lines: Sequence[SplitLine], names: dict[str, str]) -> list[SplitLine]:
    return [SplitLine(names.get(line.label, line.label), line.path) for line in lines] if names else [*lines]


def _folder(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]


# ------------------------------------------------------------------------------------------------------------- forms

_Lines = list[str]  # of a file, stripped; empty ones are there, so that errors can say the line


@dataclass(frozen=True)
class _Form:
    """How a list is recognised, and what it says of a split."""

    name: str
    fits: Callable[[Path, _Lines], bool]
    parse: Callable[[Path, _Lines, str], list[SplitLine]]


def _form(path: Path, lines: _Lines) -> _Form:
    return next(form for form in _FORMS if form.fits(path, lines))


_HMDB51 = re.compile(r"(?P<label>.+)_test_split(?P<number>\d+)\.txt")


def _is_hmdb51(path: Path, lines: _Lines) -> bool:
    return bool(_HMDB51.fullmatch(path.name)) and all(re.fullmatch(r"[^/]+ [012]", line) for line in lines if line)


def _hmdb51(path: Path, lines: _Lines, split: str) -> list[SplitLine]:
    """``<class>_test_split1.txt`` for each class, of names with 1 (training), 2 (test) or 0 (neither)."""
    own = _HMDB51.fullmatch(path.name)
    assert own is not None
    ending = f"_test_split{own['number']}.txt"
    wanted = {"train": "1", "test": "2"}.get(split, "" if split else "12")
    return [
        SplitLine(label, f"{label}/{line[:-2]}")
        for file in sorted(path.parent.glob(f"*{ending}"))
        for label in [file.name.removesuffix(ending)]
        for line in _read_lines(file)
        if line and line[-1] in wanted
    ]


def _columns(lines: _Lines) -> list[str]:
    return [column.strip().lower() for column in next(csv.reader(lines[:1]), [])]


def _is_kinetics(path: Path, lines: _Lines) -> bool:
    return "youtube_id" in _columns(lines)


def _kinetics(path: Path, lines: _Lines, split: str) -> list[SplitLine]:
    """A csv file with columns label, youtube_id, time_start, time_end and split, by the files' usual names."""
    found = []
    try:
        for number, row in enumerate(csv.DictReader(lines[1:], _columns(lines)), 2):
            label, video, part = row.get("label"), row["youtube_id"], row.get("split")
            if not label or not video:
                raise UserError(f"{path}:{number}: Kinetics' csv without a label, which tells no classes")
            if part and not part.startswith(split):
                continue
            names = [video]
            with suppress(KeyError, ValueError, TypeError, OverflowError):
                start, end = (int(float(row[f"time_{side}"])) for side in ("start", "end"))
                names.insert(0, f"{video}_{start:06d}_{end:06d}")
            usual, *others = (f"{label}/{name}" for name in names)
            found.append(SplitLine(label, usual, tuple(others)))
    except csv.Error as error:
        raise UserError(f"{path}: Kinetics' csv cannot be read ({error})") from error
    return found


def _is_json(path: Path, lines: _Lines) -> bool:
    return path.suffix.lower() == ".json" and next(filter(None, lines), "")[:1] in ("[", "{")


def _json(path: Path, lines: _Lines, split: str) -> list[SplitLine]:
    raise UserError(
        f"{path}: a JSON list of annotations, as Something-Something's, is not understood; {FEW_SHOT_LISTS}"
    )


# What follows the path: the class's number, or the number of frames and that of the class, after commas or blanks.
_NUMBERED = re.compile(r"(?P<path>.*?[^\s,])(?P<numbers>(?:(?:\s+|\s*,\s*)\d+)+)")
_HEADINGS = re.compile(r"[A-Za-z_ ]+(,[A-Za-z_ ]+)+")


def _numbered_lines(lines: _Lines) -> list[re.Match[str]]:
    """The matches of all lines, but for a csv's headings; empty where one does not match."""
    filled = [line for line in lines if line]
    matches = []
    for line in filled[bool(filled and _HEADINGS.fullmatch(filled[0])) :]:
        match = _NUMBERED.fullmatch(line)
        if match is None:
            return []
        matches.append(match)
    return matches


def _is_numbered(path: Path, lines: _Lines) -> bool:
    matches = _numbered_lines(lines)
    paths = [match["path"] for match in matches]
    numbers = [re.findall(r"\d+", match["numbers"]) for match in matches]
    pairs = {(_folder(name), found[-1]) for name, found in zip(paths, numbers, strict=True)}
    one_to_one = len({folder for folder, _ in pairs}) == len({label for _, label in pairs}) == len(pairs)
    # "class/video 7" may be a few-shot list's video, too, and "epoch 7" no list's line.
    return 2 * len({*paths}) > len(matches) > 0 and (
        all(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in paths)
        or all("," in match["numbers"] and not match["path"].isdecimal() for match in matches)
        or all(len(found) > 1 for found in numbers)
        or not any("/" in name or "," in match["numbers"] for name, match in zip(paths, matches, strict=True))
        or (one_to_one and len(pairs) < len(matches) and all(folder for folder, _ in pairs))
    )


def _numbered(path: Path, lines: _Lines, split: str) -> list[SplitLine]:
    """``path label`` (UCF101, csv files) or ``path frames label`` (mmaction2)."""
    found = []
    for match in _numbered_lines(lines):
        numbers = re.findall(r"\d+", match["numbers"])
        if len(numbers) > 2:
            raise UserError(
                f"{path}: {match[0]!r} has {len(numbers)} numbers: of mmaction2's lists those of <path> <label> and "
                "<path> <frames> <label> are understood, without offsets and with one label"
            )
        found.append(SplitLine(numbers[-1], match["path"]))
    if len({line.label for line in found}) == 1 and all(_folder(line.path) for line in found):
        return [SplitLine(_folder(line.path), line.path) for line in found]  # one number tells no classes
    return _with_names(found, _names(found))


def _few_shot(path: Path, lines: _Lines, split: str) -> list[SplitLine]:
    """``class/video`` (TRX and others; the class may hold anything, as the last ``/`` ends it) or, told line by line,
    ``train0//videos/<class>/<name>.avi`` (HyRSM), where the number before ``//`` is the class."""
    found, numbered = [], []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        first, double, rest = line.partition("//")
        below = rest if double else line
        folder, _, video = below.rpartition("/")
        label = sys.intern(first if double else folder)  # one text for the class, not one for each clip
        if not (label and video):
            raise UserError(f"{path}:{number}: {line!r} is not <class>/<video>")
        found.append(SplitLine(label, below))
        if double:
            numbered.append(found[-1])
    return _with_names(found, _names(numbered))


_FORMS = (
    _Form("HMDB51's list", _is_hmdb51, _hmdb51),
    _Form("Kinetics' csv", _is_kinetics, _kinetics),
    _Form("a JSON list", _is_json, _json),
    _Form("a list with class numbers, as UCF101's and mmaction2's", _is_numbered, _numbered),
    _Form("", lambda path, lines: True, _few_shot),
)
