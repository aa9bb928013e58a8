"""What grows with the data set: time and memory to list it, to open a zip, and of each command on many clips.

    python -m benchmarks.growth                       all of it, into benchmarks/results/ (about half an hour)
    python -m benchmarks.growth --rows listing zip    of listing, zip, commands those named
    python -m benchmarks.growth --smallest --out build  once, on few clips: that it all runs

Each is done by a process of its own. Times are the clock's and, with those of its workers, the processor's; memory is
the peak of the command's own process, of listing and zip beyond what the program takes. Clips are links to a few tiny
videos, so that what is timed is the work around reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.cpu import RESULTS, machine, slug
from soap_net.data.clips import Clip
from soap_net.data.loading import PerClip, load
from soap_net.data.splits import load_split
from soap_net.data.zips import archive_at

CLASSES, SOURCES = 400, 16  # a file of ext4 has 65,000 links at most
SHARES = {"train": 0.64, "val": 0.12, "test": 0.24}  # of the classes, as in Kinetics' few-shot splits
Found = dict[str, float]


def spent(began: tuple[float, os.times_result]) -> Found:
    clock, before = began
    used = sum(os.times()[:4]) - sum(before[:4])  # of this process and those that it has waited for
    return {"seconds": time.perf_counter() - clock, "processor": used}


def peak(process: int | str = "self") -> float:
    """MB; 0 of a process that has ended. Not ru_maxrss, which a process takes over from the one that starts it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


# ---------------------------------------------------------------------------------------------------- listing and zip


def list_train(root: Path) -> Found:
    held, began = peak(), (time.perf_counter(), os.times())
    clips = sum(map(len, load_split(root, "train").clips))
    return {"clips": clips, **spent(began), "MB": peak() - held}


def open_zip(path: Path) -> Found:
    held, began = peak(), (time.perf_counter(), os.times())
    archive_at(path)
    return {**spent(began), "MB": peak() - held}


def spawn_worker(path: Path) -> Found:
    """What a worker process that was not forked has spent once it knows a clip of the zip."""
    multiprocessing.set_start_method("spawn")
    member = next(iter(archive_at(path).folders))
    (found,) = load(PerClip([Clip(path, member=member)], spent_by_worker), 1)
    assert not isinstance(found, Exception)
    return found


def spent_by_worker(clip: Clip) -> Found:
    clip.num_frames()
    return {"processor": time.process_time(), "MB": peak()}


ALONE = {"list": list_train, "open": open_zip, "spawn": spawn_worker}


