"""Builds csrc/cuda with g++ and the shim into a library whose ops serve CPU tensors."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda"
SHIM = Path(__file__).resolve().parent / "cuda_shim.h"
KERNELS = ("prepare", "fuse", "sweep", "reduce", "finish", "exact", "wide", "window_sums")


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


Replacement = tuple[str, str, str]  # file, text, other text
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


def build(folder: Path, flags: tuple[str, ...] = (), replace: tuple[Replacement, ...] = ()) -> Path:
    """The library, built once a set of sources and flags; an object that no change reaches is not compiled again.

    Args:
        folder: where products go.
        flags: for g++: ``FEW``, ``-fsanitize=address``.
        replace: changes of the sources: a mutation, to see that the tests notice it.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler's messages are in ``stderr``.
    """
    include = cuda_include()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert include is not None
    assert compiler is not None
    sources = {p.name: p.read_text() for p in sorted(SOURCE.iterdir()) if p.suffix in (".cu", ".cuh", ".h", ".cpp")}
    for name, text, other in replace:
        assert text in sources[name], f"{name} holds no {text!r}"
        sources[name] = sources[name].replace(text, other)
    shim = SHIM.read_text()

    def key_of(texts: Mapping[str, str]) -> str:
        return hashlib.sha256(repr((texts, shim, flags, torch.__version__)).encode()).hexdigest()[:16]

    key = key_of(sources)
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
        source = "ops.cpp" if name == "ops" else f"{name}.cu"
        product = folder / f"{name}-{key_of(_included(source, sources))}.o"
        if product.exists():
            return product
        own = _torch_flags() if name == "ops" else ["-x", "c++", "-include", str(SHIM)]
        part = work / f"{name}.o"
        command = [*common, *own, "-c", str(work / source), "-o", str(part)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        part.replace(product)
        return product

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        products = list(
            pool.map(compile_one, ("ops", "sweep", "fuse", *(k for k in KERNELS if k not in ("sweep", "fuse"))))
        )
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
