"""Every command, ended by a signal to all its processes, as a terminal's Ctrl-C or a batch system sends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soap_net import train
from soap_net.config import from_dict, save_config, to_dict
from soap_net.data.motion import write_motion

REPOSITORY = Path(__file__).parents[2]
SOON = 6.0
"""Seconds within which all is over; an idle machine takes a second."""
Moment = Callable[[subprocess.Popen[str]], bool]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc, where it looks for processes"
)


@dataclass
class Outcome:
    """What a command left that was sent signals."""

    code: int
    text: str
    seconds: float
    left: list[str]

    def check(self, number: int, within: float = SOON) -> None:
        """The promise of all commands."""
        lines = [line.strip() for line in self.text.replace("\r", "\n").splitlines() if "soap-net: " in line]
        assert "Traceback" not in self.text, self.text
        assert "leaked" not in self.text, self.text
        assert self.code == 128 + number, self.text
        assert len(lines) == 1, self.text
        assert lines[0].startswith("soap-net: stopped")
        assert self.left == []
        assert self.seconds < within


def alive(group: int) -> list[str]:
    """The processes of a group, but for those that are ended and not yet waited for."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of_group = (process / "stat").read_text().rpartition(") ")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(f"{process.name} {(process / 'cmdline').read_text()}")
        except OSError:
            continue
    return found


