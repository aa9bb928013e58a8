"""`soap-net learn` and `classify` on clips that were drawn here: from folders to a right answer, without a network."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soap_net.cli import main

SMALL = ["--backbone", "tiny", "--weights", "random", "--data.resize", "32", "--data.crop", "32", "--device", "cpu"]
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def draw(folder: Path, colour: tuple[int, int, int], seed: int) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for frame in range(8):
        picture = np.clip(rng.normal(colour, 30, (36, 40, 3)), 0, 255).astype(np.uint8)
        picture[:, 4 * frame : 4 * frame + 4] = 255
        Image.fromarray(picture).save(folder / f"{frame}.png")
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for number, (name, colour) in enumerate(COLOURS.items()):
        for clip in range(4):
            draw(tmp_path / "mine" / name / f"clip{clip}", colour, 10 * number + clip)
        draw(tmp_path / "new" / name, colour, 100 + number)
    return tmp_path


def test_a_classifier_is_learnt_and_answers_right_from_its_file(clips: Path, capsys: pytest.CaptureFixture) -> None:
    file = clips / "my.classifier"
    assert main(["learn", "--support", str(clips / "mine"), "--out", str(file), *SMALL]) == 0
    told = capsys.readouterr().out
    assert "blue (4), green (4), red (4)" in told
    assert "expect about" in told
    command = ["classify", "--classifier", str(file), "--device", "cpu", str(clips / "new")]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["class"] for row in rows] == [Path(row["clip"]).name for row in rows] == ["blue", "green", "red"]
    assert main([*command, "--out", str(clips / "answers.csv")]) == 0
    with open(clips / "answers.csv", newline="") as text:
        table = list(csv.DictReader(text))
    for row, found in zip(table, rows, strict=True):
        assert row["class"] == found["class"]
        assert {name: float(row[name]) for name in COLOURS} == pytest.approx(found["probabilities"], abs=1e-6)
    assert main([*command, "--top", "1"]) == 0
    assert "% red" in capsys.readouterr().out


def test_clips_that_are_cut_short_are_learnt_and_answered_and_told_of(
    clips: Path, cut_video: Callable[[Path], tuple[Path, int]], capsys: pytest.CaptureFixture
) -> None:
    learnt, frames = cut_video(clips / "mine" / "red" / "cut.mp4")
    asked, _ = cut_video(clips / "new" / "cut.mp4")
    file = str(clips / "my.classifier")
    told = [f"warning: {path}: the file is cut short: {frames} of its 30 frames are there" for path in (learnt, asked)]
    assert main(["learn", "--support", str(clips / "mine"), "--out", file, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "red (5)" in out
    assert told[0] in err.splitlines()
    command = ["classify", "--classifier", file, "--device", "cpu", str(asked), str(clips / "new" / "red")]
    for form in ("--json", "--csv", "--top=3"):
        assert main([*command, form]) == 0
        out, err = capsys.readouterr()
        assert told[1] in err.splitlines()
        if form != "--top=3":
            rows = json.loads(out) if form == "--json" else list(csv.DictReader(out.splitlines()))
            assert [row["cut"] or "" for row in rows] == [told[1].removeprefix("warning: "), ""]
    assert main(["classify", "--support", str(clips / "mine"), str(clips / "new" / "red"), *SMALL]) == 0
    assert told[0] in capsys.readouterr().err.splitlines()


def test_classes_are_added_and_dropped_by_name(clips: Path, capsys: pytest.CaptureFixture) -> None:
    file, more = str(clips / "my.classifier"), clips / "more"
    (clips / "mine" / "red").rename(clips / "red")
    assert main(["learn", "--support", str(clips / "mine"), "--out", file, *SMALL]) == 0
    more.mkdir()
    (clips / "red").rename(more / "red")
    (clips / "mine" / "blue").rename(more / "blue")
    added = ["learn", "--classifier", file, "--support", str(more), "--drop", "green/clip1", "blue", "--out", file]
    assert main([*added, "--device", "cpu"]) == 0
    assert "green (3), blue (4), red (4)" in capsys.readouterr().out


def test_without_a_checkpoint_the_support_is_learnt_on_the_way(clips: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["classify", "--support", str(clips / "mine"), "--query", str(clips / "new" / "red"), *SMALL]
    assert main(command) == 0
    answers, told = capsys.readouterr()
    assert "red" in answers
    assert "expect about" in told


def test_one_clip_a_class_is_said_to_tell_nothing(clips: Path, capsys: pytest.CaptureFixture) -> None:
    for name in COLOURS:
        for clip in (1, 2, 3):
            (clips / "mine" / name / f"clip{clip}").rename(clips / f"{name}{clip}")
    assert main(["learn", "--support", str(clips / "mine"), "--out", str(clips / "c"), *SMALL]) == 0
    told = capsys.readouterr().out
    assert "can't be told" in told
    assert "--by appearance, motion or both" in told
    assert main(["learn", "--support", str(clips / "mine"), "--out", str(clips / "c"), *SMALL, "--by", "motion"]) == 0
    assert "--by" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (lambda d: ["learn", "--out", f"{d}/c"], "say what to learn"),
        (lambda d: ["learn", "--support", f"{d}/mine", "--out", f"{d}/new"], "is a folder; name the classifier's file"),
        (lambda d: ["classify", f"{d}/new"], "say what the classes are"),
        (lambda d: ["classify", "--support", f"{d}/mine"], "say what to classify"),
        (lambda d: ["classify", "--support", f"{d}/mine", f"{d}/new", "--by", "motoin", *SMALL], "did you mean motion"),
        (lambda d: ["classify", "--classifier", f"{d}/none", f"{d}/new"], "no such classifier"),
        (lambda d: ["classify", "--classifier", f"{d}/none", f"{d}/new", "--by", "motion"], "--by can't be set here"),
        (
            lambda d: ["classify", "--support", f"{d}/mine", f"{d}/new", "--model.head=trx", "--by", "both"],
            "head views",
        ),
        (lambda d: ["classify", "--support", f"{d}/mine", f"{d}/new", "--data.frame", "4"], "data.frames"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: Callable[[Path], list[str]], text: str, clips: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(clips)) == 2
    told = capsys.readouterr().err
    assert text in told
    assert told.count("\n") == 1
