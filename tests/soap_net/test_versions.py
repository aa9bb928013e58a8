"""`soap-net info` names versions outside those that the project is tested with."""

from __future__ import annotations

import importlib.metadata
import platform
import re

import pytest
from packaging.version import Version

from soap_net import versions
from soap_net.cli import main


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name) or real(name))


def test_an_older_dependency_is_named_with_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.9.1+cpu")
    assert [line for line in versions.untested() if line.startswith("torch 2.9.1+cpu is older than 2.10")]


def test_a_newer_one_is_named_and_a_newer_patch_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = Version(versions.TESTED["torch"])
    pretend(monkeypatch, torch=f"{tested.major}.{tested.minor}.9")
    assert not [line for line in versions.untested() if line.startswith("torch ")]
    pretend(monkeypatch, torch=f"{tested.major}.{tested.minor + 1}.0")
    assert main(["info"]) == 0
    assert re.search(rf"^warning: torch \S+ is newer than {tested}, ", capsys.readouterr().out, re.M)


def test_python_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert [line for line in versions.untested() if line.startswith("python 3.99.0 is newer")]


def test_what_is_named_as_tested_is_a_dependency() -> None:
    needs = {re.split(r"[^\w-]", need)[0] for need in importlib.metadata.requires("soap-net") or []}
    assert set(versions.TESTED) - {"python"} <= needs
