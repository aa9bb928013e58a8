"""The door for settings lets in plain values only: whatever else comes runs nothing and is refused in one line."""

from __future__ import annotations

import builtins
import importlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from torch import nn

import soap_net.models
from soap_net import checkpoint
from soap_net.cli import main
from soap_net.config import Config, from_dict, load_config, parse, to_dict
from soap_net.errors import UserError
from soap_net.settings import AtLeast, build, field_docs, kinds, load_yaml, parse_options, read, shown

CASES = 500


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was run, evaluated or newly imported while the test went on; the test's end asserts that nothing was."""
    calls: list[str] = []
    real_import = builtins.__import__

    def spy(name: str) -> Callable[..., Any]:
        return lambda *args, **options: calls.append(f"{name}{args}")

    def importing(name: str, *args: Any, **options: Any) -> Any:
        if name not in sys.modules and not (len(args) > 3 and args[3]):  # relative ones are a package's own
            calls.append(f"import {name}")
        return real_import(name, *args, **options)

    repr(torch.zeros(1))  # torch imports what it needs for these when they are first called
    torch.save({"bytes": b"\xff"}, tmp_path / "first.pt")
    torch.load(tmp_path / "first.pt", weights_only=True)

    for owner, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (importlib, "import_module")):
        monkeypatch.setattr(owner, name, spy(f"{owner.__name__}.{name}"))
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "eval", spy("eval"))
        patch.setattr(builtins, "__import__", importing)
        yield calls
    assert calls == []
    assert not (tmp_path / "ran").exists()


def outcome(door: Callable[[], Any]) -> str:
    """How a door ended: "" for a config, else the message, of which this asserts that it is one short line."""
    try:
        config = door()
    except UserError as error:
        message = str(error)
        assert message
        assert message.isprintable()
        assert len(message) < 300 + len(os.environ.get("TMPDIR", "")) + 100, message
        return message
    assert isinstance(config, Config)
    assert from_dict(to_dict(config)) == config
    return ""


def calls_of_code(marker: Path) -> list[Any]:
    """Values that parsers of other kinds would run, each to make the file `marker`."""
    return [
        {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}},
        {"class_path": "pathlib.Path.touch", "init_args": {"self": str(marker)}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}},
        {"class_path": "soap_net.config.Config"},
        {"_target_": "os.system", "command": f"touch {marker}"},
        {"__reduce__": ["os.system", f"touch {marker}"]},
        "os.system",
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"__import__('os').system('touch {marker}')",
        f"{{class_path: os.system, init_args: {{command: 'touch {marker}'}}}}",
        "${oc.env:HOME}",
        "{{7*7}}",
    ]


@cache
def strange_values(marker: Path) -> list[Any]:
    """Values of every kind that a pickle or YAML can hold and no setting is."""
    deep: Any = 1
    for _ in range(60):
        deep = [deep] if random.Random(0).random() < 0.5 else {"a": deep}
    endless: list[Any] = []
    endless.append(endless)
    ring: dict[str, Any] = {}
    ring["train"] = ring["model"] = ring["soap"] = ring
    return [
        *calls_of_code(marker),
        *(float("inf"), float("nan"), 10**400, 10**5000, -(10**30), "9" * 5000, "1e999", "0x" + "f" * 5000, "1e-3"),
        *(0, -1, 1, 3.5, True, False, None, "null", "", "x" * 100_000, "a\nb", "a\0b", "\ud800", "{", "[", "- -", "&a"),
        *([], {}, [[]], [None], {"": 1}, {1: 2}, {None: 3}, {(1, 2): 3}, {"lr": {"lr": 1}}, [{"class_path": "os"}]),
        *(b"bytes", bytearray(b"x"), {1, 2}, (1, 2), 1j, date(2026, 1, 1), torch.zeros(3), torch.float16, range(3)),
        *(deep, endless, ring, [1] * 200, {str(i): i for i in range(50)}, ["a", 1, None, True, 2.5]),
    ]


