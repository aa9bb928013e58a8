"""How the CUDA library is built, and which PyTorch loads it: one with CUDA, never one without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from test_cuda_static import NVCC

ROOT = Path(__file__).resolve().parents[2]
MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
OPS = ("cuda_soap", "cuda_soap_backward", "cuda_fuse_priors", "cuda_fuse_priors_backward", "cuda_window_sums")

# The package works on the CPU; then what of the CUDA library has come into the process.
SERVE = """
import sys, torch
if sys.argv[1] == "hide": torch.version.cuda = None
from soap_kernels import backends, selfcheck
from soap_kernels.op import window_sums
assert window_sums(torch.ones(1, 2, 4, 4), "auto").max() == 16
if sys.argv[1] == "check": assert all(check.passed for check in selfcheck.checks("cpu", ["reference"]))
print(backends.get("cuda").why_absent(torch.device("cuda")))
print(backends.status("cpu")["cuda"])
print("soap_kernels/_cuda." in open("/proc/self/maps").read())
"""
LOAD = f"""
import sys, torch
from soap_kernels.backends import cuda
assert cuda._load() is None, cuda._load()
assert "soap_kernels/_cuda." in open("/proc/self/maps").read()
for op in {OPS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"soap_kernels::{{op}}", "CUDA"), op
print(torch.ops.soap_kernels.cuda_launches())
"""


def package(folder: Path, library: Path | None) -> Path:
    """The package as installed, with a library or with a file in its place that no loader would take."""
    shutil.copytree(
        ROOT / "soap_kernels", folder / "soap_kernels", ignore=shutil.ignore_patterns("_cuda*", "__pycache__")
    )
    if library is None:
        (folder / "soap_kernels" / MODULE).write_text("not a library")
    else:
        shutil.copy(library, folder / "soap_kernels" / MODULE)
    return folder


def run(python: str, folder: Path, code: str, *arguments: str) -> list[str]:
    done = subprocess.run([python, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by setup.py for one architecture."""
    if NVCC is None:
        pytest.skip("needs nvcc, of the CUDA toolkit")
    if torch.version.cuda is None:
        pytest.skip("needs a PyTorch that is built with CUDA")
    folder = tmp_path_factory.mktemp("build")
    environment = os.environ | {"SOAP_KERNELS_CPU": "0", "SOAP_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return folder / "soap_kernels" / MODULE


@pytest.mark.slow
@pytest.mark.gpu_proof
def test_a_torch_with_cuda_loads_the_library_without_a_device(library: Path, tmp_path: Path) -> None:
    assert run(sys.executable, package(tmp_path, library), LOAD) == ["0"]


@pytest.mark.slow
@pytest.mark.gpu_proof
def test_a_torch_without_cuda_leaves_the_library_alone(library: Path, tmp_path: Path) -> None:
    """SOAP_KERNELS_CPU_TORCH names an interpreter of the same version with a PyTorch without CUDA."""
    other = os.environ.get("SOAP_KERNELS_CPU_TORCH")
    if not other:
        pytest.skip("SOAP_KERNELS_CPU_TORCH names no interpreter whose PyTorch has no CUDA")
    why, on_cpu, loaded = run(other, package(tmp_path, library), SERVE, "check")
    assert why == "this PyTorch is built without CUDA"
    assert "NVIDIA GPU" in on_cpu
    assert loaded == "False"


def test_a_library_that_cannot_be_loaded_is_not_touched_without_cuda(tmp_path: Path) -> None:
    why, on_cpu, loaded = run(sys.executable, package(tmp_path, None), SERVE, "hide")
    assert why == "this PyTorch is built without CUDA"
    assert "NVIDIA GPU" in on_cpu
    assert loaded == "False"


def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    folder = package(tmp_path, None)
    (said,) = run(sys.executable, folder, "from soap_kernels.backends import cuda; print(cuda._load())")
    assert said.startswith("the CUDA library does not load (")
