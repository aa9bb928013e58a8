"""Lists as the benchmarks publish them: known by their form, understood, and refused as few-shot splits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net.data.lists import find_split_file, read_split_file
from soap_net.data.splits import ClipSet, load_split
from soap_net.errors import UserError

CLASSES = {"Archery": 7, "Baby Crawling": 12, "Bowling": 30}
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of three videos, named as UCF101's and, one more, as Kinetics'."""
    (tmp_path / "splits").mkdir()
    for label in CLASSES:
        (tmp_path / "videos" / label).mkdir(parents=True)
        for name in ("v_g01", "v_g02", "v_g03", "abc-_1_000010_000020"):
            (tmp_path / "videos" / label / f"{name}.avi").touch()
    return tmp_path


def names(clips: ClipSet) -> dict[str, list[str]]:
    return {
        label: [clip.path.stem for clip in members] for label, members in zip(clips.classes, clips.clips, strict=True)
    }


def lines(form: Callable[[str, str, int], str], videos: tuple[str, ...] = ("v_g01", "v_g02")) -> str:
    return "".join(f"{form(label, video, number)}\n" for label, number in CLASSES.items() for video in videos)


FORMS: dict[str, tuple[str, Callable[[str, str, int], str]]] = {
    "UCF101": ("trainlist01.txt", lambda label, video, number: f"{label}/{video}.avi {number}"),
    "UCF101 of Windows": ("trainlist01.txt", lambda label, video, number: f"{label}\\{video}.avi {number}\r"),
    "mmaction2, videos": ("ucf_train_list_videos.txt", lambda label, video, number: f"{label}/{video}.avi {number}"),
    "mmaction2, frames": ("train_rawframes.txt", lambda label, video, number: f"{label}/{video} 93 {number}"),
    "mmaction2, absolute": ("train.txt", lambda label, video, number: f"/data/x/{label}/{video}.avi 93 {number}"),
    "csv": ("train.csv", lambda label, video, number: f"{label}/{video}.avi,{number}"),
    "csv without suffix": ("training.csv", lambda label, video, number: f"{label}/{video},{number}"),
    "backslashes": ("train.txt", lambda label, video, number: f"{label}\\{video}.avi"),
    "CRLF": ("trainlist01.txt", lambda label, video, number: f"{label}/{video}.avi\r"),
    "few-shot of another name": ("my_train_classes.txt", lambda label, video, number: f"{label}/{video}"),
    "few-shot": ("trainlist03.txt", lambda label, video, number: f"{label}/{video}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_list_is_known_by_its_form_and_found_by_its_name(form: str, root: Path) -> None:
    file, line = FORMS[form]
    path = root / "splits" / file
    path.write_text(lines(line), newline="")
    assert find_split_file(root, "train") == path
    assert names(load_split(root, "train")) == {label: ["v_g01", "v_g02"] for label in CLASSES}
    few_shot = form in ("backslashes", "CRLF", "few-shot", "few-shot of another name")
    assert (read_split_file(path).form == "") == few_shot


def test_a_csv_may_have_headings(root: Path) -> None:
    path = root / "splits" / "train.csv"
    path.write_text("video_path,label\n" + lines(FORMS["csv"][1]))
    assert names(load_split(root, "train")) == {label: ["v_g01", "v_g02"] for label in CLASSES}


def test_numbers_are_the_classes_where_no_folder_names_them(root: Path) -> None:
    for number in range(4):
        (root / "videos" / f"{number}.webm").touch()
    (root / "splits" / "train.txt").write_text("0 40 17\n1 38 17\n2 40 93\n3 40 93\n")
    assert names(load_split(root, "train")) == {"17": ["0", "1"], "93": ["2", "3"]}


@pytest.mark.parametrize("line", ["{}/{}.avi 7", "{}/{} 12 7", "{}/{}.avi,7"])
def test_folders_are_the_classes_where_all_have_one_number(line: str, root: Path) -> None:
    (root / "splits" / "train.txt").write_text(lines(lambda label, video, number: line.format(label, video)))
    assert names(load_split(root, "train")) == {label: ["v_g01", "v_g02"] for label in CLASSES}


def test_names_that_end_in_numbers_are_no_class_numbers(root: Path) -> None:
    labels = ["Archery", "Baby Crawling"]
    content = "".join(f"{label}/take {number}\n" for label in labels for number in (1, 2))
    for name in ("take 1", "take 2"):
        for label in labels:
            (root / "videos" / label / name).mkdir()
    (root / "splits" / "train.txt").write_text(content)
    assert names(load_split(root, "train")) == {label: ["take 1", "take 2"] for label in labels}


def write_hmdb51(root: Path, number: int = 1) -> None:
    for label in CLASSES:
        content = "v_g01.avi 1 \nv_g02.avi 1 \nv_g03.avi 2 \nabc-_1_000010_000020.avi 0 \n"
        (root / "splits" / f"{label}_test_split{number}.txt").write_text(content)


def test_hmdb51_has_a_file_for_each_class_which_tells_the_splits(root: Path) -> None:
    write_hmdb51(root)
    path = find_split_file(root, "train")
    assert path == find_split_file(root, "test") == root / "splits" / "Archery_test_split1.txt"
    for split, expected in (("train", ["v_g01.avi", "v_g02.avi"]), ("test", ["v_g03.avi"])):
        listed = read_split_file(path, split).lines
        assert [line.path for line in listed] == [f"{label}/{name}" for label in CLASSES for name in expected]
        assert [line.label for line in listed] == [label for label in CLASSES for _ in expected]
    with pytest.raises(UserError, match=r"no split file for 'val' beside Archery_test_split1\.txt"):
        load_split(root, "val")
    write_hmdb51(root, number=2)
    with pytest.raises(UserError, match=r"several split files for 'train' \(Archery_test_split1.txt, Archery_test_spl"):
        load_split(root, "train")
    with pytest.raises(UserError, match=r"3 of the 3 classes of train are in test too"):
        load_split(root, "train", path, {"test": path})


@pytest.mark.parametrize("video", ["abc-_1_000010_000020", "abc-_1"])
@pytest.mark.parametrize("folder", ["Baby Crawling", "Baby_Crawling"])
def test_the_csv_of_kinetics_finds_clips_by_their_usual_names(video: str, folder: str, root: Path) -> None:
    shutil.rmtree(root / "videos")
    (root / "videos" / folder).mkdir(parents=True)
    (root / "videos" / folder / f"{video}.mp4").touch()
    rows = ["label,youtube_id,time_start,time_end,split", '"Baby Crawling",abc-_1,10,20,train', "x,other,3,13,test"]
    (root / "splits" / "kinetics-400_train.csv").write_text("\n".join(rows))
    assert names(load_split(root, "train")) == {"Baby Crawling": [video]}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("test.csv", "youtube_id,time_start,time_end,split\nabc,1,11,test\n", r"csv:2: Kinetics' csv without a label"),
        ("test.csv", "label,youtube_id,time_start,time_end,split\nx,abc,1,11,train\n", "names no clips for test"),
        ("test.json", '[{"id": "78687", "template": "Holding [something]"}]', r"JSON list .* is not understood; take"),
        ("testlist.txt", "a/v 0 93 7\nb/w 0 80 8\na/x 0 93 7\n", r"'a/v 0 93 7' has 3 numbers: of mmaction2's lists"),
    ],
)  # fmt: skip
def test_a_form_that_is_known_and_not_understood_is_named(file: str, content: str, said: str, root: Path) -> None:
    (root / "splits" / file).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        load_split(root, "test")
    assert len(str(caught.value).splitlines()) == 1