KEYS: tuple[Any, ...] = (
    *kinds(Config),
    *("data", "model", "model.soap", "train", "model.head_options.x", "class_path", "__class__", "init_args", "config"),
    *("trian", "", ".", "a\nb", "x" * 5000, "self", "train.lr.lr", 1, None, True, 2.5, (1, 2), b"lr"),
)
YAML = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "train: {lr: !!python/object/apply:os.system ['touch {marker}']}",
    "train: !!python/object/new:os.system ['touch {marker}']",
    "train: {lr: !!python/name:os.system }",
    "out: !!python/object/apply:pathlib.Path ['{marker}']",
    "model: {head_options: {out_dim: !!binary aGVsbG8=}}",
    "train: {milestones: !!set {3, 7}}",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: *c",
    "train: &t {lr: *t}",
    "train: {<<: &base {lr: 1}}",
    "train: {lr: 1}\ntrain: {lr: 2}",
    "train: {lr: 1, lr: 2}",
    "--- {}\n--- {}",
    "%YAML 9.9\n--- {}",
    "train: {lr: 1e999}",
    "train: {lr: -.inf}",
    "train: {episodes: 190:20:30}",
    "train: {episodes: 0b1, lr: 0x10}",
    "out: 2026-01-01",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "=: 3",
    "~: 3",
    "'\\ud800': 1",
    "on: 3",
    "data",
    "3",
    "[]",
    "''",
    "\ttrain: 1",
    "train:\n\tlr: 1",
    "@",
    "`",
    "{marker}",
)


def fuzzed(number: int, marker: Path) -> dict[Any, Any]:
    """A config that may be anything."""
    rng = random.Random(number)
    values: dict[Any, Any] = {"model": {"backbone": "tiny", "head_options": {}}, "train": {"episodes": 3}}
    for _ in range(rng.choice((1, 1, 2, 3))):
        key, value = rng.choice(KEYS), rng.choice(strange_values(marker))
        place = values
        if isinstance(key, str) and rng.random() < 0.5:  # nested rather than dotted
            *path, key = key.split(".")
            for name in path:
                place = place[name] = place[name] if isinstance(place.get(name), dict) else {}
        place[key] = {**place[key], "x": value} if isinstance(place.get(key), dict) and rng.random() < 0.3 else value
    return values


def fuzzed_file(number: int, marker: Path) -> bytes:
    """A file that may hold anything: values as Python's YAML writes them, with its tags; the texts above; damage."""
    rng = random.Random(number)
    if rng.random() < 0.5:
        text = rng.choice(YAML).replace("{marker}", str(marker))
    else:
        try:
            text = yaml.dump(fuzzed(number, marker), Dumper=getattr(yaml, "CDumper", yaml.Dumper))
        except (TypeError, ValueError, RecursionError):
            text = rng.choice("[{") * rng.choice((20, 200, 5_000))
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.randbytes(rng.choice((1, 5, 300_000))) + content[at:]
    return content


