from __future__ import annotations

import copy
import errno
import math
import os
import pickle
import re
import resource
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soap_kernels import SOAP
from soap_net import checkpoint
from soap_net.checkpoint import CheckpointError
from soap_net.config import Config, to_dict
from soap_net.errors import UserError
from soap_net.models import build_model
from soap_net.optimizers import build_optimizer


@pytest.fixture
def content(tiny_run: Callable[..., Config]) -> dict[str, object]:
    config = tiny_run()
    model = build_model(config.model, config.data.frames, seed=0)
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
    model = build_model(config.model, config.data.frames, seed=0)
    config.model.weights = str(tmp_path / "gone.pth")  # what training began from need not be there any more
    checkpoint.save(tmp_path / "a.pt", {"config": to_dict(config), "model": model.state_dict()})
    rebuilt, trained = checkpoint.load_model(tmp_path / "a.pt")
    assert trained == config
    assert not rebuilt.training
    torch.testing.assert_close(rebuilt.state_dict(), model.state_dict(), rtol=0, atol=0)


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


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user other than root, who may read anything"
)
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


@pytest.mark.parametrize("centred", [False, True])
def test_centred_soap_is_rebuilt_as_it_was_trained_and_one_of_before_as_the_paper_s(
    tmp_path: Path, tiny_run: Callable[..., Config], centred: bool
) -> None:
    config = tiny_run(model__soap__centred=centred)
    model = build_model(config.model, config.data.frames, seed=0).eval()
    described = to_dict(config)
    if not centred:
        del described["model"]["soap"]["centred"]
    checkpoint.save(tmp_path / "a.pt", {"config": described, "model": model.state_dict()})
    rebuilt, trained = checkpoint.load_model(tmp_path / "a.pt")
    assert trained == config
    clip = torch.randint(0, 256, (1, config.data.frames, 3, 9, 9), dtype=torch.uint8)
    assert torch.equal(rebuilt.soap(clip), model.soap(clip))


def test_backend_and_precision_may_differ_from_those_of_training(
    tmp_path: Path, tiny_run: Callable[..., Config]
) -> None:
    config = tiny_run(model__soap__backend="triton", model__soap__precision="fast")
    model = build_model(config.model, config.data.frames, seed=0)
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


# -------------------------------------------------------------------------------------------------- strange contents

NAME = "soap.three_dem.conv.weight"
STRANGE: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "nan": (lambda w: w.clone().fill_(math.nan), "the weight {} holds values that are not finite"),
    "infinite": (lambda w: w / 0, "the weight {} holds values that are not finite"),
    "integer": (
        lambda w: w.long(),
        r"1 weights of another kind of number, first {}: \(.*\) int64, expected",
    ),
    "boolean": (lambda w: w > 0, r"1 weights of another kind of number, first {}: \(.*\) bool, expected"),
    "complex": (lambda w: w.to(torch.complex64), "the weight {} is complex"),
    "sparse": (lambda w: w.to_sparse(), "{} is made by 'torch._utils _rebuild_sparse_tensor'"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "{} is made by .*_rebuild_qtensor"),
    "meta": (lambda w: w.to("meta"), "the weight {} has no values"),
    "shape": (lambda w: w.flatten(), r"1 weights of another shape, first {}: \(27,\) float32, expected \(1, 1, 3"),
    "giant": (lambda w: torch.zeros(1).expand(10**12), r"the weight {} is of shape \(1000000000000,\), with fewer val"),
    "text": (lambda w: "abc", "its model holds other things than weights"),
}


