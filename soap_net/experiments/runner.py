"""Runs an experiment: a grid of trainings and tests, in parallel, resumable, into a table, a CSV file and a plot.

An experiment says which runs it wants and how its table is laid out (`Experiment`); all else is here. Its folder holds
``experiment.json`` (what was asked), ``runs/<cell>-seed<n>/`` (one training each, with its ``result.json``), and
``results.csv``, ``table.md`` and ``plot.svg``, which are made anew from the finished runs each time.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from soap_net.checkpoint import load_model
from soap_net.config import Config, flatten, from_dict, to_dict
from soap_net.data.memory import decoded
from soap_net.data.motion import MotionConfig, write_motion
from soap_net.data.splits import load_split
from soap_net.errors import UserError
from soap_net.evaluate import evaluate
from soap_net.interrupts import Interrupted
from soap_net.ranks import Ranks, pick_device
from soap_net.runs import FREE_TO_CHANGE, versions
from soap_net.train import train

PAPER = "[SOAP, arXiv 2407.16344](https://arxiv.org/abs/2407.16344)"
KEPT_CLIPS = 512 * 2**20
"""Bytes of decoded clips that each process keeps, as run after run reads the same ones."""
MARKERS = "os^Dv"
Result = dict[str, Any]


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


@dataclass(frozen=True)
class Row:
    """One line of the table and one point of the plot."""

    labels: tuple[str, ...]
    """The line's first columns."""
    cell: str
    test: str = "test"
    against: tuple[str, str] | None = None
    """Cell and test whose accuracy is taken from this line's, task by task."""
    paper: float | None = None
    """The paper's accuracy in percent, where it is known."""
    series: str = ""
    """The curve of the plot that this point belongs to."""
    x: float | str = ""
    """Its place on the plot's horizontal axis; numbers make a curve, words stand side by side."""


@dataclass(frozen=True)
class Estimate:
    """A mean in percent with the half width of its 95 % interval in points."""

    mean: float
    half: float
    seeds: int
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}"


