"""The one door for settings: plain values from files, checkpoints and options become a checked dataclass.

The dataclass says what may come in: its fields' names, their annotations and the bounds in these (`AtLeast`). A value
is a number, text, true, false or null, or a list of such. Nothing that comes in is ever imported, instantiated or
evaluated; whatever has no place in the dataclass is refused by a `UserError` of one line that names the key, the value
and what is right. Everything here works on any dataclass of settings; `soap_net.config` holds those of a run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import itertools
import json
import math
import os
import re
import reprlib
import sys
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from soap_net.errors import UserError, did_you_mean, nearest

Settings = TypeVar("Settings")

LARGEST_FILE = 2**16
"""Characters of a settings file or an option."""
DEEPEST = 8
"""Lists and mappings within each other."""
LONGEST_TEXT = 4096
"""Characters of a text setting: the longest path that Linux takes."""
LARGEST_NUMBER = 2**63
"""Whole numbers are below it, as those of tensors and seeds are."""


@dataclass(frozen=True)
class AtLeast:
    """Bounds of a number, at its field: ``frames: Annotated[int, AtLeast(1)] = 8``.

    Text in its place says what a value is where its type doesn't: ``out: Annotated[Path, "a folder"]``.
    """

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.least}" + (f" and at most {self.most}" if math.isfinite(self.most) else "")


# ----------------------------------------------------------------------------------------------- what there is to set


def kinds(cls: Any) -> dict[str, Any]:
    """The annotations of all settings of a dataclass by their dotted keys, such as ``model.soap.parts``."""
    found: dict[str, Any] = {}
    for name, kind in _hints(cls).items():
        found |= {f"{name}.{key}": one for key, one in kinds(kind).items()} if is_dataclass(kind) else {name: kind}
    return found


def _fields(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


_hints: Callable[[Any], dict[str, Any]] = cache(_fields)
"""The annotations of a dataclass's own fields by name."""


def is_free(kind: Any) -> bool:
    """Whether an annotation's setting is one mapping whose keys are free, as a head's options."""
    return get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) is dict


def is_list(kind: Any) -> bool:
    """Whether an annotation's setting is a list."""
    return get_origin(kind) is tuple


def as_list(texts: Sequence[str]) -> str:
    """A list's value from arguments of the command line: its items, or the whole list as YAML."""
    return texts[0] if len(texts) == 1 and re.match(r"\s*\[|null$", texts[0]) else json.dumps([*texts])


def _is_group(key: str, known: Iterable[str]) -> bool:
    """Whether a key holds settings of its own, as ``model`` and ``model.soap`` do."""
    return any(one.startswith(f"{key}.") for one in known)


def described(kind: Any) -> str:
    """What an annotation lets in, in words that go on from "it must be"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return parts[1] if isinstance(parts[1], str) else f"{described(parts[0])} of {parts[1]}"
    if origin in (Union, UnionType):
        return described(parts[0]) + ", or null"
    if origin is Literal:
        return "one of " + ", ".join(parts)
    if origin is tuple:
        return f"a list, each {described(parts[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(kind, "settings such as {out_dim: 64}")


def shown(value: Any) -> str:
    """A value for a message, whatever it is: as in YAML, on one line and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        text = short.repr([*value] if isinstance(value, tuple) else value)
    except ValueError:  # Python turns no number of thousands of digits into text
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


# ------------------------------------------------------------------------------------------------------ plain values


def read(values: Any, cls: type, source: str = "") -> dict[str, Any]:
    """The settings in nested plain `values`, by dotted key, each as its annotation in `cls` says.

    Args:
        values: nested mappings; keys may be dotted as well.
        cls: the dataclass.
        source: where the values came from, for messages; empty for the command line.

    Raises:
        UserError: an unknown key, a value of another type or out of bounds.
    """
    try:
        known = kinds(cls)
        return {key: _converted(key, value, known[key]) for key, value in _leaves(values, [*known])}
    except UserError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from None


def build(cls: type[Settings], flat: Mapping[str, Any], prefix: str = "") -> Settings:
    """The dataclass with settings that `read` gave over its defaults."""
    values = {}
    for name, kind in _hints(cls).items():
        if is_dataclass(kind) and isinstance(kind, type):
            values[name] = build(kind, flat, f"{prefix}{name}.")
        elif prefix + name in flat:
            values[name] = flat[prefix + name]
    return cls(**values)


def to_dict(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain dictionaries, lists, strings and numbers, fit for YAML and for checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(settings))


