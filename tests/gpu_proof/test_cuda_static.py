"""What nvcc makes of csrc/cuda for each architecture: no warning, no spill, tensor cores, 128-bit accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shim_build as shim

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = (80, 90, 100, 120)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu_proof,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, of the CUDA toolkit"),
]


def cuobjdump() -> str | None:
    """From a toolkit, or the one that comes with Triton."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def compile_kernel(name: str, architecture: int, folder: Path) -> tuple[Path, str]:
    product = folder / f"{name}.{architecture}.cubin"
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Werror", "-Xptxas=-v"]
    command += ["-cubin", "-o", str(product), str(shim.SOURCE / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return product, done.stderr


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = pool.map(lambda name: compile_kernel(name, request.param, folder), shim.KERNELS)
        return dict(zip(shim.KERNELS, done, strict=True))


def sass(cubin: Path) -> dict[str, list[str]]:
    """Instructions by kernel."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found.group(1)
            kernels[name] = []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            kernels[name].append(found.group(1))
    return kernels


def test_no_kernel_spills(compiled: dict[str, tuple[Path, str]]) -> None:
    for name, (_, report) in compiled.items():
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills, name
        assert all(s == ("0", "0") for s in spills), f"{name}: {spills}"


def test_convolutions_are_on_tensor_cores_and_accesses_128_bits_wide(compiled: dict[str, tuple[Path, str]]) -> None:
    for stage in ("fuse", "sweep"):
        for name, instructions in sass(compiled[stage][0]).items():
            text = "\n".join(instructions)
            assert "HMMA" in text, name
            assert "LDSM" in text, name
            if "ELi3EEE" in name:  # 3 channels
                assert re.search(r"LDG\.E\.128", text), name
                assert re.search(r"STG\.E\.128", text) or stage == "sweep", name
            assert "ATOM" not in text, name
            assert "RED." not in text, name


def test_feature_maps_are_accessed_128_bits_at_a_time(compiled: dict[str, tuple[Path, str]]) -> None:
    for kernel in ("join_kernelILi8", "join_backward_kernelILi8"):
        (name,) = [n for n in sass(compiled["wide"][0]) if kernel in n]
        text = "\n".join(sass(compiled["wide"][0])[name])
        assert re.search(r"LDG\.E\.128", text)
        assert re.search(r"STG\.E\.128", text)


def test_strict_uses_no_tensor_core(compiled: dict[str, tuple[Path, str]]) -> None:
    for instructions in sass(compiled["exact"][0]).values():
        text = "\n".join(instructions)
        assert "HMMA" not in text
        assert "FFMA" in text


@pytest.mark.parametrize("stage", ["fuse", "sweep"])
def test_the_loop_over_taps_is_tight(stage: str, compiled: dict[str, tuple[Path, str]]) -> None:
    """16 (bf16) or 48 (fp32) MMAs a tap and row of 32 pixels, and little beside them: 9 / 32 of the loop a pixel.

    NOPs apart, of which nvcc 13.0 puts one behind every MMA on sm_120.
    """
    for name, instructions in sass(compiled[stage][0]).items():
        for kernel, most in (("nv_bfloat16Li0ELi3", 56), ("kernelIfLi1ELi3", 120)):
            if kernel not in name:
                continue
            # An instruction is 16 bytes.
            jumps = [(i, re.search(r"BRA.*?0x([0-9a-f]+)", text)) for i, text in enumerate(instructions)]
            loops = [(int(m.group(1), 16) // 16, i) for i, m in jumps if m and int(m.group(1), 16) // 16 <= i]
            bodies = ["\n".join(i for i in instructions[a : b + 1] if i.strip() != "NOP") for a, b in loops]
            sizes = [body.count("\n") + 1 for body in bodies if "HMMA" in body and "LDG" in body]
            assert sizes, name
            assert min(sizes) <= most, f"{name}: {min(sizes)} instructions a tap"
