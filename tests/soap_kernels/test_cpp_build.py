"""How the CPU library is built: clean, separable by instruction set, sound under sanitizers, and in other torches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ISA_FLAGS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]


def compile_object(source: str, output: Path, *flags: str) -> Path:
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-fPIC", "-ffp-contract=fast", *WARNINGS, *flags]
    subprocess.run([*command, "-c", str(ROOT / "csrc/cpu" / source), "-o", str(output)], check=True)
    return output


def compile_stages(folder: Path, flags: list[str]) -> list[str]:
    objects = []
    for isa, name in enumerate(ISA_FLAGS):
        for stage in ("prepare", "fuse", "sweep"):
            out = folder / f"{stage}.{name}.o"
            objects.append(compile_object(f"{stage}.cpp", out, f"-DSOAP_ISA={isa}", *ISA_FLAGS[name], *flags))
    for source in ("fold", "reduce", "backend"):
        objects.append(compile_object(f"{source}.cpp", folder / f"{source}.o", *flags))
    return [str(o) for o in objects]


@pytest.mark.slow
@needs_compiler
def test_no_function_of_an_instruction_set_can_replace_one_of_another(tmp_path: Path) -> None:
    """Nothing in an AVX file may have vague linkage: the linker keeps one copy of such a function for all."""
    if shutil.which("nm") is None:
        pytest.skip("needs the program nm (binutils)")
    for stage in ("prepare", "fuse", "sweep"):
        out = compile_object(f"{stage}.cpp", tmp_path / f"{stage}.o", "-O1", "-DSOAP_ISA=1", *ISA_FLAGS["avx2"])
        symbols = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True).stdout
        assert re.findall(r" [VvWw] ", symbols) == []
        exported = re.findall(r" [TDBR] (.*)", symbols)
        assert exported
        assert all(name.startswith("soap::cpu::avx2::") for name in exported)


@pytest.mark.slow
@needs_compiler
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path: Path) -> None:
    """tests/cpp/sanitized.cpp: all stages, all instruction sets, odd shapes, views that end where their memory does."""
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = compile_stages(tmp_path, flags)
    program = tmp_path / "sanitized"
    assert COMPILER is not None
    source = ROOT / "tests/cpp/sanitized.cpp"
    command = [COMPILER, "-std=c++17", *WARNINGS, *flags, f"-I{ROOT / 'csrc'}", str(source), *objects, "-pthread"]
    subprocess.run([*command, "-o", str(program)], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout


@pytest.mark.slow
def test_a_build_under_one_torch_serves_another(tmp_path: Path) -> None:
    """SOAP_KERNELS_OTHER_PYTHON names an interpreter of the same version with another torch."""
    other = os.environ.get("SOAP_KERNELS_OTHER_PYTHON")
    if not other:
        pytest.skip("SOAP_KERNELS_OTHER_PYTHON names no interpreter with another torch")
    code = (
        "import torch, soap_kernels.backends.cpp as c; from soap_kernels import selfcheck;"
        "i = c.build_info(); print(i['torch_built_with'], torch.__version__);"
        "assert all(k.passed for k in selfcheck.checks('cpu', ['cpp']))"
    )
    done = subprocess.run([other, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built, used = done.stdout.split()[-2:]
    assert built != used


@pytest.mark.slow
def test_without_a_compiler_the_build_says_what_is_lost_and_goes_on(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {
        "PATH": str(tmp_path),
        "SOAP_KERNELS_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "soap_kernels._cpp is left out: " in done.stderr
    assert "on the slower PyTorch reference" in done.stderr
    refused = subprocess.run(
        command, cwd=ROOT, env=environment | {"SOAP_KERNELS_CPU": "1"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "soap_kernels._cpp cannot be built: " in refused.stderr
