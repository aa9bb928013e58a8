from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from soap_net.classify import Classifier
from soap_net.config import Config, to_dict
from soap_net.data.clips import Clip
from soap_net.data.find import clips_by_class, find_clips
from soap_net.errors import UserError
from soap_net.models import SOAPNet, build_model


@pytest.fixture
def classifier(tiny_run: Callable[..., Config]) -> Classifier:
    config = tiny_run()
    return Classifier(build_model(config.model, config.data.frames, seed=0), config)


def support(root: Path, shots: dict[int, int]) -> dict[str, list[Clip]]:
    return {f"c{i}": [Clip(root / f"test (class {i})" / f"v{k}") for k in range(n)] for i, n in shots.items()}


def test_probabilities_are_the_softmax_of_the_models_scores(classifier: Classifier, tiny_data: Path) -> None:
    clips = support(tiny_data, {0: 2, 1: 1, 2: 3})  # unequal shots
    assert classifier.learn(clips) == []
    query = Clip(tiny_data / "test (class 1)" / "v3")
    [prediction] = classifier.classify([query])
    frames = torch.stack([classifier_frames(classifier, clip) for members in clips.values() for clip in members])
    with torch.no_grad():
        labels = torch.tensor([0, 0, 1, 2, 2, 2])
        logits = classifier.model(frames, labels, classifier_frames(classifier, query)[None], 3)[0]
    expected = dict(zip(clips, logits.softmax(0).tolist(), strict=True))
    assert prediction.probabilities == pytest.approx(expected, rel=1e-4)
    assert prediction.label == max(expected, key=expected.__getitem__)
    assert list(prediction.probabilities.values()) == sorted(prediction.probabilities.values(), reverse=True)


def classifier_frames(classifier: Classifier, clip: Clip) -> torch.Tensor:
    from soap_net.data.transforms import clip_loader

    return clip_loader(classifier.data, train=False)(clip, None)


def test_broken_clips_are_left_out_and_told(classifier: Classifier, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    clips = support(tiny_data, {0: 1, 1: 1})
    clips["c0"].append(Clip(tmp_path / "broken.mp4"))
    [told] = classifier.learn(clips)
    assert "broken.mp4" in told
    good, bad = classifier.classify([clips["c1"][0], clips["c0"][1]])
    assert (good.label, good.error) == ("c1", None)
    assert (bad.label, bad.probabilities) == (None, {})
    assert "broken.mp4" in str(bad.error)


def test_what_makes_no_classifier_is_refused(classifier: Classifier, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"call learn\(\) first"):
        classifier.classify([])
    with pytest.raises(UserError, match="at least 2 classes, found 1: c0"):
        classifier.learn(support(tiny_data, {0: 1}))
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"class 'b' has no readable clip: .*broken\.mp4"):
        classifier.learn({**support(tiny_data, {0: 1}), "b": [Clip(tmp_path / "broken.mp4")]})
    with pytest.raises(UserError, match="class 'b' has no readable clip"):
        classifier.learn({**support(tiny_data, {0: 1}), "b": []})


