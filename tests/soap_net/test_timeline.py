from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from soap_net.classify import Classifier, Prediction
from soap_net.cli import main
from soap_net.config import Config, from_dict, to_dict
from soap_net.data.clips import Clip
from soap_net.data.transforms import FrameSampling, clip_loader
from soap_net.data.videos import Video
from soap_net.errors import UserError
from soap_net.models import SOAPNet
from soap_net.timeline import Segment, Timeline, Window, as_csv, as_lines, clock, draw, look, timeline


def colours(*parts: tuple[tuple[int, int, int], int]) -> list[np.ndarray]:
    """Frames of noise around a colour, so many of each."""
    rng = np.random.default_rng(0)
    return [
        np.clip(colour + rng.normal(0, 20, (32, 48, 3)), 0, 255).astype(np.uint8)
        for colour, count in parts
        for _ in range(count)
    ]


def write_video(
    path: Path, frames: Sequence[np.ndarray], codec: str = "libx264", ticks: Sequence[int] = (), bf: int = 0
) -> Path:
    """10 frames a second, or each frame at its tick of a tenth of a second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10, options={"bf": str(bf)})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (ticks[number] if ticks else number), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three videos each, and a long one: 4 s of the one, 4.5 s of the other."""
    root = tmp_path_factory.mktemp("timeline")
    for name, colour in (("red", RED), ("blue", BLUE)):
        (root / "classes" / name).mkdir(parents=True)
        for number in range(3):
            shade = tuple(np.add(colour, 8 * number).tolist())
            write_video(root / "classes" / name / f"{number}.mp4", colours((shade, 12)))
    write_video(root / "long.mp4", colours((RED, 40), (BLUE, 45)))
    return root


@pytest.fixture
def views(folder: Path, tiny_run: Callable[..., Config]) -> Classifier:
    return taught(folder, tiny_run(model__head="views", model__head_options={}, model__soap__enabled=False))


def taught(folder: Path, config: Config, **changes: Any) -> Classifier:
    settings = to_dict(config)
    settings["data"].update({"frames": 4, **changes})
    classifier = Classifier.from_config(from_dict(settings), "cpu", accept=1.0)
    names = ("red", "blue")
    classifier.learn({n: [Clip(path) for path in sorted((folder / "classes" / n).iterdir())] for n in names})
    return classifier


def by_itself(classifier: Classifier, clip: Clip, frames: Sequence[int]) -> dict[str, float]:
    """The oracle: these frames read and classified as a clip of their own."""
    pixels = clip_loader(classifier.data, train=False).transform(clip.read(frames), None)
    with torch.inference_mode():
        return classifier.predict("", classifier.model.features(pixels[None])[0]).probabilities


def looks(classifier: Classifier, clip: Clip, window: float, every: float) -> np.ndarray:
    times = clip.video().seconds()
    data = classifier.data
    return look(times, times[-1] + 0.1, window, every, FrameSampling(data.frames, data.interval)).frames


@pytest.mark.parametrize(("window", "every"), [(2, 1), (3, 0.7), (1, 0.1), (1.5, 2)])
def test_a_window_gets_the_answer_of_its_frames_alone(
    window: float, every: float, folder: Path, views: Classifier
) -> None:
    clip = Clip(folder / "long.mp4")
    found = timeline(views, clip, window, every)
    frames = looks(views, clip, window, every)
    assert len(found.windows) == len(frames) > 3
    for got, row in zip(found.windows, frames, strict=True):
        assert got.prediction.probabilities == pytest.approx(by_itself(views, clip, row.tolist()), abs=1e-5)


@pytest.mark.parametrize(
    ("soap", "interval", "head"), [(True, None, "prototype"), (False, 3, "prototype"), (True, 2, "otam")]
)
def test_so_it_is_of_nets_that_look_at_a_clip_as_a_whole_and_of_frames_at_an_interval(
    soap: bool, interval: int | None, head: str, folder: Path, tiny_run: Callable[..., Config]
) -> None:
    config = tiny_run(model__head=head, model__head_options={}, model__soap__enabled=soap)
    classifier, clip = taught(folder, config, interval=interval), Clip(folder / "long.mp4")
    found, frames = timeline(classifier, clip, 2, 0.8), looks(classifier, clip, 2, 0.8)
    for got, row in zip(found.windows, frames, strict=True):
        if interval:
            assert np.diff(row).tolist() == [interval] * 3
        assert got.prediction.probabilities == pytest.approx(by_itself(classifier, clip, row.tolist()), abs=1e-5)


