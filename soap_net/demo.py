"""The demo: the embedded videos, SOAP-Net and the same net without SOAP trained from them, both on unseen classes."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from soap_net.config import Config, read_settings, to_dict
from soap_net.data.motion import PATTERNS, SPLITS, MotionConfig, write_motion
from soap_net.errors import UserError
from soap_net.evaluate import evaluate_run
from soap_net.interrupts import Interrupted
from soap_net.train import train

NETS = {"with_soap": "with SOAP", "without_soap": "without SOAP"}


def run_demo(config: Config, motion: MotionConfig | None = None, *, progress: bool = True) -> Path:
    """Write the motion data set, train and evaluate with and without SOAP, and report.

    The two nets train at the same time, in a process each, which on a few cores is quicker than one after the other on
    all of them. Below ``config.out`` there are then ``motion/`` (the videos), a run folder for each net,
    ``report.html`` and ``summary.json``. Run again, an interrupted demo goes on where it stopped, and a finished one is
    done anew with the videos that are there.

    Args:
        config: how to train; ``data.root``, ``model.soap.enabled`` and the two run folders are set by the demo.
        motion: the videos, by default ``MotionConfig()``.
        progress: whether to show progress bars.

    Returns:
        The path of the report.

    Raises:
        UserError: impossible settings, or what a training or an evaluation refused.
        KeyboardInterrupt: after both trainings have saved their state.
    """
    motion = motion or MotionConfig()
    out, episode, tasks = config.out, config.episode, config.eval.tasks
    config = replace(config, data=replace(config.data, root=out / "motion")).check()
    nets = {name: _net_config(config, name) for name in NETS}
    summary_file, report_file = out / "summary.json", out / "report.html"
    if summary_file.exists():
        print(f"{out} holds a finished demo: training anew")
    _clear(nets, summary_file)

    began = time.perf_counter()
    cached = (out / "motion").exists()
    print(
        f"1. Videos: {len(PATTERNS)} motion patterns of random dots, no single frame of which tells the pattern "
        f"({motion.size} x {motion.size} pixels, {motion.frames} frames, mp4)"
    )
    write_motion(config.data.root, motion, progress=progress)
    clips = sum(getattr(motion, f"{split}_clips") * len(patterns) for split, patterns in SPLITS.items())
    print(f"   {clips} clips in {config.data.root}" + (", there already" if cached else ""))

    print(
        f"2. Training on {len(SPLITS['train'])} patterns with and without SOAP, {config.train.episodes} episodes each "
        f"({episode.way}-way {episode.shot}-shot), then {tasks} tasks on {len(SPLITS['test'])} patterns never seen"
    )
    learning = time.perf_counter()
    _train_and_evaluate(nets, progress)
    learning = time.perf_counter() - learning

    from soap_net.report import write_report  # imports matplotlib, which the nets' processes can do without

    print("3. Report")
    write_report(report_file, {NETS[name]: net.out for name, net in nets.items()}, title="SOAP-Net demo")
    seconds = time.perf_counter() - began
    results = {name: _result(net.out) for name, net in nets.items()}
    summary: dict[str, Any] = {
        name: {key: r[key] for key in ("accuracy", "ci95", "tasks")} for name, r in results.items()
    }
    summary |= {"seconds": round(seconds, 1), "training_and_evaluation_seconds": round(learning, 1)}
    summary_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    print()
    print(_table(results, config))
    print(
        f"\n{seconds:.0f} s in all, {learning:.0f} s of it training and evaluation\n"
        f"report: {report_file}\nsummary: {summary_file}"
    )
    return report_file


def _net_config(config: Config, name: str) -> Config:
    net = copy.deepcopy(config)
    net.out = config.out / name
    net.model.soap.enabled = name == "with_soap"
    return net


def _clear(nets: Mapping[str, Config], summary: Path) -> None:
    """Remove what a finished demo, or one with other settings, left; an interrupted one with these settings stays."""
    finished = summary.exists()
    summary.unlink(missing_ok=True)
    for net in nets.values():
        written = net.out / "config.yaml"
        if not net.out.exists():
            continue
        if not written.is_file() and any(net.out.iterdir()):
            raise UserError(f"{net.out}: holds other files than a run of the demo; choose another --out")
        same = False
        with contextlib.suppress(UserError):  # a config of another version
            same = not finished and read_settings(written) == to_dict(net)
        if not same:
            shutil.rmtree(net.out)


@dataclass
class _Learner:
    """A net's process, and the bar that shows how far it is."""

    config: Config
    process: SpawnProcess
    outcome: Connection
    bar: tqdm[Any]
    read: int = 0

    def advance(self) -> None:
        """Move the bar to what the process has logged since."""
        with contextlib.suppress(FileNotFoundError), (self.config.out / "metrics.jsonl").open(encoding="utf-8") as log:
            log.seek(self.read)
            while (line := log.readline()).endswith("\n"):
                self.read = log.tell()
                entry = json.loads(line)
                if "accuracy" in entry and entry["episode"] > self.bar.n:
                    self.bar.set_postfix_str(f"training accuracy {entry['accuracy']:3.0f} %", refresh=False)
                    self.bar.update(entry["episode"] - self.bar.n)


