"""Episodic training: one readable loop, exact to repeat, to interrupt and to resume.

Everything random in an episode (its clips, frames, crops, flips and dropout) is a pure function of the seed and the
episode's index, and the learning rate one of the episode's index. So a checkpoint needs no state of random generators
or schedules, a resumed run continues as the run that was never stopped, and several processes share out the episodes
of one.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from soap_net import checkpoint
from soap_net.config import Config, TrainConfig, flatten, to_dict
from soap_net.data.episodes import EpisodeClips, EpisodeDataset, EpisodeSampler, shard
from soap_net.data.loading import load
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import load_split
from soap_net.data.transforms import clip_loader
from soap_net.errors import UserError
from soap_net.evaluate import autocast, evaluate
from soap_net.interrupts import Interrupted, StopSignals
from soap_net.models import build_model
from soap_net.ranks import Ranks, digest, join, same_clips, started_again
from soap_net.runs import MetricsLog, RunFolder, free_to_change
from soap_net.settings import build, read

# So many clips read tell how many of a data set are broken; a few reads may meet the same one twice.
ENOUGH_READ = 500


class TrainingStopped(Interrupted):
    """Training was interrupted (Ctrl-C or SIGTERM) and its state saved; it can go on with ``resume=True``."""

    def __init__(self, folder: Path, episode: int) -> None:
        super().__init__(f"stopped after {episode} episodes; state saved in {RunFolder(folder).last}")
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


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Losses are means per query; accuracies in percent.

    `losses` and `accuracies` are those of each episode that this process took of the batch `episodes`; `loss` and
    `accuracy` the means over the whole batch. `clipped` is what `train.clip_norm` multiplied the gradients by, 1 where
    it left them. `seconds` are those of reading, forward, backward and update.
    """

    episodes: range
    losses: list[float]
    accuracies: list[float]
    loss: float
    accuracy: float
    lr: float
    clipped: float
    seconds: float


def train(
    config: Config,
    *,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Training, Step], object] | None = None,
    stop: Callable[[], bool] | None = None,
    memory: ClipMemory | None = None,
) -> Path:
    """Trains as `config` says and returns the run folder.

    The folder `config.out` gets the files of a `RunFolder`. Under ``torchrun`` the episodes of each batch are shared
    out among the processes and their gradients summed.

    Args:
        config: the run.
        resume: continue the run in `config.out` from its last.pt, if there is one.
        progress: whether to show progress bars.
        callback: called in every process after each optimizer step, before a validation or checkpoint that is due.
            The parameters still hold the step's gradients; raising `Interrupted`, in all of them, saves and ends.
        stop: asked after each episode whether to save and end; by default, Ctrl-C and SIGTERM ask for that.
        memory: keeps decoded clips from run to run; by default none are kept.

    Raises:
        UserError: impossible settings, bad data, a run folder that holds another run, too many clips that can't be
            decoded; `NonFiniteLoss` (one of them) names the episode and its clips.
        TrainingStopped: interrupted; the state was saved.
        OSError: the run folder can't be written; what is already there stays whole.
    """
    config.check()
    signals = StopSignals()
    with (
        join(config.device) as ranks,
        signals if stop is None else contextlib.nullcontext(),
        # Leaves the caller's random generators as they were.
        torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
    ):
        stop = stop or (lambda: signals.requested)
        with ranks.together():
            training = Training(config, ranks, progress=progress, stop=stop, memory=memory)
        with training.opened(resume):
            try:
                training.validate_if_due()  # where the run was stopped in the middle of a validation
                for batch in training.batches():
                    step = training.step(batch)
                    if callback is not None:
                        callback(training, step)
                    training.validate_if_due()
                    training.save_if_due()
            except Interrupted as error:
                training.save(training.run.last)
                raise TrainingStopped(config.out, training.state.episode) from error
        training.save(training.run.last)
        if training.val_clips is None:
            training.save(training.run.best)
    return config.out


