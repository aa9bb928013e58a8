"""Ctrl-C, SIGTERM and a terminal that goes away (SIGHUP): what each ends, and how.

The program `soap-net` ends at the first of them with one line and exit code 128 + the signal's number
(`end_at_signals`): what it was about is cleaned up, its processes are gone. A command that has work to save (train,
experiment, demo) enters `StopSignals`, which notes the first and leaves the second to end all at once; it asks now and
then whether to stop, and what it calls takes that question as a callable, and raises `Interrupted`. Its processes don't
hear the signals (`deaf_while_starting`, `leave_signals_to_main`): those that read data are ended by the main process
or with it (`live_with_main`), and those that have work to save ask an event that it sets.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # else not before it is wanted, as a signal may come in the middle of an import
    from multiprocessing.context import BaseContext

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CLEANING = 10.0
"""Seconds in which a program that was stopped cleans up. What waits then for a lock that nobody gives back is left."""
_heard: int = signal.SIGINT  # the last of them that came


class Interrupted(RuntimeError):
    """The user asked to stop."""


class Ended(KeyboardInterrupt):
    """A signal ends the program, whatever it is about."""


def exit_code() -> int:
    """That of a program which was stopped: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + _heard


def speaks() -> bool:
    """Whether this process tells the user the outcome: the only one, or the first of those under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def end_at_signals() -> None:
    """Ends this program at the signals, by `Ended` where that can be raised and what is open can be closed."""
    _hear(_end)


def leave(code: int) -> NoReturn:
    """Ends a program, whose work is done, with this exit code, which no signal changes any more."""
    _hear(lambda number, frame: os._exit(code))
    if code > 128:  # it was stopped, and Python would take a second to take down PyTorch
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        _kill_children()
        if (multiprocessing := sys.modules.get("multiprocessing.util")) is not None:
            multiprocessing._exit_function()  # else it tells of semaphores that nobody gave back
        os._exit(code)
    sys.exit(code)


def _hear(handler: Any) -> dict[int, Any]:
    """Sets the handler of the signals and returns those before; one that `nohup` had ignored stays ignored."""
    heard = [number for number in ENDING if number != getattr(signal, "SIGHUP", None) or not _ignored(number)]
    return {number: signal.signal(number, handler) for number in heard}


def _put_back(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


def _ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _end(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = number
    _hear(_end_now)
    # In the middle of an import the error would come out as another one, or as a warning of the module's C code.
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end_now(number)
        frame = frame.f_back
    sys.unraisablehook = _drop
    # `Ended` may come between the taking of a lock and its guard. Not threading.Timer, which takes locks to start.
    with contextlib.suppress(RuntimeError):  # no further thread can be had
        _thread.start_new_thread(_end_later, (number,))
    _kill_children()  # all of them: they read for what ends here, or have been asked to save before
    raise Ended


def _end_later(number: int) -> None:
    time.sleep(CLEANING)
    _end_now(number)


def _end_now(number: int, frame: FrameType | None = None) -> NoReturn:
    _kill_children()
    with contextlib.suppress(Exception):  # in the middle of a write, stdout can't be flushed
        sys.stdout.flush()
    if speaks():
        _say("soap-net: stopped\n")
    os._exit(128 + number)


def _drop(found: sys.UnraisableHookArgs) -> None:
    """Says nothing of what finalizers meet while all ends; but if that is the end's own error, this is the end."""
    if isinstance(found.exc_value, Ended):
        _end_now(_heard)


def _kill_children() -> None:
    children = getattr(sys.modules.get("multiprocessing"), "active_children", list)  # not imported: none were started
    for child in children():
        child.kill()


def _say(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except RuntimeError:  # the signal came in the middle of a write
        os.write(2, text.encode())
    except OSError:  # the terminal is gone
        pass


class StopSignals:
    """Notes the first of the signals in `requested`; a second one does what it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = _hear(self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        global _heard
        _heard = number
        self.requested = True
        _put_back(self._previous)
        if speaks():
            _say("\nstopping and saving; once more to stop at once\n")

    def __exit__(self, *exception: object) -> None:
        _put_back(self._previous)


class Flag:
    """Starts false, becomes true, and is seen by all processes that it is handed to when they are started.

    Unlike multiprocessing's Event it takes no lock, which a process that is killed at that moment would never give
    back: any other that sets or asks would wait for it without end.
    """

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


@contextlib.contextmanager
def deaf_while_starting(*, forks: bool = False) -> Iterator[None]:
    """Processes that are started meanwhile hear no signal from their first moment on; one that comes waits here.

    For it would leave a process half started, which knows of nothing and ends with a traceback. `forks`: they are no
    new programs but copies of this one.
    """
    if not forks and hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # which has signals heard again once it has started
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    previous = _hear(lambda number, frame: came.append(number)) if in_main else {}
    inherited = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if inherited is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, inherited)
        _put_back(previous)
        for number in came:
            signal.raise_signal(number)


def leave_signals_to_main() -> None:
    """Makes this process ignore the signals, as the main process ends it."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def live_with_main(worker: int = 0) -> None:
    """`leave_signals_to_main`, and ends this process with the main one, even if that is killed; a `worker_init_fn`."""
    leave_signals_to_main()
    threading.Thread(target=_end_with_main, daemon=True).start()


def main_is_alive() -> bool:
    """Whether the process that started this one is there."""
    import multiprocessing

    main = multiprocessing.parent_process()
    return main is None or main.is_alive()


def _end_with_main() -> None:
    import multiprocessing

    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)
