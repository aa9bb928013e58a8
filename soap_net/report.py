"""A report of one or several runs: one HTML file that opens without a network."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from soap_net.checkpoint import load_model
from soap_net.data.splits import load_split
from soap_net.errors import UserError
from soap_net.evaluate import clip_loader

Array = NDArray[Any]

# Okabe and Ito's, which stay apart for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LARGEST_FRAME = 112  # pixels of a frame in the report
GAP = 2  # pixels between frames


@dataclass
class _Strip:
    """One row of pictures under a clip: T frames side by side."""

    label: str
    note: str
    image: str
    scale: str = ""


@dataclass
class _Shown:
    """A clip with its priors."""

    name: str
    strips: list[_Strip]


@dataclass
class _Run:
    """What the report shows of a run folder."""

    name: str
    folder: Path
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
        speeds = [entry["episodes_per_second"] for entry in self.metrics if "episodes_per_second" in entry]
        return 1000 * sum(1 / speed for speed in speeds) / len(speeds) if speeds else None

    @property
    def task(self) -> str:
        """What it was evaluated on."""
        if self.result is None:
            return ""
        way, shot, split = (self.result[key] for key in ("way", "shot", "split"))
        return f"{way}-way {shot}-shot on the {len(self.result['classes'])} classes of the {split} split"

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
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    evaluated = [run for run in read if run.result]
    html = environment.from_string(TEMPLATE).render(
        title=title,
        runs=read,
        evaluated=evaluated,
        tasks=list(dict.fromkeys(run.task for run in evaluated)),
        unseen=all(run.result["split"] != "train" for run in evaluated if run.result),
        curves=_curves(read),
        confusions=[(run, _confusion(run.result)) for run in read if run.result],
    )
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(name: str, folder: Path, colour: str) -> _Run:
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{folder}: not a run folder: there is no config.yaml in it")
    lines = _text(folder / "metrics.jsonl").splitlines()
    return _Run(
        name=name,
        folder=folder,
        colour=colour,
        config=yaml.safe_load(_text(config_file)),
        versions=json.loads(_text(folder / "versions.json") or "{}"),
        metrics=[json.loads(line) for line in lines if line.endswith("}")],
        result=json.loads(_text(folder / "eval.json") or "null"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


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
            reach = [entry["val_ci95"] for entry in validated]
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
    return _data_uri(buffer.getvalue(), "svg+xml")


def _smooth(values: Array) -> Array:
    """The mean over a window of a twentieth of the curve, cut off at its ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    smooth: Array = (total[end] - total[start]) / (end - start)
    return smooth


def _confusion(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, str]]]]:
    """Rows of (class, cells); a cell is the share of the class's queries, and that in percent as text."""
    rows = []
    for name, counts in zip(result["classes"], result["confusion"], strict=True):
        total = sum(counts)
        shares = [count / total if total else 0.0 for count in counts]
        rows.append((name, [(share, f"{100 * share:.0f}" if share >= 0.005 else "") for share in shares]))
    return rows


# Priors