def test_a_model_that_is_not_finite_gives_no_probabilities(
    classifier: Classifier, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = support(tiny_data, {0: 1, 1: 1})
    classifier.learn(clips)
    features = SOAPNet.features
    monkeypatch.setattr(SOAPNet, "features", lambda self, frames: features(self, frames) * math.inf)
    [prediction] = classifier.classify([clips["c0"][0]])
    assert (prediction.label, prediction.probabilities) == (None, {})
    assert prediction.error == f"{clips['c0'][0].path}: the model's scores of it are not finite"
    next(classifier.model.parameters()).data[0] = math.nan
    with pytest.raises(UserError, match="the model's weights are not finite"):
        Classifier(classifier.model, classifier.config)


def test_clips_are_found_in_files_and_folders(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/b.vob", "deep/a.avi", "deep/note.txt", "z.zip", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert [str(clip.path.relative_to(tmp_path)) for clip in find_clips(tmp_path)] == [
        "deep/a.avi",
        "deep/er/b.vob",
        "z.zip",
    ]
    assert find_clips(tmp_path / "z.zip") == [Clip(tmp_path / "z.zip")]
    folder = tiny_data / "test (class 0)"
    assert len(find_clips(folder)) == 4
    assert find_clips(folder / "v1") == [Clip(folder / "v1")]
    (tmp_path / "deep" / "thumbnail.jpg").write_bytes(b"")
    assert [clip.path.name for clip in find_clips(tmp_path / "deep")] == ["a.avi", "b.vob"]
    for name in ("b/2.mp4", "b/10.mp4", "a b/x.zip"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_bytes(b"")
    found = {name: [clip.path.name for clip in clips] for name, clips in clips_by_class(tmp_path / "own").items()}
    assert found == {"a b": ["x.zip"], "b": ["2.mp4", "10.mp4"]}
    with pytest.raises(UserError, match="no such clip or folder"):
        find_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips in this folder"):
        find_clips(tmp_path / "empty")


@pytest.fixture
def untrained(tiny_run: Callable[..., Config]) -> Classifier:
    config = tiny_run()
    config.model.head, config.model.head_options = "views", {}
    return Classifier.from_config(config, "cpu")


def test_a_saved_classifier_answers_to_the_bit(untrained: Classifier, tiny_data: Path, tmp_path: Path) -> None:
    untrained.learn(support(tiny_data, {0: 3, 1: 2, 2: 3}))
    untrained.save(tmp_path / "my.classifier")
    loaded = Classifier.load(tmp_path / "my.classifier", "cpu")
    queries = [Clip(tiny_data / f"test (class {i})" / "v3") for i in range(3)]
    assert loaded.classify(queries) == untrained.classify(queries)
    assert (loaded.calibration, loaded.chosen) == (untrained.calibration, untrained.chosen)


def test_added_and_dropped_clips_give_what_learning_the_rest_gives(
    tiny_run: Callable[..., Config], tiny_data: Path
) -> None:
    # In channels-last, how a clip's features round hangs on how many are computed beside it.
    untrained = Classifier.from_config(
        tiny_run(model__head="views", model__head_options={}, model__channels_last=False)
    )
    clips = support(tiny_data, {0: 3, 1: 3, 2: 2})
    untrained.learn({"c0": clips["c0"][:1], "c1": clips["c1"], "old": clips["c2"]})
    untrained.add({"c0": clips["c0"][1:], "c2": clips["c2"]})
    untrained.drop("old")
    untrained.drop("c1/v1")
    grown = untrained.classify([clips["c0"][0]])[0].probabilities
    untrained.learn({"c0": clips["c0"], "c1": [clips["c1"][0], clips["c1"][2]], "c2": clips["c2"]})
    learnt = untrained.classify([clips["c0"][0]])[0].probabilities
    assert grown == pytest.approx(learnt, rel=1e-5)
    untrained.drop("c0")
    with pytest.raises(UserError, match="at least 2 classes"):
        untrained.drop("c1")
    untrained.add({"new": clips["c0"]}, drop=["c1"])  # only what is left in the end is counted
    assert untrained.classes == ("c2", "new")


def test_a_classifier_of_other_weights_is_refused(untrained: Classifier, tiny_data: Path, tmp_path: Path) -> None:
    untrained.learn(support(tiny_data, {0: 1, 1: 1}))
    with torch.no_grad():
        next(untrained.model.backbone.parameters()).add_(1)
    untrained.save(tmp_path / "my.classifier")
    with pytest.raises(UserError, match="made with other weights than those of backbone tiny"):
        Classifier.load(tmp_path / "my.classifier", "cpu")


def test_the_weights_of_a_classifier_may_move_and_its_file_may_keep_quiet_where_they_lie(
    untrained: Classifier, tiny_data: Path, tmp_path: Path
) -> None:
    first, net = tmp_path / "first.safetensors", untrained.model.backbone.net
    save_file({name: weight.contiguous() for name, weight in net.state_dict().items()}, first)
    config = replace(untrained.config, model=replace(untrained.config.model, weights=str(first)))
    classifier = Classifier.from_config(config, "cpu")
    classifier.learn(support(tiny_data, {0: 2, 1: 2}))
    classifier.save(tmp_path / "my.classifier")
    classifier.save(tmp_path / "quiet.classifier", paths=False)
    assert str(tmp_path).encode() in (tmp_path / "my.classifier").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "quiet.classifier").read_bytes()
    classifier.restore(tmp_path / "quiet.classifier")
    moved = first.rename(tmp_path / "moved.safetensors")
    for file in ("my.classifier", "quiet.classifier"):
        with pytest.raises(UserError, match="no such weights file"):
            Classifier.load(tmp_path / file, "cpu")
        found = Classifier.load(tmp_path / file, "cpu", weights=str(moved))
        assert found.classify([Clip(tiny_data / "test (class 0)" / "v3")]) == classifier.classify(
            [Clip(tiny_data / "test (class 0)" / "v3")]
        )
    with torch.no_grad():
        next(net.parameters()).add_(1)
    save_file({name: weight.contiguous() for name, weight in net.state_dict().items()}, moved)
    with pytest.raises(UserError, match="made with other weights"):
        Classifier.load(tmp_path / "my.classifier", "cpu", weights=str(moved))


def test_a_clip_like_no_class_is_none_of_these(untrained: Classifier, tiny_data: Path) -> None:
    untrained.learn(support(tiny_data, {0: 4, 1: 4, 2: 4}))
    assert untrained.supports is not None
    like, unlike = untrained.supports.features[0], -untrained.supports.features[0]
    known, unknown = untrained.predict("like", like), untrained.predict("unlike", unlike)
    assert known.known
    assert known.label == "c0"
    assert (unknown.known, unknown.label) == (False, None)
    assert unknown.nearest is not None


def test_accept_is_a_share(untrained: Classifier) -> None:
    for accept in (0.0, 1.5):
        with pytest.raises(UserError, match="accept is"):
            Classifier(untrained.model, untrained.config, accept=accept)


def test_clips_of_one_zip_are_named_apart_and_letters_of_two_kinds_are_one(
    untrained: Classifier, tiny_data: Path, tmp_path: Path
) -> None:
    clips = support(tiny_data, {0: 2, 1: 2})
    accented = {"cafe\u0301": clips["c0"][:1], "caf\u00e9": clips["c0"][1:], "c1": clips["c1"]}
    untrained.learn(accented)
    assert untrained.counts() == {"caf\u00e9": 2, "c1": 2}
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("a", "b"):
            for image in sorted((tiny_data / "test (class 2)" / f"v{'ab'.index(name)}").iterdir()):
                packed.write(image, f"{name}/{image.name}")
    untrained.add({"zip": [Clip(archive, member="a"), Clip(archive, member="b")]})
    assert untrained.supports is not None
    assert untrained.supports.clips[-2:] == ("zip/a", "zip/b")


@pytest.mark.parametrize("accept", [5.0, float("nan"), 0.0, None])
def test_a_file_that_accepts_no_share_is_refused_and_changes_nothing(
    accept: float | None, untrained: Classifier, tiny_data: Path, tmp_path: Path
) -> None:
    untrained.learn(support(tiny_data, {0: 2, 1: 2}))
    untrained.accept, path = accept, tmp_path / "a.classifier"  # type: ignore[assignment]
    untrained.supports.save(path, {"config": to_dict(untrained.config), "accept": accept})  # type: ignore[union-attr]
    untrained.accept = 0.9
    for take in (untrained.restore, lambda path: Classifier.load(path, "cpu")):
        with pytest.raises(UserError, match="does not say with which settings"):
            take(path)
    assert untrained.accept == 0.9


def test_copies_of_a_clip_count_once_and_are_told(untrained: Classifier, tiny_data: Path, tmp_path: Path) -> None:
    clips = support(tiny_data, {0: 3, 1: 3})
    untrained.learn(clips)
    alone = untrained.classify([clips["c0"][0]])
    copy = Clip(shutil.copytree(clips["c0"][1].path, tmp_path / "copy"))
    told = untrained.learn({"c0": [*clips["c0"], copy], "c1": clips["c1"]})
    assert told == ["c0/copy: a copy of c0/v1"]
    assert untrained.counts() == {"c0": 3, "c1": 3}
    assert untrained.classify([clips["c0"][0]])[0].probabilities == pytest.approx(alone[0].probabilities, rel=1e-4)
    assert untrained.add({"c1": [copy]}) == []  # of another class it is a mistake that the numbers show
    assert untrained.add({"c0": [copy]}) == ["c0/copy: a copy of c0/v1"]