def dump(settings: Any) -> str:
    """A dataclass of settings as YAML."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def _meant(name: str, known: Sequence[str], dashes: str = "") -> str:
    """The end of a message on an unknown key: names one like it, or else the right name in another group."""
    leaves = {key.rpartition(".")[2]: key for key in known}
    leaf = nearest(name.rpartition(".")[2], leaves)
    close = nearest(name, known, cutoff=0.5) or (leaves[leaf] if leaf else None)
    return f"; did you mean {dashes}{close}?" if close else ""


def _leaves(values: Any, known: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of single settings; descends into known groups only, whatever else `values` may hold."""
    if not isinstance(values, Mapping):
        if not prefix:
            raise UserError(f"expected settings such as 'train: {{lr: 0.001}}', found {shown(values)}")
        first = next(key for key in known if key.startswith(prefix)).removeprefix(prefix)
        group = prefix[:-1]
        raise UserError(f"{group} is {shown(values)}: it must hold settings, such as {group}: {{{first}: ...}}")
    for name, value in values.items():
        key = f"{prefix}{name}" if isinstance(name, str) else ""
        if key in known:
            yield key, value
        elif _is_group(key, known):
            yield from _leaves(value, known, f"{key}.")
        else:
            inner = next(iter(value), None) if isinstance(value, Mapping) else None
            key = f"{key}.{inner}" if key and isinstance(inner, str) else key
            raise UserError(f"unknown key {shown(key or name)}{_meant(key, known)}")


