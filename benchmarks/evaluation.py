"""How many tasks a second an evaluation does, and what memory it takes.

    python -m benchmarks.evaluation [--tasks 10000] [--repeats 3] [--clips 100000] [--check]

Speed: tasks of a TRX head on ResNet-18 at 84 pixels, 5-way 1-shot, against a loop that runs backbone and head for each
task; frames are decoded beforehand in both, and the two take turns. An evaluation runs the backbone, and what the head
does for a clip by itself, once for each of its 96 clips, however many tasks there are: the field's number is 10,000,
and with fewer the clips weigh more. So the head is timed without a backbone too. Memory: 10,000 tasks over many clips
whose features are made up, against the bytes of the features. `--check` ends with 1 where the ratio is below 100 or the
memory above 1.25 times the features.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from soap_net import tasks
from soap_net.config import Config, EvalConfig, from_dict
from soap_net.data.clips import Clip
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.splits import ClipSet
from soap_net.evaluate import evaluate
from soap_net.models import build_model
from soap_net.models.soap_net import SOAPNet

CLASSES, LOOP_TASKS = 24, 4


def clip_set(classes: int, clips: int) -> ClipSet:
    """Clips that are never opened."""
    members = tuple(tuple(Clip(Path(f"/none/{c}/{i}")) for i in range(clips)) for c in range(classes))
    return ClipSet("test", tuple(map(str, range(classes))), members)


def settings(head: str, backbone: str) -> Config:
    return from_dict({
        "data": {"frames": 8, "resize": 84, "crop": 84, "workers": 0},
        "model": {"backbone": backbone, "weights": "random", "head": head},
    })  # fmt: skip


def made_up(model: SOAPNet, clips: Sequence[Clip], *_: Any, **__: Any) -> Generator[Any]:
    """In place of reading: features of noise."""
    for start in range(0, len(clips), tasks.CLIPS_PER_CALL):
        rows = list(range(start, min(start + tasks.CLIPS_PER_CALL, len(clips))))
        yield rows, torch.rand(len(rows), model.head.frames, model.head.dim), {}, {}


def from_frames(frames: Tensor) -> Any:
    """In place of decoding: every clip has one of these frames, and goes through SOAP and the backbone."""

    def read(model: SOAPNet, clips: Sequence[Clip], *_: Any, **__: Any) -> Generator[Any]:
        for start in range(0, len(clips), tasks.CLIPS_PER_CALL):
            rows = list(range(start, min(start + tasks.CLIPS_PER_CALL, len(clips))))
            yield rows, model.features(frames[[row % len(frames) for row in rows]]), {}, {}

    return read


def speed(count: int, repeats: int, clips: int) -> float:
    """Prints tasks a second, ours and the loop's, and returns the median of their ratios."""
    config, ratios, heads = settings("trx", "resnet18"), [], []
    model = build_model(config.model, config.data.frames).eval()
    frames = torch.randint(0, 256, (16, 8, 3, 84, 84), dtype=torch.uint8)
    features = torch.rand(10, 8, model.head.dim)
    labels, split = torch.arange(5), clip_set(CLASSES, clips)

    def looped(task: Callable[[], Tensor]) -> float:
        began = time.process_time()
        with torch.inference_mode():
            for _ in range(LOOP_TASKS):
                task()
        return LOOP_TASKS / (time.process_time() - began)

    def evaluated(reading: Callable[..., Generator[Any]]) -> float:
        began = time.process_time()
        with mock.patch.object(tasks, "features_by_batch", reading):
            evaluate(model, split, config.data, EvalConfig(tasks=count), progress=False)
        return count / (time.process_time() - began)

    for _ in range(repeats):
        loop = looped(lambda: model(frames[:5], labels, frames[5:10], 5))
        ours = evaluated(from_frames(frames))
        ratios.append(ours / loop)
        print(f"{count} tasks on {CLASSES} x {clips} clips: {ours:.1f} tasks a CPU second, the loop {loop:.2f}")
        loop = looped(lambda: model.head(features[:5], labels, features[5:], 5))
        ours = evaluated(made_up)
        heads.append(ours / loop)
        print(f"the same on features: {ours:.1f} tasks a CPU second, the loop {loop:.2f}", flush=True)
    print(f"on features {np.median(heads):.1f} x the loop")
    return float(np.median(ratios))


def memory(clips: int) -> float:
    """Prints and returns what 10,000 tasks take beyond the net, in the size of the features."""
    config = settings("otam", "resnet18")
    model = build_model(config.model, config.data.frames)
    features = clips * config.data.frames * model.head.dim * 4
    split = clip_set(400, clips // 400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mock.patch.object(tasks, "features_by_batch", made_up):
        evaluate(model, split, config.data, EvalConfig(tasks=10_000, shot=5), progress=False)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"10,000 tasks over {clips} clips: {taken / 1e9:.2f} GB, features {features / 1e9:.2f} GB")
    return taken / features


def drawing(clips: int) -> None:
    """Prints how long 10,000 tasks take to draw."""
    sampler = EpisodeSampler(clip_set(400, clips // 400), 5, 5, 1, 1)
    began = time.process_time()
    for index in range(10_000):
        sampler[index]
    print(f"10,000 tasks drawn in {time.process_time() - began:.1f} CPU seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    used = memory(options.clips)  # first: the peak of a process never falls
    drawing(options.clips)
    ratio = speed(options.tasks, options.repeats, 4) if options.repeats else float("inf")
    print(f"{ratio:.0f} x the loop, {used:.2f} x the features")
    return int(options.check and (ratio < 100 or used > 1.25))


if __name__ == "__main__":
    sys.exit(main())
