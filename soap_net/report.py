"""A report of one or several runs: one HTML file that opens without a network."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from soap_net.checkpoint import load_model
from soap_net.data.splits import split_of
from soap_net.data.transforms import clip_loader
from soap_net.errors import UserError
from soap_net.files import write_text
from soap_net.intervals import Interval
from soap_net.pictures import Strip, data_uri, strips
from soap_net.runs import RunFolder, episode_seconds

Array = NDArray[Any]

# Okabe and Ito's, which stay apart for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass
class _Shown:
    """A clip with its priors."""

    name: str
    strips: list[Strip]


@dataclass
class _Run:
    """What the report shows of a run folder."""

    name: str
    folder: RunFolder
    colour: str
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    shown: list[_Shown] = field(default_factory=list)
    shown_problem: str = ""

    @property
    def soap(self) -> str:
        soap = self.config["model"]["soap"]
        return ", ".join(soap["parts"]) if soap["enabled"] and soap["parts"] else "none"

    @property
    def episode_milliseconds(self) -> float | None:
        seconds = episode_seconds(self.metrics)
        return None if seconds is None else 1000 * seconds

    @property
    def task(self) -> str:
        """What it was evaluated on."""
        if self.result is None:
            return ""
        way, shot, split = (self.result[key] for key in ("way", "shot", "split"))
        task = f"{way}-way {shot}-shot on the {len(self.result['classes'])} classes of the {split} split"
        trained, tested = (self.result.get(key, "") for key in ("trained_on", "tested_on"))
        return f"{task} of {tested}, trained on {trained}" if trained and trained != tested else task

    @property
    def beyond(self) -> str:
        """The interval over new clips, or why there is none; empty where the result, of an older version, has none."""
        found = self.result and self.result.get("beyond")
        if not found:
            return ""
        if found["low"] is None:
            return f"no interval over other clips: {found['over']}"
        return f"{Interval(**found)} % over {found['over']}"

    @property
    def settings(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)


def write_report(path: Path, runs: Mapping[str, Path], *, title: str = "SOAP-Net", clips: int = 4) -> None:
    """Write the report of run folders to ``path``.

    It shows accuracies with their 95 % intervals, learning curves, confusion matrices, and for the runs with SOAP a few
    clips of the evaluated classes with the three priors (equations 4, 8 and 14 of arXiv 2407.16344) under their frames.
    What a run lacks (it was not evaluated yet, its data set has gone) is said in its place.

    Args:
        path: the HTML file; written whole or not at all.
        runs: run folders by the name to show.
        title: heading of the report.
        clips: how many clips to show with their priors, each of another class.

    Raises:
        UserError: no runs, or a folder that is not a run.
        OSError: the file can't be written; what was there stays.
    """
    if not runs:
        raise UserError(f"{path}: a report needs at least one run")
    read = [_read(name, Path(run), COLOURS[i % len(COLOURS)]) for i, (name, run) in enumerate(runs.items())]
    for run in read:
        if run.config["model"]["soap"]["enabled"]:
            try:
                run.shown = _priors(run, clips)
            except (UserError, RuntimeError) as error:  # of one run, which the others need not suffer
                run.shown_problem = str(error)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("soap_net", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    evaluated = [run for run in read if run.result]
    html = environment.get_template("report.html").render(
        title=title,
        runs=read,
        evaluated=evaluated,
        tasks=list(dict.fromkeys(run.task for run in evaluated)),
        unseen=all(run.result["split"] != "train" for run in evaluated if run.result),
        curves=_curves(read),
        confusions=[(run, _confusion(run.result)) for run in read if run.result],
    )
    write_text(path, html)


def _read(name: str, folder: Path, colour: str) -> _Run:
    run = RunFolder(folder)
    return _Run(
        name=name,
        folder=run,
        colour=colour,
        config=run.read_config(),
        versions=run.read_versions(),
        metrics=run.read_metrics(),
        result=run.read_result(),
    )


# Charts


def _curves(runs: Sequence[_Run]) -> str:
    """Loss and accuracy over episodes as an inline picture; empty where nothing was logged."""
    if not any(run.metrics for run in runs):
        return ""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for run in runs:
        logged = [entry for entry in run.metrics if "loss" in entry]
        validated = [entry for entry in run.metrics if "val_accuracy" in entry]
        for axes, key in ((losses, "loss"), (accuracies, "accuracy")):
            episodes = [entry["episode"] for entry in logged]
            values = np.array([entry[key] for entry in logged], dtype=float)
            if len(values):
                axes.plot(episodes, values, color=run.colour, alpha=0.18, linewidth=0.8)
                axes.plot(episodes, _smooth(values), color=run.colour, linewidth=1.8)
        if validated:
            episodes = [entry["episode"] for entry in validated]
            middle = [entry["val_accuracy"] for entry in validated]
            reach = [entry.get("val_ci95", math.nan) for entry in validated]
            accuracies.errorbar(
                episodes, middle, reach, color=run.colour, fmt="o", markersize=5, markerfacecolor="white", capsize=3
            )
    for way in {run.config["episode"]["way"] for run in runs}:
        accuracies.axhline(100 / way, color="#888", linewidth=1, linestyle=":")
    accuracies.set_ylim(0, 102)
    losses.set_ylim(bottom=0)
    for axes, label in ((losses, "loss per query"), (accuracies, "accuracy, %")):
        axes.set_title(label, loc="left", fontsize=11, color="#333")
        axes.set_xlabel("episode", color="#555")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbb")
        axes.tick_params(colors="#555", length=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "svg+xml")


def _smooth(values: Array) -> Array:
    """The mean over a window of a twentieth of the curve, cut off at its ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (total[end] - total[start]) / (end - start)


def _confusion(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, str]]]]:
    """Rows of (class, cells); a cell is the share of the class's queries, and that in percent as text."""
    rows = []
    for name, counts in zip(result["classes"], result["confusion"], strict=True):
        total = sum(counts)
        shares = [count / total if total else 0.0 for count in counts]
        rows.append((name, [(share, f"{100 * share:.0f}" if share >= 0.005 else "") for share in shares]))
    return rows


# Priors


def _priors(run: _Run, count: int) -> list[_Shown]:
    folder = run.folder
    # All backends compute the same; the one it was trained with may need a GPU.
    model, config = load_model(folder.last if folder.last.is_file() else folder.best, backend="auto")
    split = run.config["eval"]["split"]
    clips = split_of(config.data, split)
    load = clip_loader(config.data, train=False)
    shown = []
    for row in np.unique(np.linspace(0, len(clips.classes) - 1, count).round().astype(int)):
        clip = clips.clips[row][0]
        frames = load(clip)
        try:
            shown.append(_Shown(clip.name, strips(frames, model.soap)))
        except UserError as error:
            raise UserError(f"those of {clip.name}: {error}") from error
    return shown
