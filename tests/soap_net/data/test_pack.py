"""A pack gives the frames, names, splits and rates of what was packed; judged by PyAV, Pillow and zipfile alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import soap_net.data.pack as packing
from soap_net.cli import main
from soap_net.data.check import check_data
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeDataset, EpisodeSampler
from soap_net.data.lists import read_split_file
from soap_net.data.pack import Packing, pack_data
from soap_net.data.splits import SPLITS, ClipSet, load_split, splits_of
from soap_net.data.transforms import ClipLoader, FrameSampling
from soap_net.errors import ClipError, UserError

Make = Callable[..., Path]
ALL = dict.fromkeys(SPLITS)


def names(clips: ClipSet) -> dict[str, list[str]]:
    return {label: [clip.name for clip in members] for label, members in zip(clips.classes, clips.clips, strict=True)}


def clip_in(path: Path, name: str) -> Clip:
    return Clip(path, member=name)


def decoded(video: Path) -> list[Image.Image]:
    with av.open(str(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def images_in(pack: Path, name: str) -> dict[str, bytes]:
    with zipfile.ZipFile(pack) as outer, zipfile.ZipFile(io.BytesIO(outer.read(f"{name}.zip"))) as inner:
        assert {info.compress_type for info in (*outer.infolist(), *inner.infolist())} == {zipfile.ZIP_STORED}
        return {info.filename: inner.read(info) for info in inner.infolist()}


@pytest.fixture
def source(tmp_path: Path, write_video: Make, write_frames: Make) -> Path:
    """Two classes of a video and a folder of frames each, with lists of different clips."""
    root = tmp_path / "source"
    write_video(root / "videos" / "a wave" / "1.mp4", frames=30)
    write_frames(root / "videos" / "a wave" / "2", 5, size=(40, 30))
    write_video(root / "videos" / "clap" / "é.webm", "libvpx-vp9", frames=12)
    write_frames(root / "videos" / "clap" / "4", 3)
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("a wave/1\na wave/2.avi\n")
    (root / "splits" / "test.txt").write_text("clap/é\nclap/4\n")
    return root


@pytest.mark.parametrize("short", [24, 256])
def test_lossless_frames_are_those_of_a_decode_that_pillow_resized(source: Path, short: int, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    pack_data(source, out, {"train": None}, Packing(short, png=True), progress=False)
    wanted = decoded(source / "videos/a wave/1.mp4")
    if short < 48:
        wanted = [image.resize((32, 24), Image.Resampling.BILINEAR) for image in wanted]
    found = images_in(out, "a wave/1")
    assert list(found) == [f"{number + 1:08d}.png" for number in range(30)]
    read = clip_in(out, "a wave/1").read(range(30)).permute(0, 2, 3, 1).numpy()
    for data, frame, image in zip(found.values(), read, wanted, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(pixels, frame), "another reader finds the same"
        difference = np.abs(pixels.astype(int) - np.asarray(image).astype(int))
        assert difference.max() <= (1 if short < 48 else 0)


@pytest.mark.parametrize("quality", [40, 90])
def test_jpegs_are_those_of_that_quality(source: Path, quality: int, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    pack_data(source, out, {"train": None}, Packing(quality=quality), progress=False)
    reference = io.BytesIO()
    decoded(source / "videos/a wave/1.mp4")[7].save(reference, "JPEG", quality=quality)
    assert images_in(out, "a wave/1")["00000008.jpg"] == reference.getvalue()


def test_names_splits_and_rates_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    [report] = pack_data(source, out, {"train": None, "test": None}, progress=False)
    assert (report.sound, report.clips, report.frames) == (True, 4, 50)
    for split in ("train", "test"):
        assert names(load_split(out, split)) == names(load_split(source, split))
    rates = {clip.name: clip.probe().fps for members in load_split(out, "test").clips for clip in members}
    assert rates == {"clap/4": None, "clap/é": 25.0}
    with pytest.raises(UserError, match=r"no split file for 'val' beside train.txt, test.txt"):
        load_split(out, "val")
    assert splits_of(out, {}) == ["train", "test"]
    read = [report.infos for report in check_data(out, {"train": None}, progress=False).splits]
    assert [[(info.frames, info.width, info.fps) for info in infos] for infos in read] == [
        [(30, 64, 25), (5, 40, None)]
    ]


def test_one_file_a_split_and_an_unpacked_pack_are_data_sets_too(source: Path, tmp_path: Path) -> None:
    pack_data(source, tmp_path / "apart", {"train": None, "test": None}, progress=False)
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == ["test.zip", "train.zip"]
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / "apart" / f"{split}.zip") as pack:
            pack.extractall(tmp_path / "unpacked")
    for split in ("train", "test"):
        wanted = load_split(source, split)
        for root in (tmp_path / "apart", tmp_path / "unpacked"):
            found = load_split(root, split)
            assert names(found) == names(wanted)
            assert [[clip.num_frames() for clip in members] for members in found.clips] == [
                [clip.num_frames() for clip in members] for members in wanted.clips
            ]
    assert Clip(tmp_path / "unpacked" / "clap" / "é.zip").probe().fps == 25


@pytest.mark.parametrize("layout", ["", "{split}/", "videos/{split}/"])
def test_folders_without_lists_stay_what_they_are(layout: str, tmp_path: Path, write_frames: Make) -> None:
    root = tmp_path / "source"
    for number, split in enumerate(SPLITS):
        for video in range(2):
            write_frames(root / layout.format(split=split) / "jump" / f"{video}", 1 + number * bool(layout) + video)
    assert splits_of(root, {}) == [*SPLITS]
    for out in (tmp_path / "out.zip", tmp_path / "apart"):
        pack_data(root, out, ALL, progress=False)
        for split in SPLITS:
            found, wanted = load_split(out, split), load_split(root, split)
            assert names(found) == names(wanted)
            frames = [[clip.num_frames() for clip in members] for members in found.clips]
            assert frames == [[clip.num_frames() for clip in members] for members in wanted.clips]
    stored = {path.name for path in (tmp_path / "apart").iterdir()}
    assert stored == ({f"{split}.zip" for split in SPLITS} if layout else {"all.zip"})


def test_labels_and_names_of_all_kinds_come_back(tmp_path: Path, write_frames: Make) -> None:
    root = tmp_path / "source"
    write_frames(root / "one" / "x", 2)
    write_frames(root / "two" / "x", 3)
    write_frames(root / "v 1", 4)
    (root / "train.txt").write_text("one/x.avi 7\ntwo/x.avi 7\none/y.avi 8\n")
    (root / "test.txt").write_text("Pouring a/b into c/v 1\n")
    out = tmp_path / "out.zip"
    [report] = pack_data(root, out, {"train": None, "test": None}, progress=False)
    assert report.missing == ["one/y.avi (train)"]
    train = load_split(out, "train")
    assert names(train) == {"7": ["7/x", "7/x (2)"]}
    assert [clip.num_frames() for clip in train.clips[0]] == [2, 3]
    assert names(load_split(out, "test")) == {"Pouring a/b into c": ["Pouring a/b into c/v 1"]}
    again = tmp_path / "again.zip"
    pack_data(out, again, {"train": None, "test": None}, progress=False)
    for split in ("train", "test"):
        assert names(load_split(again, split)) == names(load_split(out, split))


def test_a_benchmarks_own_lists_stay_refused_together(tmp_path: Path, write_frames: Make) -> None:
    for video in range(4):
        write_frames(tmp_path / "source" / "Archery" / f"{video}", 2)
        write_frames(tmp_path / "source" / "Bowling" / f"{video}", 2)
    for split, videos in (("train", (0, 1)), ("test", (2, 3))):
        lines = [f"{label}/{video}.avi {n}\n" for n, label in enumerate(("Archery", "Bowling")) for video in videos]
        (tmp_path / "source" / f"{split}list01.txt").write_text("".join(lines))
        pack_data(tmp_path / "source", tmp_path / "out" / f"{split}.zip", {split: None}, progress=False)
        (tmp_path / "source" / f"{split}list01.txt").unlink()  # together they are refused there
    form = read_split_file(tmp_path / "out" / "train.zip" / "splits" / "train.txt").form
    assert form == "a list with class numbers, as UCF101's and mmaction2's"
    with pytest.raises(UserError, match="2 of the 2 classes of train are in test too"):
        load_split(tmp_path / "out", "train")


@pytest.mark.parametrize(
    ("fps", "times", "kept"),
    [
        (10, None, [0, 2, 5, 7, 10, 12, 15, 17]),  # frames shown at 0, 0.1, 0.2, ... of 25 a second
        (25, None, list(range(20))),
        (60, None, list(range(20))),
        (5, [0, 1, 2, 3, 20, 21, 22, 40], [0, 3, 4, 6, 7]),  # 25ths of a second: the frames shown at 0, 5, 10, ...
    ],
)
def test_at_most_so_many_frames_a_second_are_kept(
    fps: float, times: list[int] | None, kept: list[int], tmp_path: Path, write_video: Make
) -> None:
    write_video(tmp_path / "source" / "c" / "v.mkv", frames=len(times or range(20)), times=times)
    out = tmp_path / "out.zip"
    [report] = pack_data(tmp_path / "source", out, {"test": None}, Packing(fps=fps), progress=False)
    assert [int(name[:8]) - 1 for name in images_in(out, "c/v")] == kept
    assert clip_in(out, "c/v").probe().fps == pytest.approx(min(fps, 25), rel=0.5 if times else 1e-6)
    assert report.unrated == 0


def test_a_packed_data_set_trains_and_evaluates_as_any(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    pack_data(source, out, {"train": None, "test": None}, Packing(png=True), progress=False)
    loader = ClipLoader(FrameSampling(3), resize=16, crop=12, train=True)
    both = []
    for root in (source, out):
        clips = load_split(root, "train")
        both_splits = ClipSet("train", ("a", "b"), tuple((clip,) * 2 for clip in clips.clips[0]))
        episodes = EpisodeDataset(EpisodeSampler(both_splits, way=2, shot=1, queries=1, seed=0), loader, range(3))
        both.append([episodes[index].support for index in range(3)])
    assert all(np.array_equal(one, two) for one, two in zip(*both, strict=True))


class Stop(BaseException):
    """Ends everything, as a signal does."""


def begin(clips: int, monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *splits: str) -> None:
    """A packing that ends after so many clips."""
    with monkeypatch.context() as patch:
        stop_after(clips, patch)
        with pytest.raises(Stop):
            pack_data(source, out, dict.fromkeys(splits), progress=False)


def stop_after(clips: int, monkeypatch: pytest.MonkeyPatch) -> list[Clip]:
    """Has the packing end before another clip than these; returns those that were packed."""
    packed: list[Clip] = []
    whole = packing._pack_clip

    def pack_clip(clip: Clip, how: Packing) -> object:
        if len(packed) == clips:
            raise Stop
        packed.append(clip)
        return whole(clip, how)

    monkeypatch.setattr(packing, "_pack_clip", pack_clip)
    return packed


@pytest.mark.parametrize("lost", ["", "end of a note", "all notes", "end of the clips", "all clips", "end of the head"])
def test_a_packing_that_was_stopped_goes_on_to_the_same_file(
    lost: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": None, "test": None}
    pack_data(source, tmp_path / "whole.zip", splits, progress=False)
    out = tmp_path / "out" / "whole.zip"
    begin(3, monkeypatch, source, out, *splits)
    data, notes = (out.with_name(f".whole.zip.{kind}") for kind in ("packing", "notes"))
    assert sorted(out.parent.iterdir()) == sorted([data, notes])
    size = data.stat().st_size
    if lost == "end of a note":
        os.truncate(notes, notes.stat().st_size - 3)
    elif lost == "end of the clips":
        os.truncate(data, size - 10)
    elif lost == "end of the head":
        os.truncate(notes, 20)
    elif lost:
        (notes if lost == "all notes" else data).unlink()
    with monkeypatch.context() as patch:
        packed = stop_after(-1, patch)
        pack_data(source, out, splits, progress=False)
    assert len(packed) == {"": 1, "end of a note": 2, "end of the clips": 2}.get(lost, 4)
    assert out.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert [*out.parent.iterdir()] == [out]


def test_a_pack_says_which_clips_were_cut_short_when_it_is_made_and_ever_after(
    source: Path,
    cut_video: Callable[[Path], tuple[Path, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, frames = cut_video(source / "videos" / "a wave" / "1.mp4")
    left = f"{frames} of its 30 frames are there"
    out = tmp_path / "out.zip"
    begin(2, monkeypatch, source, out, "train", "test")  # those that went on from there tell of those packed before
    args = ["data", "pack", str(source), str(out), "--split", "train", "test", "--data.workers", "0"]
    assert main(args) == 2
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"cut short: {path}: {left}"
    assert told[-1].endswith("0 clips missing, 0 broken, 1 cut short)")
    assert len(images_in(out, "a wave/1")) == frames
    assert check_data(out, {"train": None}, progress=False).splits[0].cut == [f"{out}/a wave/1: {left}"]
    assert clip_in(out, "a wave/2").cut() is None
    pack_data(out, tmp_path / "again.zip", {"train": None}, progress=False)
    assert clip_in(tmp_path / "again.zip", "a wave/1").cut() == left


def test_other_options_do_not_go_on_with_what_was_begun(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(1, monkeypatch, source, tmp_path / "out.zip", "train")
    with pytest.raises(UserError, match="begun with other options"):
        pack_data(source, tmp_path / "out.zip", {"train": None}, Packing(short=100), progress=False)


def test_what_reads_back_otherwise_is_not_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(1, monkeypatch, source, tmp_path / "out.zip", "train")
    begun = bytearray((tmp_path / ".out.zip.packing").read_bytes())
    begun[len(begun) // 2] ^= 1
    (tmp_path / ".out.zip.packing").write_bytes(begun)
    with pytest.raises(UserError, match=r"what was written reads back otherwise \(a wave/1.zip\)"):
        pack_data(source, tmp_path / "out.zip", {"train": None}, progress=False)
    assert not (tmp_path / "out.zip").exists()


def test_a_full_disk_is_one_line_and_goes_on(
    source: Path,
    tmp_path: Path,
    largest_file: Callable[[int], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["data", "pack", str(source), str(tmp_path / "out.zip"), "--png", "--data.workers", "0"]
    with largest_file(20_000):
        assert main(args) == 2
    assert ".out.zip.packing: file too large" in capsys.readouterr().err.splitlines()[-1]
    assert main(args) == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as pack:
        assert pack.testzip() is None


def test_the_command_lists_what_it_left_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "videos/clap/é.webm").write_bytes(b"no video")
    shutil.rmtree(source / "videos/a wave/2")
    out = tmp_path / "out.zip"
    args = ["data", "pack", str(source), str(out), "--short", "20", "--fps", "5", "--data.workers", "1"]
    assert main(args) == 2
    *left_out, unrated, last = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in left_out] == [
        "missing: a wave/2.avi",
        f"broken: {source}/videos/clap/é.webm: not a video that FFmpeg can read",
    ]
    assert unrated.startswith("1 clips have no frame rate")
    assert last.startswith(f"packed: {out} (2 clips, 9 frames, 0.0 MB; 1 clips missing, 1 broken, 0 cut short)")
    assert names(load_split(out, "test")) == {"clap": ["clap/4"]}
    with zipfile.ZipFile(out) as pack:
        told = json.loads(pack.comment)
    assert (told["format"], told["version"], told["short"], told["fps"]) == ("soap-net pack", 1, 20, 5.0)
    assert main(args) == 2
    assert f"{out} is there already" in capsys.readouterr().err
    assert main(["data", "pack", str(source)]) == 2
    assert "say what to pack and where to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "said"), [({"short": 0}, "at least 1 pixel"), ({"quality": 101}, "1 to 100"), ({"fps": 0.0}, "more than 0")]
)
def test_what_cannot_be_is_said(how: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Packing(**how)  # type: ignore[arg-type]


def test_a_pack_of_a_newer_version_and_a_damaged_clip_are_one_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    pack_data(source, out, {"train": None}, progress=False)
    data = out.read_bytes()
    (tmp_path / "newer.zip").write_bytes(data.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(ClipError, match=r"newer.zip: not a readable zip.*newer soap-net"):
        load_split(tmp_path / "newer.zip", "train")
    (tmp_path / "cut.zip").write_bytes(data.replace(b"PK\x05\x06", b"PK\x05\x07", 1))  # the first clip's directory
    with pytest.raises(ClipError, match=r"cut.zip/a wave/1: not a readable zip"):
        clip_in(tmp_path / "cut.zip", "a wave/1").num_frames()
    assert clip_in(tmp_path / "cut.zip", "a wave/2").num_frames() == 5
    with pytest.raises(ClipError, match="holds no images there"):
        Clip(out).num_frames()


def test_a_split_cannot_name_a_pack_of_all(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test.zip: a pack of that name would be taken for one of test alone"):
        pack_data(source, tmp_path / "test.zip", {"train": None, "test": None}, progress=False)
