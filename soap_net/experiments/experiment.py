"""Runs an experiment: a grid of trainings and tests, in parallel, resumable, into a table, a CSV file and a plot.

An experiment says which runs it wants and how its table is laid out (`Experiment`); all else is here. Its folder holds
``experiment.json`` (what was asked), ``runs/<cell>-seed<n>/`` (one training each, with its ``result.json``), and
``results.csv``, ``table.md`` and ``plot.svg``, which are made anew from the finished runs each time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from soap_net.checkpoint import load_model
from soap_net.config import Config, flatten, from_dict, to_dict
from soap_net.data.memory import ClipMemory
from soap_net.data.motion import MotionConfig, write_motion
from soap_net.data.splits import split_of
from soap_net.errors import UserError
from soap_net.evaluate import EvalResult, evaluate
from soap_net.experiments.drawing import plot_accuracies
from soap_net.experiments.processes import Job, Stop, perform
from soap_net.experiments.results import Estimate, Result, Results, Row
from soap_net.files import read_json, remove_stale, write_text
from soap_net.interrupts import Interrupted
from soap_net.models import SOAPNet
from soap_net.ranks import Ranks, pick_device
from soap_net.runs import FREE_TO_CHANGE, RunFolder, difference, with_files_of
from soap_net.train import train
from soap_net.versions import processor, versions

PAPER = "[SOAP, arXiv 2407.16344](https://arxiv.org/abs/2407.16344)"


class ExperimentStopped(Interrupted):
    """Ctrl-C or SIGTERM; the finished runs were kept, and the others go on from their last checkpoint."""


@dataclass(frozen=True)
class Run:
    """One training of one cell of the grid, and the tests of what it learned."""

    cell: str
    """Names the settings; together with the seed, the run."""
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings, by dotted key, over the experiment's config."""
    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"test": {}})
    """Evaluations by name, each with the settings that differ from the run's own."""
    weights_of: str | None = None
    """A cell whose net of the same seed is tested here, rather than one trained anew."""

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return folder_name(self.cell, self.seed)


def folder_name(cell: str, seed: int) -> str:
    """The folder of a run below the experiment's ``runs``."""
    return f"{re.sub(r'[^A-Za-z0-9.+=-]+', '_', cell)}-seed{seed}"


