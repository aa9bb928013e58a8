"""Episodic training: one readable loop, exact to repeat, to interrupt and to resume.

Everything random in an episode (its clips, frames, crops, flips and dropout) is a pure function of the seed and the
episode's index, and the learning rate one of the episode's index. So a checkpoint needs no state of random generators
or schedules, a resumed run continues as the run that was never stopped, and several processes share out the episodes
of one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from soap_net import checkpoint
from soap_net.config import Config, TrainConfig, flatten, save_config, to_dict
from soap_net.data.episodes import EpisodeClips, EpisodeDataset, EpisodeSampler, shard
from soap_net.data.splits import load_split
from soap_net.errors import ClipError, UserError
from soap_net.evaluate import EvalResult, autocast, clip_loader, evaluate
from soap_net.interrupts import Interrupted, StopSignals, leave_signals_to_main
from soap_net.models import build_model
from soap_net.ranks import Ranks, join

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Settings that may change between a run and its continuation, as they change no result.
FREE_TO_CHANGE = ("data.root", "data.workers", "out", "device", "train.max_failed_share")
# So many clips read tell how many of a data set are broken; a few reads may meet the same one twice.
ENOUGH_READ = 500


class TrainingStopped(Interrupted):
    """Training was interrupted (Ctrl-C or SIGTERM) and its state saved; it can go on with ``resume=True``."""

    def __init__(self, folder: Path, episode: int) -> None:
        super().__init__(f"stopped after {episode} episodes; state saved in {folder / 'last.pt'}")
        self.folder = folder
        self.episode = episode


class NonFiniteLoss(UserError):
    """The loss of an episode was infinite or not a number."""


@dataclass
class Progress:
    """How far a run has come; all of it goes into checkpoints."""

    episode: int = 0
    validated: int = 0
    best_accuracy: float = -1.0
    best_episode: int = 0
    clips_read: int = 0
    clips_failed: int = 0


def train(config: Config, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains as `config` says and returns the run folder.

    The folder `config.out` gets config.yaml, versions.json, metrics.jsonl, tensorboard/, last.pt, and best.pt: the
    weights of the best validation, or the last ones where there is no validation. Under ``torchrun`` the episodes of
    each batch are shared out among the processes and their gradients summed.

    Args:
        config: the run.
        resume: continue the run in `config.out` from its last.pt, if there is one.
        progress: whether to show progress bars.

    Raises:
        UserError: impossible settings, bad data, a run folder that holds another run, too many clips that can't be
            decoded; `NonFiniteLoss` (one of them) names the episode and its clips.
        TrainingStopped: Ctrl-C or SIGTERM; the state was saved.
        OSError: the run folder can't be written; what is already there stays whole.
    """
    config.check()
    cfg = config.train
    with join(config.device) as ranks, StopSignals() as stop, _own_random_state(ranks.device):
        if cfg.tasks_per_batch % ranks.size:
            raise UserError(
                f"train.tasks_per_batch is {cfg.tasks_per_batch}: it must be a multiple of the {ranks.size} processes"
            )
        # Everything that can be wrong with the data set or the model is found before the run folder is touched.
        data, episode = config.data, config.episode
        clips = load_split(data.root, "train", data.split_file("train"))
        sampler = EpisodeSampler(clips, episode.way, episode.shot, episode.queries, episode.seed)
        val_clips = load_split(data.root, "val", data.split_file("val")) if cfg.val_every else None
        val_config = replace(
            config.eval, tasks=cfg.val_tasks, way=episode.way, shot=episode.shot, seed=episode.seed, split="val"
        )
        if val_clips:
            EpisodeSampler(val_clips, val_config.way, val_config.shot, val_config.queries, val_config.seed)

        torch.manual_seed(episode.seed)
        model = build_model(config.model, data.frames).to(ranks.device)
        optimizer = build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler(ranks.device.type, enabled=cfg.amp == "fp16")
        state = Progress()
        last, best = config.out / "last.pt", config.out / "best.pt"
        if ranks.first:
            _open_run_folder(config, resume)
        ranks.wait()
        if resume and last.exists():
            content = checkpoint.load(last)
            checkpoint.load_weights(model, content["model"], last)
            optimizer.load_state_dict(content["optimizer"])
            scaler.load_state_dict(content["scaler"])
            state = Progress(**content["progress"])

        saved = state.episode

        def save(path: Path) -> None:
            nonlocal saved
            saved = state.episode
            if ranks.first:
                content = {"config": to_dict(config), "model": model.state_dict(), "progress": asdict(state)}
                if path == last:
                    content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                checkpoint.save(path, content)

        batches = [
            range(first, min(first + cfg.tasks_per_batch, cfg.episodes))
            for first in range(state.episode, cfg.episodes, cfg.tasks_per_batch)
        ]
        mine = [index for batch in batches for index in shard(batch, ranks.rank, ranks.size)]
        episodes = _episodes(EpisodeDataset(sampler, clip_loader(data, train=True), mine), data.workers, ranks.device)
        named: set[str] = set()
        model.train()
        bar = tqdm(
            total=cfg.episodes,
            initial=state.episode,
            desc="train",
            unit="episode",
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            disable=not (progress and ranks.first),
        )
        with _Log(config.out, state.episode, ranks.first) as log, bar, contextlib.closing(episodes):

            def validate_if_due() -> None:
                if val_clips is None or state.validated == state.episode or not _due(cfg.val_every, state, cfg):
                    return
                result = evaluate(
                    model, val_clips, data, val_config, ranks=ranks, amp=cfg.amp, progress=progress,
                    stop=lambda: stop.requested and ranks.size == 1,
                )  # fmt: skip
                state.validated = state.episode
                log.validation(state.episode, result)
                if result.accuracy > state.best_accuracy:
                    state.best_accuracy, state.best_episode = result.accuracy, state.episode
                    save(best)
                if progress and ranks.first:
                    tqdm.write(
                        f"episode {state.episode}: validation {result.accuracy:.2f} +- {result.ci95:.2f} % "
                        f"(best {state.best_accuracy:.2f} % at {state.best_episode})",
                        file=sys.stderr,
                    )

            try:
                validate_if_due()  # where the run was stopped in the middle of a validation
                for batch in batches:
                    began = time.perf_counter()
                    buffers = [buffer.clone() for buffer in model.buffers()]
                    # loss, right answers, queries, clips read, clips failed, stop requested; summed over processes
                    totals = torch.zeros(6, dtype=torch.float64)
                    for index in shard(batch, ranks.rank, ranks.size):
                        task = _next(episodes)
                        torch.manual_seed(_dropout_seed(episode.seed, index))
                        with autocast(ranks.device, cfg.amp):
                            logits = model(
                                task.support.to(ranks.device, non_blocking=True),
                                task.support_labels.to(ranks.device),
                                task.query.to(ranks.device, non_blocking=True),
                                episode.way,
                            )
                        labels = task.query_labels.to(ranks.device)
                        # Summed over the queries: the field's convention, which its learning rates assume.
                        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
                        value = float(loss.detach())
                        if not math.isfinite(value):
                            raise _non_finite(value, task, saved)
                        scaler.scale(loss / len(batch)).backward()
                        right = int((logits.argmax(dim=1) == labels).sum())
                        clips_here = len(task.support_names) + len(task.query_names)
                        totals[:5] += torch.tensor(
                            [value, right, len(labels), clips_here + len(task.failures), len(task.failures)]
                        )
                        _name_failures(task.failures, named)
                        bar.update(ranks.size)
                        bar.set_postfix(
                            loss=f"{totals[0] / totals[2]:.3f}", accuracy=f"{100 * totals[1] / totals[2]:.1f}%",
                            refresh=False,
                        )  # fmt: skip
                        if stop.requested and ranks.size == 1:
                            break
                    totals[5] = stop.requested
                    _sum_over_ranks(model, totals, ranks)
                    if totals[5]:
                        _restore(model, buffers)  # the batch counts for nothing; it is done again on resuming
                        raise Interrupted
                    lr = learning_rate(cfg, batch[-1])
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    if cfg.clip_norm:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)

                    loss_sum, right_sum, queries, read, failed, _ = totals.tolist()
                    state.episode = batch.stop
                    state.clips_read += int(read)
                    state.clips_failed += int(failed)
                    speed = len(batch) / (time.perf_counter() - began)
                    log.batch(state.episode, loss_sum / queries, 100.0 * right_sum / queries, lr, speed)
                    if state.clips_read >= ENOUGH_READ or state.episode == cfg.episodes:
                        try:
                            _refuse_failures(state, cfg)
                        except UserError:
                            save(last)  # to go on from, with a larger share or better clips
                            raise
                    validate_if_due()
                    if _due(cfg.save_every, state, cfg) or state.validated == state.episode:
                        save(last)
            except Interrupted as error:
                save(last)
                raise TrainingStopped(config.out, state.episode) from error
        save(last)
        if val_clips is None:
            save(best)
    return config.out


