from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from soap_net import checkpoint
from soap_net.callbacks import EachStep
from soap_net.config import Config
from soap_net.data.episodes import EpisodeClips, on_device
from soap_net.interrupts import Interrupted
from soap_net.machine import keep_freed_memory, repeatable
from soap_net.models.heads import build_head
from soap_net.steps import Step
from soap_net.train import Training, TrainingStopped, train


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc it is about")
@pytest.mark.skipif(
    any(name.startswith("MALLOC_") for name in os.environ), reason="MALLOC_... is set, which has its way"
)
def test_freed_memory_is_not_fetched_from_the_system_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(2**26, dtype=np.uint8).fill(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults()
    assert faults() < 2**26 // 4096 // 10


def test_only_algorithms_that_repeat_themselves_are_taken_where_that_is_asked(tiny_run: Callable[..., Config]) -> None:
    seen = []

    def note(training: Training, step: Step) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    train(tiny_run(train__episodes=2, train__val_every=0), progress=False, callbacks=[EachStep(note)])
    config = tiny_run(train__episodes=2, train__val_every=0, train__deterministic=True, out=str(tiny_run().out / "2"))
    train(config, progress=False, callbacks=[EachStep(note)])
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
    with contextlib.suppress(KeyError), repeatable(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_tasks_on_a_device_close_what_they_come_from() -> None:
    closed = []

    def tasks() -> Any:
        try:
            for index in range(3):
                frames = torch.full((2, 1, 3, 2, 2), index, dtype=torch.uint8)
                yield EpisodeClips(index, frames, torch.arange(2), frames, torch.arange(2), [], [], (0, 1))
        finally:
            closed.append(True)

    moved = on_device(tasks(), torch.device("meta"))
    first = next(moved)
    assert [t.device.type for t in (first.support, first.query, first.query_labels)] == ["meta"] * 3
    assert first.support_labels.device.type == "cpu", "the head groups by them without asking the device"
    moved.close()
    assert closed == [True]


def test_labels_on_the_cpu_are_taken_by_a_head_elsewhere() -> None:
    head = build_head("trx", 8, 4, out_dim=8).to("meta")
    logits = head(torch.zeros(3, 4, 8, device="meta"), torch.arange(3), torch.zeros(2, 4, 8, device="meta"), 3)
    assert logits.shape == (2, 3)
    assert logits.device.type == "meta"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_is_the_same_up_to_rounding_and_goes_on_bit_for_bit(tiny_run: Callable[..., Config]) -> None:
    def make(name: str, compiled: bool = True) -> Config:
        return tiny_run(train__compile=compiled, train__episodes=6, train__ema=0.5, out=str(tiny_run().out / name))

    def stop(training: Training, step: Step) -> None:
        if training.state.episode == 4:
            raise Interrupted

    whole, stopped, plain = make("whole"), make("stopped"), make("plain", compiled=False)
    train(whole, progress=False)
    train(plain, progress=False)
    with pytest.raises(TrainingStopped):
        train(stopped, progress=False, callbacks=[EachStep(stop)])
    train(stopped, progress=False)
    found = {config.out.name: checkpoint.load(config.out / "last.pt") for config in (whole, stopped, plain)}
    for content in found.values():
        del content["config"]
    torch.testing.assert_close(found["stopped"], found["whole"], rtol=0, atol=0)
    torch.testing.assert_close(found["plain"]["model"], found["whole"]["model"], rtol=1e-3, atol=1e-4)
