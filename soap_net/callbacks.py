"""What may follow a training as it goes: TensorBoard, Weights & Biases, early stopping, and whatever users add."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from soap_net.config import TrainConfig, to_dict
from soap_net.errors import UserError
from soap_net.files import Appended

if TYPE_CHECKING:
    from soap_net.evaluate import EvalResult
    from soap_net.steps import Step
    from soap_net.train import Training


class EndTraining(Exception):
    """Raised by a callback, in all processes: the run ends here, as one that is done."""


class Callback:
    """Is told of a training as it goes, in every process of it (`training.ranks.first` tells the one that writes).

    All methods may be left as they are. An error in one ends the run, with its state saved; `Interrupted` ends it as
    Ctrl-C does, to be gone on with, and `EndTraining` as one that is done. They may use the model, and random numbers,
    as they like, but must not change its weights.
    """

    def on_begin(self, training: Training) -> None:
        """Before the first step, at `training.state.episode`: 0, or where the run is gone on with."""

    def on_step(self, training: Training, step: Step) -> None:
        """After each optimizer step; the parameters still hold its gradients. A validation or save may be due then."""

    def on_validation(self, training: Training, result: EvalResult) -> None:
        """After each validation, once its weights are saved if none were better."""

    def on_save(self, training: Training) -> None:
        """Before a checkpoint is written: what it counts as done is not told again."""

    def on_end(self, training: Training) -> None:
        """Where the run ends in whatever way, if `on_begin` came to its end."""


class EachStep(Callback):
    """Calls a function after each step: `Callback.on_step` says when, and what raising does."""

    def __init__(self, call: Callable[[Training, Step], object]) -> None:
        self._call = call

    def on_step(self, training: Training, step: Step) -> None:
        self._call(training, step)


def configured(cfg: TrainConfig) -> list[Callback]:
    """Those that the config asks for."""
    found: list[Callback] = [TensorBoard()]
    if cfg.wandb:
        found.append(WeightsAndBiases(cfg.wandb))
    return [*found, EarlyStopping()] if cfg.patience else found


class EarlyStopping(Callback):
    """Ends the run once `train.patience` validations in a row were no better than the best before them."""

    def on_begin(self, training: Training) -> None:
        if training.state.finished(training.config.train):
            raise EndTraining

    def on_validation(self, training: Training, result: EvalResult) -> None:
        state = training.state
        if state.finished(training.config.train):
            if training.shows:
                tqdm.write(f"ends: {state.since_best} validations were no better than the best", file=sys.stderr)
            raise EndTraining


class TensorBoard(Callback):
    """Loss, accuracy, rate and speed of each step, and validations, in the run folder's ``tensorboard``.

    TensorBoard's own writer does so in a thread, which prints its errors; this one leaves them to the caller.

    Raises:
        WriteError: what could not be written is kept for the next time.
    """

    _file: Appended | None = None

    def on_begin(self, training: Training) -> None:
        if not training.ranks.first:
            return
        from tensorboard.compat.proto import event_pb2  # slow to import, and needed by one process only
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        folder, first_step = training.run.tensorboard, training.state.episode + 1
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / f"{name}.{sum(1 for _ in folder.glob('*'))}")
        self._records = RecordWriter(self._file)
        self._add(first_step, file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(first_step, session_log=started)  # drops what older files have from that step on

    def on_step(self, training: Training, step: Step) -> None:
        self._write(step.episodes.stop, step.logged)

    def on_validation(self, training: Training, result: EvalResult) -> None:
        self._write(training.state.episode, result.logged)

    def on_save(self, training: Training) -> None:
        if self._file is not None:
            self._file.sync()

    def on_end(self, training: Training) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, episode: int, values: dict[str, float]) -> None:
        if self._file is not None:
            for name, value in values.items():
                self._add(episode, summary=self._scalar(name, value))
            self._file.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())


class WeightsAndBiases(Callback):
    """The same and the settings, for a project of Weights & Biases; its files are in the run folder's ``wandb``.

    A run that is gone on with stays one run there. With ``WANDB_MODE=offline`` nothing is sent: ``wandb sync`` does.

    Raises:
        UserError: the package is not there, or it can't begin, as without a login.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._run: Any = None

    def on_begin(self, training: Training) -> None:
        if not training.ranks.first:
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError("train.wandb needs a package: pip install 'wandb>=0.31'") from error
        folder = training.run.path
        try:
            self._run = wandb.init(
                project=self.project, name=folder.name, config=to_dict(training.config), dir=str(folder),
                id=_identity(folder / "wandb"), resume="allow", settings=wandb.Settings(silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(
                f"train.wandb: {' '.join(str(error).split())}; WANDB_MODE=offline sends nothing, and writes into the "
                "run folder"
            ) from error
        self._run.define_metric("*", step_metric="episode")

    def on_step(self, training: Training, step: Step) -> None:
        if self._run is not None:
            self._run.log({"episode": step.episodes.stop, **step.logged})

    def on_validation(self, training: Training, result: EvalResult) -> None:
        if self._run is not None:
            self._run.log({"episode": training.state.episode, **result.logged})

    def on_end(self, training: Training) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if training.state.finished(training.config.train) else 1)


def _identity(folder: Path) -> str | None:
    """The name that the service gave a run before, by its folders; None where there was none."""
    before = sorted(folder.glob("*run-*-*"))
    return before[-1].name.rpartition("-")[2] if before else None