def build_optimizer(cfg: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that take gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def learning_rate(cfg: TrainConfig, episode: int) -> float:
    """The rate of the optimizer step whose last episode is `episode` (from 0).

    `MultiStepLR` and `CosineAnnealingLR` advanced once per episode, as the field does: milestones count episodes,
    whatever `tasks_per_batch` is.
    """
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1.0 + math.cos(math.pi * episode / cfg.episodes))
    return cfg.lr * cfg.gamma ** sum(milestone <= episode for milestone in cfg.milestones)


class _Guarded(Dataset[EpisodeClips | UserError]):
    """Hands a `UserError` over as a value: raised in a worker, it would arrive wrapped in a traceback's text."""

    def __init__(self, episodes: EpisodeDataset) -> None:
        self.episodes = episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, position: int) -> EpisodeClips | UserError:
        try:
            return self.episodes[position]
        except UserError as error:
            return error


def _episodes(
    dataset: EpisodeDataset, workers: int, device: torch.device
) -> Generator[EpisodeClips | UserError, None, None]:
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        num_workers=min(workers, len(dataset)),
        worker_init_fn=leave_signals_to_main,
        pin_memory=device.type == "cuda",
    )
    yield from loader


def _next(episodes: Iterator[EpisodeClips | UserError]) -> EpisodeClips:
    task = next(episodes)
    if isinstance(task, UserError):
        raise task
    return task


