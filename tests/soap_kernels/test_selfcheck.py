"""The self-check: quiet about sound backends, loud about a wrong one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from soap_kernels import backends, selfcheck


def test_it_prints_a_line_for_every_backend_present_and_the_reason_for_an_absent_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "SHAPE", (1, 8, 3, 6, 9))
    monkeypatch.setattr(
        selfcheck, "checks", lambda device, names: [selfcheck.check("reference", "cpu", torch.float32, "default")]
    )
    assert selfcheck.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "reference  cpu    float32   default" in printed
    assert "all backends agree" in printed
    for name, why in backends.status("cpu").items():
        assert why is None or f"{name} is absent on cpu: {why}" in printed


def test_a_wrong_backend_ends_it_with_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "SHAPE", (1, 8, 3, 4, 4))
    right = selfcheck.check("reference", "cpu", torch.float32, "default")
    monkeypatch.setattr(selfcheck, "checks", lambda device, names: [dataclasses.replace(right, output_error=1.0)])
    assert selfcheck.main(["--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out
