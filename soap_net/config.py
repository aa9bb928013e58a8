"""Every setting of a run, typed: dataclasses that are YAML files and command-line options at once.

A `Config` comes from, in rising order of precedence, the defaults below, YAML files or named presets
(``soap_net/configs/*.yaml``), and options such as ``--train.lr 1e-2``. An unknown key or an impossible value raises
`UserError` with one line that names it and the nearest right one. This module imports no torch, so that
``soap-net --help`` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from soap_net.errors import UserError, did_you_mean
from soap_net.files import write_text
from soap_net.settings import AtLeast, build, dump, is_free, kinds, parse_options, read, read_yaml, shown, to_dict

WEIGHTS_FILES = (".pth", ".pt", ".pth.tar", ".safetensors")
"""How the name of a weights file ends; other weights are names."""
Amp = Literal["none", "bf16", "fp16"]
Part = Literal["3dem", "cwem", "hmem"]
Rate = Annotated[float, AtLeast(0)]


@dataclass
class DataConfig:
    """Where the clips are and how frames are taken from them."""

    root: Annotated[Path, "a folder"] = Path("data")
    """Folder of the data set."""
    roots: tuple[Annotated[Path, "a folder"], ...] = ()
    """Folders of several data sets, in place of root: an episode is drawn from one of them."""
    train_split: Annotated[Path, "a file"] | None = None
    """Split file of the training classes; by default found under root."""
    val_split: Annotated[Path, "a file"] | None = None
    """Split file of the validation classes; by default found under root."""
    test_split: Annotated[Path, "a file"] | None = None
    """Split file of the test classes; by default found under root."""
    frames: Annotated[int, AtLeast(1)] = 8
    """Frames per clip (T)."""
    interval: Annotated[int, AtLeast(1)] | None = None
    """Take every n-th frame of a window; by default one frame from each of T equal segments."""
    resize: Annotated[int, AtLeast(1)] = 256
    """Shorter side of a frame after resizing, in pixels."""
    crop: Annotated[int, AtLeast(1)] = 224
    """Side of the square cut from it (random in training, centre in evaluation)."""
    flip: bool = True
    """Mirror half of the training clips; off where left and right tell classes apart, as in Something-Something."""
    augment: bool = True
    """Take a training clip's frames, crop and mirroring at random; off takes the centred ones of evaluation."""
    order: Literal["forward", "reversed", "shuffled"] = "forward"
    """Order in which the frames are handed over; all but forward are there to study what a model makes of time."""
    workers: Annotated[int, AtLeast(0)] = 2
    """Processes that decode clips; 0 decodes in the main process."""

    @property
    def place(self) -> Path | tuple[Path, ...]:
        """Where the clips are: `roots`, or `root` without any."""
        return self.roots or self.root

    @property
    def name(self) -> str:
        """The name of the data set's folder, or of all sets' folders."""
        return "+".join(place.name for place in self.roots or (self.root,))

    def split_file(self, split: str) -> Path | None:
        """The file set for `split` ("train", "val" or "test"), or None to look under `root`."""
        return self.split_files[split]

    @property
    def split_files(self) -> dict[str, Path | None]:
        """`split_file` of all splits."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}

    def instead_of(self, other: DataConfig) -> DataConfig:
        """Itself; where its root is another than `other`'s, without lists of that one's folder: those here are taken.

        A list that lies at the same place below this root stands for one of `other`'s; those of several sets stand for
        none, and a root of its own takes the place of `other`'s roots.
        """
        here, there, lists = self.root.absolute(), other.root.absolute(), self.split_files
        roots = () if here != there and self.roots == other.roots else self.roots
        for split, path in self.split_files.items():
            if path is None or path != other.split_file(split):
                continue
            if roots != other.roots:
                lists[split] = None
            elif here != there and path.is_relative_to(there):
                own = here / path.relative_to(there)
                lists[split] = own if own.is_file() else None
        return replace(self, roots=roots, train_split=lists["train"], val_split=lists["val"], test_split=lists["test"])


@dataclass
class SoapConfig:
    """The SOAP module in front of the backbone."""

    enabled: bool = True
    """Whether SOAP is there at all."""
    parts: tuple[Part, ...] = ("3dem", "cwem", "hmem")
    """Which of its three priors are on."""
    tuple_sizes: tuple[int, ...] = (1, 2, 3)
    """HMEM's frame tuple sizes (O)."""
    hidden_channels: Annotated[int, AtLeast(1)] = 16
    """Channels between CWEM's convolutions (C_r)."""
    backend: str = "auto"
    """Implementation: auto, or a name that `soap-net info` lists."""
    precision: Literal["default", "strict", "fast"] = "default"
    """Arithmetic of the kernels."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's equations, or what the authors' published code computes."""
    centred: bool = False
    """Each prior less one half, its value at rest: for a backbone that was trained without SOAP."""
    start: Literal["random", "differences"] = "random"
    """HMEM's initial weights: PyTorch's own, or those that compare frames half a clip apart, for little motion."""