class Experiment(ABC):
    """What to run, and how to show it."""

    title: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """Headings of the label columns."""
    difference: ClassVar[str]
    """Heading of the column of paired differences."""
    paper: ClassVar[str] = ""
    """Heading of the column of the paper's accuracies; none without."""
    axis: ClassVar[str] = ""
    """What the plot's horizontal axis shows."""
    note: ClassVar[str] = ""
    """What the paper says about it, under the table."""

    tests: ClassVar[Mapping[str, Mapping[str, Any]]] = {"test": {}}
    """How each net is evaluated, see `Run`."""
    alone: ClassVar[bool] = False
    """Whether its runs must not share the machine, as they measure time."""

    def __init__(self, config: Config, preset: str, motion: Path | None = None) -> None:
        """`motion` is the folder below which the embedded data sets go, where the experiment runs on them."""
        self.config = config
        self.preset = preset
        self.motion = motion

    @property
    def name(self) -> str:
        """What the command calls it: its file's name, with hyphens."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @abstractmethod
    def rows(self, results: Results) -> list[Row]:
        """The table's lines."""

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        """All runs wanted, given the results so far: asked again when they are done, until it wants no more.

        By default a training of each cell that a line speaks of, with each seed.
        """
        cells = {row.cell: row.changes for row in self.rows(results)}
        return seeded(cells.items(), seeds, tests=self.tests)

    def prepare(self, folder: Path) -> None:
        """Makes what the runs need in common: the embedded data sets; `folder` is the experiment's."""
        if self.motion is not None:
            write_motion(self.config.data.root, MotionConfig())

    def work(self, run: Run, config: Config, stop: Stop, memory: ClipMemory) -> Result:
        """Trains one run, going on where it was stopped, and evaluates it once for each of its tests.

        This is done in a process of its own; `config` is the run's. What it returns goes to JSON.
        """
        began = time.perf_counter()
        if run.weights_of is None:
            folder = train(config, resume=True, progress=False, stop=stop, memory=memory)
        else:
            folder = config.out.with_name(folder_name(run.weights_of, run.seed))
        trained = time.perf_counter()
        device = pick_device(config.device)
        model, _ = load_model(RunFolder(folder).best, device)
        tests = {}
        for name, changes in run.tests.items():
            cfg = changed(config, changes)
            clips = split_of(cfg.data, cfg.eval.split)
            result = evaluate(
                model, clips, cfg.data, cfg.eval, ranks=Ranks(device), amp=cfg.train.amp, progress=False, stop=stop,
                memory=memory,
            )  # fmt: skip
            tests[name] = tested(result)
        return {
            "tests": tests,
            "train_seconds": trained - began,
            "test_seconds": time.perf_counter() - trained,
            **sizes(model),
        }

    def pooled(self, results: Results) -> Results:
        """What table and plot show, where that is not each run by itself."""
        return results

    def write(self, folder: Path, results: Results, about: str) -> None:
        """Writes results.csv, table.md and plot.svg; `about` says how they came to be."""
        results.write(folder / "results.csv")
        results = self.pooled(results)
        rows = [row for row in self.rows(results) if results.seeds(row.cell)]
        text = f"# {self.title}\n\n{self.table(rows, results)}\n\n{self.remarks(rows, results)}\n\n{about}"
        write_text(folder / "table.md", text)
        if rows:
            self.plot(folder / "plot.svg", rows, results)

    def table(self, rows: Sequence[Row], results: Results) -> str:
        """The Markdown table."""
        heads = [*self.columns, "accuracy, %", self.difference]
        if self.paper:
            heads.append(self.paper)
        lines = [heads, ["---"] * len(heads)]
        for row in rows:
            gain = results.difference((row.cell, row.test), row.against) if row.against else None
            line = [*row.labels, str(results.accuracy(row.cell, row.test)), _signed(gain)]
            lines.append([*line, "" if row.paper is None else f"{row.paper:.1f}"] if self.paper else line)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def remarks(self, rows: Sequence[Row], results: Results) -> str:
        """The lines under the table: what the figures are, and what the paper says."""
        c = self.config
        counts = sorted({len(results.seeds(row.cell)) for row in rows}) or [0]
        seeds = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
        seeds += " seed" if counts == [1] else " seeds"
        lines = [
            f"{c.eval.way}-way {c.eval.shot}-shot on unseen classes (chance: {self.chance:.0f} %), {c.eval.tasks} "
            f"tasks, {seeds}; {self.model()}, {c.train.episodes} training episodes, {c.data.frames} frames of "
            f"{c.data.crop} x {c.data.crop}.",
            "Accuracies are means ± half their 95 % intervals over training seeds and test tasks. Differences are "
            "paired: the same seeds, the same test tasks, subtracted task by task. " + _beyond(rows, results),
        ]
        if counts[0] == 1:
            lines.append(
                "**Of a line with one seed the interval covers the test tasks alone.** Another training seed may "
                "move it by much more."
            )
        if self.note:
            lines.append(self.note)
        return "\n\n".join(lines)

    def model(self) -> str:
        """What of the model is the same in all runs."""
        model = self.config.model
        return f"{model.backbone} (weights: {model.weights or 'random'}), head {model.head}"

    @property
    def chance(self) -> float:
        """The accuracy of guessing, in percent."""
        return 100 / self.config.eval.way

    def plot(self, path: Path, rows: Sequence[Row], results: Results) -> None:
        """Accuracies with intervals, by series, and the paper's beside them."""
        plot_accuracies(path, rows, results, self.title, self.axis, self.chance, self.paper)


def tested(result: EvalResult) -> Result:
    """What a run's result.json holds of one test."""
    return {
        "accuracy": result.accuracy,
        "ci95": result.ci95,
        "tasks": result.tasks,
        "answers": result.way * result.queries,
        "correct": result.correct,
        **answered(result),
    }


