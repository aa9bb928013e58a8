"""The Triton backend without a GPU: interpreted in a process of its own, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import static_gpu
from soap_kernels import backends
from soap_kernels.backends import Options
from soap_kernels.equations import PARTS
from soap_kernels.modules import SOAP

HERE = Path(__file__).parent


KINDS = {
    "fp32": (torch.float32, torch.float32, "default"),
    "bf16": (torch.bfloat16, torch.bfloat16, "default"),
    "fast": (torch.float32, torch.float32, "fast"),
    "strict": (torch.float32, torch.float32, "strict"),
    "uint8": (torch.uint8, torch.bfloat16, "default"),
    "uint8-fp32": (torch.uint8, torch.float32, "default"),
}


def interpret(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", str(HERE / "test_triton_interpreted.py"), "-q", "-m", marker]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout.splitlines()[-1]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreted")
def test_kernels_equal_the_equations_in_the_interpreter() -> None:
    interpret("not slow")


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreted")
def test_general_shapes_and_precisions_in_the_interpreter() -> None:
    interpret("slow")


def test_absence_on_the_cpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = backends.get("triton").why_absent(torch.device("cpu"))
    assert why is not None
    assert "GPU" in why


def launches(kind: str, needs_x: bool = False, architecture: int = 90) -> list[static_gpu.Launch]:
    from soap_kernels.triton import BACKEND

    dtype, out, precision = KINDS[kind]
    mean, std = ((0.45,) * 3, (0.22,) * 3) if dtype == torch.uint8 else (None, None)
    weights = [w.detach().to("meta") for w in SOAP().weights().flatten()]
    x = torch.empty(6, 8, 3, 224, 224, dtype=dtype, device="meta")
    options = Options(PARTS, (1, 2, 3), precision, mean, std, out, False)
    with static_gpu.recorded(architecture) as found:
        y, prepared = BACKEND.soap_forward(x, weights, options)
        BACKEND.soap_backward(y, x, prepared, weights, options, needs_x and dtype != torch.uint8, True)
    return list(found)


def test_forward_takes_two_launches_and_backward_four() -> None:
    names = [launch.name for launch in launches("fp32")]
    assert names == ["prepare", "fuse", "sweep", "weigh", "reduce", "finish"]


def test_forward_leaves_little_for_backward() -> None:
    from soap_kernels.triton import BACKEND

    for kind, (dtype, out, precision) in KINDS.items():
        norm = (0.4,) * 3 if dtype == torch.uint8 else None
        x = torch.empty(6, 8, 3, 224, 224, dtype=dtype, device="meta")
        options = Options(PARTS, (1, 2, 3), precision, norm, norm, out, False)
        assert 4 * BACKEND.prepared_numel(x, options) < 0.02 * x.numel() * x.element_size(), kind


def test_bytes_moved() -> None:
    """Each address once per program, in units of x's bytes: what docs/gpu.md states."""
    moved = {launch.name: static_gpu.triton_bytes(launch) for launch in launches("fp32")}
    x = 6 * 24 * 224 * 224 * 4
    assert (moved["prepare"] + moved["fuse"]) / x < 4.3
    assert (moved["sweep"] + moved["weigh"]) / x < 9.1


def check_compiled(kinds: list[str], architecture: int) -> None:
    for kind in kinds:
        for launch in launches(kind, kind in ("fp32", "bf16"), architecture):
            if kind != kinds[0] and launch.name in ("prepare", "reduce", "finish"):
                continue
            facts = static_gpu.compile_launch(launch, architecture)
            assert facts.spilled == 0, (kind, facts)
            assert facts.shared <= 99 * 1024, (kind, facts)
            if launch.name in ("fuse", "sweep", "weigh", "fuse_dx"):
                products = facts.count("HMMA", "HGMMA", "UTCHMMA")
                assert (products == 0) == (kind == "strict"), (kind, facts)
            if launch.name == "fuse":
                assert 128 in facts.widths("STG"), (kind, facts)
                assert {"uint8": 64, "uint8-fp32": 64}.get(kind, 128) in facts.widths("LDG"), (kind, facts)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
def test_kernels_compile_for_hopper_without_a_spill() -> None:
    check_compiled(["bf16"], 90)


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [(80, ["fp32", "fast", "uint8-fp32"]), (90, ["fp32", "strict"]), (100, ["fp32", "bf16"]), (120, ["fp32", "uint8"])],
)
def test_kernels_compile_without_a_spill(architecture: int, kinds: list[str]) -> None:
    """A share of the kinds on each architecture; compiling takes seconds a kernel."""
    check_compiled(kinds, architecture)
