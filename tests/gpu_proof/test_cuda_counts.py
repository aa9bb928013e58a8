"""What the CUDA kernels read, write and multiply, counted where the shim runs them on the CPU.

Bytes are those of frames and gradient that a block touches, each address once a block, so with the halo. The folded
weights (10 to 28 KB, which every block reads from the cache) and partial sums do not grow with the pixels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import shim_build as shim
import static_gpu
from cuda_cases import Case, options, soap_tensors
from run_cases import use
from soap_kernels.backends import Needs, cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu_proof,
    pytest.mark.skipif(shim.cuda_include() is None, reason="needs the headers of the CUDA toolkit"),
]
X, Y, GRAD = range(3)
PROCESSORS = 4  # of the device that the shim shows to launchers
TIMES = {"bfloat16": 1, "float32": 3}  # products of a multiplication
TAPS = 9
ROW_MMAS = 16  # of a tap and a row of 32 pixels: 32 rows x 24 columns of the folded convolution, 16 x 8 x 16 an mma


@dataclass
class Counted:
    """Of one launch, by what was watched."""

    products: int
    read: list[int]
    written: list[int]
    stored: list[int]


def counts(case: Case, library: ctypes.CDLL) -> tuple[dict[str, Counted], tuple[Tensor, Tensor]]:
    """A forward and a backward to all weights, by kernel; x and y."""
    x, weights, grad = soap_tensors(case, torch.device("cpu"))
    found: dict[str, Counted] = {}

    def run(watched: dict[int, Tensor], work: Any) -> Any:
        for slot in (X, Y, GRAD):
            tensor = watched.get(slot, torch.empty(0))
            library.count_watch(slot, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
        result = work()
        numbers, i = (ctypes.c_int64 * 10)(), 0
        while name := library.count_of(i, numbers):
            kernel = name.decode().strip("()").split("<")[0]
            found[kernel] = Counted(numbers[0], list(numbers[1:4]), list(numbers[4:7]), list(numbers[7:10]))
            i += 1
        return result

    # The backend makes y, here of memory that can be watched.
    y = torch.empty(x.shape, dtype=case.out)
    if case.channels_last:
        y = torch.empty(x.movedim(2, -1).shape, dtype=case.out).movedim(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "empty_frames", lambda *_: y)
        _, prepared = run({X: x, Y: y}, lambda: cuda.BACKEND.soap_forward(x, weights, options(case)))
    run(
        {X: x, GRAD: grad},
        lambda: cuda.BACKEND.soap_backward(grad, x, prepared, weights, options(case), Needs(False, True)),
    )
    return found, (x, y)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = shim.build(shim.ROOT / "build" / "cuda_shim", shim.FEW, counting=True)
    use(path)
    found = ctypes.CDLL(str(path))
    found.count_of.restype = ctypes.c_char_p
    return found


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_SHIM_PROCESSORS", str(PROCESSORS))


CASES = [
    Case("bf16", (2, 8, 3, 24, 64), dtype="bfloat16"),
    Case("fp32", (1, 8, 3, 17, 72)),
    Case("fp32 odd", (1, 8, 3, 11, 37)),
    Case("channels last", (1, 8, 3, 10, 40), channels_last=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_value_is_written_once_and_the_plan_says_what_is_read(case: Case, library: ctypes.CDLL) -> None:
    found, (x, y) = counts(case, library)
    prepare, fuse, sweep = (found[f"{stage}_kernel"] for stage in ("prepare", "fuse", "sweep"))
    assert prepare.read[X] == x.nbytes  # each plane once
    assert fuse.written[Y] == fuse.stored[Y] == y.nbytes
    assert sweep.read[GRAD] == x.numel() * y.element_size()
    planes = case.shape[1] * case.shape[2] * x.element_size()
    touched = static_gpu.cuda_touched(case.shape[0], (case.shape[3], case.shape[4]), PROCESSORS)
    assert (fuse.read[X], sweep.read[X]) == tuple(planes * pixels for pixels in touched)
    # Nobody else reads frames or the gradient, and nobody writes them.
    assert [k for k, c in found.items() if c.read[X]] == ["prepare_kernel", "fuse_kernel", "sweep_kernel"]
    assert [k for k, c in found.items() if c.read[GRAD]] == ["sweep_kernel"]
    assert not any(c.stored[X] or c.stored[GRAD] or c.read[Y] for c in found.values())


@pytest.mark.parametrize("dtype", TIMES)
def test_products_follow_from_the_sizes(dtype: str, library: ctypes.CDLL) -> None:
    """What lies outside the image is not computed: the last row of tiles has one row of pixels."""
    found, _ = counts(Case("ragged", (1, 8, 3, 9, 32), dtype=dtype), library)
    assert found["fuse_kernel"].products == 9 * TAPS * ROW_MMAS * TIMES[dtype]


@pytest.mark.parametrize("architecture", static_gpu.PROCESSORS)
def test_bytes_of_large_clips_by_the_plan(architecture: int) -> None:
    """Forward at most 1.15 of two reads of x and a write of y, backward 1.2 of a read of x and one of the gradient."""
    pixels = 6 * 224 * 224
    fuse, sweep = static_gpu.cuda_touched(6, (224, 224), static_gpu.PROCESSORS[architecture])
    assert (2 * pixels + fuse) / (3 * pixels) <= 1.15
    assert (sweep + pixels) / (2 * pixels) <= 1.2
