from __future__ import annotations

import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net.config import DataConfig
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.lists import read_split_file
from soap_net.data.splits import ClipSet, MissingClipsError, load_split, split_of
from soap_net.errors import UserError

Make = Callable[..., Path]
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"

# Classes and clips of the published few-shot splits: train, val, test.
PUBLISHED = {
    "TRX/kinetics_CMN": ((64, 6400), (12, 1200), (24, 2400)),
    "TRX/ssv2_CMN": ((64, 6400), (12, 1200), (24, 2400)),
    "TRX/ssv2_OTAM": ((64, 67013), (12, 1926), (24, 2857)),
    "TRX/ucf_ARN": ((70, 9154), (10, 1421), (21, 2745)),
    "TRX/hmdb_ARN": ((31, 4280), (10, 1194), (10, 1292)),
    "HyRSM/kinetics100": ((64, 6400), (12, 1200), (24, 2400)),
    "HyRSM/ssv2_small": ((64, 6400), (12, 1200), (24, 2400)),
    "HyRSM/ssv2_full": ((64, 67013), (12, 1926), (24, 2857)),
    "HyRSM/ucf101": ((70, 9154), (10, 1421), (21, 2745)),
    "HyRSM/hmdb51": ((31, 4280), (10, 1194), (10, 1292)),
    "HyRSM/epic_kitchens": ((60, 66056), None, (20, 10646)),
}


def names(clips: ClipSet) -> dict[str, list[str]]:
    return {label: [clip.name for clip in members] for label, members in zip(clips.classes, clips.clips, strict=True)}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_split_files_hold_the_known_classes_and_clips(name: str) -> None:
    folder = SHARED / "splits" / name
    if not folder.is_dir():
        pytest.skip("needs the published split lists, which do not come with the project")
    seen: set[str] = set()
    for split, counts in zip(("train", "val", "test"), PUBLISHED[name], strict=True):
        if counts is None:
            continue
        (path,) = folder.glob(f"{split}*.txt")
        listed = read_split_file(path, split)
        assert listed.form == ""
        lines = listed.lines
        labels = {line.label for line in lines}
        assert (len(labels), len(lines)) == counts
        assert not labels & seen
        seen |= labels
    if name in ("HyRSM/kinetics100", "HyRSM/ucf101", "HyRSM/hmdb51"):
        assert not any(label[-1].isdigit() for label in seen - {"train0"})
    if name == "HyRSM/epic_kitchens":
        assert "train32" in seen


def test_both_formats_of_published_splits_find_the_same_files(tmp_path: Path) -> None:
    trx, hyrsm = SHARED / "splits/TRX/hmdb_ARN/testlist03.txt", SHARED / "splits/HyRSM/hmdb51/test_few_shot.txt"
    if not trx.is_file():
        pytest.skip("needs the published split lists, which do not come with the project")
    for line in read_split_file(hyrsm).lines:
        touch(tmp_path / line.path)
    one, two = load_split(tmp_path, "test", trx), load_split(tmp_path, "test", hyrsm)
    assert one == two
    assert (len(one.classes), sum(map(len, one.clips))) == (10, 1292)
    assert one.clips[0][0].path.suffix == ".avi"


@pytest.mark.parametrize(("root", "way"), [("ssv2small", 5), ("ut_interaction", 2)])
def test_the_real_data_sets_load_by_their_splits(root: str, way: int) -> None:
    if not (SHARED / root).is_dir():
        pytest.skip(f"needs the data set {root}, which does not come with the project")
    for split in ("train", "val", "test"):
        clips = load_split(SHARED / root, split)
        assert len(clips.classes) == way
        assert len({clip.path for members in clips.clips for clip in members}) == sum(map(len, clips.clips))
        EpisodeSampler(clips, way, 5, 5, seed=0)


@pytest.mark.parametrize(
    "store",
    ["", "videos", "frames", "train", "videos/train", "frames/train", "train/videos"],
)
@pytest.mark.parametrize("suffix", [".avi", ".WEBM", ".zip", ""])
def test_lines_of_class_and_video_are_found_in_every_layout(store: str, suffix: str, tmp_path: Path) -> None:
    for video in ("v1", "v.2"):
        if suffix:
            touch(tmp_path / store / "a class" / f"{video}{suffix}")
        else:
            (tmp_path / store / "a class" / video).mkdir(parents=True)
    (tmp_path / "trainlist07.txt").write_text("a class/v.2\na class/v1.avi\n\n")
    clips = load_split(tmp_path, "train")
    assert names(clips) == {"a class": ["a class/v1", "a class/v.2"]}
    assert [clip.path.name for clip in clips.clips[0]] == [f"v1{suffix}", f"v.2{suffix}"]


