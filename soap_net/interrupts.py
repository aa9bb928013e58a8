"""Ctrl-C and SIGTERM: the first asks a command that has work to save to do so and end, the second ends it at once.

Such a command (train, experiment, demo) enters `StopSignals` and asks it now and then whether to stop; what it calls
takes that question as a callable, and raises `Interrupted`. Its processes don't hear the signals
(`leave_signals_to_main`, and `ignoring_interrupts` while they start): readers of data are ended by the main process,
and those that have work to save ask an event that it sets.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(RuntimeError):
    """The user asked to stop."""


class StopSignals:
    """Notes the first Ctrl-C or SIGTERM in `requested`; a second one ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        sys.stderr.write("\nstopping and saving; once more to stop at once\n")
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._put_back()


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def leave_signals_to_main(worker: int = 0) -> None:
    """Makes this process ignore Ctrl-C and SIGTERM, as the main process ends it; a DataLoader's `worker_init_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