@dataclass
class ModelConfig:
    """SOAP, backbone and few-shot head."""

    backbone: str = "resnet50"
    """tiny, resnet18, resnet34, resnet50, vit_b_16, efficientnet_lite0, timm:<name>; of clips tiny3d, r3d_18, mc3_18,
    r3d_18_strided, r2plus1d_18, s3d, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b, hf:<folder or owner/model>."""
    weights: str | None = "imagenet"
    """pretrained (what the net has by name), imagenet, kinetics, random (or null), or a file: .safetensors, .pth, or
    the checkpoint of a run or of timm's trainer."""
    head: str = "soap"
    """Few-shot head: soap, prototype, tsn, otam, trx, bimhm, hyrsm, or views, which needs no training."""
    head_options: dict[str, Any] = field(default_factory=dict)
    """The head's own options."""
    drop_path: Annotated[float, AtLeast(0, most=0.99)] = 0.0
    """Share of a timm net's blocks that training skips at random, from 0 for the first to this for the last."""
    soap: SoapConfig = field(default_factory=SoapConfig)
    chunk_frames: Annotated[int, AtLeast(0)] = 0
    """Frames per call of the backbone, to save memory; 0 takes all at once."""
    checkpoint_backbone: bool = False
    """Recompute the backbone's activations in the backward pass, to save memory."""
    channels_last: bool = True
    """Run a backbone of frames in channels-last memory format, which changes its rounding alone."""

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names; None where that is a name which the net knows."""
        weights = self.weights or ""
        return Path(weights) if weights.endswith(WEIGHTS_FILES) or Path(weights).is_absolute() else None

    @property
    def folder(self) -> Path | None:
        """The folder that `backbone` names; None where that is the name of a net, on the hub or not."""
        source, _, name = self.backbone.partition(":")
        path = Path(name)
        of_hf = source == "hf" and name and (path.is_dir() or name.count("/") != 1)
        return path if of_hf or path.is_absolute() else None

    def absolute(self) -> ModelConfig:
        """Returns the same with absolute paths of its weights file and its backbone's folder, where these are there."""
        file, folder = self.weights_file, self.folder
        return self._of(
            file.absolute() if file is not None and file.is_file() else file,
            folder.absolute() if folder is not None and folder.is_dir() else folder,
        )

    def by_name(self) -> ModelConfig:
        """Returns the same with the bare names of its weights file and its backbone's folder."""
        file, folder = self.weights_file, self.folder
        return self._of(file and Path(file.name), folder and Path(folder.name))

    def _of(self, file: Path | None, folder: Path | None) -> ModelConfig:
        source = self.backbone.partition(":")[0]
        return replace(
            self,
            weights=str(file) if file is not None else self.weights,
            backbone=f"{source}:{folder}" if folder is not None else self.backbone,
        )