class Training:
    """A run: the model, what trains it, and how far it has come. `train` drives it.

    Attributes:
        config: its settings.
        ranks: the processes that share it, and this one's device.
        run: its folder.
        model: the net, in training mode on that device.
        optimizer: of the parameters that take gradients.
        scaler: scales the loss, where `train.amp` is fp16.
        state: how far it has come.
        val_clips: what it is validated on, if at all.
    """

    def __init__(
        self, config: Config, ranks: Ranks, *, progress: bool, stop: Callable[[], bool], memory: ClipMemory | None
    ) -> None:
        """Builds all of it, and so finds all that can be wrong with data set or model; touches no file yet."""
        cfg, data, episode = config.train, config.data, config.episode
        if cfg.tasks_per_batch % ranks.size:
            raise UserError(
                f"train.tasks_per_batch is {cfg.tasks_per_batch}: it must be a multiple of the {ranks.size} processes"
            )
        self.config, self.ranks, self.run = config, ranks, RunFolder(config.out)
        self._progress, self._stop, self._memory = progress, stop, memory
        self._clips = load_split(data.root, "train", data.split_file("train"))
        self._sampler = EpisodeSampler(self._clips, episode.way, episode.shot, episode.queries, episode.seed)
        self.val_clips = load_split(data.root, "val", data.split_file("val")) if cfg.val_every else None
        self._val_config = replace(
            config.eval, tasks=cfg.val_tasks, way=episode.way, shot=episode.shot, seed=episode.seed, split="val"
        )
        if self.val_clips:
            val = self._val_config
            EpisodeSampler(self.val_clips, val.way, val.shot, val.queries, val.seed)

        torch.manual_seed(episode.seed)
        self.model = build_model(config.model, data.frames).to(ranks.device).train()
        self.optimizer = build_optimizer(cfg, self.model)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=cfg.amp == "fp16")
        self.state = Progress()
        self._saved_episode = 0
        self._named: set[str] = set()

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Opens the run folder, takes up its checkpoint if there is one, and reads episodes ahead.

        Raises:
            UserError: see `RunFolder.begin`; or the processes found, or hold, different things.
        """
        with contextlib.ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.first:
                    stack.enter_context(self.run.held())
                    self.run.begin(self.config, resume or started_again())
            with self.ranks.together():
                begun = self.run.last.exists()
                if begun:
                    self._take_up()
            if self.ranks.size > 1:
                self._agree(begun)
            stack.enter_context(self._reading())
            yield

    def _take_up(self) -> None:
        """Goes on from last.pt."""
        content = checkpoint.load(self.run.last)
        checkpoint.load_weights(self.model, content["model"], self.run.last)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = build(Progress, read(content["progress"], Progress, str(self.run.last)))
        self._saved_episode = self.state.episode

    def _agree(self, begun: bool) -> None:
        """Ends all processes unless they are at the same place of the same run; `begun`: there is a last.pt."""
        config = flatten(to_dict(self.config))
        facts = {"last.pt": "there" if begun else "missing", **asdict(self.state), **same_clips(self._clips)}
        facts |= same_clips(self.val_clips) if self.val_clips else {}
        facts |= {key: config[key] for key in config if not free_to_change(key)}
        remedy = "all need the same command, data and last.pt, which a common disk gives, or a copy for each"
        self.ranks.agree(facts, remedy)
        if not begun:  # random numbers may differ in the last bit between kinds of processors
            self.ranks.copy_first([*self.model.parameters(), *self.model.buffers()])
        state = [self.model.state_dict(), self.optimizer.state_dict()]
        self.ranks.agree({"digest of the weights": digest(state)[:12]}, remedy)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Reads the episodes to come ahead, and keeps log and progress bar open."""
        mine = [index for batch in self.batches() for index in shard(batch, self.ranks.rank, self.ranks.size)]
        dataset = EpisodeDataset(self._sampler, clip_loader(self.config.data, train=True, memory=self._memory), mine)
        self._tasks = load(dataset, self.config.data.workers, pin_memory=self.ranks.device.type == "cuda")
        self._log = MetricsLog(self.run, self.state.episode, self.ranks.first)
        self._bar = tqdm(
            total=self.config.train.episodes,
            initial=self.state.episode,
            desc="train",
            unit="episode",
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            disable=not (self._progress and self.ranks.first),
        )
        with self._log, self._bar, contextlib.closing(self._tasks):
            yield

    def batches(self) -> list[range]:
        """The episodes of each optimizer step still to come."""
        every, last = self.config.train.tasks_per_batch, self.config.train.episodes
        return [range(first, min(first + every, last)) for first in range(self.state.episode, last, every)]

    def step(self, batch: range) -> Step:
        """One optimizer step on the episodes of `batch`. Its gradients stay until the next.

        Raises:
            Interrupted: stopped in the middle; the batch counts for nothing and is done again on resuming.
            NonFiniteLoss: in one of the episodes.
            UserError: an episode can't be read, or, with the state saved, too many clips.
        """
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        sums = _Sums()
        for index in shard(batch, self.ranks.rank, self.ranks.size):
            self._episode(index, len(batch), sums)
            if self._stop() and self.ranks.size == 1:
                break
        sums.stop = self._stop()
        _sum_over_ranks(self.model, sums, self.ranks)
        if sums.stop:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise Interrupted
        lr = learning_rate(self.config.train, batch[-1])
        clipped = self._update(lr)
        self.state.episode = batch.stop
        self.state.clips_read += sums.read
        self.state.clips_failed += sums.failed
        seconds = time.perf_counter() - began
        loss, accuracy = sums.loss / sums.queries, 100.0 * sums.right / sums.queries
        self._log.write(batch.stop, loss=loss, accuracy=accuracy, lr=lr, episodes_per_second=len(batch) / seconds)
        self._refuse_failures()
        return Step(batch, sums.losses, sums.accuracies, loss, accuracy, lr, clipped, seconds)

    def _episode(self, index: int, batch_size: int, sums: _Sums) -> None:
        """Forward and backward on the next episode, which is `index`."""
        device, episode = self.ranks.device, self.config.episode
        task = next(self._tasks)
        torch.manual_seed(_dropout_seed(episode.seed, index))
        with autocast(device, self.config.train.amp):
            logits = self.model(
                task.support.to(device, non_blocking=True),
                task.support_labels.to(device),
                task.query.to(device, non_blocking=True),
                episode.way,
            )
        labels = task.query_labels.to(device)
        # Summed over the queries: the field's convention, which its learning rates assume.
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _non_finite(value, task, self._saved_episode)
        self.scaler.scale(loss / batch_size).backward()
        sums.add(value, int((logits.argmax(dim=1) == labels).sum()), task)
        for failure in task.failures:
            if str(failure) not in self._named:
                self._named.add(str(failure))
                tqdm.write(f"warning: {failure}; another clip of its class takes its place", file=sys.stderr)
        self._bar.update(self.ranks.size)
        loss_here, right_here = sums.loss / sums.queries, 100 * sums.right / sums.queries
        self._bar.set_postfix(loss=f"{loss_here:.3f}", accuracy=f"{right_here:.1f}%", refresh=False)

    def _update(self, lr: float) -> float:
        """Takes the gradients off the loss's scale, clips them and steps; returns what clipping multiplied them by."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clipped, most = 1.0, self.config.train.clip_norm
        if most:
            self.scaler.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), most))
            clipped = min(1.0, most / (norm + 1e-6))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return clipped

    def _refuse_failures(self) -> None:
        """Raises UserError where too many clips can't be decoded, with the state saved."""
        state, most = self.state, self.config.train.max_failed_share
        judged = state.clips_read >= ENOUGH_READ or state.episode == self.config.train.episodes
        if judged and state.clips_failed > most * state.clips_read:
            self.save(self.run.last)  # to go on from, with a larger share or better clips
            raise UserError(
                f"{state.clips_failed} of {state.clips_read} clips read up to episode {state.episode} could not be "
                f"decoded, more than train.max_failed_share {most}; `soap-net data check` lists them"
            )

    def validate_if_due(self) -> None:
        """Validates where `train.val_every` says so, and keeps the weights as best.pt if none were better.

        Raises:
            Interrupted: stopped in the middle; it is done again on resuming.
        """
        state, alone = self.state, self.ranks.size == 1
        if self.val_clips is None or state.validated == state.episode or not self._due(self.config.train.val_every):
            return
        if not alone and self._saved_episode != state.episode:  # not to be stopped in the middle, but perhaps killed
            self.save(self.run.last)
        result = evaluate(
            self.model, self.val_clips, self.config.data, self._val_config, ranks=self.ranks,
            amp=self.config.train.amp, progress=self._progress, stop=lambda: alone and self._stop(),
            memory=self._memory,
        )  # fmt: skip
        state.validated = state.episode
        self._log.write(state.episode, val_accuracy=result.accuracy, val_ci95=result.ci95)
        if result.accuracy > state.best_accuracy:
            state.best_accuracy, state.best_episode = result.accuracy, state.episode
            self.save(self.run.best)
        if self._progress and self.ranks.first:
            tqdm.write(
                f"episode {state.episode}: validation {result.accuracy:.2f} +- {result.ci95:.2f} % "
                f"(best {state.best_accuracy:.2f} % at {state.best_episode})",
                file=sys.stderr,
            )

    def save_if_due(self) -> None:
        """Writes last.pt where `train.save_every` says so, and after each validation."""
        if self._due(self.config.train.save_every) or self.state.validated == self.state.episode:
            self.save(self.run.last)

    def save(self, path: Path) -> None:
        """Writes a checkpoint: weights and progress, and in last.pt all else it takes to go on."""
        self._saved_episode = self.state.episode
        if self.ranks.first:
            content = {"config": to_dict(self.config), "model": self.model.state_dict(), "progress": asdict(self.state)}
            if path == self.run.last:
                content |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            checkpoint.save(path, content)

    def _due(self, every: int) -> bool:
        """Whether the batch that ended at `state.episode` reached a multiple of `every`, or the end."""
        episode, cfg = self.state.episode, self.config.train
        if episode in (0, cfg.episodes):
            return episode > 0
        return episode // every > (episode - cfg.tasks_per_batch) // every


