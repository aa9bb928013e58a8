"""The command ``soap-net experiment``: which experiment, on which settings, into which folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soap_net.config import EpisodeConfig, flatten, parse, presets, read_settings
from soap_net.errors import UserError, nearest

if TYPE_CHECKING:
    from soap_net.experiments.experiment import Experiment

EXPERIMENTS = {  # by the file's name: class, what is put to the test
    "parts": ("Parts", "every subset of SOAP's parts (Table 2)"),
    "tuples": ("Tuples", "sets of HMEM's tuple sizes (Table 3)"),
    "order": ("Order", "frames reversed and shuffled (Table 4)"),
    "frame-rate": ("FrameRate", "videos of 15 to 240 frames a second (Figure 8)"),
    "sensitivity": ("Sensitivity", "tuple sizes and CWEM's hidden channels, by validation"),
    "heads": ("Heads", "every head and a 3-D backbone with and without SOAP"),
    "overhead": ("Overhead", "SOAP's time, memory and parameters beside each backbone"),
    "real": ("Real", "SOAP before a pretrained net on real videos, against none and a constant, on every class"),
}
PRESETS = ("quick", "paper")
SIZES: dict[str, dict[str, Any]] = {  # in place of presets, for `real`: a quarter of an hour, a night, a GPU
    "pilot": {"train.episodes": 60},
    "cpu": {"train.episodes": 240},
    "gpu": {"train.episodes": 10_000, "data.workers": 4},
}
REAL = {
    "data.resize": 112, "data.crop": 96, "data.flip": False, "data.workers": 0, "model.backbone": "efficientnet_lite0",
    "model.channels_last": True, "episode.queries": 2, "train.tasks_per_batch": 2, "train.optimizer": "adamw",
    "train.lr": 0.002, "train.weight_decay": 0.01, "train.schedule": "cosine", "train.val_every": 0,
    "train.save_every": 20, "eval.shot": 5, "eval.tasks": 1000,
}  # fmt: skip
SEEDS = 3
# The largest grids: 54 runs with three seeds would not be sure to end within 15 minutes on two cores.
QUICK_SEEDS = {"heads": 2, "frame-rate": 2}
MOTION = Path("runs/experiments/motion")
# On the demo's settings: no validation, as the last weights are the ones tested, and fewer test tasks.
QUICK = {"train.val_every": 0, "eval.tasks": 1000}
# The demo's rate suits the SOAP head; with it TRX stays at chance, with half of it both learn (validation classes).
QUICK_RATES = {"heads": 0.002}


def presets_of(name: str) -> tuple[str, ...]:
    """The presets, or sizes, of an experiment; the first is the default."""
    return tuple(SIZES) if name == "real" else PRESETS


def default_seeds(name: str, preset: str) -> int:
    """How many nets are trained of each setting, unless the caller says."""
    if preset == "pilot":
        return 1
    return QUICK_SEEDS.get(name, SEEDS) if preset == "quick" else SEEDS


def settings(preset: str, name: str) -> dict[str, Any]:
    """What a preset sets for an experiment over the defaults, by dotted key: the demo's settings, or the field's."""
    if preset in SIZES:
        return REAL | SIZES[preset]
    if preset == "paper":
        return {"train.milestones": [2000, 6000, 8000], "data.workers": 8}
    values = flatten(read_settings(presets()["demo"])) | QUICK | {"data.root": str(MOTION / "quick")}
    values["train.lr"] = QUICK_RATES.get(name, values["train.lr"])
    return values


def build(name: str, preset: str, args: Sequence[str]) -> Experiment:
    """The experiment of that name on the preset's settings, changed by options such as ``--data.root``.

    Raises:
        UserError: no such experiment, preset or setting, or an impossible value.
    """
    if name not in EXPERIMENTS:
        close = nearest(name, EXPERIMENTS)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(EXPERIMENTS)}"
        raise UserError(f"unknown experiment {name!r}; {hint}")
    if preset not in presets_of(name):
        raise UserError(f"unknown preset {preset!r}; of {name} there are {', '.join(presets_of(name))}")
    base = settings(preset, name)
    config = parse(args, base=base, prog=f"soap-net experiment {name}", source=f"preset {preset}")
    if config.episode.seed != base.get("episode.seed", EpisodeConfig.seed):
        raise UserError("episode.seed is set by the experiment, 0 for its first training of each setting; see --seeds")
    module = import_module(f"soap_net.experiments.{name.replace('-', '_')}")
    motion = MOTION if config.data.root == MOTION / "quick" else None
    return getattr(module, EXPERIMENTS[name][0])(config, preset, motion)
