from __future__ import annotations

import errno
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

from soap_kernels import SOAP
from soap_net import checkpoint
from soap_net.checkpoint import CheckpointError
from soap_net.config import Config, to_dict
from soap_net.errors import UserError
from soap_net.models import build_model


@pytest.fixture
def content(tiny_run: Callable[..., Config]) -> dict[str, object]:
    config = tiny_run()
    model = build_model(config.model, config.data.frames)
    return {"config": to_dict(config), "model": model.state_dict(), "progress": {"episode": 3}}


def test_what_is_saved_is_loaded(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    loaded = checkpoint.load(path)
    assert loaded["config"] == content["config"]
    assert loaded["progress"] == {"episode": 3}
    torch.testing.assert_close(loaded["model"], content["model"], rtol=0, atol=0)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_checkpoint_has_the_mode_of_any_other_file(tmp_path: Path, content: dict[str, object], mask: int) -> None:
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path / "a.pt", content)
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.pt", "other")]
    assert modes == [0o666 & ~mask] * 2


def test_a_model_is_rebuilt_without_its_first_weights(tmp_path: Path, tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    model = build_model(config.model, config.data.frames)
    config.model.weights = str(tmp_path / "gone.pth")  # what training began from need not be there any more
    checkpoint.save(tmp_path / "a.pt", {"config": to_dict(config), "model": model.state_dict()})
    rebuilt, trained = checkpoint.load_model(tmp_path / "a.pt")
    assert trained == config
    assert not rebuilt.training
    torch.testing.assert_close(rebuilt.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_full_disk_leaves_the_old_file_whole(
    tmp_path: Path, content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    before = path.read_bytes()

    def on_a_full_disk(self: Path, mode: str) -> IO[bytes]:
        self.touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoint.save(path, {**content, "large": torch.zeros(1_000_000)})
    monkeypatch.undo()
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_at_the_end_of_writing_leaves_the_old_file_whole(
    tmp_path: Path, content: dict[str, object], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, content)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, content: dict[str, object], keep: float) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"a\.pt: not a whole checkpoint of soap-net .*truncated") as raised:
        checkpoint.load(path)
    assert "\n" not in str(raised.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(path)
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.load(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no config and model in it"):
        checkpoint.load(path)
    torch.save({"format": 99, "config": {}, "model": {}}, path)
    with pytest.raises(CheckpointError, match="format 99, this version reads format 1"):
        checkpoint.load(path)


def test_a_folder_is_told_apart_and_its_checkpoint_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))}: a folder, not a checkpoint$"):
        checkpoint.load(tmp_path)
    best = tmp_path / "best.pt"
    best.touch()
    with pytest.raises(CheckpointError, match=rf": a folder, not a checkpoint; there is {re.escape(str(best))}$"):
        checkpoint.load(tmp_path)


def test_what_the_system_refuses_is_said_as_it_says_it(
    tmp_path: Path, content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checkpoint.torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"a\.pt: the checkpoint can't be read: permission denied$"):
        checkpoint.load(path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"a\.pt/b\.pt: the checkpoint can't be read: not a directory$"):
        checkpoint.load(path / "b.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("forbidden", ["run", "run/a.pt"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_truncated(
    tmp_path: Path, content: dict[str, object], forbidden: str
) -> None:
    path = tmp_path / "run" / "a.pt"
    path.parent.mkdir()
    checkpoint.save(path, content)
    mode = stat.S_IMODE((tmp_path / forbidden).stat().st_mode)
    (tmp_path / forbidden).chmod(0)
    try:
        with pytest.raises(CheckpointError, match="the checkpoint can't be read: permission denied"):
            checkpoint.load(path)
    finally:
        (tmp_path / forbidden).chmod(mode)


def test_backend_and_precision_may_differ_from_those_of_training(
    tmp_path: Path, tiny_run: Callable[..., Config]
) -> None:
    config = tiny_run(model__soap__backend="triton", model__soap__precision="fast")
    model = build_model(config.model, config.data.frames)
    checkpoint.save(tmp_path / "a.pt", {"config": to_dict(config), "model": model.state_dict()})
    for given, expected in (
        ({}, ("triton", "fast")),
        ({"backend": "auto"}, ("auto", "fast")),
        ({"backend": "reference", "precision": "strict"}, ("reference", "strict")),
    ):
        rebuilt, trained = checkpoint.load_model(tmp_path / "a.pt", **given)
        assert isinstance(rebuilt.soap, SOAP)
        assert (rebuilt.soap.backend, rebuilt.soap.precision) == expected
        assert trained == config
    with pytest.raises(UserError, match="backend is 'refrence', expected one of"):
        checkpoint.load_model(tmp_path / "a.pt", backend="refrence")


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "a.pt"
    torch.save({"format": 1, "config": Bomb(), "model": {}}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_another_architecture_is_named(tmp_path: Path, tiny_run: Callable[..., Config]) -> None:
    path = tmp_path / "a.pt"
    with_soap, without = tiny_run(), tiny_run(model__soap__enabled=False)
    weights = build_model(without.model, without.data.frames).state_dict()
    checkpoint.save(path, {"config": to_dict(with_soap), "model": weights})
    with pytest.raises(CheckpointError, match=r"another architecture: \d+ weights missing, first soap\."):
        checkpoint.load_model(path)
    wide = tiny_run(model__head_options={"out_dim": 9})
    weights = build_model(wide.model, wide.data.frames).state_dict()
    checkpoint.save(path, {"config": to_dict(with_soap), "model": weights})
    with pytest.raises(CheckpointError, match=r"of another shape, first head\..*\(9, .*expected \(8, "):
        checkpoint.load_model(path)
