from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soap_net import checkpoint
from soap_net.config import Config, to_dict
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeDataset, EpisodeSampler
from soap_net.data.splits import ClipSet, load_split
from soap_net.data.transforms import ClipLoader
from soap_net.errors import UserError
from soap_net.evaluate import EvalResult, Interrupted, clip_loader, evaluate, evaluate_run
from soap_net.models import HEADS, SOAPNet, build_model


def make(config: Config) -> tuple[SOAPNet, ClipSet]:
    torch.manual_seed(0)
    return build_model(config.model, config.data.frames), load_split(config.data.root, "test")


def plain_loop(model: SOAPNet, clips: ClipSet, config: Config) -> tuple[list[float], np.ndarray]:
    """Each task on its own, frames and all, as `evaluate` would have it without any sharing."""
    cfg = config.eval
    sampler = EpisodeSampler(clips, cfg.way, cfg.shot, cfg.queries, cfg.seed)
    accuracies, confusion = [], np.zeros((len(clips.classes),) * 2, dtype=int)
    model.eval()
    for task in (
        EpisodeDataset(sampler, clip_loader(config.data, train=False), range(cfg.tasks))[i] for i in range(cfg.tasks)
    ):
        with torch.no_grad():
            answers = model(task.support, task.support_labels, task.query, cfg.way).argmax(dim=1)
        accuracies.append(100.0 * float((answers == task.query_labels).float().mean()))
        for truth, answer in zip(task.query_labels.tolist(), answers.tolist(), strict=True):
            confusion[task.class_ids[truth], task.class_ids[answer]] += 1
    return accuracies, confusion


def check(result: EvalResult, accuracies: list[float], confusion: np.ndarray) -> None:
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.ci95 == pytest.approx(1.96 * np.std(accuracies) / np.sqrt(len(accuracies)))
    assert result.confusion == confusion.tolist()


@pytest.mark.parametrize("limit", [2**20, 0], ids=["embedded once", "embedded per task"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_shared_features_and_batched_tasks_equal_a_plain_loop_for_every_head(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, head: str, limit: int
) -> None:
    monkeypatch.setattr("soap_net.evaluate.EMBEDDED_LIMIT", limit)
    config = tiny_run(
        model__head=head, model__head_options={}, data__frames=4, eval__way=3, eval__shot=2, eval__queries=2
    )
    model, clips = make(config)
    result = evaluate(model, clips, config.data, config.eval, progress=False)
    check(result, *plain_loop(model, clips, config))
    assert 20 < result.accuracy < 100, "the noise makes some tasks fail"


def test_per_class_accuracy_is_the_diagonal_of_the_confusion(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(eval__way=2, eval__tasks=30)
    model, clips = make(config)
    result = evaluate(model, clips, config.data, config.eval, progress=False)
    assert result.classes == list(clips.classes)
    assert np.sum(result.confusion) == 30 * 2
    for i, name in enumerate(result.classes):
        assert result.per_class[name] == pytest.approx(100 * result.confusion[i][i] / sum(result.confusion[i]))


def test_each_clip_is_read_once(tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(eval__tasks=200)
    model, clips = make(config)
    read: list[Clip] = []
    load = ClipLoader.__call__

    def counted(self: ClipLoader, clip: Clip, rng: np.random.Generator | None = None) -> Tensor:
        read.append(clip)
        return load(self, clip, rng)

    monkeypatch.setattr(ClipLoader, "__call__", counted)
    evaluate(model, clips, config.data, config.eval, progress=False)
    assert len(read) == len(set(read)) == 12


def test_decoding_processes_change_nothing(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    model, clips = make(config)
    results = [
        evaluate(model, clips, replace(config.data, workers=workers), config.eval, progress=False) for workers in (0, 2)
    ]
    assert results[0].confusion == results[1].confusion


def test_the_models_mode_is_left_as_it_was(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(eval__tasks=1)
    model, clips = make(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model.train(), clips, config.data, config.eval, progress=False)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_broken_clips_are_named_and_replaced_as_in_training(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(tiny_data, root)
    for label, video in ((0, 1), (2, 0), (2, 3)):
        for frame in (root / f"test (class {label})" / f"v{video}").iterdir():
            frame.write_bytes(b"")
    config = tiny_run(data__root=str(root), eval__way=3, eval__tasks=30)
    model, clips = make(config)
    result = evaluate(model, clips, config.data, config.eval, progress=False)
    check(result, *plain_loop(model, clips, config))
    assert len(result.failed_clips) == 3
    assert "test (class 0)/v1" in " ".join(result.failed_clips)
    assert capsys.readouterr().err.count("another clip of its class takes its place") == 3


def test_a_class_without_enough_readable_clips_is_named(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(tiny_data, root)
    for frame in (root / "test (class 2)").rglob("*.png"):
        frame.write_bytes(b"")
    config = tiny_run(data__root=str(root), eval__way=3)
    with pytest.raises(UserError, match=r"class 'test \(class 2\)' has no readable clip left; 4 clips"):
        evaluate(*make(config), config.data, config.eval, progress=False)


def test_evaluation_can_be_stopped(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    with pytest.raises(Interrupted):
        evaluate(*make(config), config.data, config.eval, progress=False, stop=lambda: True)


@pytest.fixture
def saved(tiny_run: Callable[..., Config], tmp_path: Path) -> tuple[Path, Config]:
    config = tiny_run()
    model, _ = make(config)
    checkpoint.save(tmp_path / "best.pt", {"config": to_dict(config), "model": model.state_dict()})
    return tmp_path / "best.pt", config


def test_a_checkpoints_result_lies_beside_it(saved: tuple[Path, Config], tmp_path: Path) -> None:
    path, config = saved
    result = evaluate_run(path, config, progress=False)
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["accuracy"] == result.accuracy
    assert {
        "accuracy",
        "ci95",
        "tasks",
        "way",
        "shot",
        "episodes_per_second",
        "per_class",
        "confusion",
    } <= written.keys()
    assert (written["tasks"], written["way"], written["shot"]) == (20, 2, 1)
    evaluate_run(path, config, out=tmp_path / "elsewhere", progress=False)
    evaluate_run(path, config, out=tmp_path / "named.json", progress=False)
    assert json.loads((tmp_path / "elsewhere" / "eval.json").read_text())["accuracy"] == result.accuracy
    assert json.loads((tmp_path / "named.json").read_text())["accuracy"] == result.accuracy


def test_another_number_of_frames_than_trained_on_is_refused(saved: tuple[Path, Config]) -> None:
    path, config = saved
    config.data.frames = 5
    with pytest.raises(UserError, match=r"data\.frames is 5: .*best\.pt was trained on 3 frames"):
        evaluate_run(path, config, progress=False)
