from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from soap_net.interrupts import StopSignals, ignoring_interrupts, leave_signals_to_main

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


@pytest.mark.parametrize("guard", ["ignoring_interrupts()", "StopSignals()"])
def test_off_the_main_thread_signals_are_left_alone(guard: str) -> None:
    code = f"""
import threading
from soap_net.interrupts import StopSignals, ignoring_interrupts
def enter():
    with {guard}:
        print("entered")
thread = threading.Thread(target=enter)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("entered\n", "")


def test_processes_started_while_interrupts_are_ignored_ignore_them() -> None:
    before = signal.getsignal(signal.SIGINT)
    child = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"]
    with ignoring_interrupts():
        output = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    assert output == "True\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_leaves_signals_to_main_hears_none() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        leave_signals_to_main()
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
