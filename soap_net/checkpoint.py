"""Checkpoints: one file that holds all of a run, written so that a crash or a full disk never harms the old one.

A checkpoint is a dictionary of plain values and tensors, read back with ``weights_only=True``: `format`, `config`
(nested, as in YAML), `model`, and, where training is to go on, `optimizer`, `scaler`, `progress` and, if there is one,
`average`, the moving average of the weights. It is a zip archive whose members are not compressed, so that none is
larger than the file, and have check sums, which are compared.

A folder of the field's form, `SETTINGS` and `WEIGHTS`, as `SOAPNet.save_pretrained` writes it, stands for a checkpoint
that nobody goes on training from.
"""

from __future__ import annotations

import contextlib
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from soap_net.config import Config, from_dict, read_settings
from soap_net.errors import UserError, said
from soap_net.files import replacing
from soap_net.optimizers import fits
from soap_net.settings import shown

if TYPE_CHECKING:
    from soap_net.models.soap_net import SOAPNet

FORMAT = 1
SETTINGS, WEIGHTS = "config.json", "model.safetensors"
LARGEST_SHARE = 4
"""So many times its weights a checkpoint takes at most: AdamW's moments are twice as large, an average as. And:"""
LARGEST_REST = 2**24
"""Bytes of all else in a checkpoint: config, names, progress, alignment."""
LARGEST_PICKLE = 2**22
"""Bytes of what describes the tensors, some 200 for each."""

# What a checkpoint is built of. Of the rest that torch would let in, some takes memory by a number in the file.
_KNOWN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter|meta_tensor_no_storage)"
    r"|torch(\.storage)? \w+Storage|torch Size|torch (b?float|u?int|complex|bool)\w*"
)


class CheckpointError(UserError):
    """A checkpoint that can't be read, or that belongs to another model."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path` atomically: at any moment `path` is the old file or the whole new one.

    Raises:
        CheckpointError: a weight is infinite or not a number, so that nobody could go on from it.
        WriteError: the disk is full or the folder can't be written; the file at `path` is then as it was.
    """
    if (name := non_finite(content["model"])) is not None:
        raise CheckpointError(
            f"{path}: not written, as the weight {name} is not finite any more; what was there is as it was"
        )
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path, model: nn.Module | None = None) -> dict[str, Any]:
    """Reads a checkpoint, its tensors onto the CPU; only tensors and plain values are let in, never code.

    Args:
        path: the checkpoint, or a folder with `SETTINGS` and `WEIGHTS`, of which config and model come back.
        model: what its weights are for, on any device: they must fit it, which is seen to before memory is taken.

    Raises:
        CheckpointError: no such file, a folder, not to be read, damaged, larger than `LARGEST_SHARE` and
            `LARGEST_REST` allow, not a checkpoint, of another format, of another architecture, or with weights that
            are sparse, complex, without values or not finite; names the first of them.
    """
    if is_folder(path):
        return {"config": read_settings(path / SETTINGS), "model": _folder_weights(path / WEIGHTS, model)}
    with _opened(path) as file:
        size = _checked_archive(file, path)
        weights = _content(file, path, "meta")["model"]
        if model is not None:
            _refuse_misfit(model, weights, path)
            size = max(size, sum(part.numel() * part.itemsize for part in (*model.parameters(), *model.buffers())))
        most = LARGEST_SHARE * sum(weight.numel() * weight.itemsize for weight in weights.values()) + LARGEST_REST
        if size > most:
            raise CheckpointError(
                f"{path}: {size} bytes, unpacked, where such weights and all else take at most {most}"
            )
        _compare_sums(file)
        content = _content(file, path, "cpu")
        for weights in (content["model"], content.get("average", {})):
            for name, weight in weights.items():
                if weight.is_meta:
                    raise CheckpointError(
                        f"{path}: the weight {shown(name)} has no values: it was on torch's meta device"
                    )
            _refuse_non_finite(weights, path)
    return content


def is_folder(path: Path) -> bool:
    """Whether a folder holds `SETTINGS` and `WEIGHTS`, and so stands for a checkpoint."""
    return (path / SETTINGS).is_file() and (path / WEIGHTS).is_file()