@pytest.mark.parametrize("base", ["", "videos", "frames"])
def test_ids_in_one_folder_without_classes_are_found(base: str, tmp_path: Path) -> None:
    touch(tmp_path / base / "78687.webm")
    (tmp_path / base / "42326").mkdir()
    (tmp_path / "train_few_shot.txt").write_text("train8/78687\ntrain50/42326\n")
    clips = load_split(tmp_path, "train")
    assert names(clips) == {"train8": ["train8/78687"], "train50": ["train50/42326"]}
    assert clips.classes == ("train8", "train50")


def test_lines_with_a_number_and_a_path_take_the_folders_name_as_the_class(tmp_path: Path) -> None:
    touch(tmp_path / "train_256/air_drumming/x.mp4", tmp_path / "val_256/brewing tea/y.mp4")
    listing = tmp_path / "list.txt"
    listing.write_text("train0//train_256/air_drumming/x.mp4\ntrain1//val_256/brewing tea/y.mp4\n")
    clips = load_split(tmp_path, "train", listing)
    assert names(clips) == {"air_drumming": ["air_drumming/x"], "brewing tea": ["brewing tea/y"]}


def test_lines_with_a_number_keep_it_where_folders_are_not_classes(tmp_path: Path) -> None:
    touch(*(tmp_path / f"clips_256/P01_{i}.MP4" for i in range(4)))
    listing = tmp_path / "splits" / "train_few_shot.txt"
    touch(listing)
    listing.write_text("".join(f"train{10 * (i % 2)}//clips_256/P01_{i}.MP4\n" for i in range(4)))
    assert names(load_split(tmp_path, "train")) == {
        "train0": ["train0/P01_0", "train0/P01_2"],
        "train10": ["train10/P01_1", "train10/P01_3"],
    }


def test_frames_are_preferred_to_the_video_they_came_from(tmp_path: Path) -> None:
    touch(tmp_path / "videos/c/v.mp4")
    (tmp_path / "frames/c/v").mkdir(parents=True)
    (tmp_path / "train.txt").write_text("c/v")
    assert load_split(tmp_path, "train").clips[0][0].path == tmp_path / "frames/c/v"


def zip_frames(path: Path, folders: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for folder in folders:
            file.writestr(f"{folder}/00000001.jpg", b"")
            file.writestr(f"{folder}/00000002.jpg", b"")
    return path


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("all.zip", ""), ("all.zip", "data/train/"), ("frames/train.zip", ""), ("train.zip", "x/y z/")],
)
def test_one_zip_for_the_whole_set_serves_splits(name: str, prefix: str, tmp_path: Path) -> None:
    path = zip_frames(tmp_path / name, [f"{prefix}{c}/{v}" for c in ("a b", "c") for v in ("v1", "v2", "v10")])
    (tmp_path / "train.txt").write_text("a b/v10\nc/v2.avi\na b/v2")
    clips = load_split(tmp_path, "train")
    assert names(clips) == {"a b": ["a b/v2", "a b/v10"], "c": ["c/v2"]}
    assert clips.clips[0][1] == Clip(path, member=f"{prefix}a b/v10", name="a b/v10")
    assert clips.clips[0][1].num_frames() == 2


def test_a_zip_may_be_the_data_set_itself_and_need_no_split_file(tmp_path: Path) -> None:
    folders = [f"{s}/{s} {c}/v{v}" for s in ("train", "test") for c in "ab" for v in range(2)]
    path = zip_frames(tmp_path / "set.zip", folders)
    assert names(load_split(path, "test")) == {f"test {c}": [f"test {c}/v0", f"test {c}/v1"] for c in "ab"}


def test_a_zip_per_class_serves_splits(tmp_path: Path) -> None:
    zip_frames(tmp_path / "frames" / "jump.zip", ["v1", "v2"])
    zip_frames(tmp_path / "frames" / "sit.zip", ["v1"])
    (tmp_path / "train.txt").write_text("jump/v2\nsit/v1")
    clips = load_split(tmp_path, "train")
    assert [(clip.path.name, clip.member) for (clip,) in clips.clips] == [("jump.zip", "v2"), ("sit.zip", "v1")]


