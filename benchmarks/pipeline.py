"""The pipeline around SOAP against the field's usual one: a training step, the loader, videos, a whole episode.

    python -m benchmarks.pipeline                    all of it, into benchmarks/results/ (about 15 minutes)
    python -m benchmarks.pipeline --rows step        of step, loader, video, episode those named
    python -m benchmarks.pipeline --device cuda      the same on a GPU
    python -m benchmarks.pipeline --smallest --out build  once, on the smallest shapes: that it all runs

What is compared is taken in turns, and of each turn the processor's time counts (on a GPU, the clock's), so that a busy
machine slows all alike; ratios are of medians, with the quartiles of the turns' own ratios. Each kind of training step
has a process to itself, as what it does to the memory is part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu import RESULTS, machine, slug
from benchmarks.plain import plain_clip, plain_step
from soap_net.callbacks import EachStep
from soap_net.config import Config, ModelConfig, SoapConfig, from_dict
from soap_net.data.clips import Clip
from soap_net.data.pack import pack_data
from soap_net.data.splits import load_split
from soap_net.data.transforms import clip_loader
from soap_net.data.videos import Video
from soap_net.machine import keep_freed_memory
from soap_net.models import build_model
from soap_net.optimizers import build_optimizer
from soap_net.steps import Step
from soap_net.tasks import autocast
from soap_net.train import Training, train

STEPS: dict[str, dict[str, Any]] = {
    "plain loop": {},
    "contiguous": {"channels_last": False},
    "default": {},
    "compiled": {"compile": True},
    "bf16": {"amp": "bf16"},
    "bf16, compiled": {"amp": "bf16", "compile": True},
}
"""By name what is unlike the default; the plain loop is `benchmarks.plain`'s."""
Calls = dict[str, Callable[[], object]]


