"""Whatever the package writes is whole or as it was before: all its files, by one list."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import signal
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from soap_net import checkpoint
from soap_net.config import Config, to_dict
from soap_net.errors import UserError, WriteError
from soap_net.evaluate import EvalResult
from soap_net.files import Appended, read_json, remove_stale, replacing, write_text
from soap_net.report import write_report
from soap_net.runs import MetricsLog, RunFolder

RESULT = EvalResult(50.0, 1.0, 1, 2, 1, 1, "test", 0, 1.0, 1.0, {}, ["a", "b"], [[0, 0], [0, 0]], [])


def write_metrics(run: RunFolder, config: Config) -> None:
    with MetricsLog(run, 0, active=True):
        pass


def save_checkpoint(run: RunFolder, config: Config) -> None:
    checkpoint.save(run.last, {"config": to_dict(config), "model": {}})


WRITERS: dict[str, Callable[[RunFolder, Config], object]] = {
    "last.pt": save_checkpoint,
    "config.yaml": lambda run, config: run.begin(config, resume=True),
    "versions.json": lambda run, config: run.begin(config, resume=True),
    "metrics.jsonl": write_metrics,
    "eval.json": lambda run, config: RESULT.save(run.result),
    "report.html": lambda run, config: write_report(run.path / "report.html", {"run": run.path}),
}


@pytest.fixture
def written(tiny_run: Callable[..., Config]) -> tuple[RunFolder, Config]:
    """A run folder with a file of each writer's."""
    config = tiny_run(model__soap__enabled=False)
    run = RunFolder(config.out)
    run.path.mkdir()
    run.metrics.write_text('{"episode": 0, "loss": 0.5, "accuracy": 50.0}\n' * 2)
    (run.path / "report.html").write_text("an older version's report")
    for name, write in WRITERS.items():
        if name != "report.html":  # which takes a second
            write(run, config)
    return run, config


def files(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_what_cannot_be_written_to_its_end_leaves_the_old_file_whole(
    largest_file: Callable[[int], AbstractContextManager[None]],
    written: tuple[RunFolder, Config],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    failing: str,
) -> None:
    run, config = written
    path = run.path / name
    path.write_bytes(path.read_bytes()[:-9])  # what is there and equal would not be written again
    before = files(run)
    assert {*before} == {*WRITERS}
    work = getattr(os, failing)

    def fail(first: int | Path, *others: Path) -> None:
        if failing == "fsync" or others[0].name == name:  # fsync is given a number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        work(first, *others)

    with contextlib.ExitStack() as stack:
        if failing == "write":
            stack.enter_context(largest_file(20))
        else:
            stack.enter_context(monkeypatch.context()).setattr(os, failing, fail)
        why = "file too large" if failing == "write" else "no space left on device"
        with pytest.raises(WriteError, match=f"^{re.escape(str(path))}: {why}$") as raised:
            WRITERS[name](run, config)
    assert isinstance(raised.value, UserError)
    assert raised.value.errno == (errno.EFBIG if failing == "write" else errno.ENOSPC)
    assert files(run) == before, "nothing of the new file, and nothing beside it"
    WRITERS[name](run, config)
    assert files(run)[name] != before[name]


def test_a_file_that_holds_it_already_is_not_written(
    largest_file: Callable[[int], AbstractContextManager[None]], written: tuple[RunFolder, Config]
) -> None:
    run, config = written
    before = {path: path.stat().st_ino for path in (run.config, run.versions, run.result)}
    with largest_file(0):
        run.begin(config, resume=True)
        RESULT.save(run.result)
    assert {path: path.stat().st_ino for path in before} == before


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "a.txt", "a")
    assert (tmp_path / "new" / "folder" / "a.txt").read_text() == "a"


def test_an_error_of_writing_travels_between_processes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as raised:
        write_text(tmp_path / "file" / "a.txt", "a")
    assert str(raised.value) == f"{tmp_path / 'file' / 'a.txt'}: file exists"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


# ------------------------------------------------------------------------------------------ what killed processes leave


def killed_while_writing(path: Path) -> None:
    """Another process begins to write `path`, and is killed."""
    if (child := os.fork()) == 0:
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_remains_of_a_killed_process_go_and_a_living_ones_stay(tmp_path: Path) -> None:
    for name in ("a.txt", "b [1].txt"):
        killed_while_writing(tmp_path / name)
    others = {".mine.part", ".a.txt.12345.part", "a.txt.0123abcd.part"}
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"new")
        file.flush()
        alive = {part.name for part in tmp_path.glob(".a.txt.????????.part")}
        assert len(alive) == 1, "the killed one's went when the same file was written again"
        if (child := os.fork()) == 0:
            remove_stale(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
        assert {path.name for path in tmp_path.iterdir()} == others | alive
    assert {path.name for path in tmp_path.iterdir()} == others | {"a.txt"}
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def test_opening_a_run_clears_away_what_killed_saves_left(written: tuple[RunFolder, Config]) -> None:
    run, config = written
    before = files(run)
    for name in WRITERS:
        killed_while_writing(run.path / name)
    assert len(files(run)) == 2 * len(before)
    run.begin(config, resume=True)
    assert files(run) == before


# ------------------------------------------------------------------------------------------------------ files that grow


def test_what_does_not_fit_is_kept_and_comes_first_when_there_is_room(
    largest_file: Callable[[int], AbstractContextManager[None]], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0\n")
    file = Appended(path)
    file.write(b"one\n")
    assert path.read_bytes() == b"0\n"
    file.flush()
    assert path.read_bytes() == b"0\none\n"
    with largest_file(9):
        for text in (b"second\n", b"third\n"):
            file.write(text)
            with pytest.raises(WriteError, match=f"^{re.escape(str(path))}: file too large$"):
                file.sync()
        assert path.read_bytes() == b"0\none\nsec"
    file.sync()
    assert path.read_bytes() == b"0\none\nsecond\nthird\n"
    file.close()


@pytest.mark.parametrize("content", ["[1]", "{", "nul", '{"a": "\\ud8', "[" * 100_000])
def test_our_own_files_damaged_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.json is damaged \(.*\); delete it to have it made anew$") as raised:
        read_json(path)
    assert "\n" not in str(raised.value)


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
