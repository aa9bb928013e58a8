"""The run folder: which files a run has, what may change between a run and its continuation, and reading it back."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from soap_net.config import Config, TrainConfig, flatten, from_dict, save_config, to_dict
from soap_net.errors import UserError
from soap_net.files import Appended, read_json, remove_stale, write_text, writing
from soap_net.settings import AtLeast, build, read, read_yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FREE_TO_CHANGE = ("data.root", "data.roots", "data.workers", "out", "device", "train.max_failed_share", "train.wandb")
"""Settings that may change between a run and its continuation, as they change no result."""
COMPUTES = ("soap_net", "torch")
"""Of `versions`, those that a run goes on with only where they are the same, unless `--resume` says so."""


ENOUGH_READ = 500
"""So many clips read tell how many of a data set are broken; a few reads may meet the same one twice."""


class AnotherRun(UserError):
    """A folder or checkpoint that belongs to a run of another config."""


class UnreadableRun(UserError):
    """A folder whose run's settings can't be read: there is none, or its files are damaged."""


@dataclass
class Progress:
    """How far a run has come; all of it goes into checkpoints."""

    episode: Annotated[int, AtLeast(0)] = 0
    validated: Annotated[int, AtLeast(0)] = 0
    best_accuracy: Annotated[float, AtLeast(-1, most=100)] = -1.0
    best_episode: Annotated[int, AtLeast(0)] = 0
    clips_read: Annotated[int, AtLeast(0)] = 0
    clips_failed: Annotated[int, AtLeast(0)] = 0
    since_best: Annotated[int, AtLeast(0)] = 0

    def finished(self, cfg: TrainConfig) -> bool:
        """Whether a run of `cfg` ends here: at its last episode, or after `cfg.patience` validations without gain."""
        return self.episode >= cfg.episodes or 0 < cfg.patience <= self.since_best

    def refuse_failures(self, cfg: TrainConfig) -> None:
        """Raises UserError where too many of the clips read can't be decoded."""
        judged = self.clips_read >= ENOUGH_READ or self.episode == cfg.episodes
        if judged and self.clips_failed > cfg.max_failed_share * self.clips_read:
            raise UserError(
                f"{self.clips_failed} of {self.clips_read} clips read up to episode {self.episode} could not be "
                f"decoded, more than train.max_failed_share {cfg.max_failed_share}; `soap-net data check` lists them"
            )

    @classmethod
    def of(cls, content: Mapping[str, Any], cfg: TrainConfig, path: Path) -> Progress:
        """That of the checkpoint `path`; raises `UserError` where no run of `cfg` comes by it."""
        values = read(content.get("progress"), cls, str(path))
        state = build(cls, values)
        between = state.episode % cfg.tasks_per_batch and state.episode != cfg.episodes
        if (
            not values
            or between
            or state.episode > cfg.episodes
            or max(state.validated, state.best_episode) > state.episode
        ):
            raise UserError(
                f"{path}: its progress is that of no such run: episode {state.episode} of {cfg.episodes} in batches of "
                f"{cfg.tasks_per_batch}, validated at {state.validated}, best at {state.best_episode}"
            )
        return state