def seconds(device: torch.device) -> float:
    """The processor's time so far, or on a GPU the clock's, once it has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def took(call: Callable[[], object], device: torch.device) -> float:
    began = seconds(device)
    call()
    return seconds(device) - began


def compared(spent: dict[str, list[float]], against: str) -> dict[str, dict[str, Any]]:
    """Median milliseconds, and how many times as fast as `against`: of the medians, and the quartiles of the turns."""
    table = {}
    for name, found in spent.items():
        ratios = [base / own for base, own in zip(spent[against], found, strict=True)]
        table[name] = {
            "milliseconds": 1e3 * statistics.median(found),
            "times as fast": statistics.median(spent[against]) / statistics.median(found),
            "quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        }
    return table


def in_turns(calls: Calls, against: str, turns: int, device: torch.device) -> dict[str, dict[str, Any]]:
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            spent[name].append(took(call, device))
    return compared(spent, against)


# ------------------------------------------------------------------------------------------------------------- step


def our_step(
    support: Tensor, query: Tensor, truth: Tensor, channels_last: bool = True, amp: Any = "none", compile: bool = False
) -> Callable[[], None]:
    """A training step as `soap_net.train` does it, on the net of the plain loop."""
    keep_freed_memory()
    described = ModelConfig("resnet18", None, "trx", soap=SoapConfig(enabled=False), channels_last=channels_last)
    device = support.device
    model = build_model(described, support.shape[1]).to(device).train()
    if compile:
        model.backbone.net.compile()
    config = Config()
    optimizer = build_optimizer(config.train, model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, amp):
            logits = model(support, torch.arange(5), query, 5)
        loss = F.cross_entropy(logits.float(), truth, reduction="sum")
        loss.backward()
        optimizer.step()
        float(loss.detach())

    return step


def serve_steps(name: str, device: torch.device, side: int) -> None:
    """Does a step for each line of stdin, and answers with its seconds."""
    torch.manual_seed(0)
    frames = (5, 8, 3, side, side)
    support, query = (torch.randint(256, frames, dtype=torch.uint8, device=device) for _ in range(2))
    labels = torch.arange(5, device=device)
    if name == "plain loop":
        step = plain_step(support, labels, query, labels)
    else:
        step = our_step(support, query, labels, **STEPS[name])
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(took(step, device), flush=True)


def steps(device: torch.device, turns: int, threads: int, side: int, names: list[str]) -> dict[str, Any]:
    """5-way 1-shot with a query a class: 10 clips of 8 frames."""
    command = [sys.executable, "-m", "benchmarks.pipeline", "--device", str(device), "--side", str(side)]
    command += ["--threads", str(threads), "--serve"]
    with contextlib.ExitStack() as open_ones:
        servers = {}
        for name in names:
            process = subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            open_ones.enter_context(process)
            open_ones.callback(process.kill)
            servers[name] = process
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"the step {name!r} failed")
        spent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(turns):
            for name, process in servers.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                spent[name].append(float(process.stdout.readline()))
    return {"side": side, "steps": compared(spent, "plain loop")}


# ------------------------------------------------------------------------------------------------- loader and video


def scene(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 ``(height, width, 3)`` with the spectrum of a photograph (power falls with the frequency's third power)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.5
    planes = [np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))) for _ in range(2)]
    common, own = (plane / plane.std() for plane in planes)
    shades = [common + share * own for share in (0.2, 0.0, -0.2)]  # the channels of photographs are much alike
    return np.clip(40 * np.stack(shades, axis=-1) + 120, 0, 255).astype(np.uint8)


def frames_of(width: int, height: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """A camera that pans over a scene."""
    whole = scene(2 * width, height, seed)
    for number in range(count):
        yield np.roll(whole, -2 * number, axis=1)[:, :width]


def write_sets(root: Path, classes: int, clips: int, count: int) -> None:
    """The same clips as the field keeps them, jpgs of 320 x 240 in folders, and packed: short side 256, in a zip."""
    with zipfile.ZipFile(root / "packed.zip", "w") as packed:
        for label in range(classes):
            for video in range(clips):
                folder = root / "jpg" / f"class{label}" / f"v{video}"
                folder.mkdir(parents=True)
                for number, pixels in enumerate(frames_of(320, 240, count, seed=label * clips + video)):
                    image = Image.fromarray(pixels)
                    image.save(folder / f"{number:05d}.jpg", quality=90)
                    image.resize((341, 256), Image.Resampling.BICUBIC).save(root / "frame.jpg", quality=90)
                    packed.write(root / "frame.jpg", f"class{label}/v{video}/{number:05d}.jpg")


def loader(turns: int, smallest: bool) -> dict[str, Any]:
    """One process and thread: a training clip of 8 frames, short side 256, crop 224."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sets(root, 1, 1, 12 if smallest else 60)
        config = from_dict({"data": {"root": folder}})
        read, jpgs = clip_loader(config.data, train=True), root / "jpg/class0/v0"
        rng = np.random.default_rng(0)
        calls: Calls = {
            "PIL from jpg folders": partial(plain_clip, jpgs, 8, 256, 224, rng),
            "from jpg folders": partial(read, Clip(jpgs), rng),
            "from packed jpgs": partial(read, Clip(root / "packed.zip", member="class0/v0"), rng),
        }
        sizes = [path.stat().st_size for path in jpgs.iterdir()]
        found = in_turns(calls, "PIL from jpg folders", turns, torch.device("cpu"))
    return {"bytes of a jpg": statistics.mean(sizes), "loaders": found}


