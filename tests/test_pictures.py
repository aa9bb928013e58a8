"""The pictures of README (benchmarks/pictures.py): of a recorded result, and of a net on a clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures
from soap_net import checkpoint
from soap_net.config import Config, to_dict
from soap_net.data.motion import MotionConfig, write_motion
from soap_net.models import build_model

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_pictures_are_drawn_of_a_result_and_a_trained_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.data = replace(config.data, resize=24, crop=24)
    config.model = replace(config.model, backbone="tiny", weights="random")
    model = build_model(config.model, config.data.frames, seed=0)
    checkpoint.save(tmp_path / "last.pt", {"config": to_dict(config), "model": model.state_dict()})
    write_motion(tmp_path / "motion", MotionConfig(train_clips=1, val_clips=1, test_clips=1), progress=False)
    clip = next((tmp_path / "motion").glob("videos/*/*.mp4"))
    [results, *_] = RESULTS.glob("cpu-*.json")
    monkeypatch.setattr("sys.argv", ["pictures", *map(str, (results, tmp_path / "last.pt", clip, tmp_path))])
    pictures.main()
    for name in ("speed", "soap"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 100