@dataclass
class EpisodeConfig:
    """The few-shot tasks of training; validation has their way and shot."""

    way: Annotated[int, AtLeast(2)] = 5
    """Classes of a task."""
    shot: Annotated[int, AtLeast(1)] = 1
    """Support clips of a class."""
    queries: Annotated[int, AtLeast(1)] = 5
    """Query clips of a class."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Seeds the episodes, the augmentation, the initial weights and dropout."""


@dataclass
class TrainConfig:
    """Episodic training. Whatever is counted here is counted in episodes."""

    episodes: Annotated[int, AtLeast(1)] = 10_000
    """Training episodes."""
    tasks_per_batch: Annotated[int, AtLeast(1)] = 16
    """Episodes whose gradients are averaged into one optimizer step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent, or AdamW."""
    lr: Annotated[float, AtLeast(0)] = 1e-3
    """Initial learning rate, for cross-entropy summed over the queries of an episode."""
    momentum: Annotated[float, AtLeast(0)] = 0.0
    """SGD's momentum."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """Pull of the weights to 0: sgd adds so much of them to their gradients, adamw takes it times the rate off them."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """multistep multiplies the rate by gamma at each milestone; cosine lets it fall to 0 at the last episode."""
    milestones: tuple[Annotated[int, AtLeast(1)], ...] = ()
    """Episodes after which the learning rate drops."""
    gamma: Annotated[float, AtLeast(0)] = 0.1
    """Factor of each drop."""
    warmup: Annotated[int, AtLeast(0)] = 0
    """Episodes in which the learning rate rises from 0 to its own."""
    freeze: tuple[str, ...] = ()
    """What is not trained: soap, backbone, head, or modules by their names, such as backbone.net.layer1; they stand
    still, BatchNorm's statistics and dropout included."""
    lr_scale: Annotated[dict[str, Rate], "numbers by part or module, such as {backbone: 0.01}"] = field(
        default_factory=dict
    )
    """Factors of the learning rate by part or module, the longest name counting; 1 where none is given."""
    layer_decay: Annotated[float, AtLeast(0, most=1)] = 1.0
    """A further factor of the backbone's rates, once for its last block, twice for the one before, and so on to its
    first layer (0.75, say, to fine-tune a transformer); 1 is off."""
    ema: Annotated[float, AtLeast(0, most=0.99999)] = 0.0
    """Decay, per optimizer step, of a moving average of the weights, which is then validated and saved as best; 0 is
    off."""
    amp: Amp = "none"
    """Mixed precision: none, bf16, or fp16 with loss scaling."""
    compile: bool = False
    """Compile the backbone for training, with torch.compile: faster steps after a minute or more."""
    deterministic: bool = False
    """Take only algorithms that give the same bits each time; on a CPU a run repeats itself without it."""
    clip_norm: Annotated[float, AtLeast(0)] = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    val_every: Annotated[int, AtLeast(0)] = 1000
    """Episodes between validations; 0 never validates."""
    val_tasks: Annotated[int, AtLeast(1)] = 500
    """Tasks of a validation."""
    patience: Annotated[int, AtLeast(0)] = 0
    """Training ends after so many validations in a row that were no better than the best; 0 goes on to the last
    episode."""
    save_every: Annotated[int, AtLeast(1)] = 200
    """Episodes between writings of last.pt."""
    max_failed_share: Annotated[float, AtLeast(0, most=1)] = 0.05
    """Training stops when more than this share of the clips read (once they are 500) could not be decoded."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (pip install 'wandb>=0.31')."""


