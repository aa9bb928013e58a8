"""torchvision's video nets against the published nets themselves: what reaches their classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from soap_net.errors import UserError
from soap_net.models.backbones import build_backbone

slow = pytest.mark.slow


def published(name: str) -> nn.Module:
    """The net with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    net = models.get_model(name, weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def before_the_classifier(net: nn.Module, clips: Tensor) -> Tensor:
    """What the net's last linear layer is given, averaged over places, ``(B, dim)``."""
    found: list[Tensor] = []
    last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv3d))][-1]
    with torch.no_grad(), last.register_forward_pre_hook(lambda module, args: found.append(args[0])):
        net(clips.transpose(1, 2))
    return found[0].flatten(2).mean(2) if found[0].ndim > 2 else found[0]


@pytest.mark.parametrize(
    ("name", "frames", "side", "vectors"),
    [
        pytest.param("r3d_18_strided", 9, 32, 2, marks=slow),
        ("mc3_18", 3, 32, 3),
        pytest.param("r2plus1d_18", 8, 32, 1, marks=slow),
        ("s3d", 14, 224, 1),
        pytest.param("mvit_v2_s", 16, 224, 1, marks=slow),
        pytest.param("swin3d_t", 3, 224, 2, marks=slow),
        pytest.param("swin3d_s", 2, 224, 1, marks=slow),
        pytest.param("swin3d_b", 2, 224, 1, marks=slow),
    ],
)
def test_the_mean_of_a_clip_s_vectors_is_what_the_published_net_classifies(
    tmp_path: Path, name: str, frames: int, side: int, vectors: int
) -> None:
    source = published(name.removesuffix("_strided"))
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    backbone = build_backbone(name, str(path)).eval()
    clips = torch.randn(1, frames, 3, side, side)
    with torch.no_grad():
        features = backbone(clips)
    assert features.shape == (1, vectors, backbone.dim)
    assert backbone.vectors(frames) == vectors
    expected = before_the_classifier(source, clips)
    assert expected.std() > 1e-3
    torch.testing.assert_close(features.mean(1), expected, rtol=1e-4, atol=1e-5)


@slow
def test_r3d_18_gives_a_vector_per_frame_as_it_always_did(tmp_path: Path) -> None:
    """Written out layer by layer, with the strides in time taken out; checkpoints hold these names."""
    source = published("r3d_18")
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    backbone = build_backbone("r3d_18", str(path)).eval()
    clips = torch.randn(2, 5, 3, 32, 32)
    for module in source.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, *module.stride[1:])
    with torch.no_grad():
        x = source.stem(clips.transpose(1, 2))  # type: ignore[operator]
        for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
            x = layer(x)  # type: ignore[operator]
        torch.testing.assert_close(backbone(clips), x.mean((3, 4)).transpose(1, 2))
    assert "net.net.layer4.1.conv2.0.weight" in backbone.state_dict()
    assert backbone.vectors(5) == 5


def test_kinetics_weights_come_by_name_from_pytorch_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path), raising=False)
    torch.hub.set_dir(tmp_path)
    source = published("mc3_18")
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / "mc3_18-a90a0ba3.pth")
    for weights in ("kinetics", "KINETICS400_V1", "pretrained"):
        backbone = build_backbone("mc3_18", weights)
        assert torch.equal(backbone.net.net.stem[0].weight, source.stem[0].weight)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mc3_18", (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
        ("mvit_v2_s", (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
        ("swin3d_t", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_frames_are_normalised_as_the_weights_were_trained(name: str, mean: object, std: object) -> None:
    backbone = build_backbone(name)
    assert (backbone.mean, backbone.std) == (mean, std)


def test_clips_that_a_net_does_not_take_are_refused_with_what_to_set() -> None:
    s3d, mvit = build_backbone("s3d"), build_backbone("mvit_v2_s")
    for backbone, frames, message in (
        (s3d, 8, "backbone s3d takes clips of at least 14 frames, got 8: set data.frames to 14"),
        (mvit, 17, "backbone mvit_v2_s takes clips of 16 frames, got 17: set data.frames to 16"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            backbone.vectors(frames)
        with pytest.raises(UserError, match=f"^{message}$"):
            backbone(torch.zeros(1, frames, 3, 224, 224))
    with pytest.raises(UserError, match=r"s3d takes frames of at least 224 x at least 224 .*set data.crop to 224$"):
        s3d(torch.zeros(1, 16, 3, 112, 112))
    with pytest.raises(UserError, match=r"frames of 224 x 224 pixels, got 256 x 256: set data.crop to 224$"):
        mvit(torch.zeros(1, 16, 3, 256, 256))
