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
from soap_kernels.weights import PARTS

HERE = Path(__file__).parent


KINDS = {
    "fp32": (torch.float32, torch.float32, "default"),
    "bf16": (torch.bfloat16, torch.bfloat16, "default"),
    "fp16-fp32": (torch.float16, torch.float32, "default"),
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


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, and it starts the interpreter itself"
)
def test_kernels_equal_the_equations_in_the_interpreter() -> None:
    interpret("not slow")


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, and it starts the interpreter itself"
)
def test_general_shapes_and_precisions_in_the_interpreter() -> None:
    interpret("slow")


def test_absence_on_the_cpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = backends.get("triton").why_absent(torch.device("cpu"))
    assert why is not None
    assert "GPU" in why


def launches(kind: str, needs_x: bool = False, architecture: int = 90) -> list[static_gpu.Launch]:
    return static_gpu.soap_launches(*KINDS[kind], needs_x, architecture)


def test_forward_takes_two_launches_and_backward_four() -> None:
    names = [launch.name for launch in launches("fp32")]
    assert names == ["prepare", "fuse", "sweep", "weigh", "reduce", "finish"]


def test_kernels_compiled_with_an_older_layout_are_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache on disk knows a kernel's text and its constants' key, not what their properties compute."""
    from soap_kernels.backends.triton.plan import Layout

    layout = Layout(8, 3, 4, False)
    before = layout.cache_key
    assert layout.cache_key == before != Layout(8, 3, 1, False).cache_key
    monkeypatch.setattr(Layout, "padded_frames", property(lambda self: 16))
    assert layout.cache_key != before


def test_forward_leaves_little_for_backward() -> None:
    from soap_kernels.backends.triton import BACKEND

    for kind, (dtype, out, precision) in KINDS.items():
        norm = (0.4,) * 3 if dtype == torch.uint8 else None
        x = torch.empty(6, 8, 3, 224, 224, dtype=dtype, device="meta")
        options = Options(PARTS, (1, 2, 3), precision, norm, norm, out, False)
        assert 4 * BACKEND.prepared_numel(x, options) < 0.02 * x.numel() * x.element_size(), kind


@pytest.mark.parametrize("architecture", static_gpu.ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_moved_backward(kind: str, architecture: int) -> None:
    """At most three times what the CUDA kernels may: 1.2 x (1 read of x + 1 of the gradient), and partial sums."""
    found = {launch.name: launch for launch in launches(kind, architecture=architecture)}
    x, grad = (found["sweep"].arguments[name].data for name in ("x", "grad"))
    once = x.numel() * x.element_size() + grad.numel() * grad.element_size()
    moved = [static_gpu.triton_bytes(found[name]) for name in ("sweep", "weigh", "reduce", "finish")]
    assert sum(m.pixels for m in moved) <= 3 * 1.2 * once
    # Partial sums are written and read: 29 KB a program of weigh, and a clip's gate from each tile of sweep.
    tiles = found["sweep"].arguments["total_tiles"]
    assert sum(m.partial for m in moved) <= 2 * (2 * static_gpu.PROCESSORS[architecture] * 29_000 + tiles * 128)


@pytest.mark.parametrize(("kind", "most"), [("fp32", 4.25), ("bf16", 5.25)])
def test_bytes_moved_forward(kind: str, most: float) -> None:
    """In units of x, whose bytes are y's too."""
    found = {launch.name: launch for launch in launches(kind)}
    x = found["fuse"].arguments["x"].data
    moved = [static_gpu.triton_bytes(found[name]).pixels for name in ("prepare", "fuse")]
    assert sum(moved) <= most * x.numel() * x.element_size()


def test_bytes_are_counted_once_a_program() -> None:
    """The count by intervals, against each program's own set of addresses."""
    for launch in launches("fp32"):
        if launch.name not in ("sweep", "weigh"):
            continue
        a = launch.arguments
        x, block = a["x"].data, a["block"]
        around = block.halo if launch.name == "sweep" else 0
        total, step, pixels = a["total_tiles"], block.step, 0
        for p in range(launch.grid[0]):
            seen = torch.zeros(2 * total // a["tiles"], 224, 224, dtype=torch.bool)
            for tile in range(p * total // launch.grid[0], (p + 1) * total // launch.grid[0]):
                clip, within = divmod(tile, a["tiles"])
                column, row = divmod(within, a["down"])
                h, w = row * block.height, column * step
                seen[clip, max(h - 1, 0) : h + block.height + 1, max(w - around, 0) : w + step + around] = True
            pixels += int(seen.sum())
        counted = static_gpu.triton_bytes(launch).pixels
        if launch.name == "sweep":
            others = sum(a[name].data.numel() * a[name].data.element_size() for name in ("grad", "dz_out"))
        else:
            others = int(32 * 4 * static_gpu.tiling(launch, 0, 1, beside=1).walked(launch.grid[0]))
        assert 0 <= counted - others - pixels * 24 * x.element_size() < 0.003 * counted, launch.name


def check_compiled(kinds: list[str], architecture: int) -> None:
    for kind in kinds:
        for launch in launches(kind, kind in ("fp32", "bf16", "fp16-fp32"), architecture):
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


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, with which no kernel is compiled"
)
def test_kernels_compile_for_hopper_without_a_spill() -> None:
    check_compiled(["bf16"], 90)


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, with which no kernel is compiled"
)
@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        (80, ["fp32", "fast", "uint8-fp32"]),
        (90, ["fp32", "strict", "fp16-fp32"]),
        (100, ["fp32", "bf16"]),
        (120, ["fp32", "uint8"]),
    ],
)
def test_kernels_compile_without_a_spill(architecture: int, kinds: list[str]) -> None:
    """A share of the kinds on each architecture; compiling takes seconds a kernel."""
    check_compiled(kinds, architecture)


@pytest.mark.slow
@pytest.mark.gpu_proof
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, with which no kernel is compiled"
)
@pytest.mark.parametrize(("architecture", "kind"), [(80, "fp32"), (90, "bf16"), (100, "fp32"), (120, "bf16")])
def test_kernels_of_twice_the_rows_compile_without_a_spill(architecture: int, kind: str) -> None:
    for launch in static_gpu.soap_launches(*KINDS[kind], needs_x=True, architecture=architecture, frames=16):
        if launch.name in ("fuse", "sweep", "weigh", "fuse_dx"):
            facts = static_gpu.compile_launch(launch, architecture)
            assert facts.spilled == 0, facts
            assert facts.shared <= 99 * 1024, facts