class RunFolder:
    """The files of the run in the folder `path`, each of which may be missing.

    Attributes:
        config: ``config.yaml``, all settings.
        versions: ``versions.json``, what `versions` found when the run was begun or last gone on with.
        metrics: ``metrics.jsonl``, a line for each optimizer step and each validation, see `MetricsLog`.
        tensorboard: a folder with the same for TensorBoard, see `soap_net.callbacks`.
        last: ``last.pt``, the checkpoint to go on from.
        best: ``best.pt``, the weights of the best validation, or the last ones where there is no validation.
        result: ``eval.json``, an `EvalResult`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.versions = path / "versions.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.result = path / "eval.json"

    def begin(self, config: Config, resume: bool) -> None:
        """Makes the folder, or sees that what is in it is this run; clears away what killed processes left in it.

        Without `resume` a run goes on too that was not finished, so that a command which was killed may simply be
        given again; but not with other versions of what computes it.

        Raises:
            UserError: it holds a run of another config; or without `resume`, a finished one or one of other versions;
                or its config is damaged, and its checkpoints as well.
            WriteError: it can't be written; what is there stays whole.
        """
        from soap_net.versions import versions  # imports torch

        here = versions()
        checkpoints = self.last.exists() or self.best.exists()
        if checkpoints or self.config.exists():
            try:
                self.refuse_another(self.read_config(), config, self.path)
            except UnreadableRun:
                if checkpoints:
                    raise  # else there is nothing to go on from, and nothing to lose
        if self.last.exists() and not resume:
            self._refuse_unless_stopped(config, here)
        remove_stale(self.path)
        save_config(config, self.config)
        write_text(self.versions, json.dumps(here, indent=2) + "\n")

    @staticmethod
    def refuse_another(there: Mapping[str, Any], config: Config, where: Path) -> None:
        """Raises `AnotherRun` if `there`, all settings of the run in `where`, are not those of `config`."""
        found, asked = (lists_by_name(flatten(one)) for one in (there, to_dict(config)))
        if differ := difference(with_files_of(asked, found), asked, free_to_change):
            raise AnotherRun(f"{where} holds a run of another config: {differ}; choose another --out")

    def _refuse_unless_stopped(self, config: Config, here: Mapping[str, Any]) -> None:
        from soap_net.checkpoint import load  # imports torch

        state = Progress.of(load(self.last), config.train, self.last)
        episode = state.episode
        if state.finished(config.train):
            raise UserError(f"{self.path} holds this run already, and it is finished: choose another --out")
        there = self.read_versions()
        for name in COMPUTES:
            if there.get(name) != here[name]:
                raise UserError(
                    f"{self.path} holds this run, stopped after episode {episode} with {name} {there.get(name)}, which "
                    f"is {here[name]} here: add --resume to go on with it all the same, or choose another --out"
                )
        print(f"{self.path} holds this run, stopped after episode {episode}: going on with it", file=sys.stderr)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps others from training in the folder meanwhile, on systems and disks that can.

        Raises:
            UserError: another process does.
            WriteError: the folder can't be made.
        """
        if fcntl is None:
            yield
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        try:
            for wait in (0.5, 1.0, 2.0, None):  # one that was killed may take a moment to be gone
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if wait is None:
                        raise UserError(
                            f"{self.path}: another process is training in it; wait for it, or choose another --out"
                        ) from None
                    time.sleep(wait)
                except OSError:  # a disk of the network that knows no locks on folders
                    break
                else:
                    break
            yield
        finally:
            os.close(folder)

    def read_config(self) -> dict[str, Any]:
        """The nested settings: those of config.yaml or, where it is damaged or missing, of last.pt or best.pt.

        Raises:
            UnreadableRun: this is not a run folder, or all of these are damaged.
        """
        problem = f"{self.path}: not a run folder: there is no config.yaml in it"
        if self.config.is_file():
            try:
                return to_dict(_whole_config(self.config))
            except UserError as error:
                problem = f"{error}; no whole last.pt or best.pt holds it either: begin anew in another --out"
        from soap_net.checkpoint import load_config  # imports torch

        for path in (self.last, self.best):
            with contextlib.suppress(UserError):
                return to_dict(load_config(path))
        raise UnreadableRun(problem)

    def instead_of_last(self) -> str:
        """What can be done where last.pt is damaged, as the end of a message."""
        from soap_net.checkpoint import load

        with contextlib.suppress(UserError):
            load(self.best)
            return f"{self.best} is whole, for eval and classify; to train anew, delete {self.last}"
        return f"to train anew, delete {self.last}"

    def read_versions(self) -> dict[str, Any]:
        """Empty where there are none."""
        return read_json(self.versions) or {}

    def read_metrics(self) -> list[dict[str, Any]]:
        """The entries in their order; a last line that a crash cut off is left out."""
        content = self.metrics.read_bytes() if self.metrics.is_file() else b""
        entries = []
        for line in content.decode("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("episode"), int):
                    entries.append(entry)
        return entries

    def read_result(self) -> dict[str, Any] | None:
        """What `EvalResult.to_dict` gave; None where the run was not evaluated."""
        return read_json(self.result)


def _whole_config(path: Path) -> Config:
    """The settings in a config.yaml, none of which is missing. Raises `UserError`."""
    values = read_yaml(path)
    last = fields(Config)[-1].name
    if not isinstance(values, dict) or last not in values or not path.read_bytes().endswith(b"\n"):
        raise UserError(f"{path}: damaged: it ends before its last setting, which is {last}")
    return from_dict(values, str(path))


def free_to_change(key: str) -> bool:
    """Whether a setting, by dotted key, may change between a run and its continuation."""
    # Validation takes as many queries as evaluation.
    return key in FREE_TO_CHANGE or (key.startswith("eval.") and key != "eval.queries")


def lists_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Split files without their folders: a run may go on where its data set lies elsewhere, lists and all."""
    lists = ("data.train_split", "data.val_split", "data.test_split")
    return {key: Path(str(value)).name if key in lists and value else value for key, value in settings.items()}


def with_files_of(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """`there`, with the model's weights file and its backbone's folder as in `here` where these are the same.

    They are, too, where they were given from another folder, or have moved: nothing is there any more, and what is here
    bears its name.
    """
    same = {}
    for key in ("model.weights", "model.backbone"):
        one, other = (Path(str(settings.get(key)).removeprefix("hf:")) for settings in (here, there))
        if one.exists() and (one.samefile(other) if other.exists() else one.name == other.name):
            same[key] = here[key]
    return {**there, **same}


def difference(there: Mapping[str, Any], here: Mapping[str, Any], ignored: Callable[[str], bool]) -> str:
    """Which settings differ, for a message: the first three, and how many more; empty where none does.

    Args:
        there: the settings found in a folder, by dotted key.
        here: those asked for.
        ignored: whether a key may differ.
    """
    keys = [key for key in {**here, **there} if there.get(key) != here.get(key) and not ignored(key)]
    more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys[:3]) + more


def episode_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean time of a training episode; None where no step was logged."""
    times = [1 / entry["episodes_per_second"] for entry in metrics if "episodes_per_second" in entry]
    return sum(times) / len(times) if times else None


class MetricsLog:
    """Writes metrics.jsonl; what an abandoned continuation wrote after `episode` is dropped.

    A line is one of ``episode, loss, accuracy, lr, episodes_per_second`` for an optimizer step (loss and accuracy are
    means over the queries, of all processes) or ``episode, val_accuracy, val_ci95`` for a validation (the interval
    of several tasks only); in percent.

    Args:
        run: the run's folder.
        episode: the last one that counts.
        active: False writes nothing, as in all processes but the first.
        validated: the episode of the last validation that counts; by default `episode`.

    Raises:
        WriteError: on entering, and from `flush` and `sync`; what could not be written is kept for the next of these.
    """

    def __init__(self, run: RunFolder, episode: int, active: bool, validated: int | None = None) -> None:
        self.run, self.episode, self.active = run, episode, active
        self.validated = episode if validated is None else validated
        self._file: Appended | None = None

    def __enter__(self) -> MetricsLog:
        if self.active:
            kept = [
                entry
                for entry in self.run.read_metrics()
                if entry["episode"] <= (self.validated if "val_accuracy" in entry else self.episode)
            ]
            write_text(self.run.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
            self._file = Appended(self.run.metrics)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, episode: int, **values: float) -> None:
        """Adds a line, which `flush` makes appear in the file."""
        if self._file is not None:
            self._file.write((json.dumps({"episode": episode, **values}) + "\n").encode())

    def flush(self) -> None:
        """Writes all lines, for who watches."""
        if self._file is not None:
            self._file.flush()

    def sync(self) -> None:
        """Sees to it that all lines are on disk for good, as before a checkpoint that counts them as made."""
        if self._file is not None:
            self._file.sync()
