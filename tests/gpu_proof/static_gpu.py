"""Facts about compiled GPU kernels, found without a GPU: registers, spills, shared memory, instructions, occupancy."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from soap_kernels.backends import Needs, Options
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS

ARCHITECTURES = (80, 90, 100, 120)
# Per multiprocessor: registers, threads, shared memory in bytes (CUDA programming guide, compute capabilities).
PROCESSOR = {
    80: (65536, 2048, 164 * 1024),
    90: (65536, 2048, 228 * 1024),
    100: (65536, 2048, 228 * 1024),
    120: (65536, 1536, 100 * 1024),
}
PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}  # of an A100, an H100, a B200 and an RTX 5090
# Of csrc/cuda: rows and columns of a tile, and how many blocks of sweep a multiprocessor gets.
CUDA_FUSE_TILE, CUDA_SWEEP_TILE, CUDA_SWEEP_BLOCKS = (8, 32), (6, 32), 2
# 128-bit, 64-bit, ... in a SASS mnemonic; without one the access is 32 bits wide.
_WIDTH = re.compile(r"\.(?:U|S)?(128|64|16|8)\b")


@dataclass(frozen=True)
class Launch:
    """One launch as the backend would make it."""

    kernel: Any
    grid: tuple[int, ...]
    positional: tuple[Any, ...]
    options: dict[str, Any]  # constants by name, num_warps, ...

    @property
    def name(self) -> str:
        """The stage."""
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def arguments(self) -> dict[str, Any]:
        """Every parameter's value."""
        names = list(self.kernel.arg_names)
        found = {**dict(zip(names, self.positional, strict=False)), **self.options}
        assert set(names) <= set(found), set(names) - set(found)
        return found


@dataclass(frozen=True)
class Facts:
    name: str
    architecture: int
    threads: int
    registers: int
    spilled: int  # bytes of a thread's stack and local memory, and instructions that access them: 0 without a spill
    shared: int
    instructions: Counter[str] = field(repr=False)
    depths: Counter[int] = field(repr=False)  # how many instructions lie in how many loops, one in another

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that a multiprocessor holds."""
        registers, threads, shared = PROCESSOR[self.architecture]
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = registers // per_warp * 32 // self.threads
        by_shared = shared // (self.shared + 1024)
        return min(by_registers, by_shared, threads // self.threads) * self.threads / threads

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    def executed(self, *trips: float) -> float:
        """Instructions that a warp executes when the loops make so many trips, the outermost's first."""
        return sum(n * math.prod(trips[:depth]) for depth, n in self.depths.items())

    def widths(self, *prefixes: str) -> set[int]:
        """Widths in bits of the accesses whose mnemonics start so."""
        found = set()
        for name in self.instructions:
            if name.startswith(prefixes):
                width = _WIDTH.search(name)
                found.add(int(width[1]) if width else 32)
        return found


class _Device:
    """Stands in for a GPU that is not here: Triton's launcher asks it what to compile for."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def recorded(architecture: int = 90) -> Iterator[list[Launch]]:
    """Records what the Triton backend would launch on an architecture instead of launching it; feed it meta tensors."""
    from soap_kernels.backends.triton import plan

    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append(Launch(kernel, grid, args, options))

    before = plan.launch, plan.processors
    plan.launch, plan.processors = record, lambda x: (PROCESSORS[architecture], architecture)
    try:
        yield found
    finally:
        plan.launch, plan.processors = before


def soap_launches(
    dtype: torch.dtype,
    out: torch.dtype | None = None,
    precision: str = "default",
    needs_x: bool = False,
    architecture: int = 90,
    frames: int = 8,
) -> list[Launch]:
    """What the Triton backend launches for 6 clips of frames x 3 x 224 x 224, forward and backward to all weights."""
    from soap_kernels.backends.triton import BACKEND

    mean, std = ((0.45,) * 3, (0.22,) * 3) if dtype == torch.uint8 else (None, None)
    weights = [w.detach().to("meta") for w in SOAP(frames).weights().flatten()]
    x = torch.empty(6, frames, 3, 224, 224, dtype=dtype, device="meta")
    options = Options(PARTS, (1, 2, 3), precision, mean, std, out or dtype, False)
    with recorded(architecture) as found:
        y, prepared = BACKEND.soap_forward(x, weights, options)
        BACKEND.soap_backward(y, x, prepared, weights, options, Needs(needs_x and dtype != torch.uint8, True))
    return list(found)


def compile_launch(launch: Launch, architecture: int) -> Facts:
    """By Triton's own launcher, which stops before it would need the device."""
    import triton

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Device(architecture))
    try:
        options = {"enable_fp_fusion": True, **launch.options}
        compiled = launch.kernel.warmup(*launch.positional, grid=launch.grid, **options)
    finally:
        driver.set_active(before)
    threads = 32 * launch.options.get("num_warps", 4)
    return facts_of_cubin(launch.name, compiled.asm["cubin"], architecture, threads, compiled.metadata.shared)