def test_the_video_is_decoded_once_and_each_frame_and_difference_embedded_once(
    folder: Path, views: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, embedded, changed = [], [], []
    stream, by_frame, by_change = Video.stream, SOAPNet.frame_features, SOAPNet.change_features
    monkeypatch.setattr(Video, "stream", lambda self, wanted: (decoded.append(wanted), stream(self, wanted))[1])
    monkeypatch.setattr(Video, "read", None)
    monkeypatch.setattr(SOAPNet, "frame_features", lambda self, x: (embedded.append(len(x)), by_frame(self, x))[1])
    monkeypatch.setattr(
        SOAPNet, "change_features", lambda self, x, y: (changed.append(len(x)), by_change(self, x, y))[1]
    )
    clip = Clip(folder / "long.mp4")
    timeline(views, clip, 2, 0.5)  # on a grid of half a second; the last window too
    frames = looks(views, clip, 2, 0.5)
    assert decoded == [np.unique(frames).tolist()] == [[*range(2, 85, 5)]]
    assert sum(embedded) == 17
    assert sum(changed) == len({pair for row in frames.tolist() for pair in pairwise(row)}) == 16


@pytest.mark.parametrize(
    ("window", "every", "count"), [(3.0, 1.0, 8), (3.0, 0.3, 8), (2.0, 0.7, 5), (4.0, 4.0, 8), (2, 5, 8)]
)
def test_a_window_looks_at_a_frame_of_each_of_its_segments(window: float, every: float, count: int) -> None:
    times = np.arange(1000) / 25
    found = look(times, 40.0, window, every, FrameSampling(count))
    assert found.starts[-1] == pytest.approx(40 - window)
    assert np.diff(found.starts).max() == pytest.approx(every)
    shown = times[found.frames] - found.starts[:, None]
    segment = np.arange(count) * window / count
    assert (shown >= segment - 0.04 - 1e-6).all()  # a frame is shown for 0.04 s
    assert (shown < segment + window / count + 1e-6).all()
    centre = [(2 * k + 1) * round(25 * window) // (2 * count) for k in range(count)]
    if every >= window:  # nothing to share: as a clip
        assert found.frames[0].tolist() == centre


def test_windows_share_frames() -> None:
    frames = look(np.arange(3000) / 30, 100.0, 3.0, 1.0, FrameSampling(8)).frames
    assert len(frames) == 98
    assert len(np.unique(frames)) == 300  # 3 a second, and not 8
    pairs = {pair for row in frames.tolist() for pair in pairwise(row)}
    assert len(pairs) < 0.6 * 98 * 7


def test_times_are_the_videos_own(tmp_path: Path) -> None:
    ticks = [5, 6, 7, 8, 9, 10, 30, 31, 50, 51]
    frames = colours((RED, 10))
    for name in ("a.mp4", "a.mkv"):
        video = Clip(write_video(tmp_path / name, frames, ticks=ticks)).video()
        assert video.seconds().tolist() == pytest.approx([(tick - 5) / 10 for tick in ticks], abs=2e-3)
    vp8 = Clip(write_video(tmp_path / "a.webm", frames, "libvpx", ticks=ticks)).video()
    assert vp8.seconds().tolist() == pytest.approx([(tick - 5) / 10 for tick in ticks], abs=2e-3)
    found = look(Clip(tmp_path / "a.mp4").video().seconds(), 4.7, 2.0, 1.0, FrameSampling(4))
    assert found.starts.tolist() == pytest.approx([0, 1, 2, 2.7])
    assert found.frames[1].tolist() == [5, 5, 5, 7]  # what is shown at 1.25, 1.75, 2.25 and 2.75 s
    reordered = Clip(write_video(tmp_path / "a.avi", colours((RED, 30)), "mpeg4", bf=2)).video()  # has no times
    assert reordered.seconds().tolist() == pytest.approx([number / 10 for number in range(30)])


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_a_stream_gives_the_frames_that_reading_gives(name: str, codec: str, tmp_path: Path) -> None:
    clip = Clip(write_video(tmp_path / name, colours((RED, 20), (BLUE, 20)), codec))
    wanted = [0, 1, 7, 20, 38, 39]
    assert torch.equal(torch.stack([*clip.video().stream(wanted)]), clip.read(wanted))


def test_segments_end_midway_between_windows_and_average_probabilities() -> None:
    answers = [("a", 0.9), ("a", 0.7), (None, 0.6), ("b", 0.8), ("b", 0.5), ("b", 0.8)]
    windows = []
    for start, (label, chance) in enumerate(answers):
        nearest = label or "a"
        chances = {nearest: chance, "b" if nearest == "a" else "a": 1 - chance}
        windows.append(Window(start, start + 3, Prediction("x.mp4", chances, known=label is not None)))
    found = Timeline("x.mp4", 8.0, windows)
    assert found.segments == [
        Segment(0, 3, "a", pytest.approx(0.8)),
        Segment(3, 4, None, None),
        Segment(4, 8.0, "b", pytest.approx(0.7)),
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv([found, Timeline("y.mp4", 0, (), "y.mp4: broken")]))))
    assert [(r["start"], r["end"], r["class"], r["confidence"]) for r in rows[:2]] == [
        ("0.000", "3.000", "a", "0.800000"),
        ("3.000", "4.000", "", ""),
    ]
    empty = {"start": "", "end": "", "class": "", "confidence": "", "cut": ""}
    assert rows[3] == {"clip": "y.mp4", **empty, "error": "y.mp4: broken"}
    assert as_lines([found])[1:3] == [
        "     0:00.0 - 0:03.0      80.0 % a",
        "     0:03.0 - 0:04.0             none of these",
    ]
    assert [clock(at) for at in (59.96, 61.24, 3599.99, 3661)] == ["1:00.0", "1:01.2", "1:00:00.0", "1:01:01.0"]