class TestFuzz:
    """500 configs of any kind by all ways in: each ends in a config or in one line, and runs nothing."""

    def test_dictionaries(self, ran: list[str], tmp_path: Path) -> None:
        ends = [outcome(lambda n=n: from_dict(fuzzed(n, tmp_path / "ran"))) for n in range(CASES)]  # type: ignore[misc]
        assert 20 < ends.count("") < CASES - 200, "both ends are met"

    def test_files(self, ran: list[str], tmp_path: Path) -> None:
        path, refused = tmp_path / "c.yaml", 0
        for number in range(CASES):
            path.write_bytes(fuzzed_file(number, tmp_path / "ran"))
            refused += outcome(lambda: load_config(path)) != ""
        assert 200 < refused < CASES

    def test_options(self, ran: list[str], tmp_path: Path) -> None:
        values = [value for value in strange_values(tmp_path / "ran") if isinstance(value, str | dict | list)]
        for number in range(CASES):
            rng = random.Random(number)
            value = rng.choice(values)
            text = value if isinstance(value, str) else str(value)[:5000]
            key = rng.choice([key for key in KEYS if isinstance(key, str)])
            outcome(lambda args=[f"--{key}={text}"]: parse(args))  # type: ignore[misc]

    def test_checkpoints(self, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(soap_net.models, "build_model", lambda *args: nn.Identity())
        path, kept = tmp_path / "a.pt", 0
        for number in range(CASES):
            values = fuzzed(number, tmp_path / "ran")
            config = values if number % 9 else next(iter(values.values()))
            try:
                torch.save({"format": 1, "config": config, "model": {}}, path)
            except (RecursionError, ValueError, AttributeError):
                continue
            kept += outcome(lambda: checkpoint.load_model(path)[1]) == ""
        assert kept > 20


@pytest.mark.parametrize("number", range(3))
def test_a_class_path_in_a_checkpoint_is_refused_and_nothing_runs(
    number: int, ran: list[str], tmp_path: Path, tiny_run: Callable[..., Config]
) -> None:
    config = to_dict(tiny_run())
    config["model"]["head_options"] = {"out_dim": calls_of_code(tmp_path / "ran")[number]}
    torch.save({"format": 1, "config": config, "model": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: model\.head_options\.out_dim is \{'class_path': .* must be a number"):
        checkpoint.load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("option", ["--model.head_options.out_dim", "--model.head_options", "--model", "--model.soap"])
@pytest.mark.parametrize("command", ["train", "demo", "data check"])
def test_a_class_path_in_an_option_is_refused_and_nothing_runs(
    option: str, command: str, ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = f'{{"class_path": "os.system", "init_args": {{"command": "touch {tmp_path / "ran"}"}}}}'
    assert main([*command.split(), option, call]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "class_path" in line or "init_args" in line


@dataclass
class Inner:
    """What is within."""

    name: str = "a"
    """Its name, 100 % of it."""
    places: tuple[Annotated[int, AtLeast(1)], ...] = ()


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    share: Annotated[float, AtLeast(0, most=1)] = 0.5
    """A share."""
    count: Annotated[int, AtLeast(2)] | None = None
    home: Annotated[Path, "a folder"] = Path("here")
    free: dict[str, Any] | None = None


class TestValues:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            *(("1e-3", 0.001), ("1e3", 1000.0), ("-2.5E+2", -250.0), (".5e1", 5.0), ("1_0.5e0", 10.5), ("3", 3)),
            *((".inf", float("inf")), ("1e999", float("inf")), ("yes", True), ("~", None), ("1e", "1e"), ("e3", "e3")),
            *(("2026-01-01", "2026-01-01"), ("'3'", "3"), ("[a, 1e-3]", ["a", 0.001]), ("", None), ("=", "=")),
        ],
    )
    def test_yaml_is_read_as_people_write_it(self, text: str, value: object) -> None:
        loaded = load_yaml(text)
        assert (loaded, type(loaded)) == (value, type(value))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("!!python/object/apply:os.system ['true']", "tags such as 'tag:yaml.org,2002:python/object/apply:os.s"),
            ("!x 1", "tags such as '!x' are not taken"),
            ("a: &a 1", "anchors and aliases are not taken"),
            ("a: *a", "anchors and aliases are not taken"),
            ("{a: 1, b: 2, a: 3}", "the key 'a' is there twice"),
            ("[" * 9 + "]" * 9, "nested more than 8 deep"),
            ("- " * 9, "nested more than 8 deep"),
            ("x" * 65_537, "longer than 65536 characters"),
            ("9" * 5000, "digits"),
        ],
    )
    def test_yaml_that_no_settings_need_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(UserError) as raised:
            load_yaml(text)
        assert message in str(raised.value)
        assert len(str(raised.value)) <= 160

    def test_values_become_what_their_fields_say(self) -> None:
        values = {"inner": {"name": "b", "places": ["3", 4]}, "share": 1, "count": "5", "home": "x", "free": {"a": [1]}}
        made = build(Outer, read(values, Outer))
        assert made == Outer(Inner("b", (3, 4)), 1.0, 5, Path("x"), {"a": [1]})
        assert type(made.share) is float
        assert build(Outer, read({"inner.name": "3", "count": "null"}, Outer)) == Outer(Inner("3"))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"share": 1.5}, "f: share is 1.5: it must be at most 1"),
            ({"share": True}, "f: share is true: it must be a number of at least 0 and at most 1"),
            ({"share": 10**400}, "f: share is inf: it must be a finite number"),
            ({"count": 1}, "f: count is 1: it must be at least 2"),
            ({"count": 2.0}, "f: count is 2.0: it must be a whole number of at least 2, or null"),
            ({"count": 2**63}, "f: count is 9223372036854775808: it must be a number below 9223372036854775808"),
            ({"home": None}, "f: home is null: it must be a folder"),
            ({"home": "a\0"}, "f: home is 'a\\x00': it must be text of at most 4096 characters, none of them null"),
            ({"inner": {"name": 3}}, "f: inner.name is 3: it must be text"),
            ({"inner": {"places": [0]}}, "f: inner.places is 0: it must be at least 1"),
            ({"inner": {"places": 1}}, "f: inner.places is 1: it must be a list, each a whole number of at least 1"),
            ({"inner": "x"}, "f: inner is 'x': it must hold settings, such as inner: {name: ...}"),
            ({"free": {"a": {}}}, "f: free.a is {}: it must be a number, text, true, false, null, or a list of these"),
            ({"free": {"a": [[]]}}, "f: free.a is []: it must be a number, text, true, false, null"),
            ({"free": {"a b": 1}}, "f: free holds 'a b': it must be the name of an option, such as out_dim"),
            ({"nner": {"name": 1}}, "f: unknown key 'nner.name'; did you mean inner.name?"),
            ({3: 1}, "f: unknown key 3"),
        ],
    )
    def test_what_they_can_not_become_is_named(self, values: dict[Any, Any], message: str) -> None:
        with pytest.raises(UserError) as raised:
            read(values, Outer, "f")
        assert str(raised.value).startswith(message)

    def test_whatever_a_value_is_it_is_shown_short_and_on_one_line(self) -> None:
        for value in strange_values(Path("x")):
            assert len(shown(value)) <= 100
            assert shown(value).isprintable()
        assert [shown(value) for value in (None, True, "a", (1, 2))] == ["null", "true", "'a'", "[1, 2]"]