def _folder_weights(path: Path, model: nn.Module | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which are as large as the file and are read where they are looked at."""
    with _opened(path):
        weights = safetensors.torch.load_file(path)
        _refuse_strange(weights, "model", path)
        if model is not None:
            _refuse_misfit(model, weights, path)
        _refuse_non_finite(weights, path)
    return weights


def load_config(path: Path) -> Config:
    """The config that a checkpoint was trained with, without reading its weights.

    Raises:
        CheckpointError: see `load`.
        UserError: the config is not one of this version.
    """
    if is_folder(path):
        return from_dict(read_settings(path / SETTINGS), str(path / SETTINGS))
    with _opened(path) as file:
        _checked_archive(file, path)
        return from_dict(_content(file, path, "meta")["config"], str(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`; whatever goes wrong with it in the block becomes a `CheckpointError`."""
    if os.path.isdir(path):
        best = path / "best.pt"
        raise CheckpointError(
            f"{path}: a folder, not a checkpoint{f'; there is {best}' if os.path.isfile(best) else ''}"
        )
    try:
        with open(path, "rb") as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint can't be read: {said(error)}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        raise CheckpointError(
            f"{path}: not a whole checkpoint of soap-net ({path.stat().st_size} bytes): truncated, damaged, or "
            "another format"
        ) from error


