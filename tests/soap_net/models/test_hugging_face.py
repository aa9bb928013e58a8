"""Hugging Face's video models against themselves, read from local folders."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from soap_net.errors import UserError
from soap_net.models import build_backbone

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[videomae]'")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "VideoMAE": lambda: transformers.VideoMAEConfig(
        **SMALL,
        intermediate_size=32,
        image_size=32,
        num_frames=4,
        decoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
    ),
    "VJEPA2": lambda: transformers.VJEPA2Config(
        **SMALL,
        crop_size=32,
        frames_per_clip=4,
        num_pooler_layers=1,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    ),
}
CLIPS = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(folder: Path, kind: str) -> Any:
    """A tiny model with random weights, in evaluation mode, and in ``folder`` as its publisher would keep it."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(CONFIGS[kind.split("For")[0].removesuffix("Model")]()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def features(folder: Path, weights: str = "pretrained") -> Tensor:
    backbone = build_backbone(f"hf:{folder}", weights).eval()
    with torch.no_grad():
        found: Tensor = backbone(CLIPS)
    assert found.shape == (2, backbone.vectors(4), backbone.dim)
    return found


@pytest.mark.parametrize("kind", ["VideoMAEForVideoClassification", "VJEPA2ForVideoClassification"])
def test_a_model_with_a_classifier_gives_what_its_classifier_is_given(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    found: list[Tensor] = []
    with torch.no_grad(), model.classifier.register_forward_pre_hook(lambda module, args: found.append(args[0])):
        model(CLIPS)
    torch.testing.assert_close(features(tmp_path), found[0][:, None])


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForPreTraining", "VJEPA2Model"])
def test_a_model_without_gives_the_mean_over_space_of_each_tubelet(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    with torch.no_grad():
        tokens = getattr(model, "videomae", model)(CLIPS).last_hidden_state
    expected = torch.stack([tokens[:, :4].mean(1), tokens[:, 4:].mean(1)], dim=1)  # 2 tubelets of 2 x 2 patches
    torch.testing.assert_close(features(tmp_path), expected)


@pytest.mark.parametrize("kind", ["VideoMAEForVideoClassification", "VJEPA2Model"])
def test_a_weights_file_may_have_the_publisher_s_names(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, kind)
    own = features(tmp_path)
    file = (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert torch.equal(features(tmp_path, str(file)), own)
    assert not torch.equal(features(tmp_path, "random"), own)


@pytest.mark.parametrize("given", ["pretrained", "file"])
def test_weights_that_lack_a_tensor_are_refused_and_not_left_random(tmp_path: Path, given: str) -> None:
    saved(tmp_path, "VideoMAEForVideoClassification")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["fc_norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"these weights do not fit backbone hf:.*: 1 missing \(fc_norm.weight\)$"):
        build_backbone(f"hf:{tmp_path}", str(file) if given == "file" else given)


def test_mean_and_deviation_are_the_preprocessor_s_and_imagenet_s_where_there_is_none(tmp_path: Path) -> None:
    saved(tmp_path, "VideoMAEModel")
    assert build_backbone(f"hf:{tmp_path}").mean == (0.485, 0.456, 0.406)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    backbone = build_backbone(f"hf:{tmp_path}")
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_clips_of_another_size_are_refused_with_what_to_set(tmp_path: Path) -> None:
    saved(tmp_path / "mae", "VideoMAEModel")
    saved(tmp_path / "jepa", "VJEPA2Model")
    mae, jepa = build_backbone(f"hf:{tmp_path / 'mae'}"), build_backbone(f"hf:{tmp_path / 'jepa'}")
    with pytest.raises(UserError, match=r"takes clips of 4 frames, got 8: set data.frames to 4$"):
        mae.vectors(8)
    with pytest.raises(UserError, match=r"takes clips of a multiple of 2 frames, got 7: set data.frames to 6$"):
        jepa.vectors(7)
    with pytest.raises(UserError, match=r"takes frames of 32 x 32 pixels, got 64 x 64: set data.crop to 32$"):
        jepa(torch.zeros(1, 4, 3, 64, 64))
    assert jepa.vectors(16) == 8


def one_line(name: str, weights: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        build_backbone(name, weights)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = one_line("hf:owner/model")
    assert "no folder owner/model, and cannot get it from Hugging Face's hub" in said
    assert "hf download owner/model --local-dir DIR, then set model.backbone to hf:DIR" in said
    assert "no such folder, and no name of the form owner/model" in one_line(f"hf:{tmp_path / 'none'}")
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path}: no model of Hugging Face can be read from it" in one_line(f"hf:{tmp_path}")
    saved(tmp_path, "VideoMAEModel")
    os.remove(tmp_path / "model.safetensors")
    assert "model.safetensors" in one_line(f"hf:{tmp_path}", "pretrained")
    transformers.BertConfig().save_pretrained(tmp_path)
    assert one_line(f"hf:{tmp_path}").endswith("is a bert, expected videomae or vjepa2")


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    entry = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": entry}))
    assert "no model of Hugging Face can be read from it" in one_line(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5.0'" in one_line("hf:owner/model")