@pytest.mark.parametrize("store", ["test", "videos/test", "", "videos", "frames"])
def test_a_tree_of_class_folders_needs_no_split_file(store: str, tmp_path: Path) -> None:
    touch(tmp_path / store / "Pouring (into)" / "v 10.mp4", tmp_path / store / "Pouring (into)" / "v 9.mp4")
    (tmp_path / store / "don't" / "frames of 1").mkdir(parents=True)
    touch(tmp_path / store / "don't" / ".DS_Store", tmp_path / store / "don't" / "notes.txt")
    (tmp_path / store / "nothing").mkdir()
    assert names(load_split(tmp_path, "test")) == {
        "don't": ["don't/frames of 1"],
        "nothing": [],
        "Pouring (into)": ["Pouring (into)/v 9", "Pouring (into)/v 10"],
    }


def test_a_split_without_its_folder_is_not_taken_from_the_others(tmp_path: Path) -> None:
    touch(tmp_path / "train/c/v.mp4", tmp_path / "test/d/w.mp4")
    with pytest.raises(UserError, match="no folder 'val' beside test, train"):
        load_split(tmp_path, "val")


def test_a_split_without_its_file_is_not_taken_from_the_folders(tmp_path: Path) -> None:
    touch(tmp_path / "c/v.mp4")
    (tmp_path / "trainlist01.txt").write_text("c/v")
    with pytest.raises(UserError, match=r"no split file for 'val' beside trainlist01\.txt"):
        load_split(tmp_path, "val")


def test_accented_names_are_found_composed_or_decomposed(tmp_path: Path) -> None:
    for on_disk, listed in (("NFC", "NFD"), ("NFD", "NFC")):
        root = tmp_path / on_disk
        touch(root / unicodedata.normalize(on_disk, "Füße heben") / unicodedata.normalize(on_disk, "öl.mp4"))
        (root / "train.txt").write_text(unicodedata.normalize(listed, "Füße heben/öl"), encoding="utf-8")
        assert len(load_split(root, "train").clips[0]) == 1


def test_a_files_whole_name_comes_before_that_of_another_without_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "c/x.mp4", tmp_path / "c/x.mp4.zip", tmp_path / "c/y.mp4.avi")
    for line, file in {"c/x.mp4": "x.mp4", "c/x": "x.mp4", "c/x.mp4.zip": "x.mp4.zip", "c/y.mp4": "y.mp4.avi"}.items():
        (tmp_path / "train.txt").write_text(line)
        assert [clip.path.name for clip in load_split(tmp_path, "train").clips[0]] == [file]


def test_of_files_of_one_name_a_folder_comes_first_then_a_zip_then_the_first_video(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("c/1.webm", "c/1.avi", "c/2.avi", "c/2.zip", "c/3.zip", "c/3/0.jpg")))
    for split_file in (None, tmp_path / "list.txt"):
        if split_file is not None:
            split_file.write_text("c/3\nc/2\nc/1.webm\nc/1\nc/2\n")
        clips = load_split(tmp_path, "train", split_file)
        assert [clip.path.name for clip in clips.clips[0]] == ["1.avi", "2.zip", "3"]


def test_class_names_end_at_the_last_slash(tmp_path: Path) -> None:
    labels = ["Twisting (wringing) something", "don't", "a/b", "拍手", 'x "y" [z]', "100 %"]
    path = tmp_path / "s.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f"{label}/v 1" for label in labels).encode() + b"\r\n")
    assert [line.label for line in read_split_file(path).lines] == labels
    for label in labels:
        touch(tmp_path / label / "v 1.mp4")
    assert set(names(load_split(tmp_path, "train", path))) == set(labels)


def test_a_clip_listed_twice_counts_once(tmp_path: Path) -> None:
    touch(tmp_path / "c/v.mp4", tmp_path / "c/w.mp4")
    (tmp_path / "train.txt").write_text("c/v\nc/w\nc/v\nc/v.mp4\n")
    assert names(load_split(tmp_path, "train")) == {"c": ["c/v", "c/w"]}