def alone(what: str, path: Path) -> Found:
    """One of `ALONE`, done by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--alone", what, str(path)]
    found: Found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def names_of(count: int) -> list[tuple[str, str]]:
    """Class and video of each clip, in no order."""
    names = [(f"class {number % CLASSES}", f"v_{number:07d}") for number in range(count)]
    random.Random(0).shuffle(names)
    return names


def listing(count: int) -> dict[str, Found]:
    names = names_of(count)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label, video in names:
            for place in (root / "folders" / label, root / "flat" / "videos"):
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{video}.mp4").touch()
        (root / "flat/train.txt").write_text("".join(f"{label}/{video}\n" for label, video in names))
        return {
            f"list {count:,} clips, {CLASSES} class folders": alone("list", root / "folders"),
            f"list {count:,} clips, one folder and a split file": alone("list", root / "flat"),
        }


def zip_of_images(count: int) -> dict[str, Found]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for images in (100, count):
            path = paths[images] = Path(folder) / f"{images}.zip"
            with zipfile.ZipFile(path, "w") as file:
                for number in range(images):
                    name = f"set/class {number // 100 % CLASSES}/v_{number // 100:07d}/{number % 100:08d}.jpg"
                    file.writestr(zipfile.ZipInfo(name), b"image")
        small, large = (alone("spawn", paths[images]) for images in (100, count))
        return {
            f"open a zip of {count:,} images": alone("open", paths[count]),
            "the same in each spawned worker": {key: large[key] - small[key] for key in large},
        }


# ----------------------------------------------------------------------------------------------------------- commands


def write_set(root: Path, count: int) -> None:
    """Tiny videos, each linked many times, in one folder, with the lists of three splits."""
    (root / "videos").mkdir(parents=True)
    for source in range(SOURCES):
        with av.open(str(root / f"{source}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            rng = np.random.default_rng(source)
            for _ in range(8):
                pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    names = names_of(count)
    for number, (_, video) in enumerate(names):
        os.link(root / f"{number % SOURCES}.mp4", root / "videos" / f"{video}.mp4")
    ends = np.cumsum([0, *(round(share * CLASSES) for share in SHARES.values())])
    for split, begin, end in zip(SHARES, ends, ends[1:], strict=False):
        own = [f"{label}/{video}\n" for label, video in names if begin <= int(label.split()[1]) < end]
        (root / f"{split}.txt").write_text("".join(own))


def run(arguments: list[str], stop_at: tuple[Path, int] | None = None) -> Found:
    """A command of ours, whole, or until a file has so many lines: then Ctrl-C."""
    began, most, stopped = (time.perf_counter(), os.times()), 0.0, False
    process = subprocess.Popen([sys.executable, "-m", "soap_net", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, peak(process.pid))
        if stop_at is not None and not stopped and stop_at[0].exists():
            stopped = stop_at[0].read_bytes().count(b"\n") >= stop_at[1]
            if stopped:
                process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    if process.returncode != (130 if stopped else 0):
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return {**spent(began), "MB": most}


def commands(count: int) -> dict[str, Found]:
    """Check, stopped half way and gone on with; pack the val split; train an episode; evaluate 100 tasks."""
    with tempfile.TemporaryDirectory() as folder:
        root, notes = Path(folder) / "set", Path(folder) / "found.jsonl"
        write_set(root, count)
        check = ["data", "check", str(root), "--findings", str(notes)]
        net = ["--data.root", str(root), "--data.resize", "32", "--data.crop", "32", "--data.workers", "2",
               "--model.backbone", "resnet18", "--model.weights", "random", "--out", f"{folder}/run"]  # fmt: skip
        once = ["--train.episodes", "1", "--train.tasks_per_batch", "1", "--train.val_every", "0"]
        few = ["--episode.queries", "1", "--eval.shot", "1", "--eval.queries", "1", "--eval.tasks", "100"]
        found = {"check, stopped half way": run(check, (notes, count // 2)), "check, the rest": run(check)}
        lines = notes.read_bytes().splitlines()
        if len({json.loads(line)["path"] for line in lines}) != len(lines) or len(lines) != count:
            raise SystemExit(f"{len(lines)} findings for {count} clips")
        return found | {
            "check again, nothing to read": run(check),
            "pack the val split": run(["data", "pack", str(root), f"{folder}/val.zip", "--split", "val"]),
            "train an episode": run(["train", *net, *once, *few]),
            "evaluate 100 tasks": run(["eval", *net, *few]),
        }


# --------------------------------------------------------------------------------------------------------------- main


def as_markdown(record: dict[str, Any]) -> str:
    m = record["machine"]
    lines = [f"{m['processor']}, {m['cores']} cores; Python {m['python']}; {m['date']}, commit {m['commit']}."]
    rows = {**record.get("listing", {}), **record.get("zip", {})}
    if rows:
        lines += ["", "| what | s | processor's s | MB |", "|---|---|---|---|"]
    for what, row in rows.items():
        clock = f"{row['seconds']:.2f}" if "seconds" in row else ""
        lines.append(f"| {what} | {clock} | {row['processor']:.2f} | {row['MB']:.0f} |")
    sizes = record.get("commands", {})
    if sizes:
        shown = "".join(f" | {int(count):,} clips: s | processor's s | MB" for count in sizes)
        lines += ["", f"| command{shown} |", "|---" * (1 + 3 * len(sizes)) + "|"]
        for what in next(iter(sizes.values())):
            cells = (sizes[count][what] for count in sizes)
            told = "".join(f" | {row['seconds']:.1f} | {row['processor']:.1f} | {row['MB']:.0f}" for row in cells)
            lines.append(f"| {what}{told} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["listing", "zip", "commands"])
    parser.add_argument("--clips", type=int, default=250_000, help="of commands also a tenth of it")
    parser.add_argument("--smallest", action="store_true", help="once, on few clips: that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(ALONE[options.alone[0]](Path(options.alone[1]))))
        return 0
    count = 800 if options.smallest else options.clips
    sizes = (count,) if options.smallest else (count // 10, count)
    rows = {
        "listing": partial(listing, count),
        "zip": partial(zip_of_images, 4 * count),
        "commands": lambda: {str(size): commands(size) for size in sizes},
    }
    path = options.out / f"growth-{slug(machine()['processor'])}.json"
    record = json.loads(path.read_text()) if path.exists() else {}  # rows that are not measured now stay
    record["machine"] = machine()
    for name in options.rows:
        record[name] = rows[name]()
    table = as_markdown(record)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
