from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from soap_net import checkpoint, train
from soap_net.callbacks import EachStep
from soap_net.cli import main
from soap_net.config import Config, TrainConfig, load_config, save_config
from soap_net.data.episodes import EpisodeDataset, EpisodeSampler
from soap_net.data.splits import load_split
from soap_net.data.transforms import clip_loader
from soap_net.errors import UserError, WriteError
from soap_net.evaluate import evaluate
from soap_net.interrupts import Interrupted
from soap_net.models import build_model
from soap_net.optimizers import learning_rate
from soap_net.runs import Progress
from soap_net.steps import NonFiniteLoss, Step
from soap_net.train import Training, TrainingStopped
from soap_net.versions import versions

REPOSITORY = Path(__file__).parents[2]


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains and returns the last checkpoint, less its config."""
    content = checkpoint.load(train.train(config, resume=resume, progress=False) / "last.pt")
    del content["config"]
    return content


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("episodes_per_second", None)
    return lines


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def thorough(tiny_run: Callable[..., Config], tmp_path: Path) -> Callable[[str], Config]:
    """Runs with everything that has a state: AdamW's moments, BatchNorm, dropout, a schedule, validation."""

    def make(name: str) -> Config:
        return tiny_run(train__optimizer="adamw", train__milestones=[6], train__save_every=4, out=str(tmp_path / name))

    return make


def interrupt_at(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> None:
    """Runs `action` as the `count`-th episode is fetched."""
    fetch, fetched = EpisodeDataset.__getitem__, iter(range(1, 10**6))

    def fetch_or_act(self: EpisodeDataset, position: int) -> Any:
        if next(fetched) == count:
            action()
        return fetch(self, position)

    monkeypatch.setattr(EpisodeDataset, "__getitem__", fetch_or_act)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_accumulation_equals_one_big_batch(tiny_run: Callable[..., Config], clip_norm: float) -> None:
    config = tiny_run(
        train__episodes=4, train__tasks_per_batch=4, train__clip_norm=clip_norm, train__val_every=0,
        episode__way=3, episode__queries=2, model__head_options={"out_dim": 8, "dropout": 0.0},
    )  # fmt: skip
    trained = run(config)["model"]

    model = build_model(config.model, config.data.frames, config.episode.seed)
    sampler = EpisodeSampler(load_split(config.data.root, "train"), 3, 1, 2, config.episode.seed)
    tasks = EpisodeDataset(sampler, clip_loader(config.data, train=True), range(4))
    losses = [
        -F.log_softmax(model(t.support, t.support_labels, t.query, 3), dim=1)[range(6), t.query_labels].sum()
        for t in (tasks[i] for i in range(4))
    ]
    torch.stack(losses).mean().backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= config.train.lr * parameter.grad
    torch.testing.assert_close(trained, model.state_dict(), rtol=1e-4, atol=1e-6)


def test_an_incomplete_last_batch_is_averaged_over_its_own_episodes(tiny_run: Callable[..., Config]) -> None:
    apart = run(tiny_run(train__episodes=3, train__tasks_per_batch=3, train__val_every=0))
    larger = tiny_run(train__episodes=3, train__tasks_per_batch=8, train__val_every=0)
    larger.out = larger.out.with_name("larger")
    torch.testing.assert_close(run(larger)["model"], apart["model"], rtol=0, atol=0)


def test_the_schedules_are_torchs_own_advanced_once_per_episode() -> None:
    cases: list[tuple[TrainConfig, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]]] = [
        (
            TrainConfig(episodes=40, lr=0.3, gamma=0.5, milestones=(7, 8, 30)),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [7, 8, 30], gamma=0.5),
        ),
        (
            TrainConfig(episodes=40, lr=0.3, schedule="cosine"),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40),
        ),
    ]
    for cfg, build in cases:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
        schedule = build(optimizer)
        for episode in range(cfg.episodes):
            assert learning_rate(cfg, episode) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny_run: Callable[..., Config], amp: str) -> None:
    content = run(tiny_run(train__amp=amp, train__episodes=4, train__val_every=4))
    assert all(torch.isfinite(weight).all() for weight in content["model"].values())
    assert ("scale" in content["scaler"]) == (amp == "fp16")