def estimate(percents: NDArray[np.float64]) -> Estimate:
    """Mean and 95 % interval of accuracies, or of differences of accuracies, ``(seeds, tasks)`` in percent.

    Seeds and tasks are two crossed samples: the same tasks test the nets of all seeds. The variance of the mean is at
    most the variance of the seeds' means over their number plus that of the tasks' means over theirs; Student's t with
    Welch and Satterthwaite's degrees of freedom accounts for the few seeds. With a single seed the interval can speak
    of the tasks alone.
    """
    seeds, tasks = percents.shape
    by_task = float(percents.mean(axis=0).var(ddof=1)) / tasks if tasks > 1 else 0.0
    by_seed = float(percents.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = by_task + by_seed
    freedom = math.inf
    if seeds > 1 and by_seed > 0:
        freedom = total**2 / (by_seed**2 / (seeds - 1) + (by_task**2 / (tasks - 1) if tasks > 1 else 0.0))
    return Estimate(float(percents.mean()), student_t(freedom) * math.sqrt(total), seeds, tasks)


def student_t(freedom: float, coverage: float = 0.95) -> float:
    """The two-sided quantile of Student's t: with ``t = sqrt(freedom) tan(a)``, `a` has the density cos^(freedom-1)."""
    if freedom > 1000:
        return 1.96
    angles = np.linspace(0.0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    if freedom < 1:
        density[-1] = density[-2]
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = float(np.interp(coverage, mass / mass[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)


class Results:
    """The finished runs, by cell and seed."""

    def __init__(self, finished: Mapping[tuple[str, int], Result]) -> None:
        self.finished = finished

    def seeds(self, cell: str) -> list[int]:
        """Seeds of the finished runs of a cell."""
        return sorted(seed for name, seed in self.finished if name == cell)

    def accuracies(self, cell: str, test: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """``(seeds, tasks)`` in percent."""
        tests = [self.finished[cell, seed]["tests"][test] for seed in seeds]
        return np.array([100.0 * np.array(one["correct"]) / one["answers"] for one in tests])

    def accuracy(self, cell: str, test: str = "test") -> Estimate | None:
        """Over the seeds there are; None where there is none."""
        seeds = self.seeds(cell)
        return estimate(self.accuracies(cell, test, seeds)) if seeds else None

    def difference(self, one: tuple[str, str], other: tuple[str, str]) -> Estimate | None:
        """Accuracy of `one` (cell, test) less that of `other`, paired: the same seeds and, in each, the same tasks."""
        seeds = [seed for seed in self.seeds(one[0]) if seed in self.seeds(other[0])]
        if not seeds:
            return None
        return estimate(self.accuracies(*one, seeds) - self.accuracies(*other, seeds))


class Experiment(ABC):
    """What to run, and how to show it."""

    name: ClassVar[str]
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

    alone: ClassVar[bool] = False
    """Whether its runs must not share the machine, as they measure time."""

    def __init__(self, config: Config, preset: str, motion: Path | None = None) -> None:
        """`motion` is the folder below which the embedded data sets go, where the experiment runs on them."""
        self.config = config
        self.preset = preset
        self.motion = motion

    @abstractmethod
    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        """All runs wanted, given the results so far: asked again when they are done, until it wants no more."""

    @abstractmethod
    def rows(self, results: Results) -> list[Row]:
        """The table's lines."""

    def prepare(self) -> None:
        """Makes the embedded data sets that the runs need."""
        if self.motion is not None:
            write_motion(self.config.data.root, MotionConfig())

    def work(self, run: Run, config: Config, stop: Callable[[], bool]) -> Result:
        """Trains and tests one run, in a process of its own; `config` is the run's. What it returns goes to JSON."""
        return train_and_test(run, config, stop)

    def write(self, folder: Path, results: Results, about: str) -> None:
        """Writes results.csv, table.md and plot.svg; `about` says how they came to be."""
        rows = [row for row in self.rows(results) if results.seeds(row.cell)]
        _write_csv(folder / "results.csv", results)
        text = f"# {self.title}\n\n{self.table(rows, results)}\n\n{self.remarks(rows, results)}\n\n{about}"
        _write_text(folder / "table.md", text)
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
            "Accuracies are means with 95 % intervals over training seeds and test tasks. Differences are paired: the "
            "same seeds, the same test tasks, subtracted task by task. Tasks are drawn from one fixed set of test "
            "clips, so no interval speaks of other clips or classes.",
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


def train_and_test(run: Run, config: Config, stop: Callable[[], bool]) -> Result:
    """Trains the run, going on where it was stopped, and evaluates it once for each of its tests."""
    began = time.perf_counter()
    if run.weights_of is None:
        folder = train(config, resume=True, progress=False)
    else:
        folder = config.out.with_name(folder_name(run.weights_of, run.seed))
    trained = time.perf_counter()
    device = pick_device(config.device)
    model, _ = load_model(folder / "best.pt", device)
    tests = {}
    for name, changes in run.tests.items():
        cfg = changed(config, changes)
        clips = load_split(cfg.data.root, cfg.eval.split, cfg.data.split_file(cfg.eval.split))
        result = evaluate(
            model, clips, cfg.data, cfg.eval, ranks=Ranks(device), amp=cfg.train.amp, progress=False, stop=stop
        )
        tests[name] = {
            "accuracy": result.accuracy,
            "ci95": result.ci95,
            "tasks": result.tasks,
            "answers": result.way * result.queries,
            "correct": result.correct,
        }
    soap = model.soap
    return {
        "tests": tests,
        "train_seconds": trained - began,
        "test_seconds": time.perf_counter() - trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "soap_parameters": 0 if soap is None else sum(p.numel() for p in soap.parameters()),
    }


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other settings, given by dotted key.

    Raises:
        UserError: no such setting, or an impossible value.
    """
    values = to_dict(config)
    for key, value in changes.items():
        *path, leaf = key.split(".")
        group = values
        for name in path:
            group = group[name]
        group[leaf] = value
    return from_dict(values)


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
    experiment.prepare()
    about = _about(experiment, command)
    finished: dict[tuple[str, int], Result] = {}
    results = Results(finished)
    with _StopSignals() as stop:
        try:
            while True:
                wanted = experiment.runs(seeds, results)
                for run in wanted:
                    path = folder / "runs" / run.folder / "result.json"
                    if (run.cell, run.seed) not in finished and path.exists():
                        finished[run.cell, run.seed] = _read_json(path)
                open_runs = [run for run in wanted if (run.cell, run.seed) not in finished]
                if not open_runs:
                    break
                tasks = [(run, run_config(experiment.config, run, folder)) for run in open_runs]
                done = _perform_all(experiment, tasks, 1 if experiment.alone else jobs, stop)
                with tqdm(
                    done, desc=experiment.name, unit="run", total=len(wanted), disable=not progress,
                    initial=len(wanted) - len(open_runs),
                ) as bar:  # fmt: skip
                    for run, result in bar:
                        finished[run.cell, run.seed] = result
                        shown = ", ".join(f"{name} {one['accuracy']:.1f} %" for name, one in result["tests"].items())
                        bar.write(f"{run.folder}: {shown}", file=sys.stderr)
        except Interrupted:
            raise ExperimentStopped(
                f"stopped with {len(finished)} of {len(wanted)} runs finished; the same command goes on"
            ) from None
        finally:
            experiment.write(folder, results, about)
    return results


def run_config(config: Config, run: Run, folder: Path) -> Config:
    """The config of one run."""
    own = {"episode.seed": run.seed, "out": str(folder / "runs" / run.folder)}
    return changed(config, {**run.changes, **own})


# ------------------------------------------------------------------------------------------------- doing the runs


def _perform_all(
    experiment: Experiment, tasks: Sequence[tuple[Run, Config]], jobs: int, stop: Event
) -> Iterator[tuple[Run, Result]]:
    """The results of `tasks` as they come; the first failure lets the runs under way end, and begins no more."""
    if jobs == 1:
        with decoded.keeping(KEPT_CLIPS):
            for run, config in tasks:
                yield run, _checked(run, _perform(experiment, run, config, stop))
        return
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failure: Exception | None = None
    with ProcessPoolExecutor(jobs, context, _enter_worker, (slots, stop, threads)) as pool:
        # Processes begin here; they inherit the ignored signal, so that Ctrl-C can't break one that is still starting.
        with _ignoring_interrupts():
            futures = {pool.submit(_perform_in_worker, experiment, run, config): run for run, config in tasks}
        while futures:
            ready, _ = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ready:
                run = futures.pop(future)
                try:
                    result = _checked(run, future.result())
                except BrokenProcessPool:
                    if stop.is_set():
                        raise Interrupted from None
                    raise UserError(
                        f"run {run.folder}: its process died, for lack of memory perhaps; "
                        "the finished runs are kept, and fewer --jobs may help"
                    ) from None
                except (Interrupted, UserError, RuntimeError) as error:
                    failure = failure or error
                    for other in list(futures):
                        if other.cancel():
                            del futures[other]
                else:
                    yield run, result
        if failure is not None:
            raise failure


def _checked(run: Run, outcome: tuple[str, Any]) -> Result:
    kind, value = outcome
    if kind == "stopped":
        raise Interrupted
    if kind == "refused":
        raise UserError(f"run {run.folder}: {value}")
    if kind == "failed":
        raise RuntimeError(f"run {run.folder}: {value}")
    result: Result = value
    return result


def _perform(experiment: Experiment, run: Run, config: Config, stop: Event) -> tuple[str, Any]:
    """Does one run and writes its result.json. What goes wrong comes back as text, as not every error can travel."""
    if stop.is_set():
        return "stopped", None
    try:
        result = experiment.work(run, config, stop.is_set)
        config.out.mkdir(parents=True, exist_ok=True)
        _write_text(config.out / "result.json", json.dumps(result) + "\n")
    except (Interrupted, KeyboardInterrupt):
        stop.set()
        return "stopped", None
    except UserError as error:
        return "refused", str(error)
    except (RuntimeError, OSError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "done", result


_worker: tuple[int, Event] | None = None


def _enter_worker(slots: Queue[int], stop: Event, threads: int) -> None:
    global _worker
    _worker = slots.get(), stop
    torch.set_num_threads(threads)
    decoded.limit = KEPT_CLIPS


def _perform_in_worker(experiment: Experiment, run: Run, config: Config) -> tuple[str, Any]:
    assert _worker is not None
    slot, stop = _worker
    if torch.cuda.is_available() and config.device in ("auto", "cuda"):
        config.device = f"cuda:{slot % torch.cuda.device_count()}"
    return _perform(experiment, run, config, stop)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _StopSignals:
    """An event that Ctrl-C or SIGTERM sets, here and, by a signal passed on, in the trainings under way."""

    def __enter__(self) -> Event:
        self.event = multiprocessing.get_context("spawn").Event()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self.event

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.event.is_set():
            sys.stderr.write("\nstopping; finished runs are kept\n")
            self.event.set()
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGINT)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _open_folder(experiment: Experiment, folder: Path) -> None:
    """Makes the experiment's folder, or sees that what is in it is this experiment."""
    path = folder / "experiment.json"
    free = {*FREE_TO_CHANGE} - {"data.root"}  # a table is of one data set
    settings = {key: value for key, value in flatten(to_dict(experiment.config)).items() if key not in free}
    here = {"experiment": experiment.name, "preset": experiment.preset, **settings}
    if path.exists():
        there = _read_json(path)
        keys = [key for key in {**here, **there} if there.get(key) != here.get(key)]
        if keys:
            differ = ", ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys[:3])
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{folder} holds another experiment: {differ}{more}; choose another --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no experiment; choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(path, json.dumps(here, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """What one of the experiment's own files holds; they are written whole, so a broken one was damaged since."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it to have it made anew") from error
    return content


# ------------------------------------------------------------------------------------------------------- writing


def machine() -> str:
    """CPU model, cores and GPU."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def _about(experiment: Experiment, command: Sequence[str]) -> str:
    found = {name.replace("_", "-"): version for name, version in versions().items() if version}
    named = [name for name in ("soap-net", "torch", "torchvision", "numpy", "python") if name in found]
    commit = f"; commit {found['git']}" if "git" in found else ""
    return (
        f"Made by `{shlex.join(command) or experiment.name}` on {machine()}; "
        f"{', '.join(f'{name} {found[name]}' for name in named)}{commit}.\n"
    )


def _signed(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:+.1f} ± {value.half:.1f}"


def _write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(path: Path, results: Results) -> None:
    """One line for each test of each run."""
    heads = ["cell", "seed", "test", "accuracy", "ci95_of_tasks", "tasks", "train_seconds", "test_seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*heads, "parameters", "soap_parameters"])
        for (cell, seed), result in results.finished.items():
            for test, one in result["tests"].items():
                writer.writerow(
                    [cell, seed, test, f"{one['accuracy']:.3f}", f"{one['ci95']:.3f}", one["tasks"]]
                    + [f"{result[key]:.1f}" for key in ("train_seconds", "test_seconds")]
                    + [result[key] for key in ("parameters", "soap_parameters")]
                )


def plot_accuracies(
    path: Path, rows: Sequence[Row], results: Results, title: str, axis: str, chance: float, paper: str = ""
) -> None:
    """Accuracies with intervals, a curve or a row of points for each series; `paper` labels the paper's figures.

    Where there are several seeds, each one's accuracy is a cross. `chance`, in percent, is marked where the figures
    come near it.
    """
    figure, axes = new_figure(8.0, 4.6)
    places = {x: i for i, x in enumerate(dict.fromkeys(row.x for row in rows))}
    numbers = [float(row.x) for row in rows if not isinstance(row.x, str)]
    numeric = len(numbers) == len(rows)
    logarithmic = numeric and max(numbers) > 12
    names = list(dict.fromkeys(row.series for row in rows))
    singles: list[tuple[float, float]] = []
    for number, name in enumerate(names):
        chosen = [row for row in rows if row.series == name]
        aside = number - (len(names) - 1) / 2  # side by side, so that no interval hides another
        if logarithmic:
            xs = [float(row.x) * (max(numbers) / min(numbers)) ** (0.01 * aside) for row in chosen]
        elif numeric:
            xs = [float(row.x) + 0.01 * (max(numbers) - min(numbers)) * aside for row in chosen]
        else:
            xs = [places[row.x] + 0.16 * aside for row in chosen]
        for x, row in zip(xs, chosen, strict=True):
            each = results.accuracies(row.cell, row.test, results.seeds(row.cell)).mean(axis=1)
            singles += [(x, accuracy) for accuracy in each]
        found = [results.accuracy(row.cell, row.test) for row in chosen]
        ys = [one.mean for one in found if one]
        halves = [one.half for one in found if one]
        style = MARKERS[number % len(MARKERS)] + ("-" if numeric else "")
        axes.errorbar(
            xs, ys, yerr=halves, fmt=style, ms=4, lw=1, capsize=4, color=f"C{number}", label=name or "this run"
        )
        known = [(x, row.paper) for x, row in zip(xs, chosen, strict=True) if row.paper is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "*", ms=9, mfc="none", color="k", label=f"{paper} {name}".strip())
    if len(singles) > len(rows):
        axes.plot(*zip(*singles, strict=True), "x", ms=4, mew=0.8, color="k", alpha=0.6, label="each training seed")
    if chance > axes.get_ylim()[0] - 10:
        axes.axhline(chance, color="0.5", ls=":", lw=1, label="chance")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -3.0), min(high, 103.0))  # intervals may reach beyond what is possible
    if not numeric:
        axes.set_xticks(range(len(places)), [str(x) for x in places], fontsize="small")
    elif logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(places), [f"{x:g}" for x in places])
    axes.set_xlabel(axis)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)


def new_figure(width: float, height: float, columns: int = 1) -> Any:
    """A matplotlib figure and its axes, without a display."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end only

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save_figure(figure: Any, path: Path) -> None:
    """Writes SVG that is the same, byte for byte, for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "soap-net"}):
        figure.savefig(path, metadata={"Date": None})


def seeded(cells: Iterable[tuple[str, Mapping[str, Any]]], seeds: Sequence[int], **options: Any) -> list[Run]:
    """A run for each cell and seed: all cells with the first seed, then all with the next."""
    cells = list(cells)
    return [Run(cell, seed, changes, **options) for seed in seeds for cell, changes in cells]
