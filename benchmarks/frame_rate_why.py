"""`python -m benchmarks.frame_rate_why OUT [--start ..] [--rates ..] [--seeds ..]`: at which frame rates SOAP learns.

Trains and tests the demo's net as `soap-net experiment frame-rate` does, from either start of HMEM. A line of
OUT/results.csv is a run; those that are there are not done again. OUT/energies.csv says what the frames themselves
hold: 5-way 1-shot by opponent energies, which learn nothing.
"""

from __future__ import annotations

import argparse
import csv
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
from soap_net.runs import RunFolder
from soap_net.train import train

COUNTS = {"train_clips": 30, "val_clips": 10, "test_clips": 30}
LAGS = (1, 2, 4, 7)


def clips_at(out: Path, rate: int, interval: int) -> Path:
    """The motion set at that rate, long enough for the interval."""
    seconds = 16 / rate if interval == 1 else 1.0
    return write_motion(
        out / "motion" / f"{rate}fps-{interval}",
        MotionConfig(frame_rate=rate, seconds=seconds, **COUNTS),
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
    memory = ClipMemory(2**30)
    places = [tuple(map(int, place.split(":"))) for place in args.rates]
    with (args.out / "energies.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["rate", "interval", *(f"lag {lag}" for lag in LAGS)])
        for rate, interval in places:
            root = clips_at(args.out, rate, interval)
            lines.writerow([rate, interval, *(f"{energy_accuracy(root, interval, lag):.1f}" for lag in LAGS)])
    path = args.out / "results.csv"
    done = [line[:-1] for line in csv.reader(path.open())] if path.exists() else []
    if not done:
        path.write_text("rate,interval,start,episodes,seed,accuracy\n")
    for seed in args.seeds:
        for rate, interval in places:
            for start in args.start:
                key = [str(value) for value in (rate, interval, start, args.episodes, seed)]
                if key in done:
                    continue
                run = args.out / "runs" / "-".join(key)
                config = parse(
                    [],
                    base=flatten(read_settings(presets()["demo"]))
                    | {"data.root": str(clips_at(args.out, rate, interval)), "data.interval": interval}
                    | {"model.soap.start": start, "train.episodes": args.episodes, "train.val_every": 0}
                    | {"episode.seed": seed, "eval.tasks": 1000, "out": str(run)},
                    prog="frame_rate_why",
                    source="frame_rate_why",
                )
                train(config, resume=True, progress=False, memory=memory)
                accuracy = evaluate_run(RunFolder(run).last, config, progress=False).accuracy
                with path.open("a") as file:
                    file.write(",".join([*key, f"{accuracy:.1f}"]) + "\n")
                print(*key, f"{accuracy:.1f} %", flush=True)


if __name__ == "__main__":
    main()
