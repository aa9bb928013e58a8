from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from soap_kernels import SOAP
from soap_net import checkpoint
from soap_net.classify import Classifier
from soap_net.cli import main
from soap_net.config import Config, to_dict
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeDataset, EpisodeSampler
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import ClipSet, load_split
from soap_net.data.transforms import ClipLoader, clip_loader
from soap_net.errors import UserError
from soap_net.evaluate import EvalResult, evaluate, evaluate_run
from soap_net.interrupts import Interrupted
from soap_net.models import HEADS, SOAPNet, build_model
from soap_net.ranks import Ranks

REPOSITORY = Path(__file__).parents[2]
T = TypeVar("T")


def make(config: Config) -> tuple[SOAPNet, ClipSet]:
    return build_model(config.model, config.data.frames, seed=0), load_split(config.data.root, "test")


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
    monkeypatch.setattr("soap_net.tasks.EMBEDDED_LIMIT", limit)
    config = tiny_run(
        model__head=head, model__head_options={}, data__frames=4, eval__way=3, eval__shot=2, eval__queries=2
    )
    model, clips = make(config)
    result = evaluate(model, clips, config.data, config.eval, progress=False)
    check(result, *plain_loop(model, clips, config))
    assert 20 < result.accuracy < 100, "the noise makes some tasks fail"


