"""`python -m benchmarks.frame_rate_why OUT [--start ..] [--rates ..] [--seeds ..]`: at which frame rates SOAP learns.

Trains and tests the demo's net as `soap-net experiment frame-rate` does, from either start of HMEM. A line of
OUT/results.csv is a run; those that are there are not done again. OUT/energies.csv says what the frames themselves
hold: 5-way 1-shot by opponent energies, which learn nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from soap_net.config import flatten, parse, presets, read_settings
from soap_net.data.memory import ClipMemory
from soap_net.data.motion import MotionConfig, write_motion
from soap_net.data.splits import load_split
from soap_net.evaluate import evaluate_run
from soap_net.experiments.results import student_t, write_csv
from soap_net.files import write_text
from soap_net.runs import RunFolder
from soap_net.train import train

COUNTS = {"train_clips": 30, "val_clips": 10, "test_clips": 30}
LAGS = (1, 2, 4, 7)
HEADS = ["rate", "interval", "start", "episodes", "seed", "accuracy"]
Place = tuple[int, int]  # frames a second, sampling interval
Key = tuple[str, str, str, str, str]  # a run, as the first five of HEADS


def clips_at(out: Path, rate: int, interval: int) -> Path:
    """The motion set at that rate, long enough for the interval."""
    seconds = 16 / rate if interval == 1 else 1.0
    return write_motion(
        out / "motion" / f"{rate}fps-{interval}",
        MotionConfig(frame_rate=rate, seconds=seconds, **COUNTS),
        progress=False,
    )


def energies(frames: Tensor, lag: int) -> Tensor:
    """(32,) of (T, H, W) grey frames: the change over `lag` times the gradient between, on a 4 x 4 grid, unit norm."""
    before, after = frames[:-lag], frames[lag:]
    middle, change = (before + after) / 2, (after - before)[:, 1:-1, 1:-1]
    across, down = middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2], middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]
    products = torch.stack([change * across, change * down]).mean(1)
    return F.normalize(F.adaptive_avg_pool2d(products, 4).flatten(), dim=0)


def energy_accuracy(root: Path, interval: int, lag: int, tasks: int = 400) -> float:
    """5-way 1-shot on the test classes, the nearest support by cosine, in percent."""
    vectors = []
    for clips in load_split(root, "test", None, {}).clips:
        start = (clips[0].num_frames() - 7 * interval - 1) // 2
        indices = [start + interval * step for step in range(8)]
        vectors.append(torch.stack([energies(clip.read(indices)[:, 0].float(), lag) for clip in clips]))
    draws, right = np.random.default_rng(0), 0
    for _ in range(tasks):
        classes = draws.permutation(len(vectors))[:5]
        pairs = [vectors[c][draws.permutation(len(vectors[c]))[:2]] for c in classes]
        support, query = torch.stack(pairs).unbind(1)
        right += int(((query @ support.T).argmax(1) == torch.arange(5)).sum())
    return 100 * right / (5 * tasks)


def measure_energies(out: Path, places: Sequence[Place]) -> None:
    """Writes OUT/energies.csv."""
    lines = []
    for rate, interval in places:
        root = clips_at(out, rate, interval)
        lines.append([rate, interval, *(f"{energy_accuracy(root, interval, lag):.1f}" for lag in LAGS)])
    write_csv(out / "energies.csv", ["rate", "interval", *(f"lag {lag}" for lag in LAGS)], lines)


def accuracy(out: Path, key: Key, memory: ClipMemory) -> float:
    """Trains and tests one net."""
    rate, interval, start, episodes, seed = key
    run = out / "runs" / "-".join(key)
    settings = {
        "data.root": str(clips_at(out, int(rate), int(interval))),
        "data.interval": int(interval),
        "model.soap.start": start,
        "train.episodes": int(episodes),
        "train.val_every": 0,
        "episode.seed": int(seed),
        "eval.tasks": 1000,
        "out": str(run),
    }
    base = flatten(read_settings(presets()["demo"])) | settings
    config = parse([], base=base, prog="frame_rate_why", source="frame_rate_why")
    train(config, resume=True, progress=False, memory=memory)
    return evaluate_run(RunFolder(run).last, config, progress=False).accuracy


def write_table(out: Path, done: dict[Key, float]) -> None:
    """Writes OUT/results.csv and OUT/table.md."""
    write_csv(out / "results.csv", HEADS, [[*key, f"{value:.1f}"] for key, value in done.items()])
    text = "# Frame rate and the start of HMEM\n\n"
    text += "| frames a second | interval | start | episodes | by seed, % | mean, % |\n"
    text += "| --- | --- | --- | --- | --- | --- |\n"
    for cell in sorted({key[:-1] for key in done}, key=lambda cell: (int(cell[0]), cell[1:])):
        values = np.array([value for key, value in sorted(done.items()) if key[:-1] == cell])
        half = student_t(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        mean = f"{values.mean():.1f}" + ("" if half is None else f" ± {half:.1f}")
        text += f"| {' | '.join(cell)} | {', '.join(f'{value:.1f}' for value in values)} | {mean} |\n"
    text += (
        "\n5-way 1-shot on unseen classes (chance: 20 %), 1000 tasks; the demo's net, 8 frames of 48 x 48. Means with "
        "95 % intervals over training seeds (Student's t); they speak of no other clips or classes.\n\n"
        "Made by `python -m benchmarks.frame_rate_why OUT`.\n"
    )
    write_text(out / "table.md", text)


def main() -> None:
    """Does what is asked and not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", nargs="+", default=["random", "differences"])
    parser.add_argument("--rates", nargs="+", default=["15:1", "60:1", "120:1", "240:1", "64:8"], help="rate:interval")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=240)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    places = [(int(rate), int(interval)) for rate, interval in (place.split(":") for place in args.rates)]
    path = args.out / "results.csv"
    lines = list(csv.reader(path.open()))[1:] if path.exists() else []
    done: dict[Key, float] = {(line[0], line[1], line[2], line[3], line[4]): float(line[5]) for line in lines}
    if not (args.out / "energies.csv").exists():
        measure_energies(args.out, places)
    memory = ClipMemory(2**30)
    for seed, (rate, interval), start in itertools.product(args.seeds, places, args.start):
        key = str(rate), str(interval), start, str(args.episodes), str(seed)
        if key not in done:
            done[key] = accuracy(args.out, key, memory)
            print(*key, f"{done[key]:.1f} %", flush=True)
        write_table(args.out, done)


if __name__ == "__main__":
    main()