def _converted(key: str, value: Any, kind: Any, expected: str = "") -> Any:
    """`value` as the annotation `kind` says; text is read as YAML where no text is wanted, as in an option."""
    origin, parts = get_origin(kind), get_args(kind)
    expected = expected or described(kind)
    if kind is Any:
        return _plain(key, value)
    if origin is Annotated:
        converted, bounds = _converted(key, value, parts[0], expected), parts[1]
        if isinstance(bounds, AtLeast) and not bounds.least <= converted <= bounds.most:
            missed = f"at least {bounds.least}" if converted < bounds.least else f"at most {bounds.most}"
            raise _refused(key, converted, missed)
        return converted
    if origin in (Union, UnionType):
        return None if value is None or value == "null" else _converted(key, value, parts[0], expected)
    if origin is Literal:
        if not isinstance(value, str) or value not in parts:
            raise _refused(key, value, expected + (did_you_mean(value, parts) if isinstance(value, str) else ""))
        return value
    given = value
    if isinstance(value, str) and kind not in (str, Path):
        with contextlib.suppress(UserError):
            value = load_yaml(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_converted(key, item, parts[0]) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {_option(key, name): _converted(f"{key}.{name}", item, parts[1]) for name, item in value.items()}
    if origin is not None:
        raise _refused(key, given, expected)
    return _scalar(key, value, kind, expected, given)


def _scalar(key: str, value: Any, kind: type, expected: str, given: Any) -> Any:
    """A number, text, path or truth value, exactly of the type `kind`; `given` is how the user wrote it."""
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if not isinstance(value, (str, Path) if kind is Path else kind) or (isinstance(value, bool) and kind is not bool):
        raise _refused(key, given, expected)
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(key, value, "a finite number")
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise _refused(key, value, f"a number below {LARGEST_NUMBER}")
    if isinstance(value, str | Path) and ("\0" in str(value) or len(str(value)) > LONGEST_TEXT):
        raise _refused(key, given, f"text of at most {LONGEST_TEXT} characters, none of them null")
    return kind(value)


def _option(key: str, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name) or len(name) > 120:
        raise UserError(f"{key} holds {shown(name)}: it must be the name of an option, such as out_dim")
    return name


def _plain(key: str, value: Any, listed: bool = False) -> Any:
    """A value that its owner alone can judge, such as a head's option: a scalar or a list of scalars."""
    if isinstance(value, list | tuple) and not listed:
        return [_plain(key, item, listed=True) for item in value]
    expected = "a number, text, true, false, null, or a list of these"
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if kind is None and value is not None:
        raise _refused(key, value, expected)
    return value if kind is None else _scalar(key, value, kind, expected, value)


def _refused(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key} is {shown(value)}: it must be {expected}")


# -------------------------------------------------------------------------------------------------- files and options


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, but for dates, which stay text, and keys given twice, which are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if (most := keys.most_common(1)) and most[0][1] > 1:
            raise yaml.YAMLError(f"the key {shown(most[0][0])} is there twice")
        return super().construct_mapping(node, deep)


def _as_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


for _tag in ("timestamp", "value"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_text)
# YAML 1.1, which PyYAML follows, knows 1.0e-3 as a number, but not 1e-3 or 1.0e3.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def load_yaml(text: str) -> Any:
    """The plain values that YAML text stands for. Raises `UserError` for broken YAML, tags, anchors and giants."""
    try:
        if len(text) > LARGEST_FILE:
            raise yaml.YAMLError(f"it is longer than {LARGEST_FILE} characters")
        depth = 0
        for event in yaml.parse(text, Loader=_PlainLoader):  # by loops, where what follows goes down by recursion
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise yaml.YAMLError("anchors and aliases are not taken")
            if (tag := getattr(event, "tag", None)) is not None:
                raise yaml.YAMLError(f"tags such as {shown(tag)} are not taken")
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        reason = " ".join(str(error).split())
        raise UserError(reason if len(reason) <= 160 else f"{reason[:157]}...") from None


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file; raises `UserError` if it is none, OSError if it can't be read."""
    with path.open("rb") as file:
        content = file.read(4 * LARGEST_FILE + 1)
    try:
        return load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML file: byte {error.start} is not UTF-8") from None
    except UserError as error:
        raise UserError(f"{path}: not a YAML file: {error}") from None


def parse_options(
    args: Sequence[str],
    cls: type[Settings],
    *,
    prog: str,
    description: str,
    base: Mapping[str, Any] | None = None,
    source: str = "",
    presets: Mapping[str, Path] | None = None,
) -> Settings:
    """The dataclass that command-line options make: `base`, config files over it, and the other options over these.

    Args:
        args: ``--key value``, ``--key=value``, ``--group '{key: value}'`` and ``--config name``; the later one wins.
        cls: the dataclass.
        prog: the command, for its help.
        description: what the command does, for its help.
        base: nested settings that take the place of the defaults.
        source: where `base` came from, for messages.
        presets: config files by the names that may stand for them.

    Raises:
        UserError: one line that names the unknown option or key, or the impossible value, and the nearest right one.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    presets, known = presets or {}, kinds(cls)
    flat = read(base or {}, cls, source)
    if {"-h", "--help"} & {*args}:
        print(_help(build(cls, flat), prog, description, presets))
        raise SystemExit(0)
    options = list(_named([arg for arg in args if arg != "--print_config"], known))
    for file in [text for name, text in options if name == "config"]:
        path = presets.get(file) or Path(file)
        if not os.path.isfile(path):
            preset = ", nor a preset of that name" if presets else ""
            raise UserError(f"{shown(file)[1:-1]}: no such config file{preset}{did_you_mean(file, presets, 0.5)}")
        values = read_yaml(path)
        flat |= read({} if values is None else values, cls, str(path))
    for name, text in options:
        owner, _, own = name.rpartition(".")
        group = _is_group(name, known)
        if name in known:
            flat |= read({name: text}, cls)
        elif name != "config":
            try:
                value = read_yaml(Path(text)) if group and os.path.isfile(text) else load_yaml(text)
            except UserError as error:
                raise UserError(f"--{name}: {error}") from None
            flat |= read({name: value} if group else {owner: {**flat.get(owner, {}), own: value}}, cls)
    made = build(cls, flat)
    if "--print_config" in args:
        print(dump(made), end="")
        raise SystemExit(0)
    return made


def _named(args: Sequence[str], known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Options with their texts: settings, groups of them, ``config``, and a free one's own, as a head's options.

    A list's items may be arguments of their own, one after another.
    """
    remaining = deque(args)
    while remaining:
        arg = remaining.popleft()
        if not arg.startswith("--"):
            raise UserError(f"unrecognized arguments: {shown(arg)}")
        name, equals, text = arg[2:].partition("=")
        free = is_free(known.get(name.rpartition(".")[0]))
        if not free and name not in known and not _is_group(name, known) and name != "config":
            meant = _meant(name, [*known, "config", "help", "print_config"], "--")
            raise UserError(f"unknown option --{shown(name)[1:-1]}{meant}")
        given, several = [text] if equals else [], is_list(known.get(name))
        while remaining and not equals and not remaining[0].startswith("--") and (several or not given):
            given.append(remaining.popleft())
        if not given:
            raise UserError(f"argument --{name}: expected one argument")
        yield name, as_list(given) if several and not equals else given[0]


# --------------------------------------------------------------------------------------------------------------- help


def _help(settings: Any, prog: str, description: str, presets: Mapping[str, Path]) -> str:
    """Settings as options, with the docstrings and bounds of their fields, and the values in `settings` as defaults."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, usage=f"{prog} [--config FILE] [--SETTING VALUE ...]"
    )
    named = f", or one of the presets: {', '.join(presets)}" if presets else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file{named}.")
    parser.add_argument("--print_config", action="store_true", help="Print all settings as YAML and exit.")

    def add(place: Any, settings: Any, prefix: str) -> None:
        docs = field_docs(type(settings))
        for name, kind in _hints(type(settings)).items():
            value = getattr(settings, name)
            if is_dataclass(kind):
                title = (inspect.getdoc(kind) or name).splitlines()[0].rstrip(".")
                add(parser.add_argument_group(title), value, f"{prefix}{name}.")
            else:
                default = value if isinstance(value, str | Path) else shown(value)
                text = f"{docs.get(name, '')} ({described(kind)}; default: {default})".strip()
                place.add_argument(f"--{prefix}{name}", metavar=name.upper(), help=text.replace("%", "%%"))

    add(parser, settings, "")
    return parser.format_help()


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, by name."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(text.value.value)
    return docs
