"""The one process pool: trainings in processes of their own, a few at a time, which save and end when asked to."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import torch

from soap_net.config import Config
from soap_net.data.memory import decoded
from soap_net.errors import UserError
from soap_net.interrupts import Interrupted, StopSignals, ignoring_interrupts, leave_signals_to_main

KEPT_CLIPS = 512 * 2**20
"""Bytes of decoded clips that each process keeps, as run after run reads the same ones."""
Stop = Callable[[], bool]
"""Asked now and then whether to save and raise `Interrupted`."""


@dataclass(frozen=True)
class Job:
    """Something that a process of its own does; ``work(config, stop)`` and what it returns must pickle."""

    name: str
    """What its errors begin with."""
    work: Callable[[Config, Stop], Any]
    config: Config


def perform(
    jobs: Sequence[Job],
    at_once: int,
    *,
    threads: int | None = None,
    waiting: Callable[[], None] = lambda: None,
    let_end: bool = True,
) -> Iterator[tuple[Job, Any]]:
    """Does `jobs`, `at_once` of them at a time, and gives each with its result as they come.

    One at a time they are done in this process; else each in one of `at_once` processes, with a share of the GPUs.

    Args:
        threads: of each process; by default its share of the cores.
        waiting: called a few times a second meanwhile, where there are processes.
        let_end: whether the first failure lets the jobs under way end; else they are asked to save and stop. None is
            begun after it.

    Raises:
        UserError: a job's, after its name; or its process died.
        RuntimeError: a job's RuntimeError or OSError, as text after its name.
        Interrupted: Ctrl-C or SIGTERM, after the jobs under way have saved; `KeyboardInterrupt` where a second one
            came, at which they were killed.
    """
    if at_once == 1:
        yield from _perform_here(jobs)
        return
    context = multiprocessing.get_context("spawn")
    stop, slots = context.Event(), context.Queue()
    for slot in range(at_once):
        slots.put(slot)
    threads = threads or max(1, (os.cpu_count() or 1) // at_once)
    with (
        StopSignals(stop) as signals,
        ProcessPoolExecutor(at_once, context, _enter_worker, (slots, stop, threads)) as pool,
    ):
        with ignoring_interrupts():  # the processes begin here
            futures = {pool.submit(_do_in_worker, job): job for job in jobs}
        try:
            yield from _results(futures, stop, waiting, let_end)
        except BaseException as error:
            stop.set()
            if isinstance(error, KeyboardInterrupt):
                for child in multiprocessing.active_children():
                    child.kill()
            _interrupt_children()
            raise
        if signals.requested:
            raise Interrupted


def _perform_here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
    with StopSignals() as signals, decoded.keeping(KEPT_CLIPS):
        for job in jobs:
            yield job, _do(job, lambda: signals.requested)
        if signals.requested:
            raise Interrupted


def _results(
    futures: dict[Future[Any], Job], stop: Event, waiting: Callable[[], None], let_end: bool
) -> Iterator[tuple[Job, Any]]:
    failure: Exception | None = None
    while futures:
        ready, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
        waiting()
        if stop.is_set():
            _interrupt_children()  # again and again, as one that is just beginning its training hears nothing yet
        for future in ready:
            job = futures.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                if stop.is_set():
                    raise failure or Interrupted() from None
                raise UserError(
                    f"{job.name}: its process, or one beside it, died, for lack of memory perhaps; "
                    "what is finished is kept, and fewer at a time may help"
                ) from None
            except (Interrupted, UserError, RuntimeError) as error:
                failure = failure or error
                if isinstance(error, Interrupted) or not let_end:
                    stop.set()
                for other in [other for other in futures if other.cancel()]:
                    del futures[other]
            else:
                yield job, result
    if failure is not None:
        raise failure


def _do(job: Job, stop: Stop) -> Any:
    """Does a job. What goes wrong becomes an error that holds a text alone, as not every other can travel."""
    if stop():
        raise Interrupted
    try:
        return job.work(job.config, stop)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted from None
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from None
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"{job.name}: {type(error).__name__}: {error}") from None


_worker: tuple[int, Event] | None = None


def _enter_worker(slots: Queue[int], stop: Event, threads: int) -> None:
    global _worker
    leave_signals_to_main()
    _worker = slots.get(), stop
    torch.set_num_threads(threads)
    decoded.limit = KEPT_CLIPS


def _do_in_worker(job: Job) -> Any:
    assert _worker is not None
    slot, stop = _worker
    if torch.cuda.is_available() and job.config.device in ("auto", "cuda"):
        job.config.device = f"cuda:{slot % torch.cuda.device_count()}"
    return _do(job, stop.is_set)


def _interrupt_children() -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGINT)
