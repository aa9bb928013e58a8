"""Builds csrc/cuda with g++ and the shim into a library whose ops serve CPU tensors."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda"
SHIM = Path(__file__).resolve().parent / "cuda_shim.h"
COUNTING = SHIM.with_name("counting.cpp")
KERNELS: tuple[str, ...] = runpy.run_path(str(ROOT / "setup.py"))["CUDA_KERNELS"]


def cuda_include() -> Path | None:
    """Where cuda_runtime.h and cuda_bf16.h are: a toolkit's, or the one that comes with PyTorch's own CUDA."""
    site = Path(sysconfig.get_path("purelib"))
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [*(Path(r) / "include" for r in roots if r), *sorted(site.glob("nvidia/*/include"))]
    return next((f for f in folders if (f / "cuda_runtime.h").exists() and (f / "cuda_bf16.h").exists()), None)


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [
        f"-isystem{include}",
        f"-isystem{include / 'torch/csrc/api/include'}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]


# Leaves out most instances of the tensor core kernels (csrc/cuda/tile.cuh): quick to compile.
FEW = ("-DSOAP_FEW",)


def _included(name: str, sources: Mapping[str, str]) -> dict[str, str]:
    """The text of a source and of all that it includes, by name."""
    found: dict[str, str] = {}
    to_read = [name]
    while to_read:
        this = to_read.pop()
        if this in sources and this not in found:
            found[this] = sources[this]
            to_read += [Path(line).name for line in re.findall(r'^#include "(.+)"', sources[this], re.MULTILINE)]
    return dict(sorted(found.items()))


def _plants(sources: Mapping[str, str], plant: str) -> bool:
    return any(f"planted<{plant}>" in text for text in sources.values())


def build(folder: Path, flags: tuple[str, ...] = (), plant: str | None = None, counting: bool = False) -> Path:
    """The library, built once a set of sources and flags; an object that no change reaches is not compiled again.

    Args:
        folder: where products go.
        flags: for g++: ``FEW``, ``-fsanitize=address``.
        plant: a mistake of ``csrc/cuda/device.cuh`` to compile in, to see that the tests notice it.
        counting: with counting.cpp, which counts what kernels access.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler's messages are in ``stderr``.
    """
    include = cuda_include()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert include is not None
    assert compiler is not None
    sources = {p.name: p.read_text() for p in sorted(SOURCE.iterdir()) if p.suffix in (".cu", ".cuh", ".h", ".cpp")}
    assert plant is None or _plants(sources, plant), f"nothing in csrc/cuda is planted<{plant}>"
    own_sources = [SHIM.read_text(), COUNTING.read_text() if counting else ""]

    def key_of(texts: Mapping[str, str], flags: Sequence[str]) -> str:
        return hashlib.sha256(repr((texts, own_sources, flags, torch.__version__)).encode()).hexdigest()[:16]

    key = key_of(sources, [*flags, str(plant)])
    library = folder / f"libsoap_shim_{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=folder))  # another process may be building the same
    for name, text in sources.items():
        (work / name).write_text(text)
    common = [
        compiler,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-w",
        "-DSOAP_CUDA_SHIM",
        f"-isystem{include}",
        f"-I{work}",
        *flags,
    ]

    def compile_one(name: str) -> Path:
        source = work / ("ops.cpp" if name == "ops" else "counting.cpp" if name == "counting" else f"{name}.cu")
        own = _torch_flags() if name == "ops" else ["-x", "c++", "-include", str(SHIM)]
        included = _included(source.name, sources)
        if plant and _plants(included, plant):
            own.append(f"-DSOAP_PLANT={plant}")
        if name == "counting":
            source = COUNTING
        elif counting and name != "ops":
            own.append("-fsanitize=thread")  # a call before each access, which counting.cpp takes
        product = folder / f"{name}-{key_of(included, [*flags, *own])}.o"
        if product.exists():
            return product
        part = work / f"{name}.o"
        command = [*common, *own, "-c", str(source), "-o", str(part)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        part.replace(product)
        return product

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        products = list(pool.map(compile_one, ["ops", *KERNELS, *(["counting"] if counting else [])]))
    torch_lib = Path(torch.__file__).parent / "lib"
    part = work / "library.so"
    subprocess.run(
        [compiler, "-shared", *flags, *map(str, products), f"-L{torch_lib}", "-ltorch_cpu", "-o", str(part)],
        check=True,
        capture_output=True,
        text=True,
    )
    part.replace(library)
    shutil.rmtree(work)
    return library
