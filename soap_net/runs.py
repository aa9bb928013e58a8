"""The run folder: which files a run has, what may change between a run and its continuation, and reading it back."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soap_net.config import Config, flatten, save_config, to_dict
from soap_net.errors import UserError
from soap_net.files import write_text
from soap_net.settings import read_yaml
from soap_net.versions import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FREE_TO_CHANGE = ("data.root", "data.workers", "out", "device", "train.max_failed_share")
"""Settings that may change between a run and its continuation, as they change no result."""
COMPUTES = ("soap_net", "torch")
"""Of `versions`, those that a run goes on with only where they are the same, unless `--resume` says so."""


class RunFolder:
    """The files of the run in the folder `path`, each of which may be missing.

    Attributes:
        config: ``config.yaml``, all settings.
        versions: ``versions.json``, what `versions` found when the run was begun or last gone on with.
        metrics: ``metrics.jsonl``, a line for each optimizer step and each validation, see `MetricsLog`.
        tensorboard: a folder with the same for TensorBoard.
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
        """Makes the folder, or sees that what is in it is this run, to be gone on with.

        Without `resume` a run goes on too that was not finished, so that a command which was killed may simply be
        given again; but not with other versions of what computes it.

        Raises:
            UserError: it holds a run of another config; or without `resume`, a finished one or one of other versions.
            OSError: it can't be written; what is there stays whole.
        """
        if self.config.exists():
            differ = difference(flatten(self.read_config()), flatten(to_dict(config)), free_to_change)
            if differ:
                raise UserError(f"{self.path} holds a run of another config: {differ}; choose another --out")
            if self.last.exists() and not resume:
                self._refuse_unless_stopped(config)
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config)
        write_text(self.versions, json.dumps(versions(), indent=2) + "\n")

    def _refuse_unless_stopped(self, config: Config) -> None:
        from soap_net.checkpoint import load  # imports torch

        episode = load(self.last).get("progress", {}).get("episode", 0)
        if episode >= config.train.episodes:
            raise UserError(f"{self.path} holds this run already, and it is finished: choose another --out")
        there, here = self.read_versions(), versions()
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
        """
        if fcntl is None:
            yield
            return
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
        """The nested settings as they stand in the file, which an older version may have written.

        Raises:
            UserError: this is not a run folder, or its config is damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path}: not a run folder: there is no config.yaml in it")
        return read_yaml(self.config)

    def read_versions(self) -> dict[str, Any]:
        """Empty where there are none."""
        return json.loads(_text(self.versions) or "{}")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The entries in their order; a last line that a crash cut off is left out."""
        lines = _text(self.metrics).splitlines()
        entries = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return entries

    def read_result(self) -> dict[str, Any] | None:
        """What `EvalResult.to_dict` gave; None where the run was not evaluated."""
        return json.loads(_text(self.result) or "null")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def free_to_change(key: str) -> bool:
    """Whether a setting, by dotted key, may change between a run and its continuation."""
    # Validation takes as many queries as evaluation.
    return key in FREE_TO_CHANGE or (key.startswith("eval.") and key != "eval.queries")


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
    """Writes metrics.jsonl and TensorBoard; what an abandoned continuation wrote after `episode` is dropped.

    A line is one of ``episode, loss, accuracy, lr, episodes_per_second`` for an optimizer step (loss and accuracy are
    means over the queries, of all processes) or ``episode, val_accuracy, val_ci95`` for a validation; in percent.

    Args:
        run: the run's folder.
        episode: the last one that counts.
        active: False writes nothing, as in all processes but the first.
    """

    def __init__(self, run: RunFolder, episode: int, active: bool) -> None:
        self.run, self.episode, self.active = run, episode, active
        self._board: SummaryWriter | None = None

    def __enter__(self) -> MetricsLog:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by one process only

            kept = [entry for entry in self.run.read_metrics() if entry["episode"] <= self.episode]
            write_text(self.run.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
            self._file = self.run.metrics.open("a", encoding="utf-8", buffering=1)
            self._board = SummaryWriter(str(self.run.tensorboard), purge_step=self.episode + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._board is not None:
            self._file.close()
            self._board.close()

    def write(self, episode: int, **values: float) -> None:
        """Adds a line."""
        if self._board is not None:
            self._file.write(json.dumps({"episode": episode, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, episode)
