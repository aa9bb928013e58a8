"""The demo: the embedded videos, SOAP-Net and the same net without SOAP trained from them, both on unseen classes."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soap_net.config import Config, flatten, to_dict
from soap_net.data.loading import cores
from soap_net.data.memory import ClipMemory
from soap_net.data.motion import PATTERNS, PATTERNS_OF, MotionConfig, write_motion
from soap_net.errors import UserError
from soap_net.evaluate import evaluate_run
from soap_net.experiments.experiment import changed
from soap_net.experiments.processes import Job, Stop, perform
from soap_net.files import remove_stale, write_text
from soap_net.runs import FREE_TO_CHANGE, RunFolder, difference, episode_seconds, with_files_of
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
        Interrupted: Ctrl-C or SIGTERM, after both trainings have saved their state.
    """
    motion = motion or MotionConfig()
    out = config.out
    nets = net_configs(config)
    if (out / "summary.json").exists():
        print(f"{out} holds a finished demo: training anew")
    clear(nets, out / "summary.json")

    began = time.perf_counter()
    _write_videos(out / "motion", motion, progress)
    print(
        f"2. Training on {len(PATTERNS_OF['train'])} patterns with and without SOAP, {config.train.episodes} episodes "
        f"each ({config.episode.way}-way {config.episode.shot}-shot), then {config.eval.tasks} tasks on "
        f"{len(PATTERNS_OF['test'])} patterns never seen"
    )
    learning = time.perf_counter()
    _train_and_evaluate(nets, progress)
    return _report(out, nets, time.perf_counter() - began, time.perf_counter() - learning)


def net_configs(config: Config) -> dict[str, Config]:
    """The two nets' configs, by the names of their run folders."""
    root = str(config.out / "motion")
    return {
        name: changed(
            config, {"data.root": root, "model.soap.enabled": name == "with_soap", "out": str(config.out / name)}
        )
        for name in NETS
    }


def clear(nets: Mapping[str, Config], summary: Path) -> None:
    """Remove what a finished demo, or one with other settings, left; an interrupted one with these settings stays."""
    if finished := summary.exists():
        summary.unlink()
    for net in nets.values():
        run = RunFolder(net.out)
        if not net.out.exists():
            continue
        remove_stale(net.out)  # of a process killed at the very start
        if not run.config.is_file() and any(net.out.iterdir()):
            raise UserError(f"{net.out}: holds other files than a run of the demo; choose another --out")
        if finished or not run.config.is_file() or _differs(run, net):
            shutil.rmtree(net.out)


def _differs(run: RunFolder, net: Config) -> bool:
    here = flatten(to_dict(net))
    return bool(difference(with_files_of(here, flatten(run.read_config())), here, FREE_TO_CHANGE.__contains__))


def _write_videos(root: Path, motion: MotionConfig, progress: bool) -> None:
    cached = root.exists()
    print(
        f"1. Videos: {len(PATTERNS)} motion patterns of random dots, no single frame of which tells the pattern "
        f"({motion.size} x {motion.size} pixels, {motion.frames} frames, mp4)"
    )
    write_motion(root, motion, progress=progress)
    clips = sum(getattr(motion, f"{split}_clips") * len(patterns) for split, patterns in PATTERNS_OF.items())
    print(f"   {clips} clips in {root}" + (", there already" if cached else ""))


def _train_and_evaluate(nets: Mapping[str, Config], progress: bool) -> None:
    threads = min(4, max(1, cores() // len(nets)))  # so small a net gains nothing from more
    with ExitStack() as stack:
        bars = {
            name: stack.enter_context(
                tqdm(
                    desc=f"   {NETS[name]:<12}",
                    total=net.train.episodes,
                    unit="episode",
                    position=position,
                    mininterval=0.2 if sys.stderr.isatty() else 30.0,
                    disable=not progress,
                )
            )
            for position, (name, net) in enumerate(nets.items())
        }
        jobs = [Job(NETS[name], learn, net) for name, net in nets.items()]
        done = perform(jobs, len(jobs), threads=threads, waiting=partial(_advance, bars, nets), let_end=False)
        for _ in stack.enter_context(closing(done)):
            pass


def learn(config: Config, stop: Stop, memory: ClipMemory) -> None:
    """What a net's process does."""
    folder = train(config, resume=True, progress=False, stop=stop, memory=memory)
    # The last weights, not the best of a few validations: nothing is chosen by looking at accuracies.
    evaluate_run(RunFolder(folder).last, config, progress=False, stop=stop)


def _advance(bars: Mapping[str, tqdm[Any]], nets: Mapping[str, Config]) -> None:
    """Move the bars to what the processes have logged since."""
    for name, bar in bars.items():
        logged = [entry for entry in RunFolder(nets[name].out).read_metrics() if "accuracy" in entry]
        if logged and logged[-1]["episode"] > bar.n:
            bar.set_postfix_str(f"training accuracy {logged[-1]['accuracy']:3.0f} %", refresh=False)
            bar.update(logged[-1]["episode"] - bar.n)


def _report(out: Path, nets: Mapping[str, Config], before: float, learning: float) -> Path:
    """Writes report.html and summary.json, and prints the table; `before` and `learning` are seconds."""
    from soap_net.report import write_report  # imports matplotlib, which the nets' processes can do without

    print("3. Report")
    began = time.perf_counter()
    report, summary = out / "report.html", out / "summary.json"
    write_report(report, {NETS[name]: net.out for name, net in nets.items()}, title="SOAP-Net demo")
    seconds = before + time.perf_counter() - began
    results = {name: result(RunFolder(net.out)) for name, net in nets.items()}
    content: dict[str, Any] = {
        name: {key: one[key] for key in ("accuracy", "ci95", "tasks")} for name, one in results.items()
    }
    content |= {"seconds": round(seconds, 1), "training_and_evaluation_seconds": round(learning, 1)}
    write_text(summary, json.dumps(content, indent=2) + "\n")

    print()
    print(table(results, nets["with_soap"]))
    print(
        f"\n{seconds:.0f} s in all, {learning:.0f} s of it training and evaluation\n"
        f"report: {report}\nsummary: {summary}"
    )
    return report


def result(run: RunFolder) -> dict[str, Any]:
    """What `eval.json` of a run holds, with the mean seconds of a training episode."""
    return {**(run.read_result() or {}), "training_episode_seconds": episode_seconds(run.read_metrics())}


def table(results: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    """Accuracies and times of training of both nets, which share the machine meanwhile, for the terminal."""
    task = config.eval
    lines = [
        f"{task.way}-way {task.shot}-shot on patterns never seen in training; chance is {100 / task.way:.0f} %",
        "",
        f"{'':14}{'accuracy':>18}{'training':>18}",
    ]
    for name, one in results.items():
        interval = "of one task" if one["ci95"] is None else f"± {one['ci95']:.1f} %"
        accuracy = f"{one['accuracy']:.1f} {interval}"
        training = f"{1000 * one['training_episode_seconds']:.0f} ms/episode"
        lines.append(f"{NETS[name]:14}{accuracy:>18}{training:>18}")
    return "\n".join(lines)