@cache
def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def facts_of_cubin(name: str, cubin: bytes, architecture: int, threads: int, shared: int) -> Facts:
    """Of what Triton itself assembled, by the disassembler in its wheel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "k.cubin")
        binary.write_bytes(cubin)
        usage, sass = (
            subprocess.run([*command, str(binary)], capture_output=True, text=True, check=True).stdout
            for command in ([tool("cuobjdump"), "-res-usage"], [tool("nvdisasm"), "-c"])
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert resources is not None, usage
    registers, *memory = map(int, resources.groups())
    instructions, depths = _instructions(sass)
    assert instructions["EXIT"], "the disassembly is not understood"
    local = sum(n for mnemonic, n in instructions.items() if mnemonic.startswith(("LDL", "STL")))
    return Facts(name, architecture, threads, registers, sum(memory) + local, shared, instructions, depths)


def _instructions(sass: str) -> tuple[Counter[str], Counter[int]]:
    """All instructions by mnemonic, and how many lie in no loop, in one, in one within another."""
    listed: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}  # of a loop, by its first instruction
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(listed)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            listed.append(found[1])
            to = re.search(r"(\.L_x_\d+)", found[2]) if found[1].startswith("BRA") else None
            if to and labels.get(to[1], len(listed)) < len(listed) - 1:
                ends[labels[to[1]]] = len(listed)
    depths = Counter(sum(first <= i < last for first, last in ends.items()) for i in range(len(listed)))
    return Counter(listed), depths


@dataclass(frozen=True)
class Moved:
    """Bytes that a launch's programs touch, each address once per program."""

    pixels: int  # of what grows with the pixels: frames, gradient, dz; halo rows and columns count in each program
    partial: int  # of partial sums, which grow with the programs


@dataclass(frozen=True)
class Tiling:
    """How tiles of ``height`` x ``width`` pixels cover clips of one size, and how much around them they read."""

    clips: int
    image: tuple[int, int]
    height: int
    width: int
    rows: int = 0  # read above and below
    columns: int = 0  # read left and right
    beside: int = 0  # columns beside the image that can be read

    @property
    def down(self) -> int:
        return -(-self.image[0] // self.height)

    @property
    def tiles(self) -> int:
        return self.down * -(-self.image[1] // self.width)

    def _high(self, first: int, last: int) -> int:
        """Rows that tiles first .. last - 1 of a column touch."""
        return min(last * self.height + self.rows, self.image[0]) - max(first * self.height - self.rows, 0)

    def _across(self, column: int) -> int:
        left, right = column * self.width - self.columns, (column + 1) * self.width + self.columns
        return min(right, self.image[1] + self.beside) - max(left, -self.beside)

    def touched(self) -> int:
        """Pixels of a plane that programs touch which take a tile each."""
        columns = range(self.tiles // self.down)
        return self.clips * sum(self._high(t, t + 1) for t in range(self.down)) * sum(map(self._across, columns))

    def walked(self, programs: int) -> int:
        """The same of programs that share all clips' tiles and walk a run of them each, downwards."""
        total, touched = self.clips * self.tiles, 0
        for p in range(programs):
            tile, last = p * total // programs, (p + 1) * total // programs
            while tile < last:
                end = min(last, (tile // self.down + 1) * self.down)
                row, column = tile % self.down, tile % self.tiles // self.down
                touched += self._high(row, row + end - tile) * self._across(column)
                tile = end
        return touched


def cuda_touched(clips: int, image: tuple[int, int], processors: int) -> tuple[int, int]:
    """Pixels of a plane that the CUDA backend's fuse and sweep touch of x: csrc/cuda/sweep.cu, ``plan_sweep``."""
    fuse = Tiling(clips, image, *CUDA_FUSE_TILE, rows=1, columns=1)
    sweep = Tiling(1, image, *CUDA_SWEEP_TILE, rows=1, columns=1)
    wanted = -(-CUDA_SWEEP_BLOCKS * processors // clips)
    each = -(-sweep.tiles // wanted)
    return fuse.touched(), clips * sweep.walked(-(-sweep.tiles // each))


def tiling(launch: Launch, rows: int, columns: int, beside: int = 0) -> Tiling:
    """Of a launch of the Triton backend on frames."""
    a = launch.arguments
    frames = a["dx" if launch.name == "fuse_dx" else "x"].data
    image = (frames.shape[3], frames.shape[4])
    return Tiling(frames.shape[0], image, a["block"].height, a["block"].step, rows, columns, beside)


def triton_bytes(launch: Launch) -> Moved:
    """Weights, whose bytes are few and do not grow, are left out."""
    a = launch.arguments

    def size(name: str, numel: int | None = None) -> int:
        tensor = a[name] if isinstance(a[name], torch.Tensor) else a[name].data
        return int(tensor.element_size() * (tensor.numel() if numel is None else numel))

    if launch.name == "finish":
        return Moved(0, 0)
    layout = a["layout"]
    planes = layout.frames * layout.channels
    sums = 4 * 9 * layout.rows * (planes + (layout.one >= 0))  # bytes of a program of weigh
    if launch.name == "reduce":
        given = [n for n in ("partial_bias", "partial_gate") if a[n] is not None]
        return Moved(0, (sums * a["programs"] if a["partial"] is not None else 0) + sum(map(size, given)))
    if launch.name == "prepare":
        return Moved(size("x"), 0)
    halo = a["block"].halo
    if launch.name == "fuse":
        return Moved(size("x", planes * tiling(launch, 1, halo).touched()) + size("y"), 0)
    if launch.name == "sweep":
        x = size("x", planes * tiling(launch, 1, halo).walked(launch.grid[0]))
        return Moved(x + size("grad") + size("dz_out"), size("partial_gate"))
    if launch.name == "weigh":
        x = size("x", planes * tiling(launch, 1, 0).walked(launch.grid[0]))
        dz = size("dz", layout.rows * tiling(launch, 0, 1, beside=1).walked(launch.grid[0]))
        return Moved(launch.grid[1] * (x + dz), sums * launch.grid[0] + size("partial_bias"))
    assert launch.name == "fuse_dx", launch.name
    dz = size("dz", layout.rows * tiling(launch, 1, halo).touched())
    return Moved(dz + size("direct") + size("dx"), 0)