def test_a_video_shorter_than_the_window_is_classified_as_a_clip(folder: Path, views: Classifier) -> None:
    clip = Clip(folder / "classes" / "red" / "0.mp4")  # 1.2 s
    found = timeline(views, clip, 3, 1)
    [whole] = views.classify([clip])
    assert [(w.start, w.end) for w in found.windows] == [(0, pytest.approx(1.2))]
    assert found.windows[0].prediction.probabilities == pytest.approx(whole.probabilities, abs=1e-6)
    assert [s.label for s in found.segments] == [whole.label]


def test_the_command_finds_where_one_class_gives_way_to_the_other(
    folder: Path, views: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, video = tmp_path / "my.classifier", folder / "long.mp4"
    appearance = from_dict(to_dict(views.config))
    appearance.model.head_options = {"by": "appearance"}
    taught(folder, appearance).save(file)
    common = ["classify", "--classifier", str(file), str(video), "--window", "1", "--every", "0.5", "--device", "cpu"]
    assert main([*common, "--picture", str(tmp_path / "picture.png")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in said] == ["0:08.5", "red", "blue"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] > 1000
    assert main([*common, "--out", str(tmp_path / "times.json")]) == 0
    [told] = json.loads((tmp_path / "times.json").read_text())
    red, blue = told["segments"]
    assert (red["start"], red["class"], blue["class"], blue["end"]) == (0, "red", "blue", pytest.approx(8.5))
    assert red["end"] == blue["start"] == pytest.approx(4, abs=0.5)
    assert len(told["windows"]) == 16
    (tmp_path / "broken.mp4").write_text("no video")
    folder_of_frames = tmp_path / "frames"
    folder_of_frames.mkdir()
    Image.new("RGB", (48, 32)).save(folder_of_frames / "0.png")
    capsys.readouterr()
    assert main([*common[:4], str(tmp_path / "broken.mp4"), str(folder_of_frames), *common[4:], "--csv"]) == 2
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["red", "blue", "", ""]
    assert "not a video" in rows[2]["error"]
    assert "images have no times" in rows[3]["error"]


def test_of_a_long_video_that_is_cut_short_what_is_left_is_classified_and_that_is_said(
    folder: Path,
    views: Classifier,
    cut_video: Callable[[Path], tuple[Path, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, frames = cut_video(tmp_path / "cut.mp4")
    views.save(tmp_path / "my.classifier")
    told = f"{path}: the file is cut short: {frames} of its 30 frames are there"
    command = ["classify", "--classifier", str(tmp_path / "my.classifier"), str(path), "--window", "0.3"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"warning: {told}" in err.splitlines()
    [row] = json.loads(out)
    assert (row["seconds"], row["cut"]) == (pytest.approx(frames / 25), told)
    rows = csv.DictReader(io.StringIO(as_csv([timeline(views, Clip(path), 0.3)])))
    assert {row["cut"] for row in rows} == {told}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--window", "0"], "window is 0.0: it is a time in seconds, above 0"),
        (["--window", "nan"], "window is nan"),
        (["--window", "3", "--every", "-1"], "every is -1.0"),
        (["--window", "3", "--every", "0.01"], "a frame of .*long.mp4 lasts 0.1 s"),
        (["--every", "1"], "--every is of long videos: say the window's length, too"),
        (["--picture", "a.png"], "--picture is of long videos"),
        (["--window", "3", "--picture", "a.doc"], "a.doc: a picture's name ends in .png, .svg, .pdf"),
        (["--window", "3", "--picture", "a.png", "{folder}/classes"], "--picture shows one video, and there are 7"),
    ],
)
def test_windows_and_pictures_that_make_no_sense_are_refused(
    options: list[str], said: str, folder: Path, views: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views.save(tmp_path / "my.classifier")
    given = [option.format(folder=folder) for option in options]
    command = ["classify", "--classifier", str(tmp_path / "my.classifier"), "--device", "cpu"]
    assert main([*command, *given, "--query", str(folder / "long.mp4")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    with pytest.raises(UserError, match=said):
        raise UserError(error[0])


def test_a_picture_may_hold_any_class_names_and_hours(tmp_path: Path) -> None:
    classes = ("none of these", r"$\frac$ a", "b")
    chances = dict(zip(classes, (0.5, 0.3, 0.2), strict=True))
    windows = [Window(s, s + 60.0, Prediction("$x$_$^.mp4", chances, known=s % 120 == 0)) for s in range(0, 7200, 60)]
    draw(tmp_path / "a.svg", Timeline("$x$_$^.mp4", 7200.0, windows), classes)
    drawn = (tmp_path / "a.svg").read_text()  # text is drawn as paths, and said in comments
    assert all(f"<!-- {name} -->" in drawn for name in (*classes, "$x$_$^.mp4", "1:00:00", "15:00", "probability"))
