"""What a run depends on, and which versions of it the project is tested with."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
import torchvision
from packaging.requirements import Requirement
from packaging.version import Version

TESTED = {
    "python": "3.13",
    "torch": "2.14",
    "torchvision": "0.29",
    "numpy": "2.5",
    "av": "19.0",
    "pillow": "13.0",
    "timm": "1.0",
}
"""The newest release of each that the tests passed with; the oldest is its lower bound among our dependencies."""


def untested() -> list[str]:
    """A line for each dependency whose version is older or newer than those that the project was tested with."""
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires("soap-net") or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    found = {"python": platform.python_version()}
    oldest = {}
    for need in needs:
        if need.marker is None:  # those of extras may well be absent
            found[need.name] = importlib.metadata.version(need.name)
            oldest[need.name] = next(bound.version for bound in need.specifier if bound.operator == ">=")
    lines = []
    for name, text in found.items():
        version, newest = Version(text), Version(TESTED[name]) if name in TESTED else None
        if version < Version(oldest.get(name, text)):
            lines.append(f"{name} {text} is older than {oldest[name]}, the oldest that soap-net is tested with")
        if newest is not None and version.release[:2] > newest.release[:2]:
            lines.append(f"{name} {text} is newer than {newest}, the newest that soap-net was tested with")
    return lines


def versions() -> dict[str, str | None]:
    """What a run depends on: program versions, the machine, and in a checkout the git commit."""
    try:
        own = importlib.metadata.version("soap-net")
    except importlib.metadata.PackageNotFoundError:
        own = None
    cuda = torch.cuda.is_available()
    return {
        "soap_net": own,
        "git": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def processor() -> str:
    """The CPU's model."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if it was edited; None outside of one."""
    package = Path(__file__).parent
    git = ["git", "-C", str(package)]
    try:
        # A package installed into an environment inside some other repository is not tracked there.
        subprocess.run([*git, "ls-files", "--error-unmatch", "train.py"], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