def test_all_missing_clips_are_listed_with_their_count_on_one_line(tmp_path: Path) -> None:
    touch(tmp_path / "c/v0.mp4")
    (tmp_path / "train.txt").write_text("".join(f"c/v{i}\n" for i in range(500)) + "gone/x\n")
    with pytest.raises(MissingClipsError) as caught:
        load_split(tmp_path, "train")
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert f"500 of 501 clips are missing below {tmp_path}" in text
    assert "\n" not in text
    assert text.endswith(", ".join([f"c/v{i}" for i in range(1, 500)] + ["gone/x"]))
    assert caught.value.missing == (*(f"c/v{i}" for i in range(1, 500)), "gone/x")
    assert names(caught.value.found) == {"c": ["c/v0"], "gone": []}


def test_where_no_clip_is_found_the_message_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "train.txt").write_text("c/v\n")
    with pytest.raises(UserError, match=r"1 of 1 clips are missing .*looked in .*videos/<class>"):
        load_split(tmp_path, "train")


def test_lines_cannot_leave_the_data_set(tmp_path: Path) -> None:
    touch(tmp_path / "secret.mp4", tmp_path / "root/c/v.mp4")
    (tmp_path / "root/train.txt").write_text("c/v\n../secret\n")
    with pytest.raises(MissingClipsError, match="1 of 2"):
        load_split(tmp_path / "root", "train")


