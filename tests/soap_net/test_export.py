"""What the ONNX file answers is what the classifier answers."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soap_net import export as exporting
from soap_net.classify import Classifier
from soap_net.cli import main
from soap_net.config import from_dict
from soap_net.data.clips import Clip
from soap_net.data.transforms import clip_loader
from soap_net.errors import UserError
from soap_net.export import FramesToClasses, export
from soap_net.models.heads import HEADS, ViewsHead

pytest.importorskip("onnxscript", reason="onnx and its like are not installed: pip install '.[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnx and its like are not installed: pip install '.[export]'")
ISL10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "isl10"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def learnt(root: Path, head: str, accept: float = 0.9, **soap: Any) -> Classifier:
    """Three classes of three, three and two clips, of noise that a random net tells apart a little."""
    model = {"backbone": "tiny", "weights": "random", "head": head, "soap": {"tuple_sizes": [1, 2], **soap}}
    data = {"frames": 3, "resize": 9, "crop": 8, "workers": 0}
    classifier = Classifier.from_config(from_dict({"data": data, "model": model}), "cpu", accept=accept)
    clips = {f"ç{i}": [Clip(root / f"test (class {i})" / f"v{k}") for k in range(3 - i // 2)] for i in range(3)}
    classifier.learn(clips)
    return classifier


def check(classifier: Classifier, path: Path, clips: Sequence[Clip]) -> list[bool]:
    """All clips at once and one by one, as they are read for the classifier; returns which are known."""
    session = onnxruntime.InferenceSession(path)
    read = clip_loader(classifier.data, train=False)
    frames = torch.stack([read(clip) for clip in clips]).numpy()
    predictions = classifier.classify(clips)
    expected = np.array([[p.probabilities[name] for name in classifier.classes] for p in predictions])
    together = session.run(["probabilities", "known"], {"frames": frames})
    alone = [session.run(["probabilities", "known"], {"frames": row[None]}) for row in frames]
    for probabilities, known in (together, [np.concatenate(each) for each in zip(*alone, strict=True)]):
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-4)
        assert known.tolist() == [p.known for p in predictions]
    return list(map(bool, together[1]))


def every_clip(root: Path) -> list[Clip]:
    return [Clip(path) for path in sorted(root.glob("*(class*)/v*"))]


def test_the_file_answers_like_the_classifier(tiny_data: Path, tmp_path: Path) -> None:
    classifier = learnt(tiny_data, "views", accept=0.5)
    assert export(classifier, tmp_path / "new" / "my.onnx") < 1e-4
    known = check(classifier, tmp_path / "new" / "my.onnx", every_clip(tiny_data))
    assert set(known) == {True, False}
    session = onnxruntime.InferenceSession(tmp_path / "new" / "my.onnx")
    [frames] = session.get_inputs()
    assert (frames.name, frames.type, frames.shape[1:]) == ("frames", "tensor(uint8)", [3, 3, 8, 8])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["ç0", "ç1", "ç2"]
    assert (about["frames"], about["resize"], about["crop"]) == ("3", "9", "8")
    assert float(about["threshold"]) == classifier.calibration.threshold
    assert json.loads(about["settings"])["model"]["head"] == "views"
    assert "3 frames" in about["reading"]


@pytest.mark.slow
@pytest.mark.parametrize("head", [name for name in HEADS if name != "views"])
def test_every_head_is_exported(head: str, tiny_data: Path, tmp_path: Path) -> None:
    classifier = learnt(tiny_data, head, variant="release" if head == "prototype" else "paper")
    export(classifier, tmp_path / "my.onnx")
    check(classifier, tmp_path / "my.onnx", every_clip(tiny_data))


@pytest.mark.slow
def test_one_shot_a_class_and_none_refused_is_exported(tiny_data: Path, tmp_path: Path) -> None:
    classifier = learnt(tiny_data, "views", enabled=False)
    classifier.learn({name: [Clip(tiny_data / f"test (class {name})" / "v0")] for name in "012"})
    export(classifier, tmp_path / "my.onnx")
    assert all(check(classifier, tmp_path / "my.onnx", every_clip(tiny_data)[:5]))


def test_exporting_leaves_the_classifier_as_it_was(tiny_data: Path) -> None:
    classifier = learnt(tiny_data, "views")
    before = copy.deepcopy(classifier.model.state_dict())
    net = exporting.FramesToClasses(classifier, classifier.calibration)
    for weight in net.parameters():
        weight.data.zero_()
    assert all(torch.equal(before[name], now) for name, now in classifier.model.state_dict().items())


def test_a_file_is_compared_with_what_the_classifier_answers_itself(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, scores = learnt(tiny_data, "prototype", accept=0.5), FramesToClasses.scores
    twice = 2 * classifier.calibration.threshold
    for wrong, told in (
        (lambda chances, familiar: (chances.roll(1, dims=1), familiar), "computes other probabilities"),
        (lambda chances, familiar: (chances, twice - familiar), "takes other clips for known"),
    ):
        monkeypatch.setattr(FramesToClasses, "scores", lambda self, frames, wrong=wrong: wrong(*scores(self, frames)))
        with pytest.raises(UserError, match=rf"^onnxruntime \S+ {told}.*: not written$"):
            export(classifier, tmp_path / "my.onnx")
    assert not list(tmp_path.iterdir())


def test_the_distance_told_is_that_from_a_classifier_that_rounds_more(tiny_data: Path, tmp_path: Path) -> None:
    classifier = learnt(tiny_data, "prototype", accept=0.5)
    exact = export(classifier, tmp_path / "exact.onnx")
    classifier.config.train.amp = "bf16"  # of the reading alone: what was learnt stays
    assert exact < 1e-5 < export(classifier, tmp_path / "my.onnx") < 0.2
    assert (tmp_path / "my.onnx").is_file()


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"onnxruntime \S+ computes other probabilities, by \S+: not written"):
        export(learnt(tiny_data, "tsn"), tmp_path / "my.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cant_be_exported_is_one_line_and_writes_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my.onnx"
    classifier = learnt(tiny_data, "views")
    with monkeypatch.context() as changed:
        embed = ViewsHead.embed
        changed.setattr(ViewsHead, "embed", lambda self, x: embed(self, x if x.sum() > 0 else -x))
        with pytest.raises(UserError, match=r"^backbone tiny with head views can't be exported: .*data-dependent.*$"):
            export(classifier, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"^onnxruntime is missing, .*: pip install 'onnx>=.*onnxruntime>="):
        export(classifier, path)
    with pytest.raises(UserError, match=r"call learn\(\) first"):
        export(Classifier.from_config(classifier.config, "cpu"), path)
    assert not path.exists()


@pytest.mark.slow
def test_the_command_writes_the_file(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt(tiny_data, "prototype", enabled=False).save(tmp_path / "my.classifier")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "my.classifier", "--out", "my.onnx"]) == 0
    assert (
        "wrote my.onnx: frames (batch, 3, 3, 8, 8) uint8 to the probabilities of ç0, ç1, ç2" in capsys.readouterr().out
    )
    check(Classifier.load(Path("my.classifier"), "cpu"), Path("my.onnx"), every_clip(tiny_data)[:3])
    assert main(["export", "my.classifier", "--out", "."]) == 2
    assert main(["export", "none.classifier", "--out", "my.onnx"]) == 2
    assert "none.classifier: no such classifier" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not ISL10.is_dir(), reason="needs the data set isl10, which does not come with the project")
def test_real_clips_are_told_alike_and_by_the_page_without_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = {name: [Clip(path) for path in sorted((ISL10 / name).glob("*.mp4"))] for name in ("food", "help", "yes")}
    classifier = Classifier.from_config(device="cpu")
    classifier.learn({name: members[:4] for name, members in clips.items()})
    export(classifier, tmp_path / "my.onnx")
    queries = [clip for members in clips.values() for clip in members[4:]]
    check(classifier, tmp_path / "my.onnx", queries)
    [snippet] = re.findall(r"```python\n(import json\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert "torch" not in snippet
    monkeypatch.chdir(tmp_path)
    for clip, prediction in zip(queries, classifier.classify(queries), strict=True):
        shutil.copy(clip.path, "my_clip.mp4")
        namespace: dict[str, Any] = {}
        exec(snippet, namespace)
        assert namespace["classes"] == list(classifier.classes)
        expected = [prediction.probabilities[name] for name in classifier.classes]
        np.testing.assert_allclose(namespace["probabilities"][0], expected, rtol=0, atol=2e-2)  # pixels differ by one
    assert str(prediction.nearest) in capsys.readouterr().out
