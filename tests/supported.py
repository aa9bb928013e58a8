"""Runs the tests on the oldest and newest versions that the project promises, each in an environment of its own.

    python tests/supported.py lowest           # the oldest Python on this machine, every dependency at its lower bound
    python tests/supported.py newest           # the newest Python, the newest of everything
    python tests/supported.py pythons          # every Python from 3.10 on: the oldest as lowest, the others as newest
    python tests/supported.py lowest --whole   # the whole quick suite instead of the slice
    python tests/supported.py lowest --only-install
    python tests/supported.py lowest --only-test   # in the environment as it is

Pythons are looked for on PATH and among pyenv's; those that the machine lacks are named and left out. Environments
(``.venv-3.10-lowest`` and so on, 6 GB each) are kept and brought up to date when run again. Needs no package itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = range(10, 15)  # the Pythons that PyTorch 2.10 or a later one comes for
# What every version has to do: decode, train, resume, evaluate, compile, classify, read settings and weights.
SLICE = [
    "tests/soap_kernels/test_op.py",
    "tests/soap_kernels/test_selfcheck.py",
    "tests/soap_net/data/test_clips.py",
    "tests/soap_net/data/test_loading.py",
    "tests/soap_net/models/test_backbones.py",
    "tests/soap_net/test_checkpoint.py",
    "tests/soap_net/test_classify.py",
    "tests/soap_net/test_config.py",
    "tests/soap_net/test_evaluate.py",
    "tests/soap_net/test_train.py",
]


def find_pythons() -> dict[int, str]:
    """The interpreters of this machine by minor version, each tried, as pyenv's shims exist without one behind them."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for minor in MINORS:
        candidates = [shutil.which(f"python3.{minor}"), shutil.which("python3")]
        candidates += sorted(map(str, pyenv.glob(f"3.{minor}.*/bin/python3")), reverse=True)
        code = f"import sys, venv; sys.exit(sys.version_info[:2] != (3, {minor}))"
        for python in filter(None, candidates):
            if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
                found[minor] = python
                break
    return found


def lower_bounds() -> list[str]:
    """``name==version`` for every lower bound of pyproject.toml's dependencies and extras, but those of the tools."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    project = text[text.index("[project]") : text.index("[project.scripts]")]
    bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)[^"]*"', project)
    return [f"{name}=={version}" for name, version in bounds]


def install(python: str, folder: Path, lowest: bool) -> Path:
    """Fills the environment ``folder`` and returns its Python."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    chosen = [] if lowest else ["--upgrade", "--upgrade-strategy", "eager"]
    if lowest:
        constraints = folder / "lowest.txt"
        constraints.write_text("\n".join(lower_bounds()) + "\n", encoding="utf-8")
        chosen = ["--constraint", str(constraints)]
    build_tools = ["setuptools>=77", "packaging>=24.2", "wheel", "ninja", "pybind11>=2.13"]
    subprocess.run([*pip, *chosen, *build_tools, "torch", "torchvision"], check=True)
    subprocess.run([*pip, *chosen, "--no-build-isolation", "--editable", f"{ROOT}[test]"], check=True)
    return inside


def test(inside: Path, whole: bool) -> int:
    """Runs the quick suite or the slice; returns pytest's exit code."""
    subprocess.run([str(inside), "-m", "soap_net", "info"], check=True)
    command = [str(inside), "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
    command += ["-m", "not slow", "-q", *([] if whole else SLICE)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["lowest", "newest", "pythons"])
    parser.add_argument("--whole", action="store_true", help="the whole quick suite")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--only-install", action="store_true", help="make the environments and run nothing")
    half.add_argument("--only-test", action="store_true", help="take the environments as they are")
    options = parser.parse_args()
    pythons = find_pythons()
    if not pythons:
        parser.error(f"no Python from 3.{MINORS[0]} to 3.{MINORS[-1]} was found")
    for minor in MINORS:
        if minor not in pythons:
            print(f"==> Python 3.{minor}: not on this machine, left out", flush=True)
    oldest, newest = min(pythons), max(pythons)
    minors = {"lowest": [oldest], "newest": [newest], "pythons": sorted(pythons)}[options.which]
    failed = []
    for minor in minors:
        lowest = minor == oldest and options.which != "newest"
        name = f"3.{minor}-{'lowest' if lowest else 'newest'}"
        print(f"==> Python {name}: {pythons[minor]}", flush=True)
        folder = ROOT / f".venv-{name}"
        inside = folder / "bin" / "python" if options.only_test else install(pythons[minor], folder, lowest)
        if not options.only_install and test(inside, options.whole):
            failed.append(name)
    if failed:
        print(f"==> failed on Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
