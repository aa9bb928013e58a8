"""The sdist, wheels and installs of the working tree in fresh environments, which see the running one's PyTorch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(torch.__file__).resolve().parents[1]  # of the running environment
ODD = "My Projects/ß 動画 $1 it's"
CXX = shutil.which("g++") or shutil.which("c++")
SHIPPED = ("csrc/", "soap_kernels/", "soap_net/", "setup.py", "pyproject.toml", "LICENSE", "README.md")
# Unoptimised, in a quarter of the time: these tests are about what is found and where it goes. test_wheel.py optimises.
QUICK = {"SOAP_KERNELS_CXXFLAGS": "-O0", "SOAP_KERNELS_CUDA": "0"}

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

FIRST_USE = """
import torch, soap_kernels
print(soap_kernels.__file__)
soap = soap_kernels.SOAP(frames=4)
for _ in range(2):
    soap(torch.zeros(1, 4, 3, 8, 8))
    soap.double()(torch.zeros(1, 4, 3, 8, 8, dtype=torch.float64))
    soap.float()
"""


def run(
    command: Sequence[str | Path] | str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that sees neither this process's PYTHONPATH nor its choices of a build; a string goes to the shell."""
    ours = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("SOAP_KERNELS_")}
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=ours | QUICK | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(
    command: Sequence[str | Path] | str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = run(command, folder, environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def tracked() -> list[str]:
    """The working tree's files, without what git ignores."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout of the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [name for name in names.split("\0") if name and (ROOT / name).exists()]


def copy_of_checkout(folder: Path) -> Path:
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def environment_at(folder: Path) -> Path:
    """A fresh environment's Python. PyTorch and pip are the running environment's, seen at a path below ``folder``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (folder / "packages").symlink_to(PACKAGES)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "running.pth").write_bytes(os.fsencode(folder / "packages"))
    return folder / "venv/bin/python"


def install(python: Path, source: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "pip", "install", "--no-deps", *options, source]
    return run(command, python.parent, {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | environment)


def check_kernels(python: Path, package: Path, environment: Mapping[str, str] | None = None) -> None:
    """The package that is found is the one at ``package``, and its C++ kernels agree with the oracle."""
    found = succeed(
        [python, "-c", "import soap_kernels; print(soap_kernels.__file__)"], python.parent, environment
    ).stdout
    assert Path(found.strip()).is_relative_to(package)
    checked = succeed([python, "-m", "soap_kernels.selfcheck"], python.parent, environment).stdout
    assert re.search(r"^cpp +cpu +float32 .* ok$", checked, re.M), checked


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path asks for quotes, with the checkout and a compiler in it."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    copy_of_checkout(folder / "checkout")
    script(folder / "bin/g++", f"exec {CXX}")
    return folder


def script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{command} "$@"\n')
    path.chmod(0o755)


def first_on_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


@pytest.fixture(scope="module")
def sdist(odd: Path) -> Path:
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    succeed([sys.executable, "-c", code], odd / "checkout")
    (path,) = odd.glob("*.tar.gz")
    return path


def test_the_sdist_holds_all_that_git_has_of_the_packages_and_of_their_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [name for name in tracked() if name.startswith(SHIPPED)]
    assert any(name.startswith("csrc/") for name in wanted)
    assert [name for name in wanted if name not in held] == []


@needs_compiler
def test_the_sdist_installs_with_build_isolation(sdist: Path, tmp_path: Path) -> None:
    """What pip puts into its isolated environment are wheels that only point to the running environment's packages."""
    links = tmp_path / "links"
    links.mkdir()
    for name in ("setuptools", "torch", "ninja", "pybind11"):
        installed = importlib.metadata.distribution(name)
        version = installed.version
        folder = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(links / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}_link.pth", f"{PACKAGES}\n")
            wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{folder}/entry_points.txt", installed.read_text("entry_points.txt") or "")
            wheel.writestr(f"{folder}/RECORD", "")
    python = environment_at(tmp_path)
    path = first_on_path(Path(sys.executable).parent)  # ninja's program
    done = install(python, sdist, PIP_FIND_LINKS=str(links), SOAP_KERNELS_CPU="1", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_kernels(python, tmp_path / "venv")


@needs_compiler
def test_an_editable_checkout_serves_from_and_into_paths_that_ask_for_quotes(odd: Path) -> None:
    python = environment_at(odd / "editable")
    options = ["--no-build-isolation", "--editable"]
    done = install(python, odd / "checkout", *options, SOAP_KERNELS_CPU="1", PATH=first_on_path(odd / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    check_kernels(python, odd / "checkout")


@needs_compiler
def test_without_a_compiler_the_kernels_are_left_out_and_what_is_said_then_brings_them(odd: Path) -> None:
    """From and into paths that ask for quotes, too."""
    python = environment_at(odd / "none")
    script(odd / "no compiler/ninja", shutil.which("ninja", path=first_on_path(Path(sys.executable).parent)) or "")
    done = install(python, odd / "checkout", "--no-build-isolation", "--verbose", PATH=str(odd / "no compiler"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "soap_kernels._cpp is left out: no C++ compiler was found" in done.stdout + done.stderr

    used = succeed([python, "-c", FIRST_USE], python.parent)
    assert Path(used.stdout.strip()).is_relative_to(python.parents[1])
    assert used.stderr.count("the C++ kernels are left out, SOAP runs on the slower PyTorch reference") == 1
    info = succeed([python, "-m", "soap_net", "info"], python.parent)
    assert "left out" not in info.stderr
    (said,) = re.findall(r"^ +cpp +absent: (.*)$", info.stdout, re.M)
    assert said in used.stderr
    assert re.search(r"^ +auto +takes reference$", info.stdout, re.M)

    commands = re.findall("`(.+?)`", said)
    assert len(commands) == 2
    script(python.parent / "pip", "exec python -m pip")
    for command in commands:
        succeed(command, odd / "checkout", {"PATH": first_on_path(python.parent, odd / "bin"), "PIP_NO_INDEX": "1"})
    check_kernels(python, python.parents[1])


@needs_compiler
@pytest.mark.parametrize("name", ["fold.cpp", "simd.h"])
def test_with_a_compiler_a_source_file_that_is_missing_fails_the_build(tmp_path: Path, name: str) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    (checkout / "csrc/cpu" / name).unlink()
    done = install(environment_at(tmp_path), checkout, "--no-build-isolation")
    assert done.returncode != 0
    assert f"soap_kernels._cpp cannot be built: {checkout / 'csrc/cpu' / name} is missing" in done.stdout + done.stderr


def test_elsewhere_than_on_linux_the_kernels_are_left_out_in_one_line(tmp_path: Path) -> None:
    imports = "import runpy, sys, setuptools.command.build_ext"  # which look at the platform
    code = f"{imports}; sys.platform = 'win32'; runpy.run_path('setup.py', None, '__main__')"
    earlier = tmp_path / f"lib/soap_kernels/_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = succeed([sys.executable, "-c", code, "build_ext", "--build-lib", "lib"], copy_of_checkout(tmp_path))
    assert not earlier.exists()
    assert "soap_kernels._cpp is left out: the kernels are built on Linux only" in done.stderr


@needs_compiler
def test_make_wheel_gives_one_that_any_torch_loads(tmp_path: Path) -> None:
    """`make wheel` in a copy of the checkout. SOAP_KERNELS_OTHER_PYTHON: the same Python with another torch."""
    if importlib.util.find_spec("auditwheel") is None or importlib.util.find_spec("build") is None:
        pytest.skip("build and auditwheel are not here (pip install '.[publish]')")
    checkout = copy_of_checkout(tmp_path / "a checkout")
    (checkout / ".venv").symlink_to(sys.prefix)
    made = succeed(["make", "wheel", "--old-file=.venv/.installed"], checkout, {"SOAP_KERNELS_CXXFLAGS": ""})
    assert re.search(r"^cpp +cpu +float32 .* ok$", made.stdout, re.M), made.stdout
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", wheel.name)
    held = zipfile.ZipFile(wheel).namelist()
    assert [name for name in tracked() if name.startswith(("soap_kernels/", "soap_net/")) and name not in held] == []

    installed = checkout / "build/wheel/installed"
    (library,) = (installed / "soap_kernels").glob("_cpp*.so")
    undefined = succeed(["nm", "-D", "--undefined-only", library], checkout).stdout
    assert "torch_get_num_threads" in undefined
    assert re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w*", undefined) == []  # PyTorch's C++, which changes with releases
    if other := os.environ.get("SOAP_KERNELS_OTHER_PYTHON"):
        check_kernels(Path(other), installed, {"PYTHONPATH": str(installed)})


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built with CUDA")
def test_the_cuda_distribution_brings_one_file_beside_those_of_soap_net(odd: Path) -> None:
    """By compilers that compile nothing, as this is about files: test_cuda_build.py compiles and loads it."""
    python, checkout, tools = environment_at(odd / "cuda"), odd / "checkout", odd / "cuda/tools"
    touch = 'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done #'
    script(tools / "g++", touch)
    script(tools / "bin/nvcc", f'if [ "$1" = --version ]; then echo "release {torch.version.cuda},"; fi; {touch}')
    assert install(python, checkout, "--no-build-isolation", SOAP_KERNELS_CPU="0").returncode == 0
    package = Path(succeed([python, "-c", "import soap_kernels; print(soap_kernels.__path__[0])"], odd).stdout.strip())
    before = {path.name for path in package.iterdir()}

    path = first_on_path(tools, Path(sys.executable).parent)
    cuda = {"PATH": path, "CUDA_HOME": str(tools), "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = install(python, checkout / "csrc/cuda", "--no-build-isolation", **cuda)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in package.iterdir()} - before == {"_cuda.abi3.so"}
    code = "import soap_kernels.backends.cuda as c; print(c._load())"
    assert succeed([python, "-c", code], odd).stdout.startswith("the CUDA library does not load (")
    succeed([python, "-m", "pip", "uninstall", "--yes", "soap-kernels-cuda"], odd)
    assert {path.name for path in package.iterdir()} == before

    without = install(python, checkout / "csrc/cuda", "--no-build-isolation", **cuda | {"CUDA_HOME": str(odd)})
    assert "soap_kernels._cuda cannot be built: nvcc was not found" in without.stdout + without.stderr


def test_both_distributions_bear_one_version() -> None:
    versions = re.compile(r'^version = "(.+)"$', re.M)
    root, cuda = ((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8") for folder in (".", "csrc/cuda"))
    assert versions.findall(root) == versions.findall(cuda)
    assert f'"soap-net=={versions.findall(root)[0]}"' in cuda
