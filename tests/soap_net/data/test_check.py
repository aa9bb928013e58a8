from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net.data.check import check_data
from soap_net.errors import UserError

Make = Callable[..., Path]
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture
def mixed(tmp_path: Path, write_frames: Make, write_video: Make) -> Path:
    write_frames(tmp_path / "wave" / "a", 4)
    write_frames(tmp_path / "wave" / "b", 6, size=(30, 20))
    write_video(tmp_path / "clap" / "c.mp4", frames=5)
    (tmp_path / "clap" / "d.mp4").write_text("not a video")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("wave/a\nwave/b\nclap/c\nclap/d\nclap/gone\n")
    (tmp_path / "splits" / "test.txt").write_text("wave/a\nwave/b")
    return tmp_path


def test_a_check_reports_counts_sizes_rates_and_what_is_wrong(mixed: Path) -> None:
    report = check_data(mixed, {"train": None, "test": None}, progress=False)
    train, test = report.splits
    assert (report.sound, train.sound, test.sound) == (False, False, True)
    assert train.missing == ["clap/gone"]
    assert len(train.broken) == 1
    assert "d.mp4: not a video" in train.broken[0]
    told = json.loads(json.dumps(report.as_dict()))
    assert told["shared_classes"] == {"train and test": ["wave"]}
    assert told["splits"][0] == {
        "split": "train",
        "sound": False,
        "classes": 2,
        "clips": 4,
        "clips_per_class": {"clap": 2, "wave": 2},
        "frames": {"least": 4, "median": 5, "most": 6},
        "sizes": {"64x48": 1, "24x16": 1, "30x20": 1},
        "fps": {"none": 2, "25": 1},
        "missing": ["clap/gone"],
        "broken": train.broken,
    }
    lines = report.summary().splitlines()
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "split classes clips per class frames size fps missing broken",
        "train 2 4 2 4 to 6 24x16 to 64x48 25 1 1",
        "test 1 2 2 4 to 6 24x16 to 30x20 - 0 0",
    ]
    assert "missing in train: clap/gone" in lines
    assert any(line.startswith("warning: train and test share 1 classes (wave)") for line in lines)
    assert lines[-1] == "1 clips missing, 1 broken"


def test_a_sound_data_set_is_called_so_with_workers_too(mixed: Path) -> None:
    report = check_data(mixed, {"test": None}, workers=1, progress=False)
    assert report.sound
    assert report.summary().splitlines()[-1] == "every clip is there and can be read"
    assert [(info.frames, info.width) for info in report.splits[0].infos] == [(4, 24), (6, 30)]


def test_a_split_that_is_not_there_is_refused(mixed: Path) -> None:
    with pytest.raises(UserError, match=r"no split file for 'val' beside train.txt, test.txt"):
        check_data(mixed, {"train": None, "val": None}, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "clips", "frames"), [("ssv2small", 50, (8, 8)), ("ut_interaction", 40, (52, 143))])
def test_the_real_data_sets_are_sound(name: str, clips: int, frames: tuple[int, int]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here")
    report = check_data(SHARED / name, {"test": None}, progress=False)
    assert report.sound
    told = report.splits[0].as_dict()
    assert told["clips"] == clips
    assert (told["frames"]["least"], told["frames"]["most"]) == frames