def _dropout_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def _due(every: int, state: Progress, cfg: TrainConfig) -> bool:
    """Whether the batch that ended at `state.episode` reached a multiple of `every`, or the end."""
    if state.episode in (0, cfg.episodes):
        return state.episode > 0
    return state.episode // every > (state.episode - cfg.tasks_per_batch) // every


def _sum_over_ranks(model: nn.Module, totals: Tensor, ranks: Ranks) -> None:
    """Sums gradients and `totals`, and averages the buffers (running statistics of normalisations)."""
    if ranks.size == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=ranks.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    moved = totals.to(ranks.device)
    ranks.sum([*gradients, *buffers, used, moved])
    totals.copy_(moved)
    for parameter, gradient, count in zip(parameters, gradients, used.tolist(), strict=True):
        # What no process used keeps no gradient, so that weight decay leaves it alone, as with one process.
        parameter.grad = gradient if count else None
    for buffer in buffers:
        buffer.div_(ranks.size)


def _restore(model: nn.Module, buffers: Sequence[Tensor]) -> None:
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _non_finite(value: float, task: EpisodeClips, saved: int) -> NonFiniteLoss:
    clips = ", ".join([*task.support_names, *task.query_names])
    kept = f"nothing after episode {saved} was kept" if saved else "nothing was kept"
    return NonFiniteLoss(
        f"loss is {value} in episode {task.index}; {kept}; "
        f"a lower --train.lr or --train.clip_norm 1 may help; its clips: {clips}"
    )


def _name_failures(failures: Sequence[ClipError], named: set[str]) -> None:
    for failure in failures:
        if str(failure) not in named:
            named.add(str(failure))
            tqdm.write(f"warning: {failure}; another clip of its class takes its place", file=sys.stderr)


def _refuse_failures(state: Progress, cfg: TrainConfig) -> None:
    if state.clips_failed > cfg.max_failed_share * state.clips_read:
        raise UserError(
            f"{state.clips_failed} of {state.clips_read} clips read up to episode {state.episode} could not be "
            f"decoded, more than train.max_failed_share {cfg.max_failed_share}; `soap-net data check` lists them"
        )


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leaves the caller's random generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


class _Log:
    """metrics.jsonl and TensorBoard, from `episode` on: what an abandoned continuation wrote after it is dropped."""

    def __init__(self, folder: Path, episode: int, active: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.episode = episode
        self.active = active
        self.board: SummaryWriter | None = None

    def __enter__(self) -> _Log:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by one process only

            kept = []
            if self.path.exists():
                for line in self.path.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(json.JSONDecodeError):  # a last line cut off by a crash
                        if json.loads(line)["episode"] <= self.episode:
                            kept.append(line + "\n")
            self.path.write_text("".join(kept), encoding="utf-8")
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.episode + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.board is not None:
            self.file.close()
            self.board.close()

    def _write(self, episode: int, **values: float) -> None:
        if self.board is not None:
            self.file.write(json.dumps({"episode": episode, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, episode)

    def batch(self, episode: int, loss: float, accuracy: float, lr: float, episodes_per_second: float) -> None:
        """Means over the queries of one batch of tasks; accuracy in percent."""
        self._write(episode, loss=loss, accuracy=accuracy, lr=lr, episodes_per_second=episodes_per_second)

    def validation(self, episode: int, result: EvalResult) -> None:
        self._write(episode, val_accuracy=result.accuracy, val_ci95=result.ci95)


def _open_run_folder(config: Config, resume: bool) -> None:
    """Makes the run folder, or sees that what is in it is this run.

    Raises:
        UserError: it holds a run of another config, or this one, which is not to be resumed.
    """
    folder = config.out
    written = folder / "config.yaml"
    if written.exists():
        there, here = flatten(yaml.safe_load(written.read_text(encoding="utf-8"))), flatten(to_dict(config))
        keys = [
            key
            for key in {**here, **there}
            if there.get(key) != here.get(key)
            and key not in FREE_TO_CHANGE
            and (not key.startswith("eval.") or key == "eval.queries")  # which validation takes too
        ]
        if keys:
            differ = ", ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys[:3])
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{folder} holds a run of another config: {differ}{more}; choose another --out")
        if (folder / "last.pt").exists() and not resume:
            raise UserError(f"{folder} holds this run already: add --resume to go on with it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, written)
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str | None]:
    """What a run depends on: program versions, the machine, and in a checkout the git commit."""
    try:
        own = importlib.metadata.version("soap-net")
    except importlib.metadata.PackageNotFoundError:
        own = None
    cuda = torch.cuda.is_available()
    return {
        "soap_net": own,
        "git": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _git_commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if it was edited; None outside of one."""
    package = Path(__file__).parent
    git = ["git", "-C", str(package)]
    try:
        # A package installed into an environment inside some other repository is not tracked there.
        subprocess.run([*git, "ls-files", "--error-unmatch", "train.py"], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