def sizes(model: SOAPNet) -> Result:
    """What a run's result.json holds of its net."""
    soap = model.soap
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "soap_parameters": 0 if soap is None else sum(p.numel() for p in soap.parameters()),
    }


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other settings, given by dotted key.

    Raises:
        UserError: no such setting, or an impossible value.
    """
    return from_dict({**flatten(to_dict(config)), **changes})


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    seeds: Sequence[int],
    jobs: int,
    command: Sequence[str] = (),
    progress: bool = True,
) -> Results:
    """Does the runs that are not done yet, and writes table, CSV and plot from all that are.

    Args:
        folder: a new folder, or that of the same experiment stopped earlier, whose finished runs are kept.
        seeds: training seeds; more of them may be asked for later.
        jobs: processes that train at the same time.
        command: how this was called, for the table.

    Raises:
        UserError: `folder` holds something else, or a run can't be done; finished runs are kept.
        ExperimentStopped: Ctrl-C or SIGTERM.
    """
    _open_folder(experiment, folder)
    experiment.prepare(folder)
    about = _about(experiment, command)
    results = Results({})
    try:
        while unfinished := _unfinished(wanted := experiment.runs(seeds, results), folder, results):
            runs = {f"run {run.folder}": run for run in unfinished}
            done = perform(
                [
                    Job(name, partial(_work, experiment, run), run_config(experiment.config, run, folder))
                    for name, run in runs.items()
                ],
                1 if experiment.alone else jobs,
            )
            with closing(done), tqdm(
                done, desc=experiment.name, unit="run", total=len(wanted), disable=not progress,
                initial=len(wanted) - len(unfinished),
            ) as bar:  # fmt: skip
                for job, result in bar:
                    run = runs[job.name]
                    results.finished[run.cell, run.seed] = result
                    shown = ", ".join(f"{name} {one['accuracy']:.1f} %" for name, one in result["tests"].items())
                    bar.write(f"{run.folder}: {shown}", file=sys.stderr)
    except Exception as error:  # not where all ends at once: what is finished makes the table another time
        experiment.write(folder, results, about)
        if isinstance(error, Interrupted):
            raise ExperimentStopped(
                f"stopped with {len(results.finished)} of {len(wanted)} runs finished; the same command goes on"
            ) from None
        raise
    experiment.write(folder, results, about)
    return results


def _unfinished(wanted: Sequence[Run], folder: Path, results: Results) -> list[Run]:
    """Reads the results of those of `wanted` that are finished into `results`, and returns the others."""
    for run in wanted:
        path = folder / "runs" / run.folder / "result.json"
        if (run.cell, run.seed) not in results.finished and (result := read_json(path)) is not None:
            results.finished[run.cell, run.seed] = result
    return [run for run in wanted if (run.cell, run.seed) not in results.finished]


def _work(experiment: Experiment, run: Run, config: Config, stop: Stop, memory: ClipMemory) -> Result:
    """Does one run, in a process of its own, and writes its result.json."""
    result = experiment.work(run, config, stop, memory)
    write_text(config.out / "result.json", json.dumps(result) + "\n")
    return result


def run_config(config: Config, run: Run, folder: Path) -> Config:
    """The config of one run."""
    own = {"episode.seed": run.seed, "out": str(folder / "runs" / run.folder)}
    return changed(config, {**run.changes, **own})


def _open_folder(experiment: Experiment, folder: Path) -> None:
    """Makes the experiment's folder, or sees that what is in it is this experiment."""
    path = folder / "experiment.json"
    free = {*FREE_TO_CHANGE} - {"data.root", "data.roots"}  # a table is of one data set
    embedded = experiment.motion is not None  # such data are made anew wherever the folder is moved to
    asked = experiment.config if embedded else experiment.config.absolute()
    settings = {key: value for key, value in flatten(to_dict(asked)).items() if key not in free}
    here = {"experiment": experiment.name, "preset": experiment.preset, **settings}
    remove_stale(folder, path.name)  # of a process killed at the very start
    if (there := read_json(path)) is not None:
        if here["data.roots"]:  # in whose place data.root is not looked at, while its default is another in each folder
            there["data.root"] = here["data.root"]
        if differ := difference(with_files_of(here, there), here, lambda key: False):
            raise UserError(f"{folder} holds another experiment: {differ}; choose another --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no experiment; choose another --out")
    else:
        write_text(path, json.dumps(here, indent=2) + "\n")
    for place in (folder, *folder.glob("runs/*")):
        remove_stale(place)


def machine() -> str:
    """CPU model, cores and GPU."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {os.cpu_count()} cores{gpu}"


def _about(experiment: Experiment, command: Sequence[str]) -> str:
    found = {name.replace("_", "-"): version for name, version in versions().items() if version}
    named = [name for name in ("soap-net", "torch", "torchvision", "numpy", "python") if name in found]
    commit = f"; commit {found['git']}" if "git" in found else ""
    return (
        f"Made by `{shlex.join(command) or experiment.name}` on {machine()}; "
        f"{', '.join(f'{name} {found[name]}' for name in named)}{commit}.\n"
    )


def answered(result: EvalResult) -> dict[str, Any]:
    """What a result.json keeps of a test's tasks and answers, for intervals over clips and classes."""
    if result.answers is None:
        return {}
    return {"drawn": result.answers.drawn.to_dict(), "right": result.answers.right.astype(int).tolist()}


def _beyond(rows: Sequence[Row], results: Results) -> str:
    """What the intervals in brackets are over, or why there are none."""
    fixed = "Tasks are drawn from one fixed set of test clips, of whose choice that tells nothing"
    found = [one.beyond for row in rows if (one := results.accuracy(row.cell, row.test)) and one.beyond]
    over = dict.fromkeys(one.over for one in found if one.low is not None)
    if over:
        return f"{fixed}; the 95 % intervals in brackets are over {' or '.join(over)}."
    why = "; ".join(dict.fromkeys(one.over for one in found)) or "these results don't say which clips a task had"
    return f"{fixed}, and no interval over other clips can be given: {why}."


def _signed(value: Estimate | None) -> str:
    return "" if value is None else value.shown("+")


def seeded(cells: Iterable[tuple[str, Mapping[str, Any]]], seeds: Sequence[int], **options: Any) -> list[Run]:
    """A run for each cell and seed: all cells with the first seed, then all with the next."""
    cells = list(cells)
    return [Run(cell, seed, changes, **options) for seed in seeds for cell, changes in cells]