@torch.inference_mode()
def _priors(run: _Run, count: int) -> list[_Shown]:
    checkpoint = run.folder / "last.pt"
    # All backends compute the same; the one it was trained with may need a GPU.
    model, config = load_model(checkpoint if checkpoint.is_file() else run.folder / "best.pt", backend="auto")
    soap: Any = model.soap
    split = run.config["eval"]["split"]
    clips = load_split(config.data.root, split, config.data.split_file(split))
    load = clip_loader(config.data, train=False)
    shown = []
    for row in np.unique(np.linspace(0, len(clips.classes) - 1, count).round().astype(int)):
        clip = clips.clips[row][0]
        frames = load(clip)
        priors = {name: prior[0].float().numpy() for name, prior in soap.priors(frames[None]).items()}
        output = soap(frames[None])[0].float().movedim(1, -1).numpy()
        low, high = np.percentile(output, (1, 99), axis=(0, 1, 2))
        strips = [_Strip("frames", "as they go in", _picture(frames.movedim(1, -1).numpy() / 255))]
        if "3dem" in priors:
            strips.append(_heat("3DEM", "motion around each pixel", priors["3dem"][:, 0]))
        if "cwem" in priors:
            # One number per frame and channel: as many bands side by side, a quarter of a frame high.
            height, width = frames.shape[-2:]
            bands = np.repeat(priors["cwem"][:, :, 0, 0], max(1, width // priors["cwem"].shape[1]), axis=1)
            strips.append(
                _heat("CWEM", "a number per frame and channel", np.repeat(bands[:, None], max(1, height // 4), axis=1))
            )
        if "hmem" in priors:
            for channel, plane in zip(("red", "green", "blue"), priors["hmem"].swapaxes(0, 1), strict=True):
                strips.append(_heat(f"HMEM, {channel}", "motion between tuples of frames", plane))
        strips.append(_Strip("sum", "what the backbone sees", _picture((output - low) / np.maximum(high - low, 1e-6))))
        shown.append(_Shown(clip.name, strips))
    return shown


def _heat(label: str, note: str, planes: Array) -> _Strip:
    """A strip of ``(T, H, W)`` numbers, with the range that its colours span."""
    low, high = float(planes.min()), float(planes.max())
    colours = matplotlib.colormaps["magma"]((planes - low) / max(high - low, 1e-6))
    return _Strip(label, note, _picture(colours[..., :3]), f"{low:.2f} to {high:.2f}")


def _picture(images: Array) -> str:
    """``(T, H, W, 3)`` in 0..1 side by side, large ones scaled down, as a PNG in a data URI."""
    tiles = torch.from_numpy(np.clip(images, 0, 1)).movedim(-1, 1).float()
    scale = LARGEST_FRAME / max(tiles.shape[-2:])
    if scale < 1:
        tiles = F.interpolate(tiles, scale_factor=scale, mode="area")
    tiles = F.pad(tiles, (0, GAP), value=1.0)
    buffer = io.BytesIO()
    imsave(buffer, torch.cat(list(tiles), dim=-1)[..., :-GAP].movedim(0, -1).numpy(), format="png")
    return _data_uri(buffer.getvalue(), "png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --ground: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 24px 0 8px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; color: var(--soft); max-width: 78ch; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; margin-top: 20px; padding: 24px; }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.legend span + span { margin-left: 20px; }
.result { display: grid; grid-template-columns: minmax(120px, 200px) 1fr 150px; gap: 16px; margin: 14px 0;
  align-items: center; }
.result .name { overflow-wrap: anywhere; font-weight: 600; }
.result small { color: var(--soft); display: block; font-weight: 400; }
.result .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.result .number b { font-size: 20px; }
.track { position: relative; height: 22px; background: #f0f2f5; border-radius: 4px; }
.track i { position: absolute; top: 0; bottom: 0; }
.track .bar { left: 0; border-radius: 4px; opacity: 0.85; }
.track .interval { top: 9px; bottom: 9px; background: var(--ink); min-width: 2px; }
.track .chance { width: 0; border-left: 2px dotted #888; top: -5px; bottom: -5px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.facts { width: 100%; margin-top: 20px; }
.facts th, .facts td { text-align: right; padding: 7px 10px; border-top: 1px solid var(--line); font-weight: 400; }
.facts th { color: var(--soft); font-size: 13px; border-top: 0; }
.facts th:first-child, .facts td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.confusion td, .confusion th { padding: 0; font-weight: 400; font-size: 12px; }
.confusion tbody th { text-align: right; padding-right: 10px; white-space: nowrap; }
.confusion td { width: 38px; min-width: 30px; height: 30px; text-align: center; border: 1px solid #fff; }
.confusion td.dark { color: #fff; }
.confusion thead th { vertical-align: bottom; padding-bottom: 6px; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap;
  display: inline-block; }
.pair { display: flex; flex-wrap: wrap; gap: 32px; }
.strip { display: grid; grid-template-columns: 150px 1fr; gap: 14px; align-items: center; margin-top: 4px; }
.strip div { font-size: 13px; line-height: 1.3; }
.strip small { color: var(--soft); display: block; font-size: 11.5px; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px; }
.scale { display: inline-block; width: 90px; height: 10px; border-radius: 2px; vertical-align: -1px; margin: 0 6px;
  background: linear-gradient(90deg, #000004, #3b0f70, #8c2981, #de4968, #fe9f6d, #fcfdbf); }
img.curves { width: 100%; margin-top: 8px; }
details { margin-top: 10px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--ground); padding: 14px; border-radius: 6px; overflow-x: auto; font-size: 12.5px; }
footer { color: var(--soft); font-size: 13px; margin-top: 20px; }
@media (max-width: 640px) { .result { grid-template-columns: 1fr; gap: 4px; } .result .number { text-align: left; }
  .strip { grid-template-columns: 1fr; gap: 2px; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p>Few-shot action recognition with SOAP (arXiv 2407.16344).</p>

<section>
<h2>Accuracy{% if unseen %} on unseen classes{% endif %}</h2>
{% if evaluated %}
<p>{% if tasks | length == 1 %}{{ tasks[0] }}. {% endif %}
The dark line is the 95&nbsp;% interval, the dotted one chance.</p>
{% for run in evaluated %}
<div class="result">
<div class="name"><span class="chip" style="background: {{ run.colour }}"></span>{{ run.name }}
{% if tasks | length > 1 %}
<small>{{ run.task }}</small>
{% endif %}
</div>
<div class="track">
<i class="bar" style="width: {{ "%.3f" | format(run.result.accuracy) }}%; background: {{ run.colour }}"></i>
{% set left = [run.result.accuracy - run.result.ci95, 0] | max %}
{% set right = [run.result.accuracy + run.result.ci95, 100] | min %}
<i class="interval" style="left: {{ "%.3f" | format(left) }}%; width: {{ "%.3f" | format(right - left) }}%"></i>
<i class="chance" style="left: {{ "%.3f" | format(100 / run.result.way) }}%"></i>
</div>
<div class="number">
<b>{{ "%.1f" | format(run.result.accuracy) }}</b> &plusmn; {{ "%.1f" | format(run.result.ci95) }} %
</div>
</div>
{% endfor %}
{% else %}
<p>Not evaluated yet.</p>
{% endif %}
<div class="wide"><table class="facts">
<tr><th>run</th><th>priors of SOAP</th><th>backbone</th><th>head</th><th>training episodes</th><th>time each</th>
<th>evaluation tasks</th><th>time each</th></tr>
{% for run in runs %}
<tr><td>{{ run.name }}</td><td>{{ run.soap }}</td><td>{{ run.config.model.backbone }}</td>
<td>{{ run.config.model.head }}</td>
<td>{{ run.metrics[-1].episode if run.metrics else "-" }}</td>
<td>{{ "%.0f ms" | format(run.episode_milliseconds) if run.episode_milliseconds else "-" }}</td>
<td>{{ run.result.tasks if run.result else "-" }}</td>
<td>{{ "%.1f ms" | format(1000 / run.result.episodes_per_second) if run.result else "-" }}</td></tr>
{% endfor %}
</table></div>
</section>

{% if curves %}
<section>
<h2>Learning curves</h2>
<p>Thin: each logged step; thick: its moving mean; circles: validation on classes of their own, with
95&nbsp;% intervals; dotted: chance.</p>
<p class="legend">
{% for run in runs %}
<span><span class="chip" style="background: {{ run.colour }}"></span>{{ run.name }}</span>
{% endfor %}
</p>
<img class="curves" src="{{ curves }}" alt="loss and accuracy over training episodes">
</section>
{% endif %}

{% if confusions %}
<section>
<h2>Confusion</h2>
<p>Rows: the true class; columns: what its queries were taken for, in percent of the row.</p>
<div class="pair">
{% for run, rows in confusions %}
<div class="wide">
<h3><span class="chip" style="background: {{ run.colour }}"></span>{{ run.name }}</h3>
<table class="confusion">
<thead><tr><th></th>{% for name, _ in rows %}<th><span>{{ name }}</span></th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in rows %}
<tr><th>{{ name }}</th>
{% for share, text in cells %}
<td style="background: rgba(0, 66, 122, {{ "%.3f" | format(0.04 + 0.86 * share) }})"
{%- if share > 0.45 %} class="dark"{% endif %}>{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</div>
</section>
{% endif %}

{% for run in runs if run.shown or run.shown_problem %}
<section>
<h2>What SOAP does: {{ run.name }}</h2>
{% if run.shown %}
<p>Clips of {{ "training" if run.config.eval.split == "train" else "unseen" }} classes.
Below the frames the priors, each between 0 and 1, that SOAP adds to them: 3DEM from a
spatio-temporal convolution, CWEM from each channel's mean over time, HMEM from differences between tuples of frames.
Last the sum, stretched to full contrast. Colours run from the lowest value <span class="scale"></span> to the highest
in the row, which stand at its left.</p>
{% for clip in run.shown %}
<h3>{{ clip.name }}</h3>
{% for strip in clip.strips %}
<div class="strip">
<div>{{ strip.label }}<small>{{ strip.note }}</small><small>{{ strip.scale }}</small></div>
<img src="{{ strip.image }}" alt="{{ strip.label }} of {{ clip.name }}"></div>
{% endfor %}
{% endfor %}
{% else %}
<p>The priors can't be shown: {{ run.shown_problem }}</p>
{% endif %}
</section>
{% endfor %}

<section>
<h2>Settings</h2>
{% for run in runs %}
<details><summary>{{ run.name }}: {{ run.folder }}</summary><pre>{{ run.settings }}</pre></details>
{% endfor %}
<footer>
{% for name, value in runs[0].versions.items() if value %}
{{ name }} {{ value }}{{ "" if loop.last else " · " }}
{% endfor %}
</footer>
</section>
</main>
</body>
</html>
"""
