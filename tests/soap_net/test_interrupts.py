from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soap_net.interrupts import ENDING, Flag, StopSignals, deaf_while_starting, leave_signals_to_main

REPOSITORY = Path(__file__).parents[2]


def program(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own that has called `end_at_signals`, and can signal itself."""
    start = (
        "import os, signal, sys, time\nfrom soap_net.interrupts import *\nfrom soap_net import interrupts\n"
        "end_at_signals()\ndef send(number=signal.SIGTERM): os.kill(os.getpid(), number)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_is_noted_and_the_second_is_the_callers_again(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == [number]
        with StopSignals():
            pass
        os.kill(os.getpid(), number)
        assert heard == [number] * 2, "put back on the way out"
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "\nstopping and saving; once more to stop at once\n"


@pytest.mark.parametrize("guard", ["deaf_while_starting()", "StopSignals()"])
def test_off_the_main_thread_signals_are_left_alone(guard: str) -> None:
    code = f"""
import threading
from soap_net.interrupts import StopSignals, deaf_while_starting
def enter():
    with {guard}:
        print("entered")
thread = threading.Thread(target=enter)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("entered\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_program_once_it_has_cleaned_up(number: int, code: int) -> None:
    done = program(
        f"try:\n    try:\n        send({int(number)}); time.sleep(9)\n    finally:\n        print('cleaned up')\n"
        "except KeyboardInterrupt:\n    sys.exit(exit_code())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "cleaned up\n", "")


@pytest.mark.parametrize(
    "code",
    [
        # again, in the middle of cleaning up
        "try:\n    send()\nfinally:\n    send(signal.SIGINT); time.sleep(9)",
        # where Python drops errors
        "class Odd:\n    def __del__(self): send(signal.SIGINT)\nOdd()\ntime.sleep(9)",
        # in an import, which may make another error of it
        "class Finder:\n    def find_spec(self, *args): send(signal.SIGINT)\nsys.meta_path.insert(0, Finder())\n"
        "try:\n    import wave\nexcept BaseException: time.sleep(9)",
    ],
    ids=["twice", "finalizer", "import"],
)
def test_where_nothing_can_be_raised_the_program_ends_on_the_spot(code: str) -> None:
    done = program("print('begun', end='')\n" + code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun", "soap-net: stopped\n")


def test_what_waits_for_a_lock_that_nobody_gives_back_is_left() -> None:
    code = """
import threading
interrupts.CLEANING = 0.5
lock = threading.Lock()
try:
    lock.acquire()
    send()
finally:
    lock.acquire()
"""
    done = program(code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "soap-net: stopped\n")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_flag_is_seen_by_processes_and_needs_none_of_them_alive(method: str) -> None:
    context = multiprocessing.get_context(method)
    asked, told = Flag(context), Flag(context)
    assert not asked.is_set()
    child = context.Process(target=answer, args=(asked, told))
    child.start()
    asked.set()
    limit = time.monotonic() + 60
    while not told.is_set():
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.kill()  # most likely while it asks
    child.join()
    asked.set()
    assert asked.is_set()


def answer(asked: Flag, told: Flag) -> None:
    while True:
        if asked.is_set():
            told.set()


def test_the_programs_processes_end_with_it() -> None:
    code = """
import multiprocessing
def hang():
    leave_signals_to_main()
    ready.set()
    time.sleep(60)
context = multiprocessing.get_context("fork")
ready = context.Event()
child = context.Process(target=hang)
child.start()
ready.wait()
try:
    send()
except KeyboardInterrupt:
    child.join(20)
    print(child.exitcode)
"""
    assert program(code).stdout == f"{-signal.SIGKILL}\n"


def test_a_program_that_was_told_to_survive_its_terminal_does() -> None:
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN); end_at_signals()\nwith StopSignals() as stop:\n    "
    done = program(code + "send(signal.SIGHUP)\n    print(stop.requested)")
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_a_program_that_has_nothing_more_to_do_keeps_its_exit_code() -> None:
    done = program("import atexit; atexit.register(send)\nprint('done')\nleave(2)")
    assert (done.returncode, done.stdout, done.stderr) == (2, "done\n", "")
    done = program("import atexit; atexit.register(time.sleep, 60)\nprint('stopped')\nleave(130)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "stopped\n", "")


def test_processes_are_deaf_from_their_first_moment_and_a_signal_waits_until_they_run() -> None:
    child = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('lives')"]
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with deaf_while_starting():
            os.kill(os.getpid(), signal.SIGTERM)
            assert subprocess.run(child, capture_output=True, text=True, check=True).stdout == "lives\n"
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signals that can be blocked, as on POSIX")
def test_processes_are_deaf_though_pythons_resource_tracker_starts_with_them() -> None:
    code = """
import multiprocessing
with deaf_while_starting():
    multiprocessing.get_context("spawn").Event()
    print(len(signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*ENDING}))
"""
    assert program(code).stdout == "3\n"


def test_a_process_that_leaves_signals_to_main_hears_none() -> None:
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        leave_signals_to_main()
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_reader_of_data_ends_with_a_main_process_that_was_killed() -> None:
    code = """
import multiprocessing
def read():
    live_with_main()
    print(os.getpid(), flush=True)
    time.sleep(60)
for _ in range(2):
    multiprocessing.get_context("fork").Process(target=read).start()
time.sleep(0.5)
send(signal.SIGKILL)
"""
    began = time.monotonic()
    done = program(code)  # returns when they have closed its output
    assert time.monotonic() - began < 20
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2
