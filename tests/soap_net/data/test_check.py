from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net.data.check import check_data
from soap_net.data.clips import Clip, ClipInfo
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
        "cut_short": [],
    }
    lines = report.summary().splitlines()
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "split classes clips per class frames size fps missing broken cut short",
        "train 2 4 2 4 to 6 24x16 to 64x48 25 1 1 0",
        "test 1 2 2 4 to 6 24x16 to 30x20 - 0 0 0",
    ]
    assert "missing in train: clap/gone" in lines
    assert any(line.startswith("warning: train and test share 1 classes (wave)") for line in lines)
    assert lines[-1] == "1 clips missing, 1 broken, 0 cut short"


def test_a_clip_that_is_cut_short_is_told_and_makes_its_set_unsound_also_when_it_is_not_read_again(
    mixed: Path, tmp_path: Path, cut_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, frames = cut_video(mixed / "clap" / "d.mp4")
    (mixed / "splits" / "train.txt").write_text("wave/a\nclap/c\nclap/d\n")
    findings = tmp_path / "found.jsonl"
    for again in (False, True):
        with monkeypatch.context() as patch:
            names = reads(patch)
            report = check_data(mixed, {"train": None, "test": None}, findings=findings, progress=False)
        assert bool(names) is not again
        train, test = report.splits
        assert (report.sound, train.sound, test.sound) == (False, False, True)
        assert train.cut == [f"{path}: {frames} of its 30 frames are there"]
        assert (train.broken, [info.frames for info in train.infos]) == ([], [5, frames, 4])
        assert report.as_dict()["splits"][0]["cut_short"] == train.cut
        lines = report.summary().splitlines()
        assert lines[1].split()[-3:] == ["0", "0", "1"]
        assert f"cut short in train: {train.cut[0]}" in lines
        assert lines[-1] == "0 clips missing, 0 broken, 1 cut short"


def test_a_sound_data_set_is_called_so_with_workers_too(mixed: Path) -> None:
    report = check_data(mixed, {"test": None}, workers=1, progress=False)
    assert report.sound
    assert report.summary().splitlines()[-1] == "every clip is there and can be read"
    assert [(info.frames, info.width) for info in report.splits[0].infos] == [(4, 24), (6, 30)]


def test_a_split_that_is_not_there_is_refused(mixed: Path) -> None:
    with pytest.raises(UserError, match=r"no split file for 'val' beside train.txt, test.txt"):
        check_data(mixed, {"train": None, "val": None}, progress=False)


def reads(monkeypatch: pytest.MonkeyPatch, most: int = 10**6) -> list[str]:
    """The names of the clips that are read from here on; where they are more than `most`, Ctrl-C comes."""
    names: list[str] = []
    check = Clip.check

    def noted(clip: Clip) -> ClipInfo:
        if len(names) == most:
            raise KeyboardInterrupt
        names.append(clip.name)
        return check(clip)

    monkeypatch.setattr(Clip, "check", noted)
    return names


def test_each_clip_is_read_once_whatever_splits_it_is_in(
    tmp_path: Path, write_frames: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for video in range(3):
        write_frames(tmp_path / "jump" / f"{video}", 1 + video)
    names = reads(monkeypatch)
    report = check_data(tmp_path, dict.fromkeys(("train", "val", "test")), progress=False)
    assert names == ["jump/0", "jump/1", "jump/2"]
    assert [[info.frames for info in split.infos] for split in report.splits] == [[1, 2, 3]] * 3


def test_findings_come_one_by_one_and_a_check_goes_on_from_them(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, findings = {"train": None, "test": None}, tmp_path / "runs" / "found.jsonl"
    wanted = check_data(mixed, splits, progress=False).as_dict()
    with monkeypatch.context() as patch:
        reads(patch, most=3)
        with pytest.raises(KeyboardInterrupt):
            check_data(mixed, splits, findings=findings, progress=False)
    notes = [json.loads(line) for line in findings.read_text().splitlines()]
    assert [note["path"] for note in notes] == [str(mixed / name) for name in ("clap/c.mp4", "clap/d.mp4", "wave/a")]
    assert (notes[0]["frames"], notes[0]["width"], notes[0]["fps"]) == (5, 64, 25.0)
    assert "d.mp4: not a video" in notes[1]["broken"]
    findings.write_bytes(findings.read_bytes() + b'{"path": "')  # the power failed
    with monkeypatch.context() as patch:
        names = reads(patch)
        report = check_data(mixed, splits, findings=findings, progress=False)
    assert names == ["clap/d", "wave/b"], "what is broken may have been mended"
    assert report.as_dict() == wanted


def test_clips_that_changed_are_read_again(
    mixed: Path, tmp_path: Path, write_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = tmp_path / "found.jsonl"
    check_data(mixed, {"train": None}, findings=findings, progress=False)
    write_video(mixed / "clap" / "c.mp4", frames=7)
    write_video(mixed / "clap" / "d.mp4", frames=8)
    names = reads(monkeypatch)
    report = check_data(mixed, {"train": None}, findings=findings, progress=False)
    assert names == ["clap/c", "clap/d"]
    assert [info.frames for info in report.splits[0].infos] == [7, 8, 4, 6]
    assert report.splits[0].broken == []


def test_a_file_of_something_else_is_not_taken_for_findings(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("buy milk\n")
    with pytest.raises(UserError, match=r"notes.txt:1: not a finding of a check"):
        check_data(mixed, {"test": None}, findings=tmp_path / "notes.txt", progress=False)
    assert (tmp_path / "notes.txt").read_text() == "buy milk\n"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "clips", "frames"), [("ssv2small", 50, (8, 8)), ("ut_interaction", 40, (52, 143))])
def test_the_real_data_sets_are_sound(name: str, clips: int, frames: tuple[int, int]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the data set {name}, which does not come with the project")
    report = check_data(SHARED / name, {"test": None}, progress=False)
    assert report.sound
    told = report.splits[0].as_dict()
    assert told["clips"] == clips
    assert (told["frames"]["least"], told["frames"]["most"]) == frames