def test_a_missing_root_an_empty_one_and_one_without_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such data set folder"):
        load_split(tmp_path / "gone", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: found no clips as <class>/<clip>, nor a split file for 'train'"):
        load_split(tmp_path / "empty", "train")
    (tmp_path / "empty" / "c").mkdir()
    with pytest.raises(UserError, match="found no clips"):
        load_split(tmp_path / "empty", "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no clips"),
        (b"\n \n", "names no clips"),
        (b"c/v\njust a name\n", r"s\.txt:2: 'just a name' is not <class>/<video>"),
        (b"c/\n", "is not <class>/<video>"),
        (b"/v\n", "is not <class>/<video>"),
        (b"train0//\n", "is not <class>/<video>"),
        (b"c/\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_malformed_split_file_is_refused_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_split(tmp_path, "train", tmp_path / "s.txt")


def test_a_missing_split_file_and_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s\.txt: the split file cannot be read"):
        load_split(tmp_path, "train", tmp_path / "s.txt")
    touch(tmp_path / "splits/trainlist01.txt", tmp_path / "splits/trainlist02.txt")
    with pytest.raises(UserError, match=r"several split files for 'train' \(trainlist01.txt, trainlist02.txt\)"):
        load_split(tmp_path, "train")


# ------------------------------------------------------------------------------------------------- several data sets


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Path, ...]:
    """Set "one" of classes a, b and c, and set "two" of classes b and c; each with its own lists."""
    for name, classes in (("one", "abc"), ("two", "bc")):
        for label in classes:
            for video in range(3):
                (tmp_path / name / label / f"{name}{video}").mkdir(parents=True)
        (tmp_path / name / "splits").mkdir()
        lines = [f"{label}/{name}{video}" for label in classes for video in range(3)]
        (tmp_path / name / "splits/train.txt").write_text("\n".join(lines))
    return tmp_path / "one", tmp_path / "two"


def test_classes_of_several_sets_stay_apart_where_their_names_are_the_same(two_sets: tuple[Path, ...]) -> None:
    clips = load_split(two_sets, "train")
    assert clips.classes == ("one/a", "one/b", "one/c", "two/b", "two/c")
    assert clips.by_set == [[0, 1, 2], [3, 4]]
    assert {clip.path.parent for clip in clips.clips[1]} == {two_sets[0] / "b"}
    assert {clip.path.parent for clip in clips.clips[3]} == {two_sets[1] / "b"}
    assert load_split(two_sets[0], "train").by_set == [[0, 1, 2]]


def test_a_list_of_several_sets_names_each_clips_set(two_sets: tuple[Path, ...]) -> None:
    listing = two_sets[0].parent / "fold.txt"
    listing.write_text("two/b/two1\none/a/one0\none/a/one2\n")
    clips = load_split(two_sets, "train", listing)
    assert names(clips) == {"one/a": ["a/one0", "a/one2"], "two/b": ["b/two1"]}
    listing.write_text("two/b/two1\n")
    assert load_split(two_sets, "train", listing).by_set == [[0]], "a set may have no part in a split"
    for line in ("three/a/one0", "one/one0"):
        listing.write_text(line)
        with pytest.raises(UserError, match=f"'{line}' is not <set>/<class>/<video> with one of the sets one, two"):
            load_split(two_sets, "train", listing)


def test_two_sets_of_one_name_are_refused(two_sets: tuple[Path, ...]) -> None:
    with pytest.raises(UserError, match="several data sets of the name 'one'"):
        load_split((two_sets[0], two_sets[1].parent / "elsewhere/one"), "train")


def test_kinetics_clips_may_be_named_by_their_video_alone(tmp_path: Path) -> None:
    listing = tmp_path / "trainlist03.txt"
    listing.write_text("air drumming/-VtLx-mcPds_000012_000022\nair drumming/-eGnPDG5Pxs_000053_000063\n")
    touch(tmp_path / "air_drumming/-VtLx-mcPds/00000001.jpg", tmp_path / "air_drumming/-eGnPDG5Px/00000001.jpg")
    with pytest.raises(MissingClipsError) as missing:
        load_split(tmp_path, "train", listing)
    assert missing.value.missing == ("air drumming/-eGnPDG5Pxs_000053_000063",), "eleven characters name a video"
    assert names(missing.value.found) == {"air drumming": ["air drumming/-VtLx-mcPds"]}


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_of_classes_may_have_underscores_where_a_list_has_blanks(tmp_path: Path, zipped: bool) -> None:
    listing = tmp_path / "trainlist03.txt"
    listing.write_text("air drumming/-VtLx-mcPds_000012_000022\nbrush_hair/April 09\n")
    frames = ["air_drumming/-VtLx-mcPds_000012_000022/00000001.jpg", "brush_hair/April 09/00000001.jpg"]
    root = tmp_path / "kinetics"
    if zipped:
        root = tmp_path / "kinetics.zip"
        with zipfile.ZipFile(root, "w") as file:
            for name in frames:
                file.writestr(f"kinetics_256q5/{name}", b"")
    else:
        touch(*(root / name for name in frames))
    found = load_split(root, "train", listing)
    assert names(found) == {
        "air drumming": ["air drumming/-VtLx-mcPds_000012_000022"],
        "brush_hair": ["brush_hair/April 09"],
    }


def test_lists_of_two_splits_alone_leave_no_folders_to_the_third(tmp_path: Path) -> None:
    root, lists = tmp_path / "hmdb51", {}
    for split in ("train", "test"):
        touch(root / f"{split} class" / "a.mp4")
        lists[split] = tmp_path / f"{split}list03.txt"
        lists[split].write_text(f"{split} class/a\n")
    mend = (
        r"no split file for 'val' beside trainlist03.txt, testlist03.txt; name it with --data.val_split, or --train.v"
    )
    with pytest.raises(UserError, match=mend):
        load_split(root, "val", None, lists)
    with pytest.raises(
        UserError, match=r"no split file for 'train' beside testlist03.txt; name it with --data.train_s"
    ):
        load_split(root, "train", None, {"test": lists["test"]})
    assert load_split(root, "train", lists["train"], lists).classes == ("train class",)
    touch(root / "val" / "val class" / "a.mp4")
    assert load_split(root, "val", None, lists).classes == ("val class",), "a folder of its own needs no list"


def test_several_lists_of_a_split_are_refused_with_the_option_that_chooses(tmp_path: Path) -> None:
    touch(tmp_path / "splits" / "trainlist01.txt", tmp_path / "splits" / "trainlist02.txt")
    with pytest.raises(UserError, match=r"\(trainlist01.txt, trainlist02.txt\); take one with --data.train_split"):
        load_split(tmp_path, "train")


def test_settings_name_place_and_all_lists_of_a_split(tmp_path: Path) -> None:
    for clip in ("a/1.mp4", "b/1.mp4", "c/1.mp4"):
        (tmp_path / "set" / clip).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / clip).touch()
    (tmp_path / "some.txt").write_text("a/1\nb/1\n")
    data = DataConfig(root=tmp_path / "set", train_split=tmp_path / "some.txt")
    assert split_of(data, "train").classes == ("a", "b")
    with pytest.raises(UserError, match=r"no split file for 'val' beside some\.txt"):  # not all folders
        split_of(data, "val")
    several = DataConfig(roots=(tmp_path / "set", tmp_path / "set"))
    with pytest.raises(UserError):
        split_of(several, "train")
    assert split_of(DataConfig(roots=(tmp_path / "set",)), "train").classes == ("set/a", "set/b", "set/c")
