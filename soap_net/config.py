"""Every setting of a run, typed: dataclasses that are YAML files and command-line options at once.

A `Config` comes from, in rising order of precedence, the defaults below, YAML files or named presets
(``soap_net/configs/*.yaml``), and options such as ``--train.lr 1e-2``. An unknown key or an impossible value raises
`UserError` with one line that names it and the nearest right one. This module imports no torch, so that
``soap-net --help`` is quick.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from soap_net.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Amp = Literal["none", "bf16", "fp16"]
Part = Literal["3dem", "cwem", "hmem"]
Settings = TypeVar("Settings")


@dataclass
class DataConfig:
    """Where the clips are and how frames are taken from them."""

    root: Path = Path("data")
    """Folder of the data set."""
    train_split: Path | None = None
    """Split file of the training classes; by default found under root."""
    val_split: Path | None = None
    """Split file of the validation classes; by default found under root."""
    test_split: Path | None = None
    """Split file of the test classes; by default found under root."""
    frames: int = 8
    """Frames per clip (T)."""
    interval: int | None = None
    """Take every n-th frame of a window; by default one frame from each of T equal segments."""
    resize: int = 256
    """Shorter side of a frame after resizing, in pixels."""
    crop: int = 224
    """Side of the square cut from it (random in training, centre in evaluation)."""
    flip: bool = True
    """Mirror half of the training clips; off where left and right tell classes apart, as in Something-Something."""
    order: Literal["forward", "reversed", "shuffled"] = "forward"
    """Order in which the frames are handed over; all but forward are there to study what a model makes of time."""
    workers: int = 2
    """Processes that decode clips; 0 decodes in the main process."""

    def split_file(self, split: str) -> Path | None:
        """The file set for `split` ("train", "val" or "test"), or None to look under `root`."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}[split]


@dataclass
class SoapConfig:
    """The SOAP module in front of the backbone."""

    enabled: bool = True
    """Whether SOAP is there at all."""
    parts: tuple[Part, ...] = ("3dem", "cwem", "hmem")
    """Which of its three priors are on."""
    tuple_sizes: tuple[int, ...] = (1, 2, 3)
    """HMEM's frame tuple sizes (O)."""
    hidden_channels: int = 16
    """Channels between CWEM's convolutions (C_r)."""
    backend: str = "auto"
    """Implementation: auto, or a name that `soap-net info` lists."""
    precision: Literal["default", "strict", "fast"] = "default"
    """Arithmetic of the kernels."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's equations, or what the authors' published code computes."""


@dataclass
class ModelConfig:
    """SOAP, backbone and few-shot head."""

    backbone: str = "resnet50"
    """tiny, resnet18, resnet34, resnet50, vit_b_16, efficientnet_lite0 or timm:<name>."""
    weights: str | None = "imagenet"
    """imagenet, random (or null), or a .pth / .safetensors file."""
    head: str = "soap"
    """Few-shot head."""
    head_options: dict[str, Any] = field(default_factory=dict)
    """The head's own options."""
    soap: SoapConfig = field(default_factory=SoapConfig)
    chunk_frames: int = 0
    """Frames per call of the backbone, to save memory; 0 takes all at once."""
    checkpoint_backbone: bool = False
    """Recompute the backbone's activations in the backward pass, to save memory."""
    channels_last: bool = False
    """Run the backbone in channels-last memory format."""


@dataclass
class EpisodeConfig:
    """The few-shot tasks of training; validation has their way and shot."""

    way: int = 5
    """Classes of a task."""
    shot: int = 1
    """Support clips of a class."""
    queries: int = 5
    """Query clips of a class."""
    seed: int = 0
    """Seeds the episodes, the augmentation, the initial weights and dropout."""


