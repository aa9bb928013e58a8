"""How many tasks a second an evaluation does, and what memory it takes.

    python -m benchmarks.evaluation                  all of it, into benchmarks/results/ (about 8 minutes)
    python -m benchmarks.evaluation --repeats 0      memory alone

Speed: tasks of a TRX head on ResNet-18 at 84 pixels, 5-way 1-shot, against a loop that runs backbone and head for each
task; frames are decoded beforehand in both, and the two take turns. An evaluation runs the backbone, and what the head
does for a clip by itself, once for each of its 96 clips, however many tasks there are: the field's number is 10,000,
and with fewer the clips weigh more. So the head is timed without a backbone too. Memory: 10,000 tasks over many clips
whose features are made up, against the bytes of the features. Times are the processor's.
"""

from __future__ import annotations

import argparse
import json
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

from benchmarks.cpu import RESULTS, machine, slug
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


def speed(count: int, repeats: int, clips: int) -> dict[str, Any]:
    """Tasks a second of ours and of the loop, and their ratios, with the backbone and on features alone."""
    config = settings("trx", "resnet18")
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

    kinds: dict[str, tuple[Callable[[], Tensor], Callable[..., Generator[Any]]]] = {
        "backbone and head": (lambda: model(frames[:5], labels, frames[5:10], 5), from_frames(frames)),
        "the head, on features": (lambda: model.head(features[:5], labels, features[5:], 5), made_up),
    }
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, (task, reading) in kinds.items():
            found[kind].append((looped(task), evaluated(reading)))
            print(
                f"{kind}: the loop {found[kind][-1][0]:.2f}, ours {found[kind][-1][1]:.1f} tasks a second", flush=True
            )
    return {"tasks": count, "clips": CLASSES * clips, "turns": found}


def memory(clips: int) -> dict[str, float]:
    """What 10,000 tasks take beyond the net, and their features, in bytes."""
    config = settings("otam", "resnet18")
    model = build_model(config.model, config.data.frames)
    features = clips * config.data.frames * model.head.dim * 4
    split = clip_set(400, clips // 400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mock.patch.object(tasks, "features_by_batch", made_up):
        evaluate(model, split, config.data, EvalConfig(tasks=10_000, shot=5), progress=False)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"clips": clips, "taken": taken, "features": features}


def drawing(clips: int) -> float:
    """Seconds in which 10,000 tasks are drawn."""
    sampler = EpisodeSampler(clip_set(400, clips // 400), 5, 5, 1, 1)
    began = time.process_time()
    for index in range(10_000):
        sampler[index]
    return time.process_time() - began


def as_markdown(record: dict[str, Any]) -> str:
    m, memory_of = record["machine"], record["memory"]
    lines = [
        f"{m['processor']}, {m['threads']} threads; torch {m['torch']}; {m['date']}, commit {m['commit']}.",
        "",
        f"10,000 tasks, 5-way 5-shot, over {memory_of['clips']} clips: {memory_of['taken'] / 1e9:.2f} GB beyond the"
        f" net, of which features {memory_of['features'] / 1e9:.2f} GB; drawn in {record['drawing']:.1f} s.",
    ]
    speed_of = record["speed"]
    if turns := speed_of["turns"]:
        lines += [
            "",
            f"| {speed_of['tasks']} tasks of TRX, ResNet-18, 5-way 1-shot, {speed_of['clips']} clips"
            " | the loop, tasks a second | ours | times as many (all turns) |",
            "|---|---|---|---|",
        ]
        for kind, pairs in turns.items():
            loop, ours = np.median(pairs, axis=0)
            ratios = sorted(one / other for other, one in pairs)
            lines.append(f"| {kind} | {loop:.2f} | {ours:.0f} | {', '.join(f'{ratio:.0f}' for ratio in ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = {
        "machine": machine(),
        "memory": memory(options.clips),  # first: the peak of a process never falls
        "drawing": drawing(options.clips),
        "speed": speed(options.tasks, options.repeats, 4) if options.repeats else {"turns": {}},
    }
    table = as_markdown(record)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"evaluation-{slug(record['machine']['processor'])}"
    (options.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