def test_other_files_that_speak_of_a_split_are_no_lists(root: Path) -> None:
    others = {
        "train_log.txt": "epoch 1: loss 3.2\n",
        "train_epochs.txt": "epoch 1\nepoch 2\n",
        "train_counts.csv": "epoch,clips\n1,500\n2,500\n",
        "test-results.csv": "run,accuracy\na,81.2\n",
    }
    for name, content in others.items():
        (root / "splits" / name).write_text(content)
    (root / "train_settings.json").write_bytes(b"\xff\xfe")
    (root / "train_files.txt").write_text("a/b\n")
    (root / "splits" / "train_test_split.txt").write_text("a/b\n")
    assert find_split_file(root, "train") is None
    assert list(load_split(root, "train").classes) == list(CLASSES)


@pytest.mark.parametrize("form", ["UCF101", "mmaction2, frames", "csv"])
def test_lists_that_share_classes_between_training_and_test_are_refused_with_what_to_use(form: str, root: Path) -> None:
    line = FORMS[form][1]
    suffix = ".csv" if form == "csv" else ".txt"
    for split, videos in (("train", ("v_g01", "v_g02")), ("val", ("v_g02", "v_g03")), ("test", ("v_g03", "v_g01"))):
        (root / "splits" / f"{split}{suffix}").write_text(lines(line, videos))
    for split, other in (("train", "test"), ("test", "train"), ("val", "train")):
        with pytest.raises(UserError) as caught:
            load_split(root, split)
        told = str(caught.value)
        assert f"{split}{suffix}: 3 of the 3 classes of {split} are in {other} too (Archery, Baby Crawling, Bow" in told
        assert "CMN, OTAM and ARN" in told
        assert "github.com/tobyperrett/trx" in told
        assert len(told.splitlines()) == 1


def test_ucf101s_test_list_has_no_class_numbers_and_is_refused_beside_its_training_list(root: Path) -> None:
    (root / "splits" / "trainlist01.txt").write_text(lines(FORMS["UCF101"][1]))
    (root / "splits" / "testlist01.txt").write_text(lines(FORMS["few-shot"][1], ("v_g03",)))
    assert read_split_file(root / "splits" / "testlist01.txt").form == ""
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"3 of the 3 classes of .* UCF101's and mmaction2's is made for tests on"):
            load_split(root, split)


def test_lists_named_in_the_settings_are_the_ones_compared(root: Path, tmp_path: Path) -> None:
    lists = {split: tmp_path / f"my_{split}" for split in ("train", "test")}
    lists["train"].write_text("Archery/v_g01.avi 7\nArchery/v_g02.avi 7\n")
    lists["test"].write_text("Bowling/v_g01\n")
    (root / "splits" / "testlist01.txt").write_text("Archery/v_g03\n")  # another, not in use
    assert list(load_split(root, "train", lists["train"], lists).classes) == ["Archery"]
    assert list(load_split(root, "test", lists["test"], lists).classes) == ["Bowling"]
    with pytest.raises(UserError, match="1 of the 1 classes of train are in test too"):
        load_split(root, "train", lists["train"])


def test_few_shot_lists_that_share_classes_are_left_to_the_check(root: Path) -> None:
    for split in ("train", "test"):
        (root / "splits" / f"{split}.txt").write_text("Archery/v_g01\n")
    assert list(load_split(root, "test").classes) == ["Archery"]


def test_a_list_of_another_split_that_cannot_be_read_is_for_those_to_know_who_load_it(root: Path) -> None:
    (root / "splits" / "train.txt").write_text("Archery/v_g01.avi 7\n")
    (root / "splits" / "testlist01.txt").write_text("nothing\n")
    assert list(load_split(root, "train").classes) == ["Archery"]
    (root / "splits" / "testlist02.txt").write_text("Archery/v_g02\n")
    assert list(load_split(root, "train").classes) == ["Archery"]
