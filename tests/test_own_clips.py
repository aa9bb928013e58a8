"""The table of own clips (benchmarks/own_clips.py): its figures against simple counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import own_clips
from soap_net.data.motion import MotionConfig, write_motion


def test_the_calibration_error_is_the_gap_between_sure_and_right() -> None:
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    hit = torch.tensor([True, True, True, False, True, True])
    assert own_clips.calibration_error(sure, hit) == pytest.approx(100 * (4 / 6 * 0.20 + 2 / 6 * 0.45), rel=1e-5)


def test_the_area_counts_pairs() -> None:
    known, unknown = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0])
    pairs = [1.0 if k > u else 0.5 if k == u else 0.0 for k in known for u in unknown]
    assert own_clips.ranked(known, unknown) == pytest.approx(sum(pairs) / len(pairs))


def test_compact_vectors_keep_their_products() -> None:
    vectors = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    small = own_clips.compact(vectors)
    assert small.shape == (6, 6)
    torch.testing.assert_close(small @ small.T, vectors @ vectors.T, rtol=1e-4, atol=1e-4)


def test_a_folder_of_classes_becomes_two_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = MotionConfig(seconds=0.5, train_clips=6, val_clips=6, test_clips=6)
    root = write_motion(tmp_path / "motion", config, progress=False)
    small = [
        "--model.backbone=tiny",
        "--model.weights=random",
        "--data.resize=24",
        "--data.crop=24",
        "--data.workers=0",
    ]
    monkeypatch.setattr("sys.argv", ["own_clips", str(root / "videos"), "--tasks", "4", *small])
    own_clips.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| videos")][:3] == ["1", "2", "5"]
    assert sum(line.startswith("| videos") for line in lines) == 4