def write_video(path: Path, width: int, height: int, count: int) -> None:
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for pixels in frames_of(width, height, count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


def video(turns: int, width: int, height: int, count: int) -> dict[str, Any]:
    """8 frames of an H.264 video, on one core, opened anew each time, but for those that know the file; names absent.

    Packed ones are of a short side of 256.
    """
    chosen = [(2 * number + 1) * count // 16 for number in range(8)]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, pack = Path(folder) / "set/c/v.mp4", Path(folder) / "pack.zip"
            write_video(path, width, height, count)
            pack_data(Path(folder) / "set", pack, {"train": None}, progress=False)
            calls: Calls = {
                "soap-net": lambda: torch.stack(Video(path).read(chosen)),
                "soap-net, read before": lambda: Clip(path).read(chosen),
                "soap-net, from a pack": lambda: Clip(pack, member="c/v").read(chosen),
            }
            absent = {}
            for name, call in {"torchcodec": by_torchcodec, "decord": by_decord}.items():
                try:
                    call(path, chosen)
                    calls[name] = partial(call, path, chosen)
                except Exception as error:  # not installed, or without the FFmpeg that it needs
                    absent[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            return {"readers": in_turns(calls, "soap-net", turns, torch.device("cpu")), "not timed": absent}
    finally:
        os.sched_setaffinity(0, cores)


def by_torchcodec(path: Path, chosen: list[int]) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(chosen).data


def by_decord(path: Path, chosen: list[int]) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(str(path), num_threads=1).get_batch(chosen).asnumpy()


# ---------------------------------------------------------------------------------------------------------- episode


def episode(device: torch.device, turns: int, backbone: str, crop: int) -> dict[str, Any]:
    """A training episode whole, and its parts by themselves, each forward and backward; from packed jpgs."""
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), 5, 2, 20)
        config = from_dict(
            {
                "data": {"root": f"{folder}/packed.zip", "train_split": f"{folder}/train.txt", "crop": crop,
                         "resize": 256 if crop > 128 else crop * 8 // 7, "workers": 0},
                "model": {"backbone": backbone, "weights": "random", "head": "trx"},
                "episode": {"queries": 1},
                "train": {"episodes": turns + 2, "tasks_per_batch": 1, "val_every": 0, "save_every": turns + 2},
                "out": f"{folder}/run",
                "device": str(device),
            }
        )  # fmt: skip
        names = [f"class{label}/v{number}" for label in range(5) for number in range(2)]
        Path(folder, "train.txt").write_text("\n".join(names) + "\n")
        whole: list[float] = []
        last = [seconds(device)]

        def note(training: Training, step: Step) -> None:
            now = seconds(device)
            whole.append(now - last[0])
            last[0] = now

        train(config, progress=False, callbacks=[EachStep(note)])
        parts = {name: statistics.median(took(call, device) for _ in range(turns)) for name, call in
                 episode_parts(config, device).items()}  # fmt: skip
    reading = parts["decode"] + parts["transform"]
    computing = sum(parts.values()) - reading
    return {
        "backbone": backbone,
        "crop": crop,
        "milliseconds": {name: 1e3 * spent for name, spent in parts.items()},
        "whole": 1e3 * statistics.median(whole[2:]),
        "bound by": (
            f"reading is {reading / (reading + computing):.0%} of both, the backbone "
            f"{parts['backbone'] / (reading + computing):.0%}; {reading / computing:.2g} reading processes keep the "
            "device busy"
        ),
    }


def episode_parts(config: Config, device: torch.device) -> Calls:
    """The parts of an episode of all the config's clips, a support and a query of each class, each to be timed."""
    split = load_split(config.data.root, "train", config.data.train_split).clips
    clips = [members[number] for number in (0, 1) for members in split]
    read, rng, labels = clip_loader(config.data, train=True), np.random.default_rng(0), torch.arange(5)
    raw = [clip.read(range(8)) for clip in clips]
    model = build_model(config.model, config.data.frames).to(device).train()
    assert model.soap is not None
    optimizer = build_optimizer(config.train, model)
    host = torch.stack([read(clip, rng) for clip in clips])
    frames = host.to(device)
    shown = model.soap(frames).detach().requires_grad_()
    images = shown.flatten(0, 1)
    features = model.backbone(images).unflatten(0, shown.shape[:2]).detach().requires_grad_()

    def both(forward: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: forward().sum().backward()

    model(frames[:5], labels, frames[5:], 5).sum().backward()  # gradients, for the optimizer
    return {
        "decode": lambda: [clip.read(range(8)) for clip in clips],
        "transform": lambda: [read.transform(one, rng) for one in raw],
        "transfer": lambda: host.to(device),
        "SOAP": both(partial(model.soap, frames)),
        "backbone": both(lambda: model.backbone(shown.flatten(0, 1))),
        "head": both(lambda: model.head(features[:5], labels, features[5:], 5)),
        "optimizer": optimizer.step,
    }


# ------------------------------------------------------------------------------------------------------------- main


def as_markdown(record: dict[str, Any]) -> str:
    m = record["machine"]
    lines = [
        f"{m['processor']}, {record['threads']} threads; torch {m['torch']}; {m['date']}, commit {m['commit']}. "
        f"Times are {record['times']}.",
    ]
    for title, rows in (
        ("training step, 5-way 1-shot, ResNet-18, TRX", record.get("step", {}).get("steps")),
        ("a training clip of 8 frames, 224 x 224", record.get("loader", {}).get("loaders")),
        *((f"8 frames of a video of {size}", found["readers"]) for size, found in record.get("video", {}).items()),
    ):
        if rows:
            lines += ["", f"| {title} | ms | times as fast | quartiles |", "|---|---|---|---|"]
            for name, row in rows.items():
                low, high = row["quartiles"]
                speed = f"{row['times as fast']:.2f} | {low:.2f} to {high:.2f}"
                lines.append(f"| {name} | {row['milliseconds']:.1f} | {speed} |")
    if note := record.get("step", {}).get("note"):
        lines += ["", note]
    for size, found in record.get("video", {}).items():
        for name, why in found["not timed"].items():
            lines += ["", f"{name} was not timed on {size}: {why}"]
    if found := record.get("episode"):
        lines += ["", f"| an episode of 10 clips, {found['backbone']}, {found['crop']} px | ms |", "|---|---|"]
        lines += [f"| {name} | {spent:.1f} |" for name, spent in found["milliseconds"].items()]
        lines += [f"| whole, read by the same process | {found['whole']:.1f} |", "", f"{found['bound by']}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rows", nargs="+", default=["step", "loader", "video", "episode"])
    parser.add_argument("--smallest", action="store_true", help="once, on the smallest shapes: that it runs")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=int, default=84, help="of the frames of a training step")
    parser.add_argument("--backbone", help="of the episode; by default resnet18 of 84 pixels, on a GPU resnet50 of 224")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, small = options.device, options.smallest
    if options.serve:
        serve_steps(options.serve, device, options.side)
        return 0
    turns, gpu = 1 if small else options.turns, device.type == "cuda"
    rows: Calls = {
        "step": lambda: steps(
            device, turns, options.threads, 32 if small else options.side, [*STEPS][: 3 if small else None]
        ),
        "loader": lambda: loader(2 if small else 3 * turns, small),
        "video": lambda: {
            f"{width} x {height}, {count} frames": video(2 if small else 2 * turns, width, height, count)
            for width, height, count in (((64, 48, 30),) if small else ((340, 256, 300), (1920, 1080, 300)))
        },
        "episode": lambda: episode(
            device, turns, options.backbone or ("resnet50" if gpu else "resnet18"), 224 if gpu else 32 if small else 84
        ),
    }
    times = "medians of the clock" if gpu else "medians of the processor's time, whatever else the machine does"
    record: dict[str, Any] = {"machine": machine(), "threads": options.threads, "times": times}
    if gpu:
        record["machine"]["gpu"] = torch.cuda.get_device_name(device)
    for name in options.rows:
        record[name] = rows[name]()
    table = as_markdown(record)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"pipeline-{slug(record['machine'].get('gpu') or record['machine']['processor'])}"
    path = options.out / f"{stem}.json"
    if path.exists() and len(options.rows) < len(rows):  # the others as they were measured before
        record = {**json.loads(path.read_text()), **record}
    path.write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(as_markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
