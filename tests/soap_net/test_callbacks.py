from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from soap_net import checkpoint
from soap_net.callbacks import Callback, EndTraining
from soap_net.config import Config
from soap_net.errors import UserError
from soap_net.evaluate import EvalResult
from soap_net.interrupts import Interrupted
from soap_net.steps import Step
from soap_net.train import Training, TrainingStopped, train


class Noted(Callback):
    """Notes what it is told, with the episode."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_begin(self, training: Training) -> None:
        self.told.append(("begin", training.state.episode))

    def on_step(self, training: Training, step: Step) -> None:
        assert step.episodes.stop == training.state.episode
        self.told.append(("step", training.state.episode))

    def on_validation(self, training: Training, result: EvalResult) -> None:
        assert result.tasks == training.config.train.val_tasks
        assert training.state.best_episode <= training.state.validated == training.state.episode
        self.told.append(("validation", training.state.episode))

    def on_save(self, training: Training) -> None:
        self.told.append(("save", training.state.episode))

    def on_end(self, training: Training) -> None:
        self.told.append(("end", training.state.episode))


class StopAt(Callback):
    def __init__(self, episode: int, error: type[Exception] = Interrupted) -> None:
        self.episode, self.error = episode, error

    def on_step(self, training: Training, step: Step) -> None:
        if training.state.episode == self.episode:
            raise self.error


def validations(config: Config, monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Has validations find these accuracies, one after the other."""
    left = iter(accuracies)

    def found(*args: Any, **kwargs: Any) -> EvalResult:
        return EvalResult(next(left), 1.0, config.train.val_tasks, 2, 1, 1, "val", 0, 1.0, 1.0, {}, [], [], [])

    monkeypatch.setattr("soap_net.train.evaluate", found)


def test_callbacks_are_told_in_their_order_and_of_an_end_that_is_an_error(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=6, train__val_every=4, train__save_every=6)
    noted, second = Noted(), Noted()
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callbacks=[noted, second, StopAt(6)])
    assert noted.told[:4] == [("begin", 0), ("step", 2), ("step", 4), ("save", 4)], "best.pt comes before it is told"
    assert noted.told[4:] == [("validation", 4), ("save", 4), ("step", 6), ("save", 6), ("end", 6)]
    assert second.told == noted.told
    again = Noted()
    train(config, resume=True, progress=False, callbacks=[again])
    assert again.told[0] == ("begin", 6)
    assert ("validation", 6) in again.told, "what a run was stopped before is made up for"
    assert ("step", 6) not in again.told
    assert again.told[-1] == ("end", 6)


def test_a_callback_that_fails_ends_the_run_saved_and_the_others_are_told(tiny_run: Callable[..., Config]) -> None:
    config, noted = tiny_run(train__save_every=100, train__val_every=0), Noted()
    with pytest.raises(KeyError):
        train(config, progress=False, callbacks=[noted, StopAt(4, KeyError)])
    assert noted.told[-1] == ("end", 4)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 4


def test_a_callback_can_end_a_run_as_one_that_is_done(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__val_every=0)
    train(config, progress=False, callbacks=[StopAt(4, EndTraining)])
    assert checkpoint.load(config.out / "best.pt")["progress"]["episode"] == 4
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 4


# -------------------------------------------------------------------------------------------------- early stopping


def test_training_ends_once_so_many_validations_were_no_better(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(train__episodes=40, train__val_every=2, train__patience=3)
    validations(config, monkeypatch, [50.0, 40.0, 50.0, 60.0, 60.0, 10.0, 59.0, math.nan])
    train(config, progress=False)
    progress = checkpoint.load(config.out / "last.pt")["progress"]
    assert (progress["episode"], progress["best_episode"], progress["since_best"]) == (14, 8, 3)
    with pytest.raises(UserError, match="holds this run already, and it is finished"):
        train(config, progress=False)
    train(config, progress=False, resume=True)
    assert checkpoint.load(config.out / "last.pt")["progress"] == progress, "a finished one has nothing to go on with"


def test_a_run_gone_on_with_remembers_how_many_validations_brought_nothing(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(train__episodes=40, train__val_every=2, train__patience=2)
    validations(config, monkeypatch, [50.0, 40.0])
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callbacks=[StopAt(6)])
    validations(config, monkeypatch, [50.0])
    train(config, progress=False)
    assert checkpoint.load(config.out / "last.pt")["progress"]["episode"] == 6


def test_patience_without_validations_is_refused(tiny_run: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train\.patience is 2, in validations, and train\.val_every is 0"):
        tiny_run(train__patience=2, train__val_every=0)


# ------------------------------------------------------------------------------------------------------- services


def logged(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_what_the_log_says_also_of_a_run_gone_on_with(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__episodes=8, train__save_every=4)
    with pytest.raises(KeyError):
        train(config, progress=False, callbacks=[StopAt(6, KeyError)])
    train(config, progress=False)
    board = EventAccumulator(str(config.out / "tensorboard"), purge_orphaned_data=True).Reload()
    for name in ("loss", "accuracy", "lr", "episodes_per_second", "val_accuracy", "val_ci95"):
        expected = {int(line["episode"]): line[name] for line in logged(config) if name in line}
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(expected)


def records(content: bytes) -> Iterator[bytes]:
    """Those of a file of the package's: a header of 7 bytes, then LevelDB's log format."""
    place, part = 7, b""
    while place + 7 <= len(content):
        room = 2**15 - place % 2**15
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield part
            part = b""


def test_weights_and_biases_keeps_a_run_gone_on_with_as_one(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'wandb>=0.31'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_run(train__episodes=6, train__wandb="few-shot")
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callbacks=[StopAt(4)])
    time.sleep(1.1)  # the package names its folders by the second
    train(config, progress=False)
    found: list[dict[str, float]] = []
    runs = set()
    for path in sorted((config.out / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                runs.add((record.run.project, record.run.run_id, record.run.display_name))
            if record.HasField("history"):
                items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
                found.append({key: json.loads(i.value_json) for key, i in items.items() if not key.startswith("_")})
    assert len(runs) == 1
    assert [run[::2] for run in runs] == [("few-shot", "run")]
    assert found == [pytest.approx(line) for line in logged(config)]


def test_weights_and_biases_that_are_not_installed_are_one_line(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.wandb needs a package: pip install 'wandb>=0\.31'"):
        train(tiny_run(train__wandb="few-shot"), progress=False)