@dataclass
class TrainConfig:
    """Episodic training. Whatever is counted here is counted in episodes."""

    episodes: int = 10_000
    """Training episodes."""
    tasks_per_batch: int = 16
    """Episodes whose gradients are averaged into one optimizer step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    """Initial learning rate, for cross-entropy summed over the queries of an episode."""
    momentum: float = 0.0
    """SGD's momentum."""
    weight_decay: float = 0.0
    schedule: Literal["multistep", "cosine"] = "multistep"
    """multistep multiplies the rate by gamma at each milestone; cosine lets it fall to 0 at the last episode."""
    milestones: tuple[int, ...] = ()
    """Episodes after which the learning rate drops."""
    gamma: float = 0.1
    """Factor of each drop."""
    amp: Amp = "none"
    """Mixed precision: none, bf16, or fp16 with loss scaling."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    val_every: int = 1000
    """Episodes between validations; 0 never validates."""
    val_tasks: int = 500
    """Tasks of a validation."""
    save_every: int = 200
    """Episodes between writings of last.pt."""
    max_failed_share: float = 0.05
    """Training stops when more than this share of the clips read (once they are 500) could not be decoded."""


@dataclass
class EvalConfig:
    """Evaluation on classes never seen in training."""

    tasks: int = 10_000
    """Number of tasks."""
    way: int = 5
    """Classes of a task."""
    shot: int = 1
    """Support clips of a class."""
    queries: int = 1
    """Query clips of a class, in validation too."""
    seed: int = 1
    """Seeds the tasks."""
    split: Literal["train", "val", "test"] = "test"
    """Which classes to evaluate on."""


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    out: Path = Path("runs/soap-net")
    """Run folder."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def check(self) -> Config:
        """Returns self if every value is possible, else raises `UserError` naming the first that is not."""
        at_least = {
            1: "data.frames data.resize data.crop model.soap.hidden_channels train.episodes train.tasks_per_batch "
            "train.val_tasks train.save_every episode.shot episode.queries eval.shot eval.queries eval.tasks",
            2: "episode.way eval.way",
            0: "data.workers model.chunk_frames train.lr train.momentum train.weight_decay train.gamma "
            "train.clip_norm train.val_every train.max_failed_share episode.seed eval.seed",
        }
        flat = flatten(to_dict(self))
        for key in ("data.root", "out"):
            if flat[key] is None:
                raise UserError(f"{key} is null: it must be a folder")
        for key, value in flat.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key} is {value}: it must be a finite number")
        for least, keys in at_least.items():
            for key in keys.split():
                if flat[key] < least:
                    raise UserError(f"{key} is {flat[key]}: it must be at least {least}")
        if self.train.max_failed_share > 1:
            raise UserError(f"train.max_failed_share is {self.train.max_failed_share}: it must be at most 1")
        if self.data.interval is not None and self.data.interval < 1:
            raise UserError(f"data.interval is {self.data.interval}: it must be at least 1, or null for even segments")
        if self.data.crop > self.data.resize:
            raise UserError(
                f"data.crop is {self.data.crop}: it must be at most data.resize, which is {self.data.resize}"
            )
        if (
            list(self.train.milestones) != sorted(set(self.train.milestones))
            or min(self.train.milestones, default=1) < 1
        ):
            right = sorted({m for m in self.train.milestones if m > 0})
            raise UserError(f"train.milestones is {list(self.train.milestones)}: they must rise, as in {right}")
        sizes = self.model.soap.tuple_sizes
        if self.model.soap.enabled and "hmem" in self.model.soap.parts:
            if not sizes:
                raise UserError("model.soap.tuple_sizes is []: HMEM needs at least one size, as in [1, 2, 3]")
            for size in sizes:
                if not 1 <= size < self.data.frames:
                    nearest = min(max(size, 1), self.data.frames - 1)
                    raise UserError(
                        f"model.soap.tuple_sizes holds {size}: with data.frames {self.data.frames} "
                        f"a size is 1 to {self.data.frames - 1}, the nearest is {nearest}"
                    )
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", self.device):
            names = ["auto", "cpu", "cuda", "cuda:0", "mps", "xpu"]
            near = "; did you mean cuda?" if "gpu" in self.device.lower() else _nearest(self.device, names)
            raise UserError(f"device is {self.device!r}: it must be one of {', '.join(names)}{near}")
        return self


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain dictionaries, lists, strings and numbers, fit for YAML and for checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(asdict(config))
    return result


def from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """The config with these values over the defaults; raises `UserError` (`source` says where they came from)."""
    check_keys(values, source)
    return parse([], base=values, source=source)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file or a named preset; `overrides` are options such as ``["--train.lr=1e-2"]``."""
    return parse(["--config", str(name), *overrides])


def save_config(config: Config, path: Path) -> None:
    """Writes the full config as YAML."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def presets() -> dict[str, Path]:
    """The published configs by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; `head_options`, free in its keys, stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "head_options":
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


@cache
def known_keys(cls: type = Config) -> tuple[str, ...]:
    """All dotted keys of a config dataclass."""
    return tuple(flatten(to_dict(cls())))


def read_settings(path: Path, cls: type = Config) -> dict[str, Any]:
    """The nested settings in a YAML file; raises `UserError` if it isn't one or holds an unknown key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {_one_line(str(error))}") from error
    check_keys({} if values is None else values, str(path), cls)
    return dict(values or {})


