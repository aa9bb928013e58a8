"""Reads a data set ahead in other processes. Whatever happens to them ends the reading with one clear error."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from soap_net.data.clips import Clip
from soap_net.data.zips import keep_archives, kept_archives
from soap_net.errors import ClipError, UserError
from soap_net.interrupts import Flag, deaf_while_starting, live_with_main

T = TypeVar("T")

STUCK_AFTER = 600.0
"""Seconds in which a worker must give its next item or batch. A single clip that hangs is given up much sooner."""
GRACE = 5.0
"""Seconds that workers have to end when nothing more is wanted of them."""
_starting = threading.Lock()  # so that each knows the processes it started from those of others


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PerClip(Dataset[T | ClipError], Generic[T]):
    """`read` of each of `clips`; an unreadable clip is its error. `read` must pickle, as a partial does."""

    def __init__(self, clips: Sequence[Clip], read: Callable[[Clip], T]) -> None:
        self.clips = clips
        self.read = read

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, position: int) -> T | ClipError:
        try:
            return self.read(self.clips[position])
        except ClipError as error:
            return error


@overload
def load(
    dataset: Dataset[T], workers: int, *, batch_size: None = None, pin_memory: bool = False, timeout: float = ...
) -> Generator[T, None, None]: ...


@overload
def load(
    dataset: Dataset[T], workers: int, *, batch_size: int, pin_memory: bool = False, timeout: float = ...
) -> Generator[list[T], None, None]: ...


def load(
    dataset: Dataset[T],
    workers: int,
    *,
    batch_size: int | None = None,
    pin_memory: bool = False,
    timeout: float = STUCK_AFTER,
) -> Generator[T | list[T], None, None]:
    """The items of `dataset` in their order, or lists of `batch_size` of them, read by `workers` processes.

    The processes end with the generator: when it is exhausted, closed or dropped, or raises; and with the main process.
    They ignore Ctrl-C and SIGTERM, so that the main process can finish what it does first.

    Args:
        dataset: has a length; its items travel between processes.
        workers: 0 reads in this process.
        pin_memory: move tensors into page-locked memory.
        timeout: seconds to wait for the next item or batch before the workers count as stuck.

    Raises:
        UserError: one that the data set raised, as it was raised there; or a worker was killed, or is stuck.
    """
    size = batch_size or 1
    workers = min(workers, -(-len(dataset) // size))  # type: ignore[arg-type]
    reading = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()  # each worker's process id and position
    batches = DataLoader(
        _Guarded(dataset, reading),
        batch_size=batch_size,
        collate_fn=None if batch_size is None else list,
        num_workers=workers,
        worker_init_fn=live_with_main,
        multiprocessing_context=_context() if workers else None,
        pin_memory=pin_memory,
    )
    crew = _Crew(batches)
    try:
        for number in range(len(batches)):
            try:
                found = crew.next(timeout)
            except _Lost as lost:
                at = reading[:, 1][reading[:, 0] == lost.pid] if lost.pid else reading[number % workers, 1:]
                raise UserError(f"{lost} while reading {_named(dataset, at.tolist())}; {lost.remedy}") from None
            for item in found if batch_size else [found]:
                if isinstance(item, _Raised):
                    raise item.error
            yield found
    finally:
        crew.end()


class _Raised:
    """A `UserError` on its way between processes: raised in a worker, it would arrive as a traceback's text."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], reading: Tensor) -> None:
        self.dataset = dataset
        self.reading = reading

    def __getstate__(self) -> tuple[Any, ...]:  # for workers that are no forks, which would read all indexes again
        return self.dataset, self.reading, kept_archives()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dataset, self.reading, archives = state
        keep_archives(archives)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Any:
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), position])
        try:
            return self.dataset[position]
        except UserError as error:
            return _Raised(error)


class _Lost(Exception):
    def __init__(self, what: str, remedy: str, pid: int | None = None) -> None:
        super().__init__(what)
        self.remedy = remedy
        self.pid = pid  # of the process that died; None: the one that is waited for is stuck


class _Crew:
    """What a DataLoader gives, and the processes that make it, if any."""

    def __init__(self, batches: DataLoader[Any]) -> None:
        self.items, self.processes = _started(batches) if batches.num_workers else (iter(batches), [])
        self.stuck = False
        # At exit, multiprocessing sends its children SIGTERM, which these ignore, and waits for them without end.
        self.at_exit = Finalize(None, self.kill, exitpriority=1)

    def next(self, timeout: float) -> Any:
        """The next item or batch. Raises _Lost where a process died, or `timeout` seconds brought nothing."""
        if not self.processes:
            return next(self.items)
        # Not DataLoader's own timeout: it does not count while a tensor's memory is being asked of a stuck worker.
        came = threading.Event()
        threading.Thread(target=self._watch, args=(timeout, came), daemon=True).start()
        try:
            return next(self.items)
        except Exception:
            ended = connection.wait([process.sentinel for process in self.processes], timeout=0.5)
            dead = [process for process in self.processes if process.sentinel in ended]
            if self.stuck:
                raise _Lost(
                    f"nothing came from the data workers for {timeout:g} s, and they were ended,",
                    "`soap-net data check` finds clips that hang their decoder",
                ) from None
            if dead:
                dead[0].join()  # for its exit code
                how = _end_of(dead[0].exitcode)
                raise _Lost(
                    f"a data worker {how}", "where memory ran out, fewer workers may help", dead[0].pid
                ) from None
            raise
        finally:
            came.set()

    def end(self) -> None:
        """Asks the processes to end, and kills those that don't."""
        if not self.at_exit.still_active():  # the program is ending: they were killed, and no thread can start
            return
        watch = threading.Timer(0.0 if self.stuck else GRACE, self.kill)
        watch.daemon = True
        watch.start()
        del self.items  # what DataLoader asks and waits in
        watch.cancel()
        self.at_exit()
        for process in self.processes:
            process.join()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _watch(self, timeout: float, came: threading.Event) -> None:
        for _ in range(math.ceil(timeout)):  # one by one, so that a program that was stopped for a while is not late
            if came.wait(1.0):
                return
        self.stuck = True
        self.kill()


def _context() -> BaseContext:
    """multiprocessing's own, but that DataLoader's event for its workers is nothing that a killed one can hold."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = partial(Flag, context)  # type: ignore[method-assign,assignment]
    return context


def _started(batches: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    child_ended = getattr(signal, "SIGCHLD", None)  # Windows has no such signal
    with _starting, deaf_while_starting(forks=multiprocessing.get_start_method() == "fork"):
        others = multiprocessing.active_children()
        before = child_ended and signal.getsignal(child_ended)
        # A worker that cleared away the decoders of this process would wait for their threads, which it has not.
        gc.collect()
        items = iter(batches)
        processes = [child for child in multiprocessing.active_children() if child not in others]
        main = threading.current_thread() is threading.main_thread()
        if child_ended and main and _is_pytorchs(signal.getsignal(child_ended)):
            # It would raise a worker's death in whatever line is running then, far from here; DataLoader polls as well.
            signal.signal(child_ended, signal.SIG_DFL if before is None or _is_pytorchs(before) else before)
    return items, processes


def _is_pytorchs(handler: object) -> bool:
    return getattr(handler, "__module__", "").startswith("torch.")


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _named(dataset: Dataset[Any], positions: list[int]) -> str:
    return ", ".join(dataset.clips[at].name if isinstance(dataset, PerClip) else f"item {at}" for at in positions)
