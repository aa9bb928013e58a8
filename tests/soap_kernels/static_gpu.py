"""Facts about compiled GPU kernels, found without a GPU: registers, spills, shared memory, instructions, occupancy."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from soap_kernels.backends import Options
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
# 128-bit, 64-bit, ... in a SASS mnemonic; without one the access is 32 bits wide.
_WIDTH = re.compile(r"\.(?:U|S)?(128|64|16|8)\b")


@dataclass(frozen=True)
class Launch:
    """One launch as the backend would make it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # every parameter's value
    options: dict[str, int]  # num_warps, ...

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


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


@contextmanager
def recorded(architecture: int = 90) -> Iterator[list[Launch]]:
    """Records what the Triton backend would launch on an architecture instead of launching it; feed it meta tensors."""
    from soap_kernels.backends.triton import ops, wide

    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        names = list(kernel.arg_names)
        arguments = dict(zip(names, args, strict=False))
        arguments.update({k: v for k, v in options.items() if k in names})
        assert set(names) == set(arguments), set(names) ^ set(arguments)
        found.append(Launch(kernel, grid, arguments, {k: v for k, v in options.items() if k not in names}))

    before: list[tuple[Any, Callable[..., None]]] = [(m, m.launch) for m in (ops, wide)]
    processors = ops.processors
    ops.processors = lambda x: (PROCESSORS[architecture], architecture)
    try:
        for module, _ in before:
            module.launch = record
        yield found
    finally:
        for module, launch in before:
            module.launch = launch
        ops.processors = processors


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
        BACKEND.soap_backward(y, x, prepared, weights, options, needs_x and dtype != torch.uint8, True)
    return list(found)


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.float64: "*fp64",
}


def _specialize(path: tuple[int, ...], value: Any, constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """A parameter's type as Triton's launcher would specialise it: pointers aligned, 1 constant, 16 divides or not."""
    if isinstance(value, tuple):
        return tuple(_specialize((*path, i), v, constants, attributes) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, architecture: int) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            fixed = parameter.do_not_specialize and isinstance(value, int)
            signature[parameter.name] = "i32" if fixed else _specialize((i,), value, constants, attributes)
    from soap_kernels.backends.triton.plan import compiled as options_of

    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options_of(launch.options))
    threads = 32 * launch.options.get("num_warps", 4)
    return facts_of_cubin(launch.name, compiled.asm["cubin"], architecture, threads, compiled.metadata.shared)


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def facts_of_cubin(name: str, cubin: bytes, architecture: int, threads: int, shared: int) -> Facts:
    """Of what Triton itself assembled, by the disassembler in its wheel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "k.cubin")
        binary.write_bytes(cubin)
        usage, sass = (
            subprocess.run([*command, str(binary)], capture_output=True, text=True, check=True).stdout
            for command in ([_tool("cuobjdump"), "-res-usage"], [_tool("nvdisasm"), "-c"])
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


def _seen(tiles: range, size: int, step: int, around: int, limits: tuple[int, int]) -> int:
    """Rows or columns that consecutive tiles of so many touch with what they read around them, inside the limits."""
    first, last = tiles.start * step - around, (tiles.stop - 1) * step + size + around
    return max(min(last, limits[1]) - max(first, limits[0]), 0)


def _walked(launch: Launch, clips: int, height: int, width: int, rows: int, columns: int, beside: int = 0) -> int:
    """Pixels of a plane that programs touch which walk runs of tiles, with so many rows and columns around."""
    a = launch.arguments
    down, total, programs = a["tiles_h"], a["total_tiles"], launch.grid[0]
    assert total == clips * a["tiles"]
    step = a["BW"] - 2 * a["HALO"]
    touched = 0
    for p in range(programs):
        tile, last = p * total // programs, (p + 1) * total // programs
        while tile < last:
            end = min(last, (tile // down + 1) * down)
            column = tile % a["tiles"] // down
            high = _seen(range(tile % down, tile % down + end - tile), a["BH"], a["BH"], rows, (0, height))
            touched += high * _seen(range(column, column + 1), step, step, columns, (-beside, width + beside))
            tile = end
    return touched


def _tiled(launch: Launch, clips: int, height: int, width: int, rows: int, columns: int) -> int:
    """The same of programs that take a tile each."""
    a = launch.arguments
    step = a["BW"] - 2 * a["HALO"]
    down = sum(_seen(range(t, t + 1), a["BH"], a["BH"], rows, (0, height)) for t in range(-(-height // a["BH"])))
    across = sum(_seen(range(t, t + 1), step, step, columns, (0, width)) for t in range(-(-width // step)))
    return clips * down * across


def triton_bytes(launch: Launch) -> Moved:
    """Weights, whose bytes are few and do not grow, are left out."""
    a = launch.arguments

    def size(name: str, numel: int | None = None) -> int:
        return int(a[name].element_size() * (a[name].numel() if numel is None else numel))

    if launch.name == "reduce":
        real = a["T"] * a["C"] + (a["ONE"] >= 0)
        sums = 9 * a["JP"] * a["TP"] * real * a["programs"] if a["WEIGHTS"] else 0
        return Moved(0, 4 * sums + sum(size(n) for n in ("partial_bias", "partial_gate") if a[n] is not None))
    if launch.name == "finish":
        return Moved(0, 0)
    frames = a["dx" if launch.name == "fuse_dx" else "x"]
    clips, planes, (height, width) = frames.shape[0], frames.shape[1] * frames.shape[2], frames.shape[3:]
    image = (clips, height, width)
    if launch.name == "prepare":
        return Moved(frames.numel() * frames.element_size(), 0)
    if launch.name == "fuse":
        return Moved(size("x", planes * _tiled(launch, *image, 1, a["HALO"])) + size("y"), 0)
    row_count = a["JP"] * a["TP"]
    if launch.name == "sweep":
        x = size("x", planes * _walked(launch, *image, 1, a["HALO"]))
        return Moved(x + size("grad") + size("dz_out"), size("partial_gate"))
    if launch.name == "weigh":
        x = size("x", planes * _walked(launch, *image, 1, 0))
        dz = size("dz", row_count * _walked(launch, *image, 0, 1, beside=1))
        real = a["T"] * a["C"] + (a["ONE"] >= 0)
        return Moved(launch.grid[1] * (x + dz), 4 * 9 * row_count * real * launch.grid[0] + size("partial_bias"))
    assert launch.name == "fuse_dx", launch.name
    return Moved(size("dz", row_count * _tiled(launch, *image, 1, a["HALO"])) + size("direct") + size("dx"), 0)
