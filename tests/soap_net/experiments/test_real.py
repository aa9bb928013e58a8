from __future__ import annotations

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soap_net.config import from_dict
from soap_net.data.memory import ClipMemory
from soap_net.data.pack import pack_data
from soap_net.data.splits import load_split
from soap_net.errors import UserError
from soap_net.experiments import real
from soap_net.experiments.command import build
from soap_net.experiments.experiment import Experiment, run_config, run_experiment
from soap_net.experiments.real import ARMS, ENDPOINT, SHUFFLED
from soap_net.experiments.results import Results
from soap_net.experiments.sets import FOLDS, FRAMES, SIDE, by_set, deal, fold_list, pack, packed, write_folds
from soap_net.models import build_model


def write_set(root: Path, classes: int, clips: int, frames: int = 3) -> Path:
    """Classes of clips of flat frames, whose grey tells class, clip and frame."""
    for label in range(classes):
        for video in range(clips):
            folder = root / f"class {label}" / f"v{video}"
            folder.mkdir(parents=True)
            for number in range(frames):
                grey = (40 * label + 5 * video + number) % 256
                Image.new("RGB", (20, 16), (grey, grey, grey)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A set of 10 classes, five in a fold, and one of 4, two in a fold; six clips of each class."""
    folder = tmp_path_factory.mktemp("sets")
    return [write_set(folder / "many", 10, 6), write_set(folder / "few", 4, 6)]


@pytest.fixture
def options(sets: list[Path]) -> list[str]:
    """What makes the pilot a matter of seconds, tests aside."""
    settings = {
        "data.frames": 3, "data.resize": 9, "data.crop": 8, "model.backbone": "tiny", "model.weights": "random",
        "model.soap.tuple_sizes": "[1,2]", "train.episodes": 2, "eval.tasks": 10,
    }  # fmt: skip
    return ["--data.roots", *map(str, sets), *(f"--{key}={value}" for key, value in settings.items())]


def test_every_class_is_tested_in_one_fold_and_each_set_is_spread_evenly() -> None:
    classes = [
        f"{name}/{label}" for name, count in (("a", 9), ("b", 10), ("c", 15), ("d", 6)) for label in range(count)
    ]
    folds = deal(classes)
    assert sorted(name for fold in folds for name in fold) == sorted(classes)
    assert abs(len(folds[0]) - len(folds[1])) <= 1
    for name, count in (("a", 9), ("b", 10), ("c", 15), ("d", 6)):
        assert {sum(one.startswith(f"{name}/") for one in fold) for fold in folds} <= {count // 2, -(-count // 2)}
    assert deal(classes[::-1])[0][:1] != [], "the order of the sets may differ"
    alone = deal([name for name in classes if name.startswith("b/")])
    assert any(set(one) <= set(fold) for one in alone for fold in folds), "a set's halves hang on its names alone"


def test_a_pack_holds_all_clips_in_small_and_leaves_out_what_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", 2, 2, frames=FRAMES + 4)
    (root / "class 1/v1/5.png").write_bytes(b"no picture")
    pack(root, tmp_path / "one.zip")
    assert "v1" in capsys.readouterr().err
    clips = load_split(tmp_path / "one.zip", "train")
    assert [[clip.name for clip in members] for members in clips.clips] == [
        ["class 0/v0", "class 0/v1"],
        ["class 1/v0"],
    ]
    frames = clips.clips[1][0].read(range(FRAMES))
    assert frames.shape == (FRAMES, 3, SIDE, SIDE)
    greys = frames.float().mean(dim=(1, 2, 3))
    expected = [40 + (2 * i + 1) * (FRAMES + 4) // (2 * FRAMES) for i in range(FRAMES)]
    assert greys.numpy() == pytest.approx(expected, abs=1.5)
    pack(root, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as opened:
        assert len(opened.namelist()) == 3 * FRAMES
    pack(tmp_path / "gone", tmp_path / "one.zip")  # there already
    with pytest.raises(UserError, match="no such data set folder"):
        pack(tmp_path / "gone", tmp_path / "three.zip")


def test_a_zip_that_tells_splits_apart_is_packed_with_the_clips_of_all(sets: list[Path], tmp_path: Path) -> None:
    for split, labels in (("train", (0, 1)), ("test", (2, 3))):
        lines = [f"class {label}/v{video}\n" for label in labels for video in range(6)]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    source = tmp_path / "few.v2.zip"
    pack_data(sets[1], source, {split: tmp_path / f"{split}.txt" for split in ("train", "test")}, progress=False)
    assert len(load_split(source, "train").classes) == 2
    whole = packed(source, tmp_path / "clips")
    assert whole == tmp_path / "clips/few.v2.zip"
    whole.parent.mkdir()
    pack(source, whole)
    assert [len(members) for members in load_split(whole, "train").clips] == [6] * 4
    assert packed(whole, tmp_path / "again") == whole
    assert packed(sets[1], tmp_path) == tmp_path / "few.zip"


def test_folds_train_on_what_they_do_not_test(sets: list[Path], tmp_path: Path) -> None:
    write_folds(tuple(sets), tmp_path)
    tested: list[str] = []
    for fold in range(FOLDS):
        sides = [load_split(tuple(sets), side, fold_list(tmp_path, fold, side)) for side in ("train", "test")]
        assert not {*sides[0].classes} & {*sides[1].classes}
        assert sum(len(side.classes) for side in sides) == 14
        assert {name: len(own.classes) for name, own in by_set(sides[1])} == {"many": 5, "few": 2}
        assert all(len(members) == 6 for side in sides for members in side.clips)
        tested += sides[1].classes
    assert len({*tested}) == 14


def test_a_set_of_too_few_classes_for_the_folds_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="three: 3 classes can't be dealt to 2 folds"):
        write_folds((write_set(tmp_path / "three", 3, 1), write_set(tmp_path / "four", 4, 1)), tmp_path)


def test_soap_at_rest_adds_three_halves_to_every_pixel() -> None:
    config = from_dict({"model": {"backbone": "tiny", "weights": "random"}})
    model = build_model(config.model, 8)
    real._at_rest(model)
    frames = torch.randint(0, 256, (2, 8, 3, 12, 10), dtype=torch.uint8)
    assert model.soap is not None
    shown = (frames / 255 - model.mean) / model.std
    assert torch.allclose(model.soap(frames), shown + 1.5, atol=1e-5)


def test_sizes_differ_in_heads_episodes_and_seeds_alone(options: list[str]) -> None:
    cells = {size: len(build("real", size, options).runs([0], Results({}))) for size in ("pilot", "cpu", "gpu")}
    assert cells == {"pilot": 2 * len(ARMS) * FOLDS, "cpu": 3 * 2 * len(ARMS) * FOLDS, "gpu": 3 * 2 * len(ARMS) * FOLDS}
    with pytest.raises(UserError, match="unknown preset 'quick'; of real there are pilot, cpu, gpu"):
        build("real", "quick", options)
    with pytest.raises(UserError, match="unknown preset 'pilot'; of parts there are quick, paper"):
        build("parts", "pilot", [])


def do(experiment: Experiment, name: str, folder: Path) -> dict[str, object]:
    run = next(run for run in experiment.runs([0], Results({})) if run.cell == name)
    config = run_config(experiment.config, run, folder)
    return {**experiment.work(run, config, lambda: False, ClipMemory()), "out": config.out}


def test_what_nothing_is_to_be_trained_of_is_tested_as_it_is_built(options: list[str], tmp_path: Path) -> None:
    experiment = build("real", "pilot", options)
    experiment.prepare(tmp_path)
    plain = do(experiment, "views-frozen-none-fold0", tmp_path)
    assert not Path(str(plain["out"])).exists()
    assert plain["soap_parameters"] == 0
    tests = plain["tests"]
    assert isinstance(tests, dict)
    assert {name: (test["way"], test["shot"]) for name, test in tests.items()} == {
        "many": (5, 5), "many" + SHUFFLED: (5, 5), "few": (2, 5), "few" + SHUFFLED: (2, 5),
    }  # fmt: skip
    trained = do(experiment, "views-frozen-trained-fold0", tmp_path)
    assert (Path(str(trained["out"])) / "best.pt").exists()


def test_pooling_pairs_tasks_over_folds_and_heads(options: list[str]) -> None:
    experiment = build("real", "cpu", options)
    assert isinstance(experiment, real.Real)
    rng = np.random.default_rng(0)
    right = {(name, seed): rng.integers(0, 6, (4, 7)).tolist() for name in experiment.cells for seed in (0, 1)}
    finished = {}
    for (name, seed), (many, shuffled, few, other) in right.items():
        answers = {"many": (many, 5), "many" + SHUFFLED: (shuffled, 5), "few": (few, 2), "few" + SHUFFLED: (other, 2)}
        tests = {test: {"correct": c, "answers": 5, "way": way, "shot": 5} for test, (c, way) in answers.items()}
        finished[name, seed] = {"tests": tests}
    del finished["otam-frozen-none-fold1", 1]
    pooled = experiment.pooled(Results(finished))

    def rights(head: str, arm: str, seed: int, place: int) -> np.ndarray:
        return np.concatenate([right[f"{head}-frozen-{arm}-fold{fold}", seed][place] for fold in range(FOLDS)])

    for test, place in ((ENDPOINT, 0), (ENDPOINT + SHUFFLED, 1)):
        of_views = [rights("views", "trained", seed, place) - rights("views", "none", seed, place) for seed in (0, 1)]
        gain = pooled.difference(("views-frozen-trained", test), ("views-frozen-none", test))
        assert gain is not None
        assert gain.mean == pytest.approx(20 * np.mean(of_views))
        assert (gain.seeds, gain.tasks) == (2, 14)
    heads = [rights(head, "trained", 0, 0) - rights(head, "none", 0, 0) for head in real.HEADS]
    gain = pooled.difference(("mean-frozen-trained", ENDPOINT), ("mean-frozen-none", ENDPOINT))
    assert gain is not None
    assert gain.mean == pytest.approx(20 * np.mean(heads))
    assert gain.seeds == 1, "where a head has not finished a seed, the mean over heads waits for it"


def test_pooling_keeps_classes_of_different_folds_apart(options: list[str]) -> None:
    experiment = build("real", "cpu", options)
    assert isinstance(experiment, real.Real)
    finished = {}
    for number, (name, cell) in enumerate(experiment.cells.items()):
        drawn = {"classes": [[0, 2, 1, 4, 3], [1, 0, 2, 3, 4]], "support": [], "query": [], "sizes": [6, 7, 8, 9, 10]}
        drawn = {**drawn, "classes": [row[:: 1 - 2 * cell.fold] for row in drawn["classes"]]}
        right = [[[float(number % 2)]] * 5, [[1.0]] * 5]
        one = {"correct": [5 * (number % 2), 5], "answers": 5, "way": 5, "shot": 5, "drawn": drawn, "right": right}
        finished[name, 0] = {"tests": {"many": one, "few": {**one, "way": 2 + cell.fold}}}
    pooled = experiment.pooled(Results(finished)).finished
    tests = pooled["otam-frozen-init", 0]["tests"]
    assert tests[ENDPOINT]["drawn"]["classes"] == [
        [0, 2, 1, 4, 3], [1, 0, 2, 3, 4], [8, 9, 6, 7, 5], [9, 8, 7, 5, 6]
    ]  # fmt: skip
    assert tests[ENDPOINT]["drawn"]["sizes"] == [6, 7, 8, 9, 10] * 2
    assert "drawn" not in tests["few"], "tasks of 2 and of 3 ways are no sample of one kind"
    for name, test in (("otam", ENDPOINT), ("mean", ENDPOINT)):
        test_of = pooled[f"{name}-frozen-init", 0]["tests"][test]
        answered = np.array(test_of["right"]).sum(axis=(1, 2)) / 5
        assert answered == pytest.approx(np.array(test_of["correct"]) / np.array(test_of["answers"]))


@pytest.mark.parametrize(
    ("shift", "words"), [(0, "which can't be told from zero"), (2, "above zero"), (-2, "below zero")]
)
def test_the_verdict_says_what_the_interval_says(shift: int, words: str, options: list[str]) -> None:
    experiment = build("real", "pilot", options)
    assert isinstance(experiment, real.Real)
    finished = {}
    for name, cell in experiment.cells.items():
        rng = np.random.default_rng(cell.fold + 10 * (cell.arm == "trained"))
        correct = (rng.integers(2, 4, 40) + (shift if cell.arm == "trained" else 0)).tolist()
        finished[name, 0] = {"tests": {"many": {"correct": correct, "answers": 5, "way": 5, "shot": 5}}}
    pooled = experiment.pooled(Results(finished))
    text = experiment.remarks(experiment.rows(pooled), pooled)
    assert text.startswith("**Endpoint: ")
    assert f"{words} on these clips.**" in text.splitlines()[0]


def test_the_verdict_goes_by_new_classes_where_one_class_makes_the_gain(options: list[str]) -> None:
    experiment = build("real", "pilot", options)
    assert isinstance(experiment, real.Real)
    finished = {}
    for name, cell in experiment.cells.items():
        rng = np.random.default_rng(cell.fold)
        classes = np.array([rng.permutation(8)[:5] for _ in range(400)])
        right = ((classes == 0) & (cell.fold == 0) & (cell.arm == "trained")).astype(int)[:, :, None]
        drawn = {"classes": classes.tolist(), "support": [], "query": [], "sizes": [10] * 8}
        correct = right.sum(axis=(1, 2)).tolist()
        one = {"correct": correct, "answers": 5, "way": 5, "shot": 5, "drawn": drawn, "right": right.tolist()}
        finished[name, 0] = {"tests": {"many": one}}
    pooled = experiment.pooled(Results(finished))
    gain = pooled.difference(("views-frozen-trained", ENDPOINT), ("views-frozen-none", ENDPOINT))
    assert gain is not None
    assert gain.half is not None
    assert gain.mean - gain.half > 0, "of the tasks there is no doubt"
    text = experiment.remarks(experiment.rows(pooled), pooled)
    assert "points, which can't be told from zero.**" in text.splitlines()[0]


@pytest.mark.slow
def test_the_pilot_runs_whole_and_goes_on(options: list[str], tmp_path: Path) -> None:
    experiment = build("real", "pilot", options)
    results = run_experiment(experiment, tmp_path, seeds=[0], jobs=1, progress=False)
    assert len(results.finished) == 2 * len(ARMS) * FOLDS
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| views |") == 2 * len(ARMS)
    assert "less none on few" in text
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.glob("clips/*"), *tmp_path.glob("runs/*/*")]}
    run_experiment(experiment, tmp_path, seeds=[0], jobs=1, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    correct = [
        json.loads((tmp_path / f"runs/views-frozen-{arm}-fold0-seed0/result.json").read_text())["tests"]["many"]
        for arm in ("init", "trained")
    ]
    assert all(len(one["correct"]) == 10 for one in correct)
    roots = ["--data.roots", *(str(tmp_path / f"clips/{name}.zip") for name in ("many", "few"))]
    again = run_experiment(
        build("real", "pilot", [*options, *roots]), tmp_path / "packed", seeds=[0], jobs=1, progress=False
    )
    assert not (tmp_path / "packed/clips").exists()
    for key, result in results.finished.items():
        assert again.finished[key]["tests"] == result["tests"], "packed clips give the same answers elsewhere"
    assert all(a <= b for a, b in pairwise(sorted(run.seed for run in experiment.runs([0, 1], Results({})))))
