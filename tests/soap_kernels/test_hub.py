"""SOAP alone as a folder of Hugging Face's hub."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from soap_kernels import SOAP

hub = pytest.importorskip("soap_kernels.hub", reason="huggingface_hub is not installed: pip install huggingface_hub")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"frames": 4, "channels": 2, "tuple_sizes": (1, 3), "hidden_channels": 5, "parts": ["hmem", "cwem"]},
    {"normalize": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)), "out_dtype": torch.float16, "out_channels_last": True},
    {"variant": "release", "precision": "strict"},
    {"centred": True, "start": "differences"},
    {"tuple_sizes": (size for size in (2, 1)), "parts": (part for part in ("3dem", "hmem"))},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_saved_computes_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    soap = hub.HubSOAP(**settings).eval()
    soap.save_pretrained(tmp_path)
    back = hub.HubSOAP.from_pretrained(tmp_path)
    assert back.settings() == soap.settings()
    shape = (2, soap.frames, soap.channels, 8, 8)
    x = torch.randint(0, 256, shape, dtype=torch.uint8) if soap.normalize else torch.randn(shape)
    y, again = soap(x), back(x)
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    assert again.dtype == y.dtype
    assert again.stride() == y.stride()
    assert isinstance(back, SOAP)
    assert "SOAP for clips of" in (tmp_path / "README.md").read_text()


def test_every_setting_of_soap_is_kept() -> None:
    assert {*hub.HubSOAP().settings(), "backend"} == {*inspect.signature(SOAP).parameters}


def test_a_setting_that_an_older_version_lacked_has_its_default(tmp_path: Path) -> None:
    hub.HubSOAP(frames=4).save_pretrained(tmp_path)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["centred"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert hub.HubSOAP.from_pretrained(tmp_path).settings() == hub.HubSOAP(frames=4).settings()


def test_it_trains_on(tmp_path: Path) -> None:
    hub.HubSOAP(frames=4).save_pretrained(tmp_path)
    back = hub.HubSOAP.from_pretrained(tmp_path, backend="equations")
    assert back.backend == "equations"
    back.train()(torch.randn(1, 4, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in back.parameters())


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, frames="8"), "not the settings of this version's SOAP: 'frames'"),
        (lambda f: change(f, out_dtype="torch.load"), "not the settings of this version's SOAP: 'out_dtype'"),
        (lambda f: change(f, more=1), "not the settings of this version's SOAP: 'more'"),
        (lambda f: change(f, parts=["4dem"]), "parts holds '4dem'"),
        (lambda f: change(f, frames=9), r"model\.safetensors: does not fit its config\.json: 'hmem\.restore"),
        (lambda f: (f / "config.json").write_text("[" * 60_000), "damaged, or not the settings of SOAP"),
        (lambda f: (f / "config.json").unlink(), r"no model: there is no config\.json in it"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02cos\nsystem\n."), "damaged, or no safetensors"),
        (lambda f: weights(f, lambda s: s.popitem()), r"does not fit its config\.json"),
        (lambda f: weights(f, lambda s: s["cwem.temporal.bias"].fill_(float("nan"))), "temporal.bias' is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    hub.HubSOAP().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        hub.HubSOAP.from_pretrained(tmp_path)


def test_the_kernels_need_no_hub() -> None:
    code = "import sys, soap_kernels; assert not {'huggingface_hub', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
