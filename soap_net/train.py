"""Episodic training: one readable loop, exact to repeat, to interrupt and to resume.

Everything random in an episode (its clips, frames, crops, flips and dropout) is a pure function of the seed and the
episode's index, and the learning rate one of the episode's index. So a checkpoint needs no state of random generators
or schedules, a resumed run continues as the run that was never stopped, and several processes share out the episodes
of one.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from soap_net import checkpoint
from soap_net.callbacks import Callback, EndTraining, configured
from soap_net.config import Config, flatten, to_dict
from soap_net.data.episodes import EpisodeClips, EpisodeDataset, EpisodeSampler, on_device, shard
from soap_net.data.loading import load
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import split_of
from soap_net.data.transforms import clip_loader
from soap_net.errors import UserError
from soap_net.evaluate import EvalResult, evaluate
from soap_net.frozen import can_embed_once, embedded_episodes
from soap_net.interrupts import Interrupted, StopSignals
from soap_net.machine import keep_freed_memory, repeatable
from soap_net.models import build_model
from soap_net.models.soap_net import SOAPNet
from soap_net.optimizers import build_average, build_optimizer, learning_rate, set_rate
from soap_net.ranks import Ranks, digest, join, same_clips, started_again
from soap_net.runs import AnotherRun, MetricsLog, Progress, RunFolder, free_to_change, lists_by_name
from soap_net.steps import Step, Sums
from soap_net.tasks import autocast


class TrainingStopped(Interrupted):
    """Training was interrupted (Ctrl-C or SIGTERM) and its state saved; it can go on with ``resume=True``."""

    def __init__(self, folder: Path, episode: int) -> None:
        super().__init__(f"stopped after {episode} episodes; state saved in {RunFolder(folder).last}")
        self.folder = folder
        self.episode = episode


def train(
    config: Config,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] | None = None,
    memory: ClipMemory | None = None,
    start: Callable[[SOAPNet], object] | None = None,
) -> Path:
    """Trains as `config` says and returns the run folder.

    The folder `config.out` gets the files of a `RunFolder`. Under ``torchrun`` the episodes of each batch are shared
    out among the processes and their gradients summed.

    Args:
        config: the run.
        resume: continue the run in `config.out` from its last.pt, if there is one.
        progress: whether to show progress bars.
        callbacks: told of steps, validations, saves and the end, after those that the config asks for; `EachStep` makes
            one of a function of steps.
        stop: asked after each episode whether to save and end; by default, Ctrl-C and SIGTERM ask for that.
        memory: keeps decoded clips from run to run; by default none are kept.
        start: called with the new net, in every process, to give it other weights to start from.

    Raises:
        UserError: impossible settings, bad data, a run folder that holds another run, too many clips that can't be
            decoded; `NonFiniteLoss` (one of them) names the episode and its clips.
        WriteError: the run folder can't be written (one of them, too); what is already there stays whole.
        TrainingStopped: interrupted; the state was saved.

    Whatever else ends it, what was done up to the last finished step is saved first, if it can be.
    """
    config = config.check().absolute()
    signals = StopSignals()
    keep_freed_memory()
    told = [*configured(config.train), *callbacks]
    with (
        repeatable(config.train.deterministic),
        join(config.device) as ranks,
        signals if stop is None else contextlib.nullcontext(),
        torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),  # the caller's stay as they were
    ):
        stop = stop or (lambda: signals.requested)
        with ranks.together():
            training = Training(config, ranks, progress=progress, stop=stop, memory=memory, callbacks=told)
            if start is not None:
                start(training.model)
        with training.opened(resume):
            try:
                with contextlib.suppress(EndTraining):
                    training.run_to_end()
                training.finish()
            except Interrupted as error:
                training.save(training.run.last)
                raise TrainingStopped(config.out, training.state.episode) from error
            except BaseException:
                training.rescue()
                raise
    return config.out


class Training:
    """A run: the model, what trains it, and how far it has come. `train` drives it.

    Attributes:
        config: its settings.
        ranks: the processes that share it, and this one's device.
        run: its folder.
        model: the net, in training mode on that device.
        average: the moving average of its weights, if `train.ema` asks for one.
        optimizer: of the parameters that take gradients.
        scaler: scales the loss, where `train.amp` is fp16.
        state: how far it has come.
        val_clips: what it is validated on, if at all.
        shows: whether this process shows bars and messages.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        *,
        progress: bool,
        stop: Callable[[], bool],
        memory: ClipMemory | None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Builds all of it, and so finds all that can be wrong with data set or model; touches no file yet."""
        cfg, data, episode = config.train, config.data, config.episode
        if cfg.tasks_per_batch % ranks.size:
            raise UserError(f"train.tasks_per_batch is {cfg.tasks_per_batch}: no multiple of {ranks.size} processes")
        self.config, self.ranks, self.run = config, ranks, RunFolder(config.out)
        self.shows = progress and ranks.first
        self._stop, self._memory, self._callbacks = stop, memory, callbacks
        self._told: list[Callback] = []  # of the callbacks those that have begun
        self._clips = split_of(data, "train")
        self._sampler = EpisodeSampler(
            self._clips, episode.way, episode.shot, episode.queries, episode.seed, fewer=bool(data.roots)
        )
        self.val_clips = split_of(data, "val") if cfg.val_every else None
        self._val_config = replace(
            config.eval, tasks=cfg.val_tasks, way=episode.way, shot=episode.shot, seed=episode.seed, split="val"
        )
        if self.val_clips:
            val = self._val_config
            EpisodeSampler(self.val_clips, val.way, val.shot, val.queries, val.seed)

        torch.manual_seed(episode.seed)  # of what `start` and callbacks draw; the net's weights are drawn apart
        self.model = build_model(config.model, data.frames, episode.seed).to(ranks.device).train()
        self.model.freeze(cfg.freeze)
        self.optimizer = build_optimizer(cfg, self.model)
        self.average = build_average(cfg, self.model)
        self._embedded = can_embed_once(self.model, config, self._sampler)
        if cfg.compile:
            self.model.backbone.net.compile()
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=cfg.amp == "fp16")
        self.state = Progress()
        self._saved = Progress()  # in last.pt
        self._whole = True  # whether weights, state and log are those of the same step
        self._named: set[str] = set()

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Opens the run folder, takes up its checkpoint if there is one, and keeps open what a run writes to.

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

    def _agree(self, begun: bool) -> None:
        """Ends all processes unless they are at the same place of the same run; `begun`: there is a last.pt."""
        config = lists_by_name(flatten(to_dict(replace(self.config, model=self.config.model.by_name()))))
        facts = {"last.pt": "there" if begun else "missing", **asdict(self.state), **same_clips(self._clips)}
        facts |= same_clips(self.val_clips) if self.val_clips else {}
        facts |= {key: config[key] for key in config if not free_to_change(key)}
        remedy = "all need the same command, data and last.pt, which a common disk gives, or a copy for each"
        self.ranks.agree(facts, remedy)
        if not begun:  # random numbers may differ in the last bit between kinds of processors
            nets = [self.model, self.average] if self.average else [self.model]
            self.ranks.copy_first([tensor for net in nets for tensor in (*net.parameters(), *net.buffers())])
        state = [self.model.state_dict(), self.optimizer.state_dict(), self.average and self.average.state_dict()]
        self.ranks.agree({"digest of the weights": digest(state)[:12]}, remedy)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keeps log, progress bar, callbacks and what reads episodes ahead open."""
        self._log = MetricsLog(self.run, self.state.episode, self.ranks.first, self.state.validated)
        self._bar = tqdm(
            total=self.config.train.episodes,
            initial=self.state.episode,
            desc="train",
            unit="episode",
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            disable=not self.shows,
        )
        with self._log, self._bar, contextlib.ExitStack() as self._ending:
            yield

    def _episodes(self, batches: Sequence[range]) -> Generator[EpisodeClips, None, None]:
        """This process's episodes of `batches`: of frames or, where these stay as they are, of features."""
        config, ranks = self.config, self.ranks
        mine = [index for batch in batches for index in shard(batch, ranks.rank, ranks.size)]
        if self._embedded:
            return embedded_episodes(
                self.model, config, self._sampler, mine, ranks,
                progress=self.shows, stop=self._stop, memory=self._memory,
            )  # fmt: skip
        dataset = EpisodeDataset(self._sampler, clip_loader(config.data, train=True, memory=self._memory), mine)
        return load(dataset, config.data.workers, pin_memory=ranks.device.type == "cuda")

    def run_to_end(self) -> None:
        """All that is still to be done of the run. Raises `EndTraining` where a callback ends it before its time."""
        for callback in self._callbacks:
            callback.on_begin(self)
            self._told.append(callback)
            self._ending.callback(callback.on_end, self)
        self.validate_if_due()  # where the run was stopped in the middle of a validation
        if batches := self.batches():  # in every process, as they share out the work on features
            tasks = on_device(self._episodes(batches), self.ranks.device)
            self._tasks = self._ending.enter_context(contextlib.closing(tasks))
        for batch in batches:
            step = self.step(batch)
            for callback in self._told:
                callback.on_step(self, step)
            self.validate_if_due()
            self.save_if_due()

    def _take_up(self) -> None:
        """Goes on from last.pt. Raises `UserError` where it is damaged, or not this run's."""
        last = self.run.last
        try:
            self.run.refuse_another(to_dict(checkpoint.load_config(last)), self.config, last)
            content = checkpoint.load_training(last, self.model, self.optimizer, self.scaler, self.average)
            self.state = Progress.of(content, self.config.train, last)
        except AnotherRun:
            raise
        except UserError as error:
            raise UserError(f"{error}; {self.run.instead_of_last()}") from error
        self._saved = replace(self.state)

    def batches(self) -> list[range]:
        """The episodes of each optimizer step still to come."""
        every, last = self.config.train.tasks_per_batch, self.config.train.episodes
        return [range(first, min(first + every, last)) for first in range(self.state.episode, last, every)]

    def step(self, batch: range) -> Step:
        """One optimizer step on the episodes of `batch`. Its gradients stay until the next.

        Raises:
            Interrupted: stopped in the middle; the batch counts for nothing and is done again on resuming.
            NonFiniteLoss: in one of the episodes.
            UserError: an episode can't be read, or too many clips.
            WriteError: the step is done, and can't be logged yet.
        """
        began = time.perf_counter()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self._whole = False
        try:
            sums = self._gradients(batch)
        except BaseException:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._whole = True
            raise
        lr = learning_rate(self.config.train, batch[-1])
        clipped = self._update(lr)
        self.state.episode = batch.stop
        self.state.clips_read += sums.read
        self.state.clips_failed += sums.failed
        seconds = time.perf_counter() - began
        loss, accuracy = sums.loss / sums.queries, 100.0 * sums.right / sums.queries
        step = Step(batch, sums.losses, sums.accuracies, loss, accuracy, lr, clipped, seconds)
        self._log.write(batch.stop, **step.logged)
        self._whole = True
        self._log.flush()
        self._bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}%", refresh=False)
        self.state.refuse_failures(self.config.train)
        return step

    def _gradients(self, batch: range) -> Sums:
        """Those of the batch, summed over its episodes and all processes. Raises as `step` does."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        for index in shard(batch, self.ranks.rank, self.ranks.size):
            self._episode(index, len(batch), sums)
            if self._stop() and self.ranks.size == 1:
                break
        sums.stop = self._stop()
        sums.collect()
        sums.add_other_processes(self.ranks, self.model)
        if sums.stop:
            raise Interrupted
        return sums

    def _episode(self, index: int, batch_size: int, sums: Sums) -> None:
        """Forward and backward on the next episode, which is `index`; waits for no result of a GPU."""
        task, episode = next(self._tasks), self.config.episode
        torch.manual_seed(_dropout_seed(episode.seed, index))
        scoring = self.model.head if self._embedded else self.model
        with autocast(self.ranks.device, self.config.train.amp):
            logits = scoring(task.support, task.support_labels, task.query, len(task.class_ids))
        # Summed over the queries: the field's convention, which its learning rates assume.
        loss = F.cross_entropy(logits.float(), task.query_labels, reduction="sum")
        self.scaler.scale(loss / batch_size).backward()
        sums.add(loss, (logits.argmax(dim=1) == task.query_labels).sum(), task)
        for remark in task.remarks:
            if remark not in self._named:
                self._named.add(remark)
                tqdm.write(f"warning: {remark}", file=sys.stderr)
        self._bar.update(self.ranks.size)

    def _update(self, lr: float) -> float:
        """Takes the gradients off the loss's scale, clips them and steps; returns what clipping multiplied them by."""
        set_rate(self.optimizer, lr)
        clipped, most = 1.0, self.config.train.clip_norm
        if most:
            self.scaler.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), most))
            clipped = min(1.0, most / (norm + 1e-6))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return clipped

    def validate_if_due(self) -> None:
        """Validates where `train.val_every` says so, and keeps the weights as best.pt if none were better.

        Raises:
            Interrupted: stopped in the middle; it is done again on resuming.
        """
        state, alone = self.state, self.ranks.size == 1
        if self.val_clips is None or state.validated == state.episode or not self._due(self.config.train.val_every):
            return
        if not alone and self._saved != state:  # not to be stopped in the middle, but perhaps killed
            self.save(self.run.last)
        compiled = self.config.train.compile  # which it would be anew for each number of clips
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            result = evaluate(
                self.trained, self.val_clips, self.config.data, self._val_config, ranks=self.ranks,
                amp=self.config.train.amp, progress=self.shows, stop=lambda: alone and self._stop(),
                memory=self._memory,
            )  # fmt: skip
        self._note_validation(result)
        if self.shows:
            tqdm.write(
                f"episode {state.episode}: validation {result.shown} "
                f"(best {self.state.best_accuracy:.2f} % at {self.state.best_episode})",
                file=sys.stderr,
            )
        for callback in self._told:
            callback.on_validation(self, result)

    @property
    def trained(self) -> SOAPNet:
        """The net that validations see and best.pt holds: the average, if there is one."""
        return cast(SOAPNet, self.average.module) if self.average is not None else self.model

    def _note_validation(self, result: EvalResult) -> None:
        """Saves the weights if none were better, and logs; unless all of it is done, the validation has not been."""
        before, episode = self.state, self.state.episode
        self._whole = False
        self.state = replace(before, validated=episode, since_best=before.since_best + 1)
        if result.accuracy > before.best_accuracy:
            self.state.best_accuracy, self.state.best_episode, self.state.since_best = result.accuracy, episode, 0
            try:
                self.save(self.run.best)
            except BaseException:
                self.state, self._whole = before, True
                raise
        self._log.write(episode, **result.logged)
        self._whole = True
        self._log.flush()

    def save_if_due(self) -> None:
        """Writes last.pt where `train.save_every` says so, and after each validation."""
        if self._due(self.config.train.save_every) or self.state.validated == self.state.episode:
            self.save(self.run.last)

    def finish(self) -> None:
        """Writes what the end of a run asks for and is not there yet."""
        if self.state != self._saved:  # a validation at the very end was made up for
            self.save(self.run.last)
        if self.val_clips is None:
            self.save(self.run.best)

    def save(self, path: Path) -> None:
        """Writes a checkpoint: what is `trained` and progress, or in last.pt the weights and all it takes to go on."""
        for callback in self._told:
            callback.on_save(self)
        if self.ranks.first:
            self._log.sync()  # as what the checkpoint counts as done is not logged again
            net = self.model if path == self.run.last else self.trained
            content = {"config": to_dict(self.config), "model": net.state_dict(), "progress": asdict(self.state)}
            if path == self.run.last:
                content |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
                content |= {"average": self.average.state_dict()} if self.average is not None else {}
            checkpoint.save(path, content)
        if path == self.run.last:
            self._saved = replace(self.state)

    def rescue(self) -> None:
        """Writes last.pt up to the last finished step, where an error ends the run before that was due."""
        if self._whole and self.state != self._saved:
            with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
                self.save(self.run.last)

    def _due(self, every: int) -> bool:
        """Whether the batch that ended at `state.episode` reached a multiple of `every`, or the end."""
        episode, cfg = self.state.episode, self.config.train
        if episode in (0, cfg.episodes):
            return episode > 0
        return episode // every > (episode - cfg.tasks_per_batch) // every


def _dropout_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
