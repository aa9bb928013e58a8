"""Checkpoints: one file that holds all of a run, written so that a crash or a full disk never harms the old one.

A checkpoint is a dictionary of plain values and tensors, read back with ``weights_only=True``: `format`, `config`
(nested, as in YAML), `model`, and, where training is to go on, `optimizer`, `scaler` and `progress`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soap_net.config import Config, from_dict
from soap_net.errors import UserError, said
from soap_net.files import replacing
from soap_net.settings import shown

if TYPE_CHECKING:
    from soap_net.models.soap_net import SOAPNet

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that can't be read, or that belongs to another model."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path` atomically: at any moment `path` is the old file or the whole new one.

    Raises:
        OSError: the disk is full or the folder can't be written; the file at `path` is then as it was.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, its tensors onto the CPU; only tensors and plain values are let in, never code.

    Raises:
        CheckpointError: no such file, a folder, not to be read, truncated, not a checkpoint, or of another format.
    """
    if os.path.isdir(path):
        best = path / "best.pt"
        raise CheckpointError(
            f"{path}: a folder, not a checkpoint{f'; there is {best}' if os.path.isfile(best) else ''}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint can't be read: {said(error)}") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes in it
        raise CheckpointError(
            f"{path}: not a whole checkpoint of soap-net ({path.stat().st_size} bytes): truncated, or another format"
        ) from error
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise CheckpointError(f"{path}: not a checkpoint of soap-net: no config and model in it")
    if not isinstance(content["format"], int) or content["format"] != FORMAT:
        found = shown(content["format"])
        raise CheckpointError(f"{path}: checkpoint format {found}, this version reads format {FORMAT}")
    weights = content["model"]
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise CheckpointError(f"{path}: not a checkpoint of soap-net: its model holds other things than weights")
    return content


def load_model(
    path: Path, device: str | torch.device = "cpu", *, backend: str | None = None, precision: str | None = None
) -> tuple[SOAPNet, Config]:
    """Rebuilds the model of a checkpoint, in evaluation mode, and the config it was trained with.

    Args:
        path: the checkpoint.
        device: where the model is to run.
        backend: what SOAP runs with; by default what it was trained with, which this machine may not have.
        precision: that of SOAP's kernels; by default that of training.

    Raises:
        CheckpointError: see `load`; or its weights don't fit the model that its config describes.
        UserError: no such backend or precision.
    """
    from soap_net.models import build_model

    content = load(path)
    config = from_dict(content["config"], str(path))
    given: dict[str, Any] = {"backend": backend, "precision": precision}
    soap = replace(config.model.soap, **{key: value for key, value in given.items() if value is not None})
    described = replace(config.model, weights="random", soap=soap)  # the checkpoint brings all weights
    model = build_model(described, config.data.frames)
    load_weights(model, content["model"], path)
    return model.to(device).eval(), config


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copies `weights` into `model`.

    Raises:
        CheckpointError: names or shapes differ; names the first of each and their counts.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    strange = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights missing, first {missing[0]}")
    if strange:
        faults.append(f"{len(strange)} unknown, first {strange[0]}")
    if shapes:
        name = shapes[0]
        faults.append(
            f"{len(shapes)} of another shape, first {name}: {tuple(weights[name].shape)}, "
            f"expected {tuple(own[name].shape)}"
        )
    if faults:
        raise CheckpointError(f"{path}: checkpoint of another architecture: {'; '.join(faults)}")
    model.load_state_dict(weights)