@dataclass
class _Sums:
    """What the episodes of a batch add up to; `losses` and `accuracies` are those of each one here."""

    loss: float = 0.0
    right: int = 0
    queries: int = 0
    read: int = 0
    failed: int = 0
    stop: bool = False
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def add(self, loss: float, right: int, task: EpisodeClips) -> None:
        """Adds an episode with the loss and the right answers of all its queries."""
        queries, failed = len(task.query_names), len(task.failures)
        self.loss += loss
        self.right += right
        self.queries += queries
        self.read += len(task.support_names) + queries + failed
        self.failed += failed
        self.losses.append(loss / queries)
        self.accuracies.append(100.0 * right / queries)


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


def _dropout_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def _sum_over_ranks(model: nn.Module, sums: _Sums, ranks: Ranks) -> None:
    """Sums gradients and `sums`, and averages the buffers (running statistics of normalisations)."""
    if ranks.size == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=ranks.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    names = ("loss", "right", "queries", "read", "failed", "stop")
    moved = torch.tensor([float(getattr(sums, name)) for name in names], dtype=torch.float64, device=ranks.device)
    ranks.sum([*gradients, *buffers, used, moved])
    for name, value in zip(names, moved.tolist(), strict=True):
        setattr(sums, name, type(getattr(sums, name))(value))
    for parameter, gradient, count in zip(parameters, gradients, used.tolist(), strict=True):
        # What no process used keeps no gradient, so that weight decay leaves it alone, as with one process.
        parameter.grad = gradient if count else None
    for buffer in buffers:
        buffer.div_(ranks.size)


def _non_finite(value: float, task: EpisodeClips, saved: int) -> NonFiniteLoss:
    clips = ", ".join([*task.support_names, *task.query_names])
    kept = f"nothing after episode {saved} was kept" if saved else "nothing was kept"
    return NonFiniteLoss(
        f"loss is {value} in episode {task.index}; {kept}; "
        f"a lower --train.lr or --train.clip_norm 1 may help; its clips: {clips}"
    )
