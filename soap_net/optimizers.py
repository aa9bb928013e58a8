"""What training steps with: the optimizers, the state that each keeps, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from soap_net.config import TrainConfig

# What each keeps of a parameter: tensors of its shape, but for the steps counted.
_STATE = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def build_optimizer(cfg: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that take gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def learning_rate(cfg: TrainConfig, episode: int) -> float:
    """The rate of the optimizer step whose last episode is `episode` (from 0).

    `MultiStepLR` and `CosineAnnealingLR` advanced once per episode, as the field does: milestones count episodes,
    whatever `tasks_per_batch` is.
    """
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