def _train_and_evaluate(nets: Mapping[str, Config], progress: bool) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(4, max(1, cores // len(nets)))  # so small a net gains nothing from more
    with _learners(nets, threads, progress) as running:
        while running:
            for learner in list(running):
                learner.advance()
                if not learner.outcome.poll(0.2):
                    continue
                try:
                    message = learner.outcome.recv()
                except EOFError:
                    learner.process.join()
                    message = f"its process ended with code {learner.process.exitcode}"
                if message:
                    raise UserError(f"{NETS[learner.config.out.name]}: {message}")
                learner.advance()
                running.remove(learner)


@contextlib.contextmanager
def _learners(nets: Mapping[str, Config], threads: int, progress: bool) -> Iterator[list[_Learner]]:
    """The processes of the nets, which have ended on the way out."""
    context = multiprocessing.get_context("spawn")
    learners: list[_Learner] = []
    try:
        for position, (name, config) in enumerate(nets.items()):
            outcome, inner = context.Pipe(duplex=False)
            process = context.Process(target=_learn, args=(config, threads, inner), name=name)
            process.start()
            inner.close()
            bar = tqdm(
                desc=f"   {NETS[name]:<12}",
                total=config.train.episodes,
                unit="episode",
                position=position,
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
                disable=not progress,
            )
            learners.append(_Learner(config, process, outcome, bar))
        yield list(learners)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            for learner in learners:  # the Ctrl-C has reached them too, as a rule, and they are saving
                learner.process.join(10)
        for learner in learners:
            learner.process.terminate()
        raise
    finally:
        for learner in learners:
            learner.process.join()
            learner.bar.close()


def _learn(config: Config, threads: int, outcome: Connection) -> None:
    """What a net's process does; sends what went wrong, or an empty text."""
    torch.set_num_threads(threads)
    try:
        folder = train(config, resume=True, progress=False)
        # The last weights, not the best of a few validations: nothing is chosen by looking at accuracies.
        evaluate_run(folder / "last.pt", config, progress=False)
    except (UserError, OSError, Interrupted) as error:
        outcome.send(str(error))
    except KeyboardInterrupt:
        outcome.send("stopped")
    else:
        outcome.send("")


def _result(folder: Path) -> dict[str, Any]:
    """What `eval.json` of a run holds, with the mean seconds of a training episode."""
    result: dict[str, Any] = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [1 / entry["episodes_per_second"] for entry in entries if "episodes_per_second" in entry]
    return result | {"training_episode_seconds": sum(times) / len(times)}


def _table(results: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    task = config.eval
    lines = [
        f"{task.way}-way {task.shot}-shot on patterns never seen in training; chance is {100 / task.way:.0f} %",
        "",
        f"{'':14}{'accuracy':>18}{'training':>18}{'evaluation':>18}",
    ]
    for name, result in results.items():
        accuracy = f"{result['accuracy']:.1f} ± {result['ci95']:.1f} %"
        training = f"{1000 * result['training_episode_seconds']:.0f} ms/episode"
        evaluation = f"{1000 / result['episodes_per_second']:.1f} ms/episode"
        lines.append(f"{NETS[name]:14}{accuracy:>18}{training:>18}{evaluation:>18}")
    return "\n".join(lines)