# ---------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 6), (signal.SIGTERM, 9), (signal.SIGINT, 1)])
def test_an_interrupted_run_resumes_to_the_weights_of_one_never_stopped(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, count: int
) -> None:
    whole = run(thorough("whole"))
    config = thorough("stopped")
    before = signal.getsignal(number)  # ignored, where a shell started pytest in the background
    with monkeypatch.context() as patched:
        interrupt_at(patched, count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingStopped) as stopped:
            train.train(config, progress=False)
    assert stopped.value.episode == (count - 1) // 2 * 2, "the batch under way counts for nothing"
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == stopped.value.episode
    assert signal.getsignal(number) is before, "handlers are put back"
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


@pytest.mark.parametrize("count", [4, 7, 12])
def test_a_killed_run_resumes_to_the_weights_of_one_never_stopped(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    whole = run(thorough("whole"))
    config = thorough("killed")

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        interrupt_at(patched, count, kill)
        with pytest.raises(Killed):
            train.train(config, progress=False)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"episode": 1')  # the line that was being written
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)
    best = [checkpoint.load(folder.out / "best.pt") for folder in (config, thorough("whole"))]
    assert_equal(best[0]["model"], best[1]["model"])


def test_an_interrupted_validation_is_made_up_for(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(thorough("whole"))
    config = thorough("stopped")
    with monkeypatch.context() as patched:
        evaluate = train.evaluate

        def evaluate_interrupted(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return evaluate(*args, **kwargs)

        patched.setattr(train, "evaluate", evaluate_interrupted)
        with pytest.raises(TrainingStopped):
            train.train(config, progress=False)
    progress = checkpoint.load(config.out / "last.pt")["progress"]
    assert (progress["episode"], progress["validated"]) == (4, 0)
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


def test_resuming_a_finished_run_changes_nothing(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=4)
    assert_equal(run(config), run(config, resume=True))


def test_decoding_processes_change_nothing(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    here = run(tiny_run(train__episodes=4))
    assert_equal(run(tiny_run(train__episodes=4, data__workers=2, out=str(tmp_path / "workers"))), here)


def test_the_callers_random_state_is_left_alone(tiny_run: Callable[..., Config]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tiny_run(train__episodes=2, train__val_every=0))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ callback


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_a_callback_sees_each_step_with_its_gradients(tiny_run: Callable[..., Config], clip_norm: float) -> None:
    config = tiny_run(train__episodes=5, train__val_every=0, train__clip_norm=clip_norm, train__optimizer="sgd")
    steps: list[Step] = []
    before = build_model(config.model, config.data.frames, config.episode.seed)

    def note(training: Training, step: Step) -> None:
        assert training.state.episode == step.episodes.stop
        norm = nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
        assert 0 < step.clipped <= 1
        assert (step.clipped < 1) == (clip_norm > 0)
        if clip_norm:
            assert float(norm) == pytest.approx(clip_norm, rel=1e-3)
        if not steps:
            for old, new in zip(before.parameters(), training.model.parameters(), strict=True):
                expected = old if new.grad is None else old - step.lr * new.grad
                torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-7)
        steps.append(step)

    train.train(config, progress=False, callbacks=[EachStep(note)])
    assert [step.episodes for step in steps] == [range(0, 2), range(2, 4), range(4, 5)]
    for step, line in zip(steps, metrics(config.out), strict=True):
        assert (step.loss, step.accuracy, step.lr) == (line["loss"], line["accuracy"], line["lr"])
        assert len(step.losses) == len(step.accuracies) == len(step.episodes)
        assert step.loss == pytest.approx(sum(step.losses) / len(step.losses))
        assert step.accuracy == pytest.approx(sum(step.accuracies) / len(step.accuracies))
        assert step.seconds > 0


def test_what_a_callback_does_with_the_model_changes_no_training(thorough: Callable[[str], Config]) -> None:
    whole = run(thorough("whole"))
    config = thorough("watched")
    seen: list[float] = []

    def watch(training: Training, step: Step) -> None:
        torch.rand(3)
        clips = training.val_clips
        assert clips is not None
        seen.append(evaluate(training.model, clips, config.data, config.eval, progress=False).accuracy)
        training.save(config.out / f"episode{training.state.episode}.pt")

    train.train(config, progress=False, callbacks=[EachStep(watch)])
    assert len(seen) == 6
    after = checkpoint.load(config.out / "last.pt")
    del after["config"]
    assert_equal(after, whole)
    assert "optimizer" not in checkpoint.load(config.out / "episode12.pt")
    assert_equal(checkpoint.load(config.out / "episode12.pt")["model"], whole["model"])


def test_a_callback_can_stop_the_training_which_resumes_as_if_never_stopped(thorough: Callable[[str], Config]) -> None:
    whole = run(thorough("whole"))
    config = thorough("stopped")

    def stop_at_8(training: Training, step: Step) -> None:
        if training.state.episode == 8:  # where a validation is due
            raise Interrupted

    with pytest.raises(TrainingStopped):
        train.train(config, progress=False, callbacks=[EachStep(stop_at_8)])
    progress = checkpoint.load(config.out / "last.pt")["progress"]
    assert (progress["episode"], progress["validated"]) == (8, 4)
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


def test_a_caller_that_says_when_to_stop_keeps_its_signal_handlers(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(thorough("whole"))
    config = thorough("stopped")
    asked: list[bool] = []
    handler = signal.getsignal(signal.SIGINT)
    fetch = EpisodeDataset.__getitem__

    def fetch_and_look(self: EpisodeDataset, position: int) -> Any:
        assert signal.getsignal(signal.SIGINT) is handler
        return fetch(self, position)

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 7  # once after each episode, once more after each step, and in validation

    with monkeypatch.context() as patched:
        patched.setattr(EpisodeDataset, "__getitem__", fetch_and_look)
        with pytest.raises(TrainingStopped) as stopped:
            train.train(config, progress=False, stop=stop)
    assert stopped.value.episode == 4
    assert_equal(run(config, resume=True), whole)


# ------------------------------------------------------------------------------------------------- run folder


def test_a_run_folder_holds_config_versions_metrics_and_checkpoints(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    folder = train.train(config, progress=False)
    assert load_config(folder / "config.yaml") == config
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert list((folder / "tensorboard").iterdir())
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_accuracy" in line]
    assert [line["episode"] for line in steps] == [2, 4, 6, 8, 10, 12]
    assert [line["episode"] for line in validations] == [4, 8, 12]
    assert {*steps[0]} == {"episode", "loss", "accuracy", "lr"}
    assert all(0 < line["loss"] < 10 and 0 <= line["accuracy"] <= 100 for line in steps)
    best = checkpoint.load(folder / "best.pt")["progress"]
    assert best["best_accuracy"] == max(line["val_accuracy"] for line in validations)
    assert best["episode"] == best["best_episode"] == max(validations, key=lambda v: v["val_accuracy"])["episode"]


def test_without_validation_the_last_weights_are_the_best(tiny_run: Callable[..., Config]) -> None:
    folder = train.train(tiny_run(train__val_every=0, train__episodes=2), progress=False)
    assert_equal(checkpoint.load(folder / "best.pt")["model"], checkpoint.load(folder / "last.pt")["model"])


def test_a_folder_of_another_run_is_not_overwritten(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=2)
    train.train(config, progress=False)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    for resume in (False, True):
        with pytest.raises(UserError, match=r"another config: train\.lr is 0\.01 there and 0\.5 here; choose another"):
            train.train(tiny_run(train__episodes=2, train__lr=0.5), resume=resume, progress=False)
    with pytest.raises(UserError, match="holds this run already, and it is finished: choose another --out"):
        train.train(config, progress=False)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before


def stop_at(episode: int) -> Callable[[Training, Step], None]:
    """A callback that stops the training after so many episodes."""

    def stop(training: Training, step: Step) -> None:
        if training.state.episode == episode:
            raise Interrupted

    return stop


def test_the_same_command_goes_on_with_a_run_that_was_not_finished(
    thorough: Callable[[str], Config], capsys: pytest.CaptureFixture[str]
) -> None:
    straight, stopped = run(thorough("straight")), thorough("stopped")
    with pytest.raises(TrainingStopped):
        train.train(stopped, progress=False, callbacks=[EachStep(stop_at(6))])
    assert capsys.readouterr().err == ""
    assert_equal(run(stopped), straight)
    assert capsys.readouterr().err == f"{stopped.out} holds this run, stopped after episode 6: going on with it\n"
    assert metrics(stopped.out) == metrics(thorough("straight").out)


def test_a_run_stopped_with_other_versions_goes_on_where_that_is_asked_for(thorough: Callable[[str], Config]) -> None:
    config = thorough("stopped")
    with pytest.raises(TrainingStopped):
        train.train(config, progress=False, callbacks=[EachStep(stop_at(6))])
    before = checkpoint.load(config.out / "last.pt")["progress"]
    path = config.out / "versions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "1.0"}))
    with pytest.raises(UserError, match=r"stopped after episode 6 with torch 1\.0, which is .* here: add --resume"):
        train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"] == before
    assert run(config, resume=True)["progress"]["episode"] == 12


def test_a_process_that_torchrun_started_again_finds_a_finished_run_done(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(tiny_run(train__episodes=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert_equal(run(tiny_run(train__episodes=2)), before)


def test_two_trainings_in_one_folder_at_a_time_are_refused(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soap_net.runs.time.sleep", lambda seconds: None)
    config = tiny_run(train__episodes=4)

    def train_too(training: Training, step: Step) -> None:
        with pytest.raises(UserError, match=f"^{config.out}: another process is training in it; wait for it, or"):
            train.train(config, progress=False)

    train.train(config, progress=False, callbacks=[EachStep(train_too)])
    train.train(config, progress=False, resume=True)


def test_what_changes_no_result_may_change_on_resuming(tiny_run: Callable[..., Config], tiny_data: Path) -> None:
    train.train(tiny_run(train__episodes=2), progress=False)
    changed = tiny_run(train__episodes=2, data__workers=1, eval__tasks=7, train__max_failed_share=0.5)
    train.train(changed, resume=True, progress=False)
    with pytest.raises(UserError, match=r"eval\.queries is 1 there and 2 here"):  # validation has as many
        train.train(tiny_run(train__episodes=2, eval__queries=2), resume=True, progress=False)


def test_a_relative_data_set_is_the_same_one_from_any_folder(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        shutil.copytree(tiny_data, tmp_path / folder / "data")
    for frame in (tmp_path / "there").rglob("*.png"):
        frame.unlink()  # another data set of that name
    monkeypatch.chdir(tmp_path / "here")
    given = {"data__root": "data", "data__train_split": "data/splits/train.txt", "data__test_split": "lists/../list"}
    config = tiny_run(train__episodes=2, **given)
    train.train(config, progress=False)
    monkeypatch.chdir(tmp_path / "there")
    kept = load_config(config.out / "config.yaml").data
    assert (kept.root, kept.train_split) == (tmp_path / "here/data", tmp_path / "here/data/splits/train.txt")
    assert checkpoint.load(config.out / "last.pt")["config"]["data"]["root"] == str(tmp_path / "here/data")
    (config.out / "last.pt").unlink()
    assert main(["train", "--resume", str(config.out)]) == 0
    assert config.data.root == Path("data"), "the caller's config stays as it was"


def test_a_run_from_a_relative_weights_file_goes_on_from_any_folder_and_by_the_same_command(
    tiny_run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.train(tiny_run(out=str(tmp_path / "first"), train__episodes=2), progress=False)
    (tmp_path / "other").mkdir()
    shutil.copy("first/best.pt", "other/best.pt")
    given = {"train__val_every": 0, "train__episodes": 6}
    config = tiny_run(model__weights="first/best.pt", **given)
    with pytest.raises(TrainingStopped):
        train.train(config, progress=False, callbacks=[EachStep(stop_at(2))])
    assert load_config(config.out / "config.yaml").model.weights == str(tmp_path / "first/best.pt")
    # What an older version wrote, which kept the file as it was given.
    save_config(config, config.out / "config.yaml")
    content = checkpoint.load(config.out / "last.pt")
    content["config"]["model"]["weights"] = "first/best.pt"
    checkpoint.save(config.out / "last.pt", content)
    with pytest.raises(TrainingStopped):
        train.train(config, progress=False, callbacks=[EachStep(stop_at(4))])
    with pytest.raises(UserError, match=r"another config: model\.weights is .*first/best.pt' there and .*other/best"):
        train.train(tiny_run(model__weights="other/best.pt", **given), progress=False)
    monkeypatch.chdir(tmp_path / "other")
    assert main(["train", "--resume", str(config.out)]) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(["train", "--resume", str(config.out), "--model.weights", str(tmp_path / "moved" / "best.pt")]) == 0


def test_a_moved_data_set_is_named_with_the_option_that_finds_it(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_data, old)
    config = tiny_run(train__episodes=2, data__root=str(old), data__train_split=str(old / "splits/train.txt"))
    train.train(config, progress=False)
    old.rename(new)
    commands = [["train", "--resume", str(config.out)], ["eval", "--checkpoint", str(config.out / "best.pt")]]
    for command in commands:
        assert main(command) == 2
        assert f"{old}: no such data set folder; say with --data.root where it is" in capsys.readouterr().err
        command.append(f"--data.root={new}")
    assert main(commands[0]) == 2
    assert "no such file or directory); say with --data.train_split where it is" in capsys.readouterr().err
    lists = new / "splits"
    assert main([*commands[0], f"--data.train_split={lists / 'test.txt'}"]) == 2
    assert "data.train_split is 'train.txt' there and 'test.txt' here" in capsys.readouterr().err
    assert main([*commands[0], f"--data.train_split={lists / 'train.txt'}"]) == 0
    assert main(commands[1]) == 0


def test_versions_name_the_commit_in_a_checkout() -> None:
    commit = versions()["git"]
    if not (REPOSITORY / ".git").exists():
        assert commit is None
    else:
        assert commit is not None
        assert len(commit.removesuffix("+changes")) == 40


# ------------------------------------------------------------------------------------------------------ failures


def test_a_loss_that_is_not_finite_names_the_episode_and_its_clips(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__lr=1e30, train__val_every=0, train__save_every=12)
    with pytest.raises(
        NonFiniteLoss, match=r"loss is \S+ in episode [23]; a lower .*; its clips: train \(class \d\)/v\d, "
    ) as raised:
        train.train(config, progress=False)
    assert "\n" not in str(raised.value)


def test_a_validation_of_one_task_claims_no_interval(
    tiny_run: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(train__episodes=4, train__val_tasks=1)
    train.train(config)
    [validation] = [entry for entry in metrics(config.out) if "val_accuracy" in entry]
    assert validation.keys() == {"episode", "val_accuracy"}
    assert "(no interval: a single task) (best" in capsys.readouterr().err


def test_too_few_classes_are_refused_before_the_run_folder_is_made(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(episode__way=4)
    with pytest.raises(UserError, match="4-way episodes need 4 classes, and the train split has 3"):
        train.train(config, progress=False)
    assert not config.out.exists()


@pytest.fixture
def damaged_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data set with one training clip whose frames are no images."""
    root = tmp_path / "damaged"
    shutil.copytree(tiny_data, root)
    for frame in (root / "train (class 1)" / "v2").iterdir():
        frame.write_text("not an image")
    return root


def test_broken_clips_are_named_counted_and_replaced(
    tiny_run: Callable[..., Config], damaged_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(data__root=str(damaged_data), train__max_failed_share=0.5, train__val_every=0)
    progress = run(config)["progress"]
    assert progress["clips_failed"] > 0
    assert progress["clips_read"] == 12 * 4 + progress["clips_failed"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "train (class 1)/v2" in line]
    assert warnings
    assert len(set(warnings)) == len(warnings), "each is named once"


@pytest.mark.parametrize("still", [False, True])
def test_clips_that_are_cut_short_are_trained_on_and_named_once(
    still: bool,
    tiny_run: Callable[..., Config],
    tiny_data: Path,
    cut_video: Callable[[Path], tuple[Path, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "cut"
    shutil.copytree(tiny_data, root)
    shutil.rmtree(root / "train (class 1)" / "v2")
    path, frames = cut_video(root / "train (class 1)" / "v2.mp4")
    frozen = {"train__freeze": ["backbone", "soap"], "data__augment": False} if still else {}
    config = tiny_run(data__root=str(root), train__val_every=0, data__workers=1, **frozen)
    assert run(config)["progress"]["clips_failed"] == 0
    told = f"warning: {path}: the file is cut short: {frames} of its 30 frames are there"
    assert [line for line in capsys.readouterr().err.splitlines() if "cut short" in line] == [told]


def test_training_stops_when_too_many_clips_are_broken(tiny_run: Callable[..., Config], damaged_data: Path) -> None:
    config = tiny_run(data__root=str(damaged_data), train__max_failed_share=0.01, train__val_every=0)
    with pytest.raises(UserError, match=r"\d+ of \d+ clips read up to episode 12 could not be decoded, more than "):
        train.train(config, progress=False)
    # A few reads tell little of a data set: judged at the end of so short a run, with all that was learnt saved.
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 12


def test_training_stops_early_once_enough_clips_were_read(
    tiny_run: Callable[..., Config], damaged_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soap_net.runs.ENOUGH_READ", 20)
    config = tiny_run(data__root=str(damaged_data), train__max_failed_share=0.01, train__val_every=0)
    with pytest.raises(UserError, match="could not be decoded"):
        train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] < 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_readable_clips_is_one_line(
    tiny_run: Callable[..., Config], damaged_data: Path, workers: int
) -> None:
    for frame in (damaged_data / "train (class 1)").rglob("*.png"):
        frame.write_bytes(b"")
    config = tiny_run(data__root=str(damaged_data), data__workers=workers, train__val_every=0, episode__way=3)
    with pytest.raises(UserError, match=r"class 'train \(class 1\)' has no readable clip left") as raised:
        train.train(config, progress=False)
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------- whatever ends a run saves first


class Broken(BaseException):
    """An error that nothing in the project knows."""


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "count"), [(Broken(), 6), (KeyboardInterrupt(), 9), (UserError("a worker"), 12), (OSError(5, "io"), 4)]
)
def test_whatever_ends_a_run_saves_up_to_the_last_finished_step(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch, error: BaseException, count: int
) -> None:
    whole = run(thorough("whole"))
    config = thorough("ended")
    config.train.save_every = 100
    with monkeypatch.context() as patched:
        interrupt_at(patched, count, failing(error))
        with pytest.raises(type(error)):
            train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == (count - 1) // 2 * 2
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


def test_what_ends_a_run_before_its_first_step_leaves_no_checkpoint(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 2, failing(Broken()))
    with pytest.raises(Broken):
        train.train(config := tiny_run(), progress=False)
    assert not (config.out / "last.pt").exists()


@pytest.mark.parametrize("name", ["_note_validation", "refuse_failures", "save_if_due", "validate_if_due"])
def test_an_error_between_steps_costs_none(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = run(thorough("whole"))
    config = thorough("ended")
    owner: Any = Progress if hasattr(Progress, name) else Training
    work = getattr(owner, name)

    def fail_at_8(self: Any, *args: Any) -> Any:
        if getattr(self, "state", self).episode == 8:
            raise Broken
        return work(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail_at_8)
        with pytest.raises(Broken):
            train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 8
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


def test_a_step_that_broke_off_in_the_middle_of_its_update_is_not_saved(
    thorough: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(thorough("whole"))
    config = thorough("ended")
    step = torch.optim.AdamW.step

    def half_a_step(self: torch.optim.AdamW, *args: Any) -> Any:
        if self.param_groups[0]["lr"] < config.train.lr:  # after the milestone at episode 6
            with torch.no_grad():
                self.param_groups[0]["params"][0].zero_()
            raise Broken
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", half_a_step)
        with pytest.raises(Broken):
            train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 4
    assert_equal(run(config, resume=True), whole)


def test_a_class_that_runs_out_of_readable_clips_costs_no_episode(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    config = tiny_run(data__root=str(root), train__val_every=0, train__save_every=100, episode__way=3)
    whole = run(tiny_run(train__val_every=0, train__save_every=100, episode__way=3, out=str(tmp_path / "whole")))
    gone = root / "train (class 1)"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8, lambda: gone.rename(root / "away"))
        with pytest.raises(UserError, match=r"class 'train \(class 1\)' has no readable clip left"):
            train.train(config, progress=False)
    (root / "away").rename(gone)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 6
    resumed = run(config, resume=True)
    assert_equal(resumed, whole)


# ------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("name", "room"), [("metrics.jsonl", 60), ("tensorboard/events*", 100), ("last.pt", 9000), ("*st.pt", -1)]
)
def test_a_full_disk_is_one_line_and_costs_nothing_once_there_is_room(
    largest_file: Callable[[int], AbstractContextManager[None]],
    thorough: Callable[[str], Config],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    room: int,
) -> None:
    whole = run(thorough("whole"))
    config = thorough("full")
    with contextlib.ExitStack() as full, monkeypatch.context() as patched:

        def fill() -> None:
            size = next(config.out.glob(name)).stat().st_size
            full.enter_context(largest_file(room if name == "last.pt" else size + room))

        interrupt_at(patched, 6, fill)
        with pytest.raises(WriteError) as raised:
            train.train(config, progress=False)
    path = str(raised.value).removesuffix(": file too large")
    assert fnmatch(path, f"{config.out}/{'*st.pt' if name == 'last.pt' else name}")
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 4
    assert not list(config.out.glob(".*")), "nothing half-written"
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


def test_a_step_that_could_not_be_logged_at_once_is_saved_with_its_line(
    largest_file: Callable[[int], AbstractContextManager[None]],
    thorough: Callable[[str], Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(thorough("whole"))
    config = thorough("full")
    rescue = Training.rescue
    with contextlib.ExitStack() as full, monkeypatch.context() as patched:

        def rescue_with_room(self: Training) -> None:
            full.close()
            rescue(self)

        patched.setattr(Training, "rescue", rescue_with_room)
        interrupt_at(patched, 6, lambda: full.enter_context(largest_file(0)))
        with pytest.raises(WriteError, match=r"metrics\.jsonl: file too large$"):
            train.train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 6
    assert metrics(config.out)[-1]["episode"] == 6
    assert_equal(run(config, resume=True), whole)
    assert metrics(config.out) == metrics(thorough("whole").out)


# -------------------------------------------------------------------------------------------------- damaged run folders


def test_a_damaged_config_costs_nothing(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=4)
    whole = run(config)
    text = (config.out / "config.yaml").read_bytes()
    for size in (0, 200, len(text) - 1):
        (config.out / "config.yaml").write_bytes(text[:size])
        assert_equal(run(config, resume=True), whole)
        assert (config.out / "config.yaml").read_bytes() == text


def test_a_damaged_last_checkpoint_says_what_else_there_is(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=4)
    run(config)
    last, best = config.out / "last.pt", config.out / "best.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a whole checkpoint") as raised:
        train.train(config, resume=True, progress=False)
    assert str(raised.value).endswith(f"; {best} is whole, for eval and classify; to train anew, delete {last}")
    best.write_bytes(b"")
    with pytest.raises(UserError, match="not a whole checkpoint") as raised:
        train.train(config, resume=True, progress=False)
    assert str(raised.value).endswith(f"; to train anew, delete {last}")
    assert "is whole" not in str(raised.value)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_run(train__episodes=4)
    wider = {"model__head_options": {"out_dim": 9}}
    other = tiny_run(train__episodes=4, train__lr=0.5, out=str(tmp_path / "other"), **wider)
    for one in (config, other):
        train.train(one, progress=False)
    shutil.copy(other.out / "last.pt", config.out)
    with pytest.raises(UserError, match=r"last\.pt holds a run of another config: model.*there.*--out$"):
        train.train(config, resume=True, progress=False)


# ------------------------------------------------------------------------------------------------ whole processes


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_ends_training_cleanly(
    tiny_run: Callable[..., Config], tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny_run(train__episodes=100_000, train__val_every=0, data__workers=2)
    save_config(config, tmp_path / "c.yaml")
    command = [sys.executable, "-m", "soap_net", "train", "--config", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while not (config.out / "last.pt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"go on with: soap-net train --resume {config.out}" in errors
    assert "Traceback" not in errors
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] > 0


FULL_DISK = """
mount -t tmpfs -o size=700k tmpfs "$DISK"
"$PYTHON" -m soap_net train --config "$CONFIG" && exit 3
find "$DISK" -name '*.part' >&2
mount -o remount,size=16m "$DISK"
"$PYTHON" -m soap_net train --resume "$DISK/run" >/dev/null 2>&1
cp -r "$DISK/run" "$RESULT"
"""


@pytest.mark.slow
def test_on_a_disk_that_is_full_a_run_ends_in_one_line_and_goes_on_once_there_is_room(
    thorough: Callable[[str], Config], tmp_path: Path
) -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to make namespaces, for a disk of a given size")
    whole = run(thorough("whole"))
    config = thorough("disk/run")
    (tmp_path / "disk").mkdir()
    save_config(config, tmp_path / "c.yaml")
    given = {"DISK": tmp_path / "disk", "CONFIG": tmp_path / "c.yaml", "RESULT": tmp_path / "result"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", FULL_DISK], capture_output=True, text=True, timeout=200, check=False,
        env={**environment(), "PYTHON": sys.executable, **{name: str(value) for name, value in given.items()}},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "episode" not in line and line.strip()]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(rf"soap-net: {config.out}/\S+: no space left on device", lines[0])
    result = checkpoint.load(tmp_path / "result" / "last.pt")
    del result["config"]
    assert_equal(result, whole)
    assert metrics(tmp_path / "result") == metrics(thorough("whole").out)


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "train__tasks_per_batch": 4, "train__optimizer": "sgd", "train__momentum": 0.9, "train__episodes": 10,
        "episode__way": 3, "train__val_every": 4, "train__clip_norm": 1.0,
    }  # fmt: skip
    alone = run(tiny_run(**common))
    config = tiny_run(**common, out=str(tmp_path / "two"))
    save_config(config, tmp_path / "two.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "soap_net", "train", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    together = checkpoint.load(config.out / "last.pt")
    weights = {n: w for n, w in alone["model"].items() if "running" not in n and "num_batches" not in n}
    for name, weight in weights.items():
        torch.testing.assert_close(together["model"][name], weight, rtol=1e-3, atol=1e-5)
    assert together["progress"]["clips_read"] == alone["progress"]["clips_read"]
    pairs = zip(metrics(config.out), metrics(tiny_run(**common).out), strict=True)
    for two, one in pairs:
        assert two.keys() == one.keys()
        if "loss" in one:
            assert math.isclose(two["loss"], one["loss"], rel_tol=1e-3)


def test_training_on_several_sets_takes_as_many_ways_as_the_episodes_set_has(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    (few / "splits").mkdir(parents=True)
    lines = (tiny_data / "splits/train.txt").read_text().split("\n")[:8]  # two of the three classes
    (few / "splits/train.txt").write_text("\n".join(lines))
    for folder in {line.partition("/")[0] for line in lines}:
        (few / folder).symlink_to(tiny_data / folder)
    both = [str(tiny_data), str(few)]
    config = tiny_run(data__roots=both, episode__way=3, train__episodes=8, train__val_every=0, eval__way=3)
    train.train(config, progress=False)
    metrics = [entry for entry in train.RunFolder(config.out).read_metrics() if "loss" in entry]
    assert metrics[-1]["episode"] == 8
    sampler = EpisodeSampler(load_split(config.data.place, "train"), 3, 1, 1, config.episode.seed, fewer=True)
    assert {len(sampler[index].classes) for index in range(8)} == {2, 3}
