"""The shim's `mma` and `ldmatrix` against Triton's compiler, whose lane layouts our kernels had no part in.

Kernels and shim read the layouts from the same manual and would share an error. Triton's layouts feed its own kernels.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shim_build as shim

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    shim.cuda_include() is None or COMPILER is None, reason="the CUDA headers or g++ are not installed"
)
Places = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def triton_says() -> dict[str, Any]:
    command = [sys.executable, str(HERE / "mma_layouts.py")]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.fixture(scope="module")
def places(triton_says: dict[str, Any]) -> Places:
    """``[lane, element, (row, column)]`` of each operand."""
    return {name: np.array(found) for name, found in triton_says["places"].items()}


@pytest.fixture(scope="module")
def warp(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("fragments") / "fragments.so"
    folder = shim.SHIM.parent
    command = [str(COMPILER), "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-isystem{shim.cuda_include()}"]
    subprocess.run([*command, str(folder / "fragments.cpp"), "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def pointer(a: NDArray[np.generic]) -> ctypes.c_void_p:
    assert a.flags.c_contiguous
    return ctypes.c_void_p(a.ctypes.data)


def as_bits(matrix: NDArray[np.float32], half: bool) -> NDArray[np.uint16]:
    """Whole numbers that bf16 and fp16 hold exactly."""
    if half:
        return matrix.astype(np.float16).view(np.uint16)
    bits = matrix.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def fragment(matrix: NDArray[np.generic], places: NDArray[np.int64]) -> NDArray[np.generic]:
    return np.ascontiguousarray(matrix[places[..., 0], places[..., 1]])


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize("k", [16, 8])
def test_mma_reads_and_writes_what_triton_says(k: int, half: bool, places: Places, warp: ctypes.CDLL) -> None:
    """Fragments laid out by Triton, multiplied by the shim, are the matrices' product."""
    random = np.random.default_rng(0)
    for _ in range(4):
        a, b, c = (random.integers(-9, 10, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
        registers = [fragment(as_bits(m, half), places[f"{n}{k}"]).view(np.uint32) for n, m in (("A", a), ("B", b))]
        assert [r.shape for r in registers] == [(32, k // 4), (32, k // 8)]
        found = fragment(c, places["C"])
        warp.shim_mma(pointer(found), *map(pointer, registers), k, int(half))
        assert np.array_equal(found, fragment(a @ b + c, places["C"]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix_gives_what_mma_takes(count: int, transposed: bool, places: Places, warp: ctypes.CDLL) -> None:
    """Of each 8x8 matrix a lane gets its pair of A's upper left quarter; transposed, its pair of B's upper half."""
    tiles = np.random.default_rng(0).permutation(np.arange(count * 64, dtype=np.uint16)).reshape(count, 8, 8)
    # 16-byte rows, as ldmatrix wants them.
    room = np.zeros(tiles.size + 8, np.uint16)
    start = -room.ctypes.data % 16 // 2
    aligned = room[start : start + tiles.size]
    aligned[:] = tiles.ravel()
    found = np.zeros((32, count), np.uint32)
    warp.shim_ldmatrix(pointer(found), ctypes.c_void_p(aligned.ctypes.data), count, int(transposed))
    pairs = places["B16" if transposed else "A16"][:, :2]
    for m in range(count):
        assert np.array_equal(found[:, m], fragment(tiles[m], pairs).view(np.uint32)[:, 0])


def test_triton_feeds_mma_from_ldmatrix_without_a_shuffle(triton_says: dict[str, Any]) -> None:
    """So `ldmatrix` delivers the layout of an operand: A from rows along k, B transposed from rows along n."""
    ptx = triton_says["ptx"].replace("\n", " ")
    loads = {
        register: bool(transposed)
        for transposed, found in re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x\d(\.trans)?\.shared\.b16 {([^}]*)}", ptx)
        for register in re.findall(r"%\w+", found)
    }
    products = re.findall(r"mma\.sync\.aligned\.m16n8k16\.\S+\s+{[^}]*},\s*{([^}]*)},\s*{([^}]*)}", ptx)
    assert products
    for a, b in products:
        assert [loads[r] for r in re.findall(r"%\w+", a)] == [False] * 4
        assert [loads[r] for r in re.findall(r"%\w+", b)] == [True] * 2
