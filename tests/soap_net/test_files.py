"""Whatever the package writes is whole or as it was before: all its files, by one list."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from soap_net import checkpoint
from soap_net.config import Config
from soap_net.evaluate import EvalResult
from soap_net.files import write_text
from soap_net.report import write_report
from soap_net.runs import MetricsLog, RunFolder

RESULT = EvalResult(50.0, 1.0, 1, 2, 1, 1, "test", 0, 1.0, 1.0, {}, ["a", "b"], [[0, 0], [0, 0]], [])


def write_metrics(run: RunFolder, config: Config) -> None:
    with MetricsLog(run, 0, active=True):
        pass


WRITERS: dict[str, Callable[[RunFolder, Config], object]] = {
    "config.yaml": lambda run, config: run.begin(config, resume=True),
    "versions.json": lambda run, config: run.begin(config, resume=True),
    "metrics.jsonl": write_metrics,
    "last.pt": lambda run, config: checkpoint.save(run.last, {"config": {}, "model": {}}),
    "eval.json": lambda run, config: RESULT.save(run.result),
    "report.html": lambda run, config: write_report(run.path / "report.html", {"run": run.path}),
}


def write_all(run: RunFolder, config: Config) -> None:
    for write in WRITERS.values():
        write(run, config)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_what_cannot_be_written_to_its_end_leaves_the_old_file_whole(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str, function: str
) -> None:
    config = tiny_run(model__soap__enabled=False)
    run = RunFolder(config.out)
    write_all(run, config)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    assert {*before} == {*WRITERS}
    work = getattr(os, function)

    def fail(first: int | Path, *others: Path) -> None:
        if function == "fsync" or others[0].name == name:  # fsync is given a number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        work(first, *others)

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](run, config)
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def on_a_full_disk(self: Path, mode: str) -> IO[bytes]:
        self.touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new" * 100_000)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_file_has_the_mode_of_any_other(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "ä")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "other")]
    assert modes == [0o666 & ~mask] * 2
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()