def test_any_dataclass_is_made_of_options(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("inner: {name: b}")
    args = [f"--config={tmp_path / 'o.yaml'}", "--share=1e-1"]
    assert parse_options(args, Outer, prog="test", description="") == Outer(Inner("b"), 0.1)
    with pytest.raises(UserError, match="unknown option --shrae; did you mean --share"):
        parse_options(["--shrae=1"], Outer, prog="test", description="")
    with pytest.raises(UserError, match=r"^nowhere: no such config file$"):
        parse_options(["--config", "nowhere"], Outer, prog="test", description="")


class TestHelp:
    def test_fields_are_told_by_the_docstrings_under_them(self) -> None:
        assert field_docs(Inner) == {"name": "Its name, 100 % of it."}

    def test_every_setting_is_there_with_its_default_and_bounds(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            parse(["--help"], base={"train": {"lr": 0.25}}, prog="soap-net train", description="Train.")
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(f"--{key} " in text for key in kinds(Config))
        assert "Initial learning rate, for cross-entropy summed over the queries of an episode." in text
        assert "(a number of at least 0; default: 0.25)" in text
        assert "or one of the presets: demo, hmdb51_5way_1shot" in text

    def test_the_settings_that_options_make_are_printed_as_yaml(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            parse(["--print_config", "--train.lr", "0.25"])
        assert ended.value.code == 0
        assert from_dict(yaml.safe_load(capsys.readouterr().out)) == parse(["--train.lr=0.25"])

    def test_every_setting_is_described(self) -> None:
        def undescribed(settings: Any, prefix: str = "") -> list[str]:
            docs, found = field_docs(type(settings)), []
            for name, value in vars(settings).items():
                if is_dataclass(value):
                    found += undescribed(value, f"{prefix}{name}.")
                elif not docs.get(name):
                    found.append(prefix + name)
            return found

        assert undescribed(Config()) == []
