from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from soap_net.config import Config
from soap_net.errors import UserError
from soap_net.experiments.processes import Job, Stop, perform
from soap_net.interrupts import Interrupted, StopSignals


def job(name: str, work: Callable[[Config, Stop], object], out: Path) -> Job:
    return Job(name, work, Config(out=out / name, device="cpu"))


def note(config: Config, stop: Stop) -> int:
    config.out.touch()
    return torch.get_num_threads()


def refuse(config: Config, stop: Stop) -> None:
    raise UserError("no such clip")


def run_out_of_memory(config: Config, stop: Stop) -> None:
    raise RuntimeError("out of memory")


def die(config: Config, stop: Stop) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_when_stopped(config: Config, stop: Stop, hears_signals: bool = False) -> None:
    """As a test does, which asks `stop`, or as a training, which hears the signals."""
    with StopSignals() as signals:
        config.out.with_suffix(".begun").touch()
        while not (signals.requested if hears_signals else stop()):
            time.sleep(0.01)
        config.out.with_suffix(".saved").touch()
        raise Interrupted("saved")


def test_one_at_a_time_is_done_here_and_ends_at_the_first_failure(tmp_path: Path) -> None:
    here = os.getpid()
    done = []
    with pytest.raises(UserError, match="^bad: no such clip$"):
        for one, _ in perform([job(name, w, tmp_path) for name, w in (("a", note), ("bad", refuse), ("c", note))], 1):
            done.append(one.name)
    assert done == ["a"]
    assert not (tmp_path / "c").exists()
    [(_, worker)] = perform([job("pid", lambda config, stop: os.getpid(), tmp_path)], 1)
    assert worker == here


def test_errors_of_the_machine_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^big: RuntimeError: out of memory$"):
        list(perform([job("big", run_out_of_memory, tmp_path)], 1))


@pytest.mark.slow
def test_processes_give_each_result_with_its_job_and_wait_in_between(tmp_path: Path) -> None:
    waits: list[None] = []
    jobs = [job(f"job {i}", note, tmp_path) for i in range(3)]
    found = list(perform(jobs, 2, threads=1, waiting=lambda: waits.append(None)))
    assert sorted(one.name for one, _ in found) == ["job 0", "job 1", "job 2"]
    assert [threads for _, threads in found] == [1, 1, 1]
    assert waits
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_failure_ends_the_others_after_they_saved(tmp_path: Path) -> None:
    waits = partial(save_when_stopped, hears_signals=True)
    with pytest.raises(UserError, match="^bad: no such clip$"):
        list(perform([job("a", waits, tmp_path), job("bad", refuse, tmp_path)], 2, let_end=False))
    assert (tmp_path / "a.saved").exists() == (tmp_path / "a.begun").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_was_killed_ends_all_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its process, or one beside it, died") as caught:
        list(perform([job("a", save_when_stopped, tmp_path), job("b", die, tmp_path)], 2))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_sigterm_to_the_main_process_alone_lets_all_save_and_begins_no_more(tmp_path: Path) -> None:
    def terminate() -> None:
        while len(list(tmp_path.glob("*.begun"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=terminate)
    watcher.start()
    hears = partial(save_when_stopped, hears_signals=True)
    jobs = [job("asks", save_when_stopped, tmp_path), job("hears", hears, tmp_path), job("late", note, tmp_path)]
    with pytest.raises(Interrupted):
        list(perform(jobs, 2))
    watcher.join()
    assert {path.name for path in tmp_path.glob("*.saved")} == {"asks.saved", "hears.saved"}
    assert not (tmp_path / "late").exists()
    assert not multiprocessing.active_children()