def _checked_archive(file: BinaryIO, path: Path) -> int:
    """Unpacked bytes of a checkpoint, at most those of the file. Raises any error where it is not built as one."""
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    names = {member.filename for member in members}
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or len(names) < len(members) or size > file.seek(0, os.SEEK_END):
        raise zipfile.BadZipFile("compressed, overlapping or repeated members")
    pickles = [member for member in members if member.filename.count("/") == 1 and member.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
        raise zipfile.BadZipFile("no pickle, or more than one, or a giant")
    name: object = ""
    for code, value, _ in pickletools.genops(archive.read(pickles[0])):
        if code.name == "GLOBAL" and not _KNOWN.fullmatch(str(value)):
            raise CheckpointError(f"{path}: {shown(name)} is made by {shown(value)}, as no weight of soap-net is")
        if code.name == "BINUNICODE":  # the key, where a value of a dictionary follows
            name = value
    return size


def _compare_sums(file: BinaryIO) -> None:
    if (damaged := zipfile.ZipFile(file).testzip()) is not None:  # torch leaves them alone
        raise zipfile.BadZipFile(damaged)


def _content(file: BinaryIO, path: Path, device: str) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on `device`; "meta" reads none of their values."""
    file.seek(0)
    content = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise CheckpointError(f"{path}: not a checkpoint of soap-net: no config and model in it")
    if not isinstance(content["format"], int) or content["format"] != FORMAT:
        found = shown(content["format"])
        raise CheckpointError(f"{path}: checkpoint format {found}, this version reads format {FORMAT}")
    for part in ("model", "average"):
        if part in content:
            _refuse_strange(content[part], part, path)
    return content


def _refuse_strange(weights: object, part: str, path: Path) -> None:
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise CheckpointError(f"{path}: not a checkpoint of soap-net: its {part} holds other things than weights")
    for name, weight in weights.items():
        if strange := _strange(weight):
            raise CheckpointError(f"{path}: the weight {shown(name)} is {strange}, as none of soap-net is")


def _refuse_non_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    if (name := non_finite(weights)) is not None:
        raise CheckpointError(f"{path}: the weight {shown(name)} holds values that are not finite")


def _strange(weight: Tensor) -> str:
    """What keeps a tensor from being a weight; empty for real values, each of which has its place in the file."""
    if weight.is_complex():
        return "complex"
    short = weight.numel() * weight.itemsize > weight.untyped_storage().nbytes()
    return f"of shape {tuple(weight.shape)}, with fewer values" if short else ""


def non_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The first weight or statistic that is infinite or not a number; None where all are finite."""
    floats = (name for name, weight in weights.items() if weight.is_floating_point())
    return next((name for name in floats if not weights[name].float().isfinite().all()), None)


def load_model(
    path: Path, device: str | torch.device = "cpu", *, backend: str | None = None, precision: str | None = None
) -> tuple[SOAPNet, Config]:
    """Rebuilds the model of a checkpoint, in evaluation mode, and the config it was trained with.

    Args:
        path: the checkpoint, or a folder that stands for one.
        device: where the model is to run.
        backend: what SOAP runs with; by default what it was trained with, which this machine may not have.
        precision: that of SOAP's kernels; by default that of training.

    Raises:
        CheckpointError: see `load`; or its weights don't fit the model that its config describes.
        UserError: no such backend or precision.
    """
    from soap_net.models import build_model

    config = load_config(path)
    given: dict[str, Any] = {"backend": backend, "precision": precision}
    soap = replace(config.model.soap, **{key: value for key, value in given.items() if value is not None})
    described = replace(config.model, weights="random", soap=soap)  # the checkpoint brings all weights

    def built() -> SOAPNet:
        try:
            return build_model(described, config.data.frames)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            why = str(error).partition("\n")[0]
            raise CheckpointError(f"{path}: the model that its config describes can't be built: {why}") from error

    outline = None
    # A config may describe any size: first without memory, which not every backbone of another library can do.
    with contextlib.suppress(CheckpointError), torch.device("meta"):
        outline = built()
    weights = load(path, outline)["model"]
    model = built()
    load_weights(model, weights, path)
    model.config = config
    return model.to(device).eval(), config


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies `weights` into `model`.

    Raises:
        CheckpointError: names, shapes or kinds of number differ; names the first of each and their counts.
    """
    _refuse_misfit(model, weights, path)
    model.load_state_dict(weights)


def load_training(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: nn.Module | None = None,
) -> dict[str, Any]:
    """Takes up what a training left in its last.pt: weights, their average, the optimizer's and the scaler's state.

    Returns:
        The whole content, whose config and progress are the caller's to check.

    Raises:
        CheckpointError: see `load` and `load_weights`; or there is no such state in it, or one of another optimizer.
            Model, optimizer, scaler and average are then as they were.
    """
    content = load(path, model)
    state, scale = content.get("optimizer"), content.get("scaler")
    if not isinstance(state, dict) or not isinstance(scale, dict):
        raise CheckpointError(f"{path}: holds weights alone, and not what it takes to go on with their training")
    own = optimizer.state_dict()
    if not fits(optimizer, state.get("state")):
        raise CheckpointError(f"{path}: its optimizer's state is not one of {type(optimizer).__name__} for this model")
    if average is not None:
        if "average" not in content:
            raise CheckpointError(f"{path}: holds no moving average of the weights, which train.ema asks for")
        _refuse_misfit(average, content["average"], path)
    if scaler.is_enabled():
        size, tracked = scale.get("scale"), scale.get("_growth_tracker")
        if not isinstance(size, float) or not 0 < size < float("inf") or not isinstance(tracked, int) or tracked < 0:
            raise CheckpointError(f"{path}: its loss scaler's state is not one: scale {shown(size)}")
        scaler.load_state_dict({**scaler.state_dict(), "scale": size, "_growth_tracker": tracked})
    load_weights(model, content["model"], path)
    if average is not None:
        average.load_state_dict(content["average"])
    optimizer.load_state_dict({**own, "state": state["state"]})  # its settings are the config's
    return content


def _refuse_misfit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    both = [name for name in own if name in weights]
    groups = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": [name for name in both if own[name].shape != weights[name].shape],
        "of another kind of number": [
            name for name in both if own[name].is_floating_point() != weights[name].is_floating_point()
        ],
    }
    faults = []
    for fault, names in groups.items():
        if names:
            name, expected = names[0], ""
            if name in both:
                expected = f": {_described(weights[name])}, expected {_described(own[name])}"
            faults.append(f"{len(names)} weights {fault}, first {name}{expected}")
    if faults:
        raise CheckpointError(f"{path}: checkpoint of another architecture: {'; '.join(faults)}")


def _described(weight: Tensor) -> str:
    return f"{tuple(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
