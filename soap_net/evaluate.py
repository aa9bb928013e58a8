"""Evaluation on many few-shot tasks, each clip's features computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from soap_net.config import Amp, Config, DataConfig, EvalConfig

if TYPE_CHECKING:
    from soap_net.data.splits import ClipSet
    from soap_net.models.soap_net import SOAPNet


@dataclass
class EvalResult:
    """What `eval.json` holds; accuracies in percent, `ci95` is the half width of the 95 % interval in points."""

    accuracy: float
    ci95: float
    tasks: int
    way: int
    shot: int
    queries: int
    split: str
    seed: int
    episodes_per_second: float
    seconds: float
    per_class: dict[str, float]
    classes: list[str]
    confusion: list[list[int]]
    failed_clips: list[str]


def evaluate(
    model: SOAPNet,
    clips: ClipSet,
    data: DataConfig,
    config: EvalConfig,
    *,
    device: torch.device | str = "cpu",
    amp: Amp = "none",
    progress: bool = True,
) -> EvalResult:
    """Evaluates `model` (in eval mode) on `config.tasks` tasks drawn from `clips`."""
    raise SystemExit("not built yet")


def evaluate_run(checkpoint: Path, config: Config | None = None, *, out: Path | None = None, progress: bool = True) -> EvalResult:
    """Evaluates a checkpoint and writes eval.json beside it (or to `out`)."""
    raise SystemExit("not built yet")
