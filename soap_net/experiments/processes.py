"""The one process pool: trainings in processes of their own, a few at a time, which save and end when asked to."""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from soap_net.config import Config
from soap_net.data.loading import cores
from soap_net.data.memory import ClipMemory
from soap_net.errors import UserError
from soap_net.interrupts import (
    Flag,
    Interrupted,
    StopSignals,
    deaf_while_starting,
    leave_signals_to_main,
    main_is_alive,
)

KEPT_CLIPS = 512 * 2**20
"""Bytes of decoded clips that each process keeps, as run after run reads the same ones."""
Stop = Callable[[], bool]
"""Asked now and then whether to save and raise `Interrupted`."""


@dataclass(frozen=True)
class Job:
    """Something to do; ``work`` and what it returns must pickle where it is done in another process.

    It is called with the config, the question whether to stop, and a memory that lasts from job to job.
    """

    name: str
    """What its errors begin with."""
    work: Callable[[Config, Stop, ClipMemory], Any]
    config: Config


def perform(
    jobs: Sequence[Job],
    at_once: int,
    *,
    threads: int | None = None,
    waiting: Callable[[], None] = lambda: None,
    let_end: bool = True,
) -> Generator[tuple[Job, Any], None, None]:
    """Does `jobs`, `at_once` of them at a time, and gives each with its result as they come.

    One at a time they are done in this process; else in `at_once` others, which share out cores and GPUs.

    Args:
        threads: of each process; by default its share of the cores.
        waiting: called a few times a second meanwhile, where there are processes.
        let_end: whether the first failure lets the jobs under way end; else they are asked to save and stop. None is
            begun after it.

    Raises:
        UserError: a job's, after its name; or its process died.
        RuntimeError: any other error of a job, as text after its name.
        Interrupted: Ctrl-C or SIGTERM, once the jobs under way have saved. A second one ends them at once.
    """
    with StopSignals() as signals:
        if at_once == 1:
            memory = ClipMemory(KEPT_CLIPS)
            for job in jobs:
                yield job, _do(job, lambda: signals.requested, memory)
        else:
            # Whatever number of jobs is left: how many threads add up a sum decides its last bits, and a run that is
            # gone on with is to end as one that was never stopped.
            threads = threads or max(1, cores() // at_once)
            stop = Flag(multiprocessing.get_context("spawn"))
            with deaf_while_starting():
                workers = [_Worker(slot, threads, stop) for slot in range(min(at_once, len(jobs)))]
            try:
                yield from _share_out(jobs, workers, signals, stop, waiting, let_end)
            except KeyboardInterrupt:
                for worker in workers:
                    worker.process.kill()
                raise
            finally:
                stop.set()
                for worker in workers:
                    worker.end()
        if signals.requested:
            raise Interrupted


def _share_out(
    jobs: Sequence[Job],
    workers: Sequence[_Worker],
    signals: StopSignals,
    stop: Flag,
    waiting: Callable[[], None],
    let_end: bool,
) -> Generator[tuple[Job, Any], None, None]:
    left, failure = deque(jobs), None
    busy: dict[object, tuple[_Worker, Job]] = {
        worker.pipe: (worker, worker.begin(left.popleft())) for worker in workers
    }
    while busy:
        ready = wait([worker.pipe for worker, _ in busy.values()], timeout=0.2)
        waiting()
        if signals.requested:  # not set by the handler, as a signal may come while this process is setting it
            stop.set()
            for worker, _ in busy.values():
                worker.end_if_still_starting()
        for pipe in ready:
            worker, job = busy.pop(pipe)
            outcome = worker.outcome(job)
            if isinstance(outcome, Exception):
                failure = failure or outcome
                if isinstance(outcome, Interrupted) or not let_end:
                    stop.set()
            else:
                yield job, outcome
            if left and not failure and not signals.requested:
                busy[worker.pipe] = worker, worker.begin(left.popleft())
    if failure:
        raise failure


class _Worker:
    """A process that does one job after another."""

    def __init__(self, slot: int, threads: int, stop: Flag) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop, self.started, self.busy = stop, Flag(context), False
        self.pipe, inner = context.Pipe()
        self.process = context.Process(target=_serve, args=(inner, slot, threads, stop, self.started))
        self.process.start()
        inner.close()

    def begin(self, job: Job) -> Job:
        """Hands `job` over, and returns it."""
        self.busy = True
        with suppress(BrokenPipeError):  # it has died, which shows when its outcome is asked for
            self.pipe.send(job)
        return job

    def outcome(self, job: Job) -> Any:
        """What became of `job`: its result or its error."""
        self.busy = False
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            if self.stop.is_set() and not self.started.is_set():
                return Interrupted()
            return UserError(
                f"{job.name}: its process ended with code {self.process.exitcode}, for lack of memory perhaps; "
                "what is finished is kept, and fewer at a time may help"
            )

    def end_if_still_starting(self) -> None:
        """Ends the process, once `stop` is set, if it is still starting, which takes it seconds."""
        if not self.started.is_set():  # one that gets that far at this very moment finds `stop` set, and begins nothing
            self.process.kill()

    def end(self) -> None:
        """Returns when it has ended; one that is at a job, when that has."""
        if self.busy:
            self.end_if_still_starting()
        else:
            self.process.kill()
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, slot: int, threads: int, stop: Flag, started: Flag) -> None:
    leave_signals_to_main()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives a process that is ended
    memory = ClipMemory(KEPT_CLIPS)
    with suppress(EOFError, ConnectionError):  # the main process has closed the pipe, or is gone
        while True:
            job: Job = pipe.recv()
            started.set()
            if torch.cuda.is_available() and job.config.device in ("auto", "cuda"):
                job.config.device = f"cuda:{slot % torch.cuda.device_count()}"
            try:
                outcome = _do(job, lambda: stop.is_set() or not main_is_alive(), memory)
            except Exception as error:
                outcome = error
            pipe.send(outcome)


def _do(job: Job, stop: Stop, memory: ClipMemory) -> Any:
    """Does a job. What goes wrong becomes an error that holds a text alone, as not every other can travel."""
    try:
        if stop():
            raise Interrupted
        return job.work(job.config, stop, memory)
    except Interrupted:
        raise Interrupted from None
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{job.name}: {type(error).__name__}: {error}") from error
