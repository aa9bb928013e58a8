"""Trainings killed at random times and before every write, each gone on with: as if it had never been stopped."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from soap_net import checkpoint
from soap_net.config import Config
from soap_net.data.memory import ClipMemory
from soap_net.train import train

WRITING = ("write", "replace", "mkdir", "unlink")
"""What of the system's functions and of files' methods changes a file; a kill at an fsync finds no other state."""
MEMORY = ClipMemory(2**24)
"""The clips of all these runs, decoded once."""

Folder = dict[str, Any]


FRESH = multiprocessing.get_context("forkserver")
"""Children are copies of a process in which nothing was computed: threads of autograd and OpenMP survive no fork."""
FRESH.set_forkserver_preload(["soap_net.train"])


@pytest.fixture
def small(
    tiny_run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Config]]:
    """Runs with everything that has a state, in half a second, with one thread here as in children."""

    def make(name: str) -> Config:
        return tiny_run(
            train__optimizer="adamw", train__episodes=4, train__save_every=2, train__val_every=2, train__val_tasks=2,
            train__milestones=[2], out=str(tmp_path / name),
        )  # fmt: skip

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where children find this file
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)


@contextlib.contextmanager
def before_writes(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with 1, 2, 3... before each call of the system that writes, makes, renames or removes a file."""
    count = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal count
        if event == "c_call" and function.__name__ in WRITING:
            owner = getattr(function, "__self__", None)
            if isinstance(owner, io.FileIO) or getattr(owner, "__name__", "") == os.name:
                count += 1
                act(count)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def train_until(config: Config, number: int | None, resume: bool) -> None:
    """Trains in this process, which kills itself before its write of that number."""

    def kill(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    with before_writes(kill):
        train(config, resume=resume, progress=False)


def kill_at(config: Config, number: int, resume: bool = False) -> int | None:
    """Trains in a child that is killed before its write of that number; returns how it ended."""
    child = FRESH.Process(target=train_until, args=(config, number, resume))
    child.start()
    child.join()
    return child.exitcode


def kill_after(config: Config, seconds: float) -> int | None:
    """Trains in a child that is killed so long after it began; returns how it ended."""
    child = FRESH.Process(target=train_until, args=(config, None, False))
    child.start()
    deadline = time.perf_counter() + 60
    while not config.out.exists() and child.is_alive() and time.perf_counter() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode


def content(config: Config) -> Folder:
    """All that a run is to leave: names of files, weights and states, the log but for its times."""
    found: Folder = {"names": sorted(path.name for path in config.out.iterdir())}
    for name in ("last.pt", "best.pt"):
        found[name] = checkpoint.load(config.out / name)
        del found[name]["config"]
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key != "episodes_per_second"} for line in lines]
    return found


def undisturbed(config: Config) -> Folder:
    train(config, progress=False, memory=MEMORY)
    return content(config)


def assert_goes_on(config: Config, whole: Folder) -> None:
    """Goes on with a run and compares it with one never stopped, bit for bit."""
    train(config, resume=True, progress=False, memory=MEMORY)
    found = content(config)
    for name in ("last.pt", "best.pt"):
        torch.testing.assert_close(found.pop(name), whole[name], rtol=0, atol=0)
    assert found == {name: part for name, part in whole.items() if not name.endswith(".pt")}


def count_writes(config: Config) -> int:
    """How many writes a whole run takes."""
    counts: list[int] = []
    with before_writes(counts.append):
        train(config, progress=False, memory=MEMORY)
    return len(counts)


def test_killed_before_a_write_a_run_goes_on_bit_for_bit(small: Callable[[str], Config]) -> None:
    whole = undisturbed(small("whole"))
    writes = count_writes(small("counted"))
    assert writes > 60, "all writes are seen"
    for number in random.Random(5).sample(range(1, writes + 1), 3):
        config = small(f"write{number}")
        assert kill_at(config, number) == -signal.SIGKILL
        assert_goes_on(config, whole)


@pytest.mark.slow
@pytest.mark.campaign
def test_killed_before_each_write_a_run_goes_on_bit_for_bit(small: Callable[[str], Config]) -> None:
    whole = undisturbed(small("whole"))
    for number in range(1, count_writes(small("counted")) + 1):
        config = small(f"write{number}")
        assert kill_at(config, number) == -signal.SIGKILL
        if number % 5 == 0:  # and once more while it goes on, if that takes so many
            kill_at(config, 1 + number % 23, resume=True)
        assert_goes_on(config, whole)


@pytest.mark.slow
def test_killed_at_any_time_a_run_goes_on_bit_for_bit(small: Callable[[str], Config]) -> None:
    whole = undisturbed(small("whole"))
    began = time.perf_counter()
    train(small("timed"), progress=False, memory=MEMORY)
    seconds, times = time.perf_counter() - began, random.Random(11)
    killed = 0
    for number in itertools.count():
        config = small(f"time{number}")
        if kill_after(config, times.uniform(0, seconds)) == -signal.SIGKILL:
            killed += 1
        else:
            seconds *= 0.9  # it is done sooner than thought
        assert_goes_on(config, whole)
        if killed == 50:
            break