class Unshared(Ranks):
    """The last of a hundred processes, whose exchanges bring nothing from the others."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def gather(self, own: Mapping[int, T]) -> dict[int, T]:
        return dict(own)


@pytest.mark.parametrize("limit", [2**20, 0], ids=["embedded once", "embedded per task"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_process_without_a_task_takes_part_with_every_head(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, head: str, limit: int
) -> None:
    monkeypatch.setattr("soap_net.tasks.EMBEDDED_LIMIT", limit)
    config = tiny_run(model__head=head, model__head_options={}, data__frames=4, eval__tasks=2)
    model, clips = make(config)
    ranks = Unshared(torch.device("cpu"), rank=99, size=100)
    result = evaluate(model, clips, config.data, config.eval, ranks=ranks, progress=False)
    assert result.answers is not None
    assert not result.answers.predicted.any(), "zeros, to which the others' answers are added"
    assert not result.answers.chosen.any()


def test_a_net_without_a_checkpoint_is_that_of_the_seed_and_the_one_that_classifies(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, other = tiny_run(episode__seed=3), tiny_run(episode__seed=4)
    nets: list[dict[str, Tensor]] = []

    def noting(model: SOAPNet, *args: Any, **kwargs: Any) -> EvalResult:
        nets.append(model.state_dict())
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr("soap_net.evaluate.evaluate", noting)
    for run, state in ((config, 0), (config, 1), (other, 0)):
        torch.manual_seed(state)
        evaluate_run(None, run, progress=False)
    first, again, seeded_otherwise = nets
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(Classifier.from_config(config).model.state_dict(), first, rtol=0, atol=0)
    assert any(not torch.equal(first[name], seeded_otherwise[name]) for name in first)


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


def test_clips_that_are_cut_short_are_counted_and_named_beside_the_result(
    tiny_run: Callable[..., Config],
    tiny_data: Path,
    cut_video: Callable[[Path], tuple[Path, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    shutil.rmtree(root / "test (class 0)" / "v1")
    path, frames = cut_video(root / "test (class 0)" / "v1.mp4")
    told = f"{path}: the file is cut short: {frames} of its 30 frames are there"
    config = tiny_run(data__root=str(root), eval__way=3, eval__tasks=30)
    model, clips = make(config)
    result = evaluate(model, clips, config.data, config.eval, progress=False)
    assert (result.failed_clips, result.cut_clips) == ([], [told])
    assert result.to_dict()["cut_clips"] == [told]
    assert f"warning: {told}" in capsys.readouterr().err.splitlines()


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


def test_a_single_task_has_no_interval(saved: tuple[Path, Config], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = saved
    config.eval.tasks = 1
    result = evaluate_run(path, config, progress=False)
    assert result.ci95 is None
    assert result.shown == f"{result.accuracy:.2f} (no interval: a single task)"
    assert json.loads((path.parent / "eval.json").read_text())["ci95"] is None
    assert main(["eval", "--checkpoint", str(path), "--eval.tasks", "1"]) == 0
    assert "(no interval: a single task)  (1 tasks" in capsys.readouterr().out
    config.eval.tasks = 2
    assert "+- " in evaluate_run(path, config, progress=False).shown


def test_no_tasks_are_refused(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    with pytest.raises(UserError, match="tasks must be at least 1, not 0"):
        evaluate(*make(config), config.data, replace(config.eval, tasks=0), progress=False)


@pytest.mark.parametrize("part", ["soap.three_dem", "soap.cwem", "soap.hmem", "backbone", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tiny_run: Callable[..., Config], part: str, value: float) -> None:
    config = tiny_run()
    model, clips = make(config)
    name, weight = [(name, weight) for name, weight in model.named_parameters() if name.startswith(part)][-1]
    weight.data.view(-1)[-1] = value
    with pytest.raises(UserError, match=f"^{re.escape(name)}: the model's weights are not finite"):
        evaluate(model, clips, config.data, config.eval, progress=False)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_scores_that_are_not_finite_are_no_answers(
    tiny_run: Callable[..., Config], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(model__head=head, model__head_options={}, data__frames=4)
    model, clips = make(config)
    features = SOAPNet.features
    broken: list[int] = []

    def overflow(self: SOAPNet, frames: Tensor) -> Tensor:
        found = features(self, frames).clone()
        if not broken:
            found[0] *= math.inf
        broken.append(len(frames))
        return found

    monkeypatch.setattr(SOAPNet, "features", overflow)
    with pytest.raises(UserError, match=r"task \d+: the model's scores are not finite, so that its answers mean no"):
        evaluate(model, clips, config.data, config.eval, progress=False)


def test_evaluation_can_be_stopped(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    with pytest.raises(Interrupted):
        evaluate(*make(config), config.data, config.eval, progress=False, stop=lambda: True)


def test_a_stopped_evaluation_leaves_no_decoding_processes(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(data__workers=2)
    with pytest.raises(Interrupted) as stopped:
        evaluate(*make(config), config.data, config.eval, progress=False, stop=lambda: True)
    assert multiprocessing.active_children() == [], "even while the error, and with it every frame, is kept"
    assert stopped.value


def test_clips_are_kept_in_the_memory_handed_in(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run()
    model, clips = make(config)
    memory = ClipMemory(2**20)
    results = [evaluate(model, clips, config.data, config.eval, progress=False, memory=memory)]

    def read(self: Clip, indices: Any) -> Tensor:
        raise AssertionError("read again, though it was kept")

    monkeypatch.setattr(Clip, "read", read)
    results.append(evaluate(model, clips, config.data, config.eval, progress=False, memory=memory))
    assert results[0].confusion == results[1].confusion


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


def test_an_evaluation_that_is_stopped_leaves_the_last_result(saved: tuple[Path, Config], tmp_path: Path) -> None:
    path, config = saved
    (tmp_path / "eval.json").write_text("older")
    with pytest.raises(Interrupted):
        evaluate_run(path, config, progress=False, stop=lambda: True)
    assert (tmp_path / "eval.json").read_text() == "older"


def test_another_number_of_frames_than_trained_on_is_refused(saved: tuple[Path, Config]) -> None:
    path, config = saved
    config.data.frames = 5
    with pytest.raises(UserError, match=r"data\.frames is 5: .*best\.pt was trained on 3 frames"):
        evaluate_run(path, config, progress=False)


def never(*args: object, **options: object) -> None:
    raise AssertionError("evaluated, though the result can't be written")


def test_a_place_that_cannot_be_written_to_is_found_before_evaluating(
    saved: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = saved
    monkeypatch.setattr("soap_net.evaluate.evaluate", never)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for out, why in (
        ("notes.txt", r"notes\.txt/eval\.json: .* not a directory; .*--out"),
        ("notes.txt/deeper", r"notes\.txt/deeper/eval\.json: .* not a directory; .*--out"),
        ("folder.json", r"folder\.json: the result can't be written there: is a directory; .*--out"),
    ):
        with pytest.raises(UserError, match=why):
            evaluate_run(path, config, out=tmp_path / out, progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_read_only_run_folder_is_found_before_evaluating(
    saved: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = saved

    def refuse(dir: Path) -> None:  # by hand, as root writes anywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr("soap_net.evaluate.evaluate", never)
    monkeypatch.setattr("soap_net.evaluate.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"eval\.json: the result can't be written there: read-only file system; "):
        evaluate_run(path, config, progress=False)


def test_a_result_that_cannot_be_written_after_all_is_returned(
    saved: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = saved

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", fail)
    result = evaluate_run(path, config, progress=False)
    assert result.tasks == 20
    said = f"warning: {tmp_path / 'eval.json'}: the result can't be written: no space left on device\n"
    assert capsys.readouterr().err == said
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


def test_the_result_lies_beside_a_checkpoint_in_any_folder(saved: tuple[Path, Config], tmp_path: Path) -> None:
    path, config = saved
    folder = tmp_path / "run.json"
    folder.mkdir()
    shutil.move(path, folder)
    evaluate_run(folder / path.name, config, progress=False)
    assert (folder / "eval.json").is_file()


def test_a_checkpoint_of_another_backend_is_evaluated_with_the_configs(
    tiny_run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tiny_run(model__soap__backend="triton", model__soap__precision="fast")
    model, clips = make(trained)
    checkpoint.save(tmp_path / "best.pt", {"config": to_dict(trained), "model": model.state_dict()})
    config = tiny_run(model__soap__backend="reference", model__soap__precision="strict")
    used: list[tuple[str, str]] = []

    def noted(model: SOAPNet, *args: Any, **options: Any) -> EvalResult:
        assert isinstance(model.soap, SOAP)
        used.append((model.soap.backend, model.soap.precision))
        return evaluate(model, *args, **options)

    monkeypatch.setattr("soap_net.evaluate.evaluate", noted)
    result = evaluate_run(tmp_path / "best.pt", config, progress=False)
    assert used == [("reference", "strict")]
    model, clips = make(config)
    assert result.confusion == evaluate(model, clips, config.data, config.eval, progress=False).confusion


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_name_all_broken_clips(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(tiny_data, root)
    for label, video in ((0, 1), (0, 2), (1, 3), (2, 0)):
        for frame in (root / f"test (class {label})" / f"v{video}").iterdir():
            frame.write_bytes(b"")
    config = tiny_run(data__root=str(root), eval__way=3)
    model, _ = make(config)
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"config": to_dict(config), "model": model.state_dict()})
    alone = evaluate_run(path, config, out=tmp_path / "alone.json", progress=False)
    assert len(alone.failed_clips) == 4

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "soap_net", "eval", "--checkpoint", str(path), "--out", str(tmp_path / "two.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two.json").read_text())
    times = {"seconds", "episodes_per_second"}
    assert {key: value for key, value in alone.to_dict().items() if key not in times} == {
        key: value for key, value in together.items() if key not in times
    }