@dataclass
class EvalConfig:
    """Evaluation on classes never seen in training."""

    tasks: Annotated[int, AtLeast(1)] = 10_000
    """Number of tasks."""
    way: Annotated[int, AtLeast(2)] = 5
    """Classes of a task."""
    shot: Annotated[int, AtLeast(1)] = 1
    """Support clips of a class."""
    queries: Annotated[int, AtLeast(1)] = 1
    """Query clips of a class, in validation too."""
    seed: Annotated[int, AtLeast(0)] = 1
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
    out: Annotated[Path, "a folder"] = Path("runs/soap-net")
    """Run folder."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def absolute(self) -> Config:
        """Returns the same with the paths of `data` and `model` absolute, which mean the same from any folder."""
        names = ("root", "train_split", "val_split", "test_split")
        paths = {name: path.absolute() for name in names if (path := getattr(self.data, name)) is not None}
        roots = tuple(root.absolute() for root in self.data.roots)
        return replace(self, data=replace(self.data, roots=roots, **paths), model=self.model.absolute())

    def portable(self) -> Config:
        """Returns the same without what it says of the machine: folders, files but for their names, device."""
        data = replace(self.data, root=Path(self.data.name), roots=(), workers=DataConfig.workers)
        data = replace(data, train_split=None, val_split=None, test_split=None)
        model = self.model.by_name()
        model = replace(model, soap=replace(model.soap, backend=SoapConfig.backend))
        return replace(self, data=data, model=model, out=Config.out, device=Config.device)

    def check(self) -> Config:
        """Returns self if every value is possible, else raises `UserError` naming the first that is not."""
        read(to_dict(self), Config)
        data, soap, milestones = self.data, self.model.soap, [*self.train.milestones]
        if data.crop > data.resize:
            raise UserError(f"data.crop is {data.crop}: it must be at most data.resize, which is {data.resize}")
        if milestones != sorted(set(milestones)):
            right = shown(sorted(set(milestones)))
            raise UserError(f"train.milestones is {shown(milestones)}: they must rise, as in {right}")
        if self.train.patience and not self.train.val_every:
            raise UserError(
                f"train.patience is {self.train.patience}, in validations, and train.val_every is 0: there are none"
            )
        if soap.enabled and "hmem" in soap.parts:
            if not soap.tuple_sizes:
                raise UserError("model.soap.tuple_sizes is []: HMEM needs at least one size, as in [1, 2, 3]")
            for size in soap.tuple_sizes:
                if not 1 <= size < data.frames:
                    raise UserError(
                        f"model.soap.tuple_sizes holds {size}: with data.frames {data.frames} a size is 1 to "
                        f"{data.frames - 1}, the nearest is {min(max(size, 1), data.frames - 1)}"
                    )
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", self.device):
            names = ["auto", "cpu", "cuda", "cuda:0", "mps", "xpu"]
            near = "; did you mean cuda?" if "gpu" in self.device.lower() else did_you_mean(self.device, names)
            raise UserError(f"device is {shown(self.device)}: it must be one of {', '.join(names)}{near}")
        return self


def from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """The config with these values over the defaults; raises `UserError` (`source` says where they came from)."""
    return build(Config, read(values, Config, source)).check()


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file or a named preset; `overrides` are options such as ``["--train.lr=1e-2"]``."""
    return parse([f"--config={name}", *overrides])


def save_config(config: Config, path: Path) -> None:
    """Writes the full config as YAML, whole or not at all."""
    write_text(path, dump(config))


def presets() -> dict[str, Path]:
    """The published configs by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; one that is free in its keys, as `head_options`, stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not is_free(kinds(Config).get(prefix + key)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file's nested settings of a run, checked one by one; raises `UserError` if it isn't one or they aren't."""
    values = read_yaml(path)
    values = {} if values is None else values
    read(values, Config, str(path))
    return dict(values)


def parse(
    args: Sequence[str],
    *,
    base: Mapping[str, Any] | None = None,
    prog: str = "soap-net",
    description: str = "",
    source: str = "",
) -> Config:
    """The checked config that command-line options make, presets among them; see `soap_net.settings.parse_options`."""
    return parse_options(
        args, Config, base=base, prog=prog, description=description, source=source, presets=presets()
    ).check()