def listening(process: subprocess.Popen[str]) -> bool:
    """Whether it hears SIGTERM: Python is up, and nothing but that."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def processes(count: int) -> Moment:
    """Whether it has so many processes."""
    return lambda process: len(alive(process.pid)) >= count


def holds(folder: Path, pattern: str, count: int = 1) -> Moment:
    """Whether there are so many files in a folder."""
    return lambda process: len(list(folder.glob(pattern))) >= count


def after(seconds: float) -> Moment:
    """Whether so much time has gone by since it was first asked."""
    asked: list[float] = []
    return lambda process: bool(asked.append(time.monotonic()) or asked[-1] > asked[0] + seconds)


def end(command: Sequence[str], moment: Moment, numbers: Sequence[int], folder: Path, wait: float = 0.3) -> Outcome:
    """Starts a command in `folder`, and sends it the signals from the moment on, `wait` seconds apart."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "soap_net", *command],
            env=environment,
            cwd=folder,
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored below "pytest &"
        )
    try:
        limit = time.monotonic() + 120
        while not moment(process) and process.poll() is None:
            assert time.monotonic() < limit, output.read_text()
            time.sleep(0.02)
        assert process.poll() is None, output.read_text()
        began = time.monotonic()
        for sent, number in enumerate(numbers):
            time.sleep(wait if sent else 0.0)  # the system makes one of two at a time
            os.killpg(process.pid, number)
        code = process.wait(timeout=60)
        while (left := alive(process.pid)) and time.monotonic() < began + SOON + 10:
            time.sleep(0.02)
        return Outcome(code, output.read_text(), time.monotonic() - began, left)
    finally:
        for line in alive(process.pid):
            os.kill(int(line.split()[0]), signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def slow_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 20 clips in each split, each of 4 frames so large that a clip takes a good part of a second."""
    root = tmp_path_factory.mktemp("slow_data")
    frame = np.random.default_rng(0).integers(0, 4, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(frame).save(root / "frame.png")
    for split in ("train", "val", "test"):
        for clip in range(60):
            folder = root / split / f"{split} {clip % 3}" / f"v{clip}"
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.png").symlink_to(root / "frame.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, slow_data: Path) -> Path:
    """A folder with a config and a run of it, on slow data."""
    folder = tmp_path_factory.mktemp("made")
    config = from_dict(
        {
            "data": {"root": str(slow_data), "frames": 3, "resize": 9, "crop": 8, "workers": 2},
            "model": {"backbone": "tiny", "weights": "random", "soap": {"tuple_sizes": [1, 2], "hidden_channels": 4}},
            "episode": {"way": 3, "shot": 1, "queries": 1},
            "train": {"episodes": 100, "tasks_per_batch": 1, "val_every": 0},
            "eval": {"way": 3, "tasks": 1000},
            "device": "cpu",
            "out": str(folder / "run"),
        }
    )
    save_config(config, folder / "c.yaml")
    short = from_dict({**to_dict(config), "train": {"episodes": 1, "tasks_per_batch": 1, "val_every": 0}})
    train.train(short, progress=False)
    return folder


def test_a_command_that_is_still_starting_ends_on_the_spot(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        found = end(["train", "--data.root", "none"], listening, [number], tmp_path)
        found.check(number)
        assert found.text == "soap-net: stopped\n"


def test_reading_ends_with_its_processes(slow_data: Path, tmp_path: Path) -> None:
    end(["data", "check", str(slow_data), "--data.workers", "2"], processes(3), [signal.SIGTERM], tmp_path).check(
        signal.SIGTERM
    )


@pytest.mark.slow
def test_a_packing_ends_with_its_processes_and_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "data" / "jump"
    frame = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    for clip in range(12):
        (data / f"{clip}").mkdir(parents=True)
        for number in range(6):
            Image.fromarray(frame).save(data / f"{clip}" / f"{number}.png")
    command = ["data", "pack", "data", "out.zip", "--data.workers", "2"]
    notes = tmp_path / ".out.zip.notes"
    end(command, lambda _: notes.exists() and notes.read_bytes().count(b"\n") > 2, [signal.SIGTERM], tmp_path).check(
        signal.SIGTERM
    )
    assert not (tmp_path / "out.zip").exists()
    assert 2 < notes.read_bytes().count(b"\n") < 13
    done = subprocess.run(
        [sys.executable, "-m", "soap_net", *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("packed: out.zip (12 clips, 72 frames, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "classify", "data check", "report"])
def test_a_command_that_reads_ends_at_once(made: Path, slow_data: Path, tmp_path: Path, name: str) -> None:
    best = str(made / "run" / "best.pt")
    command = {
        "eval": ["eval", "--checkpoint", best, "--out", str(tmp_path)],
        "classify": f"classify --checkpoint {best} --support {slow_data}/test --query {slow_data}/val".split(),
        "data check": ["data", "check", str(slow_data), "--data.workers", "2"],
        "report": ["report", str(made / "run"), "--out", str(tmp_path / "report.html")],
    }[name]
    reading = after(3.0) if name == "report" else processes(3)
    for moment, number in ((after(1.5), signal.SIGINT), (reading, signal.SIGTERM)):
        end(command, moment, [number], tmp_path).check(number)
        kept = {"runs"} if name == "data check" else set()  # what it has found, if it had begun to read
        assert {path.name for path in tmp_path.iterdir()} - kept == {"output.txt"}


@pytest.mark.slow
def test_a_training_saves_and_at_a_second_signal_ends_at_once(made: Path, tmp_path: Path) -> None:
    command = ["train", "--config", str(made / "c.yaml"), "--out", str(tmp_path / "run")]
    found = end(command, holds(tmp_path, "run/metrics.jsonl"), [signal.SIGTERM], tmp_path)
    found.check(signal.SIGTERM, within=30)  # the episode under way is finished first
    assert "stopping and saving; once more to stop at once" in found.text
    assert (tmp_path / "run" / "last.pt").exists()
    found = end(command, processes(3), [signal.SIGINT, signal.SIGINT], tmp_path)
    found.check(signal.SIGINT)
    assert f"{tmp_path / 'run'} holds this run, stopped after episode" in found.text


@pytest.mark.slow
def test_writing_videos_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    commands = (["data", "motion", "m"], ["demo", "--out", "demo"], ["experiment", "parts"])
    for command, number in zip(commands, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=True):
        found = end(command, lambda _: bool([*tmp_path.rglob("*part-*/fresh/videos/*/*.mp4")]), [number], tmp_path)
        found.check(number)
        assert [*tmp_path.rglob("*.mp4"), *tmp_path.rglob("*part-*")] == []


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded videos."""
    return write_motion(tmp_path_factory.mktemp("motion") / "motion", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "experiment"])
def test_trainings_in_processes_save_and_end(motion: Path, tmp_path: Path, name: str) -> None:
    command, videos = {
        "demo": ("demo", "out/motion"),
        "experiment": ("experiment parts --jobs 2", "runs/experiments/motion/quick"),
    }[name]
    (tmp_path / videos).parent.mkdir(parents=True)
    (tmp_path / videos).symlink_to(motion)
    starting, training = processes(4), holds(tmp_path, "out/**/metrics.jsonl", 2)
    for moment, numbers in (
        (processes(3), [signal.SIGINT]),
        (starting, [signal.SIGTERM]),
        (training, [signal.SIGINT]),
        (starting, [signal.SIGTERM, signal.SIGTERM]),
    ):
        end([*command.split(), "--out", "out", "--device", "cpu"], moment, numbers, tmp_path).check(numbers[0])
    assert len([*tmp_path.glob("out/**/last.pt")]) == 2
    assert [*tmp_path.glob("out/**/*.part")] == []
