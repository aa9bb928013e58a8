# ruff: noqa: E501
"""What the compiled kernels execute and move, found by running their sm_80 machine code with the launchers' own arguments.

Instructions are all that a warp issues, the predicated ones too; loop trips and branches are those of the launch. Bytes
are those of frames and gradient that a block touches, each address once a block, so with the halo; the folded weights
(10 to 28 KB, which every block reads from the cache) and partial sums, which do not grow with the pixels, apart.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import build as shim
import sass
from cuda_cases import Case, options, soap_tensors
from launches import Launch, recorded
from run_cases import use
from soap_kernels.backends import cuda
from static_gpu import PROCESSORS
from test_cuda_static import NVCC, cuobjdump

TOOL = cuobjdump()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu_proof,
    pytest.mark.skipif(NVCC is None or TOOL is None, reason="nvcc or cuobjdump is not installed"),
    pytest.mark.skipif(shim.cuda_include() is None, reason="the CUDA headers are not installed"),
]
CPU = torch.device("cpu")
A100 = PROCESSORS[80]
# The two kernels that a call with 3 channels runs on, as explicit instantiations: the whole files take a minute longer.
INSTANCES = """#include "fuse.cuh"
#include "sweep.cuh"
namespace soap::cuda {
template void launch_fuse<bf16, BF16X1, 3>(const FuseParams&, void*);
template void launch_fuse<float, BF16X3, 3>(const FuseParams&, void*);
template void launch_sweep<bf16, BF16X1, 3>(const SweepParams&, void*);
template void launch_sweep<float, BF16X3, 3>(const SweepParams&, void*);
}
"""
CLIPS = {
    "bfloat16": Case("bf16", (6, 8, 3, 224, 224), dtype="bfloat16"),
    "float32": Case("fp32", (6, 8, 3, 224, 224)),
}


@dataclass
class Call:
    """The launches of a forward and a backward to all weights."""

    launches: list[Launch]
    x: Tensor
    y: Tensor
    grad: Tensor

    def launch(self, kernel: str) -> Launch:
        (found,) = [launch for launch in self.launches if launch.is_of(kernel)]
        return found


def call(case: Case, processors: int = A100) -> Call:
    x, weights, grad = soap_tensors(case, CPU)
    with recorded(processors) as launches:
        y, prepared = cuda.BACKEND.soap_forward(x, weights, options(case))
        cuda.BACKEND.soap_backward(grad, x, prepared, weights, options(case), False, True)
    return Call(launches, x, y, grad)


@dataclass
class Compiled:
    cubins: dict[str, Path]  # by stage
    code: dict[str, list[sass.Instruction]]

    def machine(self, launch: Launch, stage: str) -> sass.Machine:
        (symbol,) = [s for s in self.code if launch.symbol in s]
        bank = sass.constant_bank(self.cubins[stage], symbol, 2)
        return sass.Machine(self.code[symbol], launch.arguments, launch.grid, launch.block, bank)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    use(shim.build(shim.ROOT / "build" / "cuda_shim", shim.FEW))
    folder = tmp_path_factory.mktemp("cubin")
    (folder / "instances.cu").write_text(INSTANCES)
    cubins: dict[str, Path] = {}
    code: dict[str, list[sass.Instruction]] = {}
    sources = {stage: shim.SOURCE / f"{stage}.cu" for stage in ("prepare", "finish")}
    for stage, source in {"main": folder / "instances.cu", **sources}.items():
        cubins[stage] = folder / f"{stage}.cubin"
        command = [
            str(NVCC),
            "-std=c++17",
            "-O3",
            "-arch=sm_80",
            f"-I{shim.SOURCE}",
            "-cubin",
            "-o",
            str(cubins[stage]),
            str(source),
        ]
        subprocess.run(command, check=True, capture_output=True)
        code |= sass.disassemble(str(TOOL), cubins[stage])
    return Compiled(cubins, code)


def touched(run: sass.Run, tensor: Tensor, write: bool) -> set[int]:
    """Elements of a tensor's memory that a block's warps read or write, each once."""
    size = tensor.element_size()
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * size
    found: set[int] = set()
    for access in run.accesses:
        if access.write == write:
            for at in access.lanes:
                if first <= at < last:
                    assert (at - first) % size == 0
                    assert at + access.width <= last, "an access past the end"
                    found.update(range((at - first) // size, (at - first + access.width) // size))
    return found


def tiles_of(part: int, parts: int, tiles: int) -> int:
    return tiles * (part + 1) // parts - tiles * part // parts


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 40), ("float32", 55)])
def test_instructions_a_pixel_of_the_forward(dtype: str, most: float, compiled: Compiled) -> None:
    launch = call(CLIPS[dtype]).launch("fuse_kernel")
    tile = 3 * 7 + 3  # of 28 x 7 of a clip: no side of it is the image's
    run = compiled.machine(launch, "main").run_block((tile, 0, 0))
    pixel = run.total / (8 * 32)
    print(f"fuse {dtype}: {pixel:.1f} warp instructions a pixel")
    assert pixel <= most


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 65), ("float32", 90)])
def test_instructions_a_pixel_of_the_backward(dtype: str, most: float, compiled: Compiled) -> None:
    launch = call(CLIPS[dtype]).launch("sweep_kernel")
    tiles, parts = 7 * 38, launch.grid[0] // 6
    part = 8  # its tiles lie in the second column of 7, within the image
    assert tiles * part // parts >= 38
    assert tiles * (part + 1) // parts < 2 * 38
    run = compiled.machine(launch, "main").run_block((part, 0, 0))
    pixel = run.total / (tiles_of(part, parts, tiles) * 6 * 32)
    print(f"sweep {dtype}: {pixel:.1f} warp instructions a pixel")
    assert pixel <= most


def test_the_counts_of_what_is_known_beforehand(compiled: Compiled) -> None:
    """MMAs follow from the sizes, whatever the compiler makes of the rest: 16 a tap and 32 pixels, three times for fp32."""
    for dtype, times in (("bfloat16", 1), ("float32", 3)):
        launch = call(CLIPS[dtype]).launch("fuse_kernel")
        machine = compiled.machine(launch, "main")
        run = machine.run_block((3 * 7 + 3, 0, 0))
        mmas = sum(n for at, n in run.by_address.items() if machine.code[at].name.startswith("HMMA"))
        assert mmas == 8 * 9 * 16 * times
    # What lies outside the image is not computed: the last row of tiles has one row of pixels.
    launch = call(Case("ragged", (1, 8, 3, 9, 32), dtype="bfloat16")).launch("fuse_kernel")
    machine = compiled.machine(launch, "main")
    run = machine.run_block((1, 0, 0))
    assert sum(n for at, n in run.by_address.items() if machine.code[at].name.startswith("HMMA")) == 9 * 16


def test_no_warp_of_finish_is_long(compiled: Compiled) -> None:
    """finish does little and waits much: its time is that of its longest chain of instructions."""
    launch = call(CLIPS["float32"]).launch("finish_kernel")
    machine = compiled.machine(launch, "finish")
    longest = 0
    for block in range(launch.blocks):
        for first in range(0, machine.threads, sass.LANES):
            run = sass.Run()
            sass.Warp(machine, (block, 0, 0), first, run).run(100_000)
            longest = max(longest, run.total)
    print(f"finish: {longest} instructions in the longest of {launch.blocks} blocks' warps")
    assert longest <= 2000


@pytest.mark.parametrize("case", [
    Case("bf16", (2, 8, 3, 24, 64), dtype="bfloat16"), Case("fp32", (1, 8, 3, 17, 72)),
    Case("fp32 odd", (1, 8, 3, 11, 37)), Case("channels last", (1, 8, 3, 10, 40), channels_last=True),
], ids=lambda c: c.name)  # fmt: skip
def test_every_value_is_written_once_and_all_are_read(case: Case, compiled: Compiled) -> None:
    made = call(case)
    launch = made.launch("fuse_kernel")
    machine = compiled.machine(launch, "main")
    seen: set[int] = set()
    written = 0
    for block in range(launch.blocks):
        run = machine.run_block((block, 0, 0))
        mine = touched(run, made.y, write=True)
        written += len(mine)
        seen |= touched(run, made.x, write=False)
        assert not touched(run, made.y, write=False)
        assert not touched(run, made.x, write=True)
        # Nothing but x, y and `prepared`, which is the only other operand, is touched.
        stores = sum(a.width * len(a.lanes) for a in run.accesses if a.write)
        assert stores == len(mine) * made.y.element_size(), "a value is written twice"
    assert written == made.y.numel()
    assert len(seen) == made.x.numel()


@pytest.mark.parametrize("dtype", CLIPS)
def test_bytes_of_the_forward(dtype: str, compiled: Compiled) -> None:
    """Of a block without an edge of the image, which touches most a pixel."""
    made = call(CLIPS[dtype])
    run = compiled.machine(made.launch("fuse_kernel"), "main").run_block((3 * 7 + 3, 0, 0))
    pixels = 8 * 32 * 24
    fused = len(touched(run, made.x, write=False)) + len(touched(run, made.y, write=True))
    prepare = made.launch("prepare_kernel")
    machine = compiled.machine(prepare, "prepare")
    first = prepare.blocks - 6 * 24 * 8  # before it the folds
    read = [touched(machine.run_block((first + k, 0, 0)), made.x, write=False) for k in range(8)]
    assert sum(map(len, read)) == len(set.union(*read)) == 224 * 224, "8 blocks read a plane once"
    ratio = (1 + fused / pixels) / 3
    print(f"forward {dtype}: {ratio:.3f} of two reads of x and a write of y")
    assert ratio <= 1.15


@pytest.mark.parametrize("architecture", PROCESSORS)
def test_bytes_of_the_backward(architecture: int, compiled: Compiled) -> None:
    """Of the blocks of a clip, as the launcher divides it among each architecture's multiprocessors."""
    made = call(CLIPS["bfloat16"], PROCESSORS[architecture])
    launch = made.launch("sweep_kernel")
    machine = compiled.machine(launch, "main")
    tiles, parts = 7 * 38, launch.grid[0] // 6
    clip = 24 * 224 * 224
    partial = 4 * 2 * (9 * 32 * 24 + 32 + 24) * parts  # written here, read by reduce: fp32
    # The whole clip on the A100; elsewhere a block within a column and one that goes over into the next.
    chosen = range(parts) if architecture == 80 else [0, next(p for p in range(parts) if tiles * (p + 1) // parts > 38)]
    moved = pixels = 0
    for part in chosen:
        run = machine.run_block((part, 0, 0))
        moved += len(touched(run, made.x, write=False)) + len(touched(run, made.grad, write=False))
        tile = range(tiles * part // parts, tiles * (part + 1) // parts)
        pixels += sum(24 * 32 * min(6, 224 - t % 38 * 6) for t in tile)
        assert sum(a.width * len(a.lanes) for a in run.accesses if a.write) <= partial / 2 / parts
    if architecture == 80:
        assert pixels == clip
    ratio = moved / pixels / 2
    print(
        f"backward sm_{architecture}: {ratio:.3f} of a read of x and one of the gradient, and {partial / 2**20:.2f} MiB of partial sums a clip"
    )
    assert ratio <= 1.2
    # reduce and finish read no frames.
    for later in ("reduce_kernel", "finish_kernel"):
        arguments = made.launch(later).arguments
        assert made.grad.data_ptr().to_bytes(8, "little") not in arguments
