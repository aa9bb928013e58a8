"""What SOAP costs: time, memory and parameters beside each backbone, and what it does to training."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soap_net.callbacks import EachStep
from soap_net.config import Config
from soap_net.data.memory import ClipMemory
from soap_net.experiments.drawing import MARKERS, new_figure, save_figure
from soap_net.experiments.experiment import Experiment, Run, changed, seeded
from soap_net.experiments.processes import Stop
from soap_net.experiments.results import Result, Results, Row, write_csv
from soap_net.files import write_text
from soap_net.interrupts import Interrupted
from soap_net.models import build_model
from soap_net.ranks import pick_device
from soap_net.runs import RunFolder
from soap_net.steps import Step
from soap_net.train import Training, train

BACKBONES = {
    "quick": ("tiny", "resnet18", "resnet50", "efficientnet_lite0"),
    "paper": ("resnet18", "resnet34", "resnet50", "vit_b_16", "efficientnet_lite0"),
}
CLIPS = 3
REPEATS = {"quick": 5, "paper": 15}
"""Turns that are timed at the least; a small net takes as many as fit into `SECONDS`."""
SECONDS = 20.0
SIZE = 224
"""Pixels of a frame's sides: the field's, as costs at the small frames of the preset quick would tell nothing."""
PART_NAMES = {"three_dem": "3DEM", "cwem": "CWEM", "hmem": "HMEM"}
SMOOTHED = 10


class Overhead(Experiment):
    """Times each backbone with and without SOAP, turn by turn in one process; then traces training with and without."""

    title = "What SOAP costs"
    columns = ("backbone",)
    difference = ""
    alone = True

    @property
    def backbones(self) -> tuple[str, ...]:
        """Those that are timed."""
        return BACKBONES[self.preset]

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        curves = [(_curve(soap), {"model.soap.enabled": soap, "train.val_every": 0}) for soap in (True, False)]
        return super().runs(seeds[:1], results) + seeded(curves, seeds)

    def rows(self, results: Results) -> list[Row]:
        return [
            Row((name,), _cost(name), changes={"model.backbone": name, "model.weights": "random"})
            for name in self.backbones
        ]

    def work(self, run: Run, config: Config, stop: Stop, memory: ClipMemory) -> Result:
        if run.cell.startswith("cost-"):
            return {"tests": {}, **measure(config, REPEATS[self.preset], SIZE, stop)}
        return {"tests": {}, **trace(config, stop, memory)}

    def write(self, folder: Path, results: Results, about: str) -> None:
        rows = [row for row in self.rows(results) if results.seeds(row.cell)]
        lines = [self._line(row, results) for row in rows]
        heads = [
            "backbone", "parameters", "SOAP adds", "forward without, ms", "with, ms", "SOAP adds, %",
            "training step without, ms", "with, ms ", "SOAP adds, % ", "kept for backward without, MiB", "with, MiB",
        ]  # fmt: skip
        table = "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])
        threads = sorted({one["threads"] for one in results.finished.values() if "threads" in one})
        write_text(
            folder / "table.md",
            f"# {self.title}\n\n{table}\n\n"
            f"{CLIPS} clips of {self.config.data.frames} frames of {SIZE} x {SIZE} from uint8, fp32, random weights, "
            f"head {self.config.model.head}, threads: {' or '.join(map(str, threads)) or 'none yet'}. Times are "
            "medians; a percentage is the median of the ratios of neighbouring turns, with their quartiles. Kept for "
            "backward: the bytes of all tensors that autograd holds at the end of a training forward, parameters left "
            "out.\n\n"
            "plot-cost.svg shows the percentages. "
            f"plot.svg and curves.csv: training on {self.config.train.episodes} episodes "
            f"({self.config.model.backbone}), losses and gradient norms averaged over {SMOOTHED} of them; the bands "
            f"reach from the lowest to the highest seed.\n\n{about}",
        )
        write_csv(folder / "results.csv", [head.strip() for head in heads], lines)
        curves = {
            (soap, seed): results.finished[_curve(soap), seed]["curves"]
            for soap in (True, False)
            for seed in results.seeds(_curve(soap))
        }
        if curves:
            _write_curves(folder / "curves.csv", curves)
            _plot_curves(folder / "plot.svg", curves)
        costs = {row.labels[0]: results.finished[row.cell, results.seeds(row.cell)[0]] for row in rows}
        if costs:
            _plot_costs(folder / "plot-cost.svg", costs)

    def _line(self, row: Row, results: Results) -> list[str]:
        one = results.finished[row.cell, results.seeds(row.cell)[0]]
        line = [row.labels[0], f"{one['parameters']:,}", f"{one['soap_parameters']:,}"]
        for kind in ("forward", "step"):
            line += [f"{1e3 * statistics.median(one[f'{kind}_{name}']):.1f}" for name in ("without", "with")]
            low, middle, high = added(one, kind)
            line.append(f"{middle:+.1f} ({low:+.1f} to {high:+.1f})")
        return line + [f"{one[f'kept_{name}'] / 2**20:.1f}" for name in ("without", "with")]


def added(cost: Result, kind: str) -> list[float]:
    """Quartiles of what SOAP adds to the time of a forward or a step, in percent, from neighbouring turns."""
    turns = zip(cost[f"{kind}_without"], cost[f"{kind}_with"], strict=True)
    ratios = [100.0 * (with_soap / without - 1.0) for without, with_soap in turns]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def _cost(backbone: str) -> str:
    return f"cost-{backbone}"


def _curve(soap: bool) -> str:
    return f"curve-{'soap' if soap else 'plain'}"


def measure(config: Config, repeats: int, size: int, stop: Stop) -> dict[str, Any]:
    """Seconds of forward and of a training step, with and without SOAP, taken in turns; bytes kept; parameters.

    The clips have `config.data.frames` frames of `size` x `size` pixels, whatever `config.data.crop` is.
    """
    device = pick_device(config.device)
    models = {
        name: build_model(
            changed(config, {"model.soap.enabled": name == "with"}).model, config.data.frames, config.episode.seed
        ).to(device)
        for name in ("without", "with")
    }
    draw = torch.Generator(device).manual_seed(0)
    clips = torch.randint(
        0, 256, (CLIPS, config.data.frames, 3, size, size), dtype=torch.uint8, device=device, generator=draw
    )
    labels = torch.arange(CLIPS - 1, device=device)

    def forward(model: nn.Module) -> Tensor:
        return model(clips[:-1], labels, clips[-1:], len(labels))

    def step(model: nn.Module) -> None:
        F.cross_entropy(forward(model), labels[:1]).backward()
        model.zero_grad(set_to_none=True)

    def infer(model: nn.Module) -> None:
        with torch.inference_mode():
            forward(model)

    found: dict[str, Any] = {f"{kind}_{name}": [] for kind in ("forward", "step") for name in models}
    turn, end = 0, time.perf_counter() + SECONDS
    while turn <= repeats or time.perf_counter() < end:
        for kind, act, training in (("forward", infer, False), ("step", step, True)):
            for name in ("without", "with") if turn % 2 else ("with", "without"):
                if stop():
                    raise Interrupted
                models[name].train(training)
                _wait(device)
                began = time.perf_counter()
                act(models[name])
                _wait(device)
                if turn:  # the first is for warming up
                    found[f"{kind}_{name}"].append(time.perf_counter() - began)
        turn += 1
    for name, model in models.items():
        found[f"kept_{name}"] = kept_bytes(model.train(), partial(forward, model))
    soap = models["with"].soap
    assert soap is not None
    found["soap_parameters"] = sum(p.numel() for p in soap.parameters())
    found["parameters"] = sum(p.numel() for p in models["without"].parameters())
    found["threads"] = torch.get_num_threads()
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the memory blocks that `forward` leaves with autograd for backward, `model`'s parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # alive until the sum is taken, and with it all that it keeps
    total = sum(kept.values())
    del output
    return total


def trace(config: Config, stop: Stop, memory: ClipMemory | None = None) -> dict[str, Any]:
    """Trains from the beginning, and notes loss and accuracy of each episode and the gradient norms of each step."""
    RunFolder(config.out).last.unlink(missing_ok=True)  # a training that goes on has lost its first half's curves
    curves = defaultdict[str, list[float]](list)

    def note(training: Training, step: Step) -> None:
        model = training.model
        curves["loss"] += step.losses
        curves["accuracy"] += step.accuracies
        modules: dict[str, nn.Module] = {"backbone": model.backbone, "head": model.head}
        modules |= {shown: getattr(model.soap, name) for name, shown in PART_NAMES.items() if hasattr(model.soap, name)}
        for name, module in modules.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
            curves[name].append(norm / step.clipped if step.clipped else math.nan)  # clipped to 0: fp16 has overflowed

    train(config, progress=False, callbacks=[EachStep(note)], stop=stop, memory=memory)
    return {"curves": curves}


Curves = dict[tuple[bool, int], dict[str, list[float]]]


def _write_curves(path: Path, curves: Curves) -> None:
    lines = [
        ["with" if soap else "without", seed, what, end, f"{statistics.fmean(values[end - SMOOTHED : end]):.5g}"]
        for (soap, seed), found in curves.items()
        for what, values in found.items()
        for end in range(SMOOTHED, len(values) + 1, SMOOTHED)
    ]
    write_csv(path, ["soap", "seed", "what", "step", "value"], lines)


def _plot_curves(path: Path, curves: Curves) -> None:
    figure, (left, right) = new_figure(10.0, 5.2, 2)
    for soap in (True, False):
        name, style = ("with SOAP", "-") if soap else ("without SOAP", "--")
        found = [one for (on, _), one in curves.items() if on == soap]
        if not found:
            continue
        _band(left, [one["loss"] for one in found], name, f"C{0 if soap else 1}", "-")
        for number, what in enumerate(("backbone", "head", *PART_NAMES.values())):
            if what in found[0]:
                _band(right, [one[what] for one in found], f"{what}, {name}", f"C{number}", style)
    left.set(xlabel="episode", ylabel="loss per query", title="Training loss")
    right.set(xlabel="optimizer step", ylabel="norm of the gradient", title="Gradients", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    save_figure(figure, path)


def _plot_costs(path: Path, costs: Mapping[str, Result]) -> None:
    figure, axes = new_figure(8.0, 4.2)
    for number, (kind, label) in enumerate((("forward", "forward"), ("step", "training step"))):
        quartiles = np.array([added(cost, kind) for cost in costs.values()])
        places = np.arange(len(costs)) + 0.16 * (number - 0.5)
        low, middle, high = quartiles.T
        axes.errorbar(
            places, middle, yerr=[middle - low, high - middle], fmt=MARKERS[number], ms=4, lw=1, capsize=4, label=label
        )
    axes.set_xticks(range(len(costs)), list(costs))
    axes.axhline(0.0, color="0.5", lw=1)
    axes.set(xlabel="backbone", ylabel="SOAP adds, % of the time", title="Time: medians and quartiles")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    save_figure(figure, path)


def _band(axes: Any, lines: Sequence[Sequence[float]], label: str, color: str, style: str) -> None:
    """The mean of the seeds, and what lies between the lowest and the highest, both smoothed."""
    steps = min(map(len, lines)) // SMOOTHED
    if not steps:
        return
    values = np.array([np.reshape(line[: steps * SMOOTHED], (steps, SMOOTHED)).mean(axis=1) for line in lines])
    places = SMOOTHED * (np.arange(steps) + 0.5)
    axes.plot(places, values.mean(axis=0), style, color=color, label=label)
    axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