def check_keys(values: Any, source: str, cls: type = Config) -> None:
    """Raises `UserError` for the first key in nested `values` that no setting bears, with the nearest one that does."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected settings such as 'train: {{lr: 0.001}}', found {values!r}")
    known = known_keys(cls)
    groups = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in flatten(values).items():
        if key in groups:
            raise UserError(f"{source}: {key} is {value!r}: it must hold settings, such as {key}: {{lr: 0.001}}")
        if key not in known:
            raise UserError(f"{source}: unknown key {key!r}{_nearest(key, known)}")


@overload
def parse(
    args: Sequence[str],
    *,
    base: Mapping[str, Any] | None = None,
    prog: str = "soap-net",
    description: str = "",
    source: str = "",
) -> Config: ...


@overload
def parse(args: Sequence[str], cls: type[Settings], *, prog: str, description: str) -> Settings: ...


def parse(
    args: Sequence[str],
    cls: type[Any] = Config,
    *,
    base: Mapping[str, Any] | None = None,
    prog: str = "soap-net",
    description: str = "",
    source: str = "",
) -> Any:
    """Parses command-line options into a checked config dataclass.

    Args:
        args: options, ``--config <file or preset>`` among them.
        cls: the dataclass.
        base: nested settings that take the place of the defaults.
        prog: the command, for its help.
        description: what the command does, for its help.
        source: where `base` came from, for messages.

    Raises:
        UserError: one line that names the unknown option or key, or the impossible value, and the nearest right one.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    named = f", or one of the presets: {', '.join(presets())}" if cls is Config else ""
    parser.add_argument("--config", action="config", help=f"YAML file{named}.")
    parser.add_class_arguments(cls, as_group=False)
    prefix = f"{source}: " if source else ""
    try:
        if base:
            # Parsed alone first, so that an impossible value in it is told apart from one in the options.
            parser.parse_object(dict(base))
            parser.set_defaults(flatten(base))
        prefix = ""
        values = parser.instantiate(parser.parse_args(_resolve(args, cls))).as_dict()
    except (UserError, OSError):
        raise
    except Exception as error:  # jsonargparse raises its own, argparse's and the YAML library's
        raise UserError(prefix + _one_line(str(error))) from error
    values.pop("config")
    settings = cls(**values)
    return settings.check() if isinstance(settings, Config) else settings


def _resolve(args: Sequence[str], cls: type) -> list[str]:
    """Checks the option names and the keys of config files, and puts a preset's path in place of its name."""
    known = known_keys(cls)
    options = [*known, "config", "help", "print_config"]
    groups = {key.rpartition(".")[0] for key in known}
    resolved: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            if name == "config" and (file := value if equals else next(remaining, None)) is not None:
                path = _config_file(file, cls)
                resolved += [f"--config={path}"] if read_settings(path, cls) else []  # not one of comments alone
                continue
            if name not in options and name not in groups and not name.startswith("model.head_options."):
                raise UserError(f"unknown option --{name}{_nearest(name, options, '--')}")
        resolved.append(arg)
    return resolved


def _config_file(name: str, cls: type) -> Path:
    named = presets() if cls is Config else {}
    path = named.get(name) or Path(name)
    if not path.is_file():
        preset = ", nor a preset of that name" if cls is Config else ""
        raise UserError(f"{name}: no such config file{preset}{_nearest(name, named)}")
    return path


def _nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # a right name in the wrong group, or without its group
        leaf = name.rpartition(".")[2]
        leaves = {key.rpartition(".")[2]: key for key in known}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _one_line(message: str) -> str:
    """The parser's message as one line, with the nearest right value where it lists the choices."""
    line = " ".join(message.split()).replace("Parser key ", "")
    literal = re.search(r"Expected a (?:typing\.)?Literal\[(.*?)\]\. Got value: (.*)$", line)
    if literal:
        key = line.split(":")[0].strip('"')
        choices = [choice.strip(" '\"") for choice in literal[1].split(",")]
        return f"{key} is {literal[2]!r}: it must be one of {', '.join(choices)}{_nearest(literal[2], choices)}"
    value = re.match(r'"(?P<key>[\w.]+)": (?P<why>.*)$', line)
    if value:
        expected = re.search(r"Expected (?:a |an )?<class '(\w+)'>", value["why"])
        got = re.search(r"(?:Got value|Given value): (.*)$", value["why"])
        if expected and got:
            kind = {
                "int": "a whole number",
                "float": "a number",
                "bool": "true or false",
                "dict": "settings such as '{out_dim: 64}'",
            }
            return f"{value['key']} is {got[1]!r}: it must be {kind.get(expected[1], expected[1])}"
        return f"{value['key']}: {value['why']}"
    return line
