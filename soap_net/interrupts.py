"""Ctrl-C and SIGTERM: the first asks a command to save and end, the second ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
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


def leave_signals_to_main(worker: int) -> None:
    """Makes a decoding process ignore Ctrl-C and SIGTERM: the main process ends its workers when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
