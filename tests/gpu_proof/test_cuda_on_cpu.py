"""The CUDA C++ kernels without a GPU: the same sources, run on the CPU by the shim, against the float64 oracle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shim_build as shim
from cuda_cases import (
    FUSIONS,
    SOAPS,
    WIDE_FUSIONS,
    WIDES,
    Case,
    FusionCase,
    check_fusion,
    check_soap,
    check_window_sums,
    options,
    soap_tensors,
)
from published import check_in_single_precision
from run_cases import use
from soap_kernels import SOAP, backends
from soap_kernels.backends import Needs, cuda
from soap_kernels.compat import TriplePrior

FOLDER = shim.ROOT / "build" / "cuda_shim"
RUNNER = Path(shim.__file__).with_name("run_cases.py")
CPU = torch.device("cpu")
# What the quick build serves: see shim_build.FEW.
QUICK_SOAPS = [
    c
    for c in SOAPS
    if c.dtype in ("float32", "bfloat16") and c.shape[2] > 1 and c.precision != "fast" and c.shape[1] <= 8
]
QUICK_FUSIONS = [c for c in FUSIONS if c.dtype != "float16" and c.shape[1] <= 8]
QUICK = [c.name for c in (*QUICK_SOAPS, *QUICK_FUSIONS, *WIDES, *WIDE_FUSIONS)]

pytestmark = pytest.mark.skipif(shim.cuda_include() is None, reason="needs the headers of the CUDA toolkit")


@pytest.fixture(autouse=True)
def fresh_tensors_hold_nan() -> Iterator[None]:
    """What a kernel reads and nobody has written then shows, instead of once in many runs."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def backend() -> backends.Backend:
    use(shim.build(FOLDER, shim.FEW))
    return cuda.BACKEND


@pytest.mark.parametrize("case", QUICK_SOAPS, ids=lambda c: c.name)
def test_soap_agrees_with_the_oracle(case: Case, backend: backends.Backend) -> None:
    check_soap(case, backend, CPU)


@pytest.mark.parametrize("case", QUICK_FUSIONS, ids=lambda c: c.name)
def test_fuse_priors_agrees_with_the_oracle(case: FusionCase, backend: backends.Backend) -> None:
    check_fusion(case, backend, CPU)


def test_window_sums_agree_with_the_oracle(backend: backends.Backend) -> None:
    check_window_sums(backend, CPU)


def test_two_runs_give_the_same_bits(backend: backends.Backend) -> None:
    case = SOAPS[0]
    x, weights, grad = soap_tensors(case, CPU)
    runs = []
    for _ in range(2):
        y, prepared = backend.soap_forward(x, weights, options(case))
        runs.append([y, *backend.soap_backward(grad, x, prepared, weights, options(case), Needs(False, True))[1]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_library_says_how_large_things_are_while_compiling_for_any_batch(
    backend: backends.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "choose", lambda name, x, *dtypes: backend)
    module = SOAP(backend="cuda")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 8, 3, 9, 33)
        eager = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        ours = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(ours, eager)


def test_the_authors_module_equals_the_published_equations(
    backend: backends.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "choose", lambda name, x, *dtypes: backend)
    before = torch.ops.soap_kernels.cuda_launches()
    check_in_single_precision(TriplePrior(backend="cuda"), torch.randn(2 * 8, 3, 9, 33))
    assert torch.ops.soap_kernels.cuda_launches() > before


@pytest.mark.parametrize("case", WIDES, ids=lambda c: c.name)
def test_soap_on_feature_maps_agrees_with_the_oracle(case: Case, backend: backends.Backend) -> None:
    assert backend.prepared_numel(soap_tensors(case, CPU)[0], options(case)) == 0
    check_soap(case, backend, CPU)


@pytest.mark.parametrize("case", WIDE_FUSIONS, ids=lambda c: c.name)
def test_fuse_priors_on_feature_maps_agrees_with_the_oracle(case: FusionCase, backend: backends.Backend) -> None:
    before = torch.ops.soap_kernels.cuda_launches()
    check_fusion(case, backend, CPU)
    assert torch.ops.soap_kernels.cuda_launches() - before == 2


def test_absence_says_why() -> None:
    assert "NVIDIA GPU" in str(backends.get("cuda").why_absent(CPU))
    if not torch.cuda.is_available():
        assert backends.get("cuda").why_absent(torch.device("cuda")) is not None


def run_cases(library: Path, *names: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), str(library), *names]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_every_case_in_every_thread_order(order: str) -> None:
    done = run_cases(shim.build(FOLDER), CUDA_SHIM_ORDER=order)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.gpu_proof
def test_no_access_is_out_of_bounds() -> None:
    flags = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")
    library = shim.build(FOLDER, (*shim.FEW, *flags))
    # The C++ library with it: the sanitizer looks its throw up when it starts, and Python brings none.
    preload = " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    options = "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0"
    done = run_cases(library, *QUICK, LD_PRELOAD=preload, ASAN_OPTIONS=options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def planted_mistakes() -> list[str]:
    (names,) = re.findall(r"enum Plant { NO_PLANT, (.*) };", (shim.SOURCE / "device.cuh").read_text())
    return str(names).split(", ")


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.parametrize("plant", planted_mistakes())
def test_a_planted_mistake_is_noticed(plant: str) -> None:
    """By one of the cases, in one thread order at least."""
    library = shim.build(FOLDER, shim.FEW, plant)
    orders = ("forward", "reverse", "random")
    assert any(run_cases(library, *QUICK, CUDA_SHIM_ORDER=o).returncode for o in orders)
