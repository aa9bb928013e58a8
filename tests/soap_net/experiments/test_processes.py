from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soap_net.config import Config
from soap_net.data.memory import ClipMemory
from soap_net.errors import UserError
from soap_net.experiments.processes import Job, Stop, perform
from soap_net.interrupts import Interrupted


def job(name: str, work: Callable[[Config, Stop, ClipMemory], object], out: Path) -> Job:
    return Job(name, work, Config(out=out / name, device="cpu"))


def note(config: Config, stop: Stop, memory: ClipMemory) -> int:
    config.out.touch()
    return torch.get_num_threads()


def refuse(config: Config, stop: Stop, memory: ClipMemory) -> None:
    raise UserError("no such clip")


def run_out_of_memory(config: Config, stop: Stop, memory: ClipMemory) -> None:
    raise RuntimeError("out of memory")


def die(config: Config, stop: Stop, memory: ClipMemory) -> None:
    config.out.with_suffix(".begun").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def save_when_stopped(config: Config, stop: Stop, memory: ClipMemory) -> None:
    config.out.with_suffix(".begun").touch()
    while not stop():
        time.sleep(0.01)
    config.out.with_suffix(".saved").touch()
    raise Interrupted("saved")


def never_end(config: Config, stop: Stop, memory: ClipMemory) -> None:
    config.out.with_suffix(".begun").touch()
    while True:
        time.sleep(1)


def end_after_another_died(config: Config, stop: Stop, memory: ClipMemory) -> str:
    while not list(config.out.parent.glob("*.begun")):
        time.sleep(0.05)
    time.sleep(3.0)
    return "ended"


def signal_once_begun(number: signal.Signals, folder: Path, jobs: int, times: int = 1) -> None:
    """Sends this process a signal when the files of so many jobs are there."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.begun"))) < jobs and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.5)


def test_one_at_a_time_is_done_here_and_ends_at_the_first_failure(tmp_path: Path) -> None:
    jobs = [job(name, work, tmp_path) for name, work in (("a", note), ("bad", refuse), ("c", note))]
    with pytest.raises(UserError, match=r"^bad: no such clip$"):
        list(perform(jobs, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    [(_, worker)] = perform([job("pid", lambda config, stop, memory: os.getpid(), tmp_path)], 1)
    assert worker == os.getpid()


def test_errors_of_the_machine_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^big: RuntimeError: out of memory$"):
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
    with pytest.raises(UserError, match=r"^bad: no such clip$"):
        list(perform([job("a", save_when_stopped, tmp_path), job("bad", refuse, tmp_path)], 2, let_end=False))
    assert (tmp_path / "a.saved").exists() == (tmp_path / "a.begun").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_was_killed_is_named_those_under_way_end_and_none_begins(tmp_path: Path) -> None:
    jobs = [job(name, work, tmp_path) for name, work in (("a", end_after_another_died), ("b", die), ("late", note))]
    done = perform(jobs, 2)
    assert next(done) == (jobs[0], "ended")
    with pytest.raises(UserError, match=r"^b: its process ended with code -9") as caught:
        next(done)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "late").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_sigterm_to_the_main_process_alone_lets_all_save_and_begins_no_more(tmp_path: Path) -> None:
    watcher = threading.Thread(target=signal_once_begun, args=(signal.SIGTERM, tmp_path, 2))
    watcher.start()
    jobs = [job(name, save_when_stopped, tmp_path) for name in "ab"] + [job("late", note, tmp_path)]
    with pytest.raises(Interrupted):
        list(perform(jobs, 2))
    watcher.join()
    assert {path.name for path in tmp_path.glob("*.saved")} == {"a.saved", "b.saved"}
    assert not (tmp_path / "late").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_what_does_not_stop(tmp_path: Path) -> None:
    watcher = threading.Thread(target=signal_once_begun, args=(signal.SIGINT, tmp_path, 2, 2))
    watcher.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it with "&"
    try:
        with pytest.raises(KeyboardInterrupt):
            list(perform([job(name, never_end, tmp_path) for name in "ab"], 2))
    finally:
        signal.signal(signal.SIGINT, before)
    watcher.join()
    assert not multiprocessing.active_children()
