"""What training steps with: the optimizers, the state that each keeps, and the learning rates of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from soap_net.config import TrainConfig
from soap_net.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from soap_net.models.soap_net import SOAPNet

# What each keeps of a parameter: tensors of its shape, but for the steps counted.
_STATE = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def build_optimizer(cfg: TrainConfig, model: SOAPNet) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that take gradients, in a group for each of the factors of their rates.

    Raises:
        UserError: there are none; or `train.lr_scale` names something else.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError(
            "nothing is left to train: the net has no weights, or train.freeze holds all of them; "
            "`soap-net eval` takes a net as it is"
        )
    groups: dict[float, list[nn.Parameter]] = {}
    depths = _depths(model) if cfg.layer_decay < 1 else {}
    for name, parameter in trained.items():
        factor = _scale(cfg, name) * cfg.layer_decay ** depths.get(name, 0)
        groups.setdefault(factor, []).append(parameter)
    for part in cfg.lr_scale:
        if not any(_within(name, part) for name in trained):
            known = {name.rsplit(".", depth)[0] for name in trained for depth in range(name.count(".") + 1)}
            near = did_you_mean(part, sorted(known))
            raise UserError(f"train.lr_scale names {part!r}: nothing of that name is trained{near}")
    parts = [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parts, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return torch.optim.SGD(parts, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all parameters, each by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def build_average(cfg: TrainConfig, model: nn.Module) -> AveragedModel | None:
    """The moving average of weights and statistics that `train.ema` asks for, in evaluation mode.

    What holds no fractions (counters, indices, masks) is not averaged: it is what the model has.
    """
    if not cfg.ema:
        return None
    average = AveragedModel(model, multi_avg_fn=partial(_move_average, get_ema_multi_avg_fn(cfg.ema)), use_buffers=True)
    return average.requires_grad_(False).eval()


def _move_average(move: Callable[..., None], averages: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
    """One step of an average; the tensors are of one dtype. `move` takes those of numbers with fractions."""
    if averages[0].is_floating_point() or averages[0].is_complex():
        move(averages, current, steps)
        return
    for average, now in zip(averages, current, strict=True):
        average.copy_(now)


def _scale(cfg: TrainConfig, name: str) -> float:
    """The factor of a parameter's rate: that of the longest of the parts it is in."""
    return cfg.lr_scale[max(parts, key=len)] if (parts := [p for p in cfg.lr_scale if _within(name, p)]) else 1.0


def _depths(model: SOAPNet) -> dict[str, int]:
    """How many steps of `train.layer_decay` each of the backbone's weights lies before the head.

    The last block is one step before it, each other block one more than the next, and what lies before the first block
    one more than that. Weights behind a block count with it.
    """
    blocks = list(model.backbone.blocks())
    block_of = {parameter: number for number, block in enumerate(blocks, 1) for parameter in block.parameters()}
    depths, now = {}, 0
    for name, parameter in model.backbone.named_parameters(prefix="backbone"):
        now = block_of.get(parameter, now)
        depths[name] = len(blocks) + 1 - now
    return depths


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def learning_rate(cfg: TrainConfig, episode: int) -> float:
    """The rate of the optimizer step whose last episode is `episode` (from 0).

    `MultiStepLR` and `CosineAnnealingLR` advanced once per episode, as the field does: milestones count episodes,
    whatever `tasks_per_batch` is. In the first `warmup` episodes it is that share of it which they have come to.
    """
    rising = min(1.0, (episode + 1) / cfg.warmup) if cfg.warmup else 1.0
    return rising * _scheduled(cfg, episode)


def _scheduled(cfg: TrainConfig, episode: int) -> float:
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1.0 + math.cos(math.pi * episode / cfg.episodes))
    return cfg.lr * cfg.gamma ** sum(milestone <= episode for milestone in cfg.milestones)


def fits(optimizer: torch.optim.Optimizer, state: object) -> bool:
    """Whether `state` is what `optimizer` keeps of some of its parameters, by their numbers, each in its shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return isinstance(state, dict) and all(
        type(index) is int
        and 0 <= index < len(parameters)
        and isinstance(kept, dict)
        and kept.keys() == _STATE[type(optimizer)]
        and all(_fits(key, value, parameters[index]) for key, value in kept.items())
        for index, kept in state.items()
    )


def _fits(key: str, value: object, parameter: Tensor) -> bool:
    if value is None:
        return key == "momentum_buffer"  # there is none before SGD's first step, nor without momentum
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not value.is_meta
        and value.shape == (() if key == "step" else parameter.shape)
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()
    )