@pytest.mark.filterwarnings("ignore")  # of quantized tensors, and of checks of sparse ones
@pytest.mark.parametrize("kind", STRANGE)
def test_weights_that_are_none_are_refused_by_name(tmp_path: Path, content: dict[str, Any], kind: str) -> None:
    make, message = STRANGE[kind]
    content["model"][NAME] = make(content["model"][NAME])
    torch.save({"format": 1, **content}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: .*" + message.format(f"'?{NAME}'?")) as raised:
        checkpoint.load_model(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)
    if kind not in ("integer", "boolean", "shape"):  # which are wrong for this model alone
        with pytest.raises(CheckpointError, match=message.format(f"'?{NAME}'?")):
            checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_nobody_could_go_on_from_are_not_saved(
    tmp_path: Path, content: dict[str, Any], value: float
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    before = path.read_bytes()
    content["model"][NAME] = torch.full_like(content["model"][NAME], value)
    with pytest.raises(CheckpointError, match=rf"a\.pt: not written, as the weight {NAME} is not finite any more"):
        checkpoint.save(path, content)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_weights_of_lower_precision_are_taken(tmp_path: Path, content: dict[str, Any]) -> None:
    content["model"] = {name: w.half() if w.is_floating_point() else w for name, w in content["model"].items()}
    checkpoint.save(tmp_path / "a.pt", content)
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    torch.testing.assert_close(model.state_dict()[NAME], content["model"][NAME].float(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- limits on memory


def test_no_more_is_unpacked_than_weights_take(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    size = sum(weight.nbytes for weight in content["model"].values())
    fits = [torch.zeros(size // 4) for _ in range(3)]  # as AdamW's moments and a little more
    checkpoint.save(path, {**content, "optimizer": {"state": fits}})
    assert checkpoint.load(path)["optimizer"]["state"][0].numel() == size // 4
    checkpoint.save(path, {**content, "optimizer": {"state": torch.zeros(3 * size + checkpoint.LARGEST_REST)}})
    refuse_real_loads(monkeypatch)
    with pytest.raises(CheckpointError, match=r"a\.pt: \d+ bytes, unpacked, where such .* take at most \d+$"):
        checkpoint.load(path)


def refuse_real_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a checkpoint's tensors may be looked at, and not read."""
    load = torch.load

    def look(*args: Any, **options: Any) -> Any:
        assert options["map_location"] == "meta"
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", look)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("model", {"head_options": {"out_dim": 10**11}}, r"of another shape, first head\..*expected \(100000000000"),
        ("model", {"head_options": {"out_dim": 2**62}}, "the model that its config describes can't be built: "),
        ("data", {"frames": 10**6}, r"of another shape, first soap\.hmem.*expected \(1000000"),
    ],
)
def test_a_config_of_a_giant_model_takes_no_memory(
    tmp_path: Path, content: dict[str, Any], group: str, change: dict[str, Any], message: str
) -> None:
    content["config"][group].update(change)
    checkpoint.save(tmp_path / "a.pt", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load_model(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


def test_tables_that_a_config_describes_count_as_well(tmp_path: Path, tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(model__soap__enabled=False)
    weights = build_model(config.model, config.data.frames, seed=0).state_dict()
    config.data.frames = 10**5  # sines for each, 230 MB, of which no weight tells
    checkpoint.save(tmp_path / "a.pt", {"config": to_dict(config), "model": weights})
    with pytest.raises(CheckpointError, match=r"a\.pt: 2\d{8} bytes, unpacked, where such .* take at most \d+$"):
        checkpoint.load_model(tmp_path / "a.pt")


def rebuilt(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    """Writes the archive at `path` anew, its check sums right."""
    with zipfile.ZipFile(path) as archive:
        members = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def test_compressed_members_and_what_takes_memory_by_a_number_are_refused(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    rebuilt(path, lambda name, data: (name, data), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.load(path)
    checkpoint.save(path, content)
    giant = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."  # bytearray(2**31 - 1)
    rebuilt(path, lambda name, data: (name, giant if name.endswith("data.pkl") else data))
    with pytest.raises(CheckpointError, match="is made by 'builtins bytearray'"):
        checkpoint.load(path)


def test_a_config_is_read_without_the_weights(
    tmp_path: Path, content: dict[str, Any], tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path / "a.pt", content)
    refuse_real_loads(monkeypatch)
    assert checkpoint.load_config(tmp_path / "a.pt") == tiny_run()


# ---------------------------------------------------------------------------------------------- going on with training


def trained(config: Config) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """A model, an optimizer and a scaler after one step."""
    model = build_model(config.model, config.data.frames, seed=0)
    optimizer, scaler = build_optimizer(config.train, model), torch.amp.GradScaler("cpu")
    sum((parameter**2).sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return model, optimizer, scaler


BROKEN_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no optimizer": lambda c: c.pop("optimizer"),
    "no scaler": lambda c: c.pop("scaler"),
    "another kind": lambda c: c["optimizer"].update(state=[1]),
    "a number too many": lambda c: c["optimizer"]["state"].update({10**6: c["optimizer"]["state"][0]}),
    "a name for a number": lambda c: c["optimizer"]["state"].update(a=c["optimizer"]["state"][0]),
    "a part missing": lambda c: c["optimizer"]["state"][0].popitem(),
    "another shape": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "integers": lambda c: c["optimizer"]["state"][0].update(exp_avg=c["optimizer"]["state"][0]["exp_avg"].long()),
    "text": lambda c: c["optimizer"]["state"][0].update(exp_avg="a"),
    "no step": lambda c: c["optimizer"]["state"][0].update(step=None),
    "no scale": lambda c: c.update(scaler={}),
    "an infinite scale": lambda c: c["scaler"].update(scale=math.inf),
    "a tracker of text": lambda c: c["scaler"].update(_growth_tracker="a"),
}


@pytest.mark.parametrize("kind", BROKEN_STATES)
def test_a_state_that_no_training_leaves_is_refused_and_nothing_taken_up(
    tmp_path: Path, content: dict[str, Any], tiny_run: Callable[..., Config], kind: str
) -> None:
    config, path = tiny_run(train__optimizer="adamw"), tmp_path / "last.pt"
    model, optimizer, scaler = trained(config)
    saved = {"config": to_dict(config), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    saved = copy.deepcopy({**saved, "model": model.state_dict()})
    checkpoint.save(path, saved)
    checkpoint.load_training(path, *trained(config))
    BROKEN_STATES[kind](saved)
    checkpoint.save(path, saved)
    fresh = trained(config)
    before = copy.deepcopy([part.state_dict() for part in fresh])
    with pytest.raises(
        CheckpointError, match=r"last\.pt: (holds weights alone|its (optimizer|loss scaler)'s state is not)"
    ):
        checkpoint.load_training(path, *fresh)
    torch.testing.assert_close([part.state_dict() for part in fresh], before, rtol=0, atol=0)
