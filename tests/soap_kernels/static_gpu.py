"""Facts about compiled GPU kernels, found without a GPU: registers, spills, shared memory, instructions, occupancy."""

from __future__ import annotations

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
    spilled: int  # bytes stored and loaded
    shared: int
    instructions: Counter[str] = field(repr=False)
    hot: Counter[str] = field(repr=False)  # instructions within the innermost loops

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
    from soap_kernels.triton import ops, wide

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
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    threads = 32 * launch.options.get("num_warps", 4)
    return facts_of_ptx(launch.name, compiled.asm["ptx"], architecture, threads, compiled.metadata.shared)


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def facts_of_ptx(name: str, ptx: str, architecture: int, threads: int, shared: int) -> Facts:
    """Assembles and disassembles with the tools in Triton's wheel."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        ptxas = _tool("ptxas-blackwell" if architecture >= 100 else "ptxas")
        command = [ptxas, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(binary)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([_tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None
    instructions, hot = _instructions(sass)
    spilled = int(spills[1]) + int(spills[2]) if spills else 0
    return Facts(name, architecture, threads, int(registers[1]), spilled, shared, instructions, hot)


def _instructions(sass: str) -> tuple[Counter[str], Counter[str]]:
    """All instructions by mnemonic, and those within the innermost loops."""
    listed: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(listed)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            listed.append(found[1])
            to = re.search(r"(\.L_x_\d+)", found[2]) if found[1].startswith("BRA") else None
            if to and to[1] in labels and labels[to[1]] < len(listed) - 1:
                loops.append((labels[to[1]], len(listed)))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    hot: Counter[str] = Counter()
    for first, last in innermost:
        hot.update(listed[first:last])
    return Counter(listed), hot


def triton_bytes(launch: Launch) -> int:
    """Bytes of frames, gradient and dz that a launch's programs touch, each address once per program.

    Of a whole tiling: halo rows and columns count again in each program that reads them. Partial sums and weights,
    which do not grow with the frames' pixels, are left out.
    """
    a = launch.arguments
    if launch.name not in ("prepare", "fuse", "sweep", "weigh", "fuse_dx"):
        return 0
    x = a["x"] if launch.name != "fuse_dx" else a["dx"]
    clips, planes, height, width = x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]
    one = clips * planes * height * width
    if launch.name == "prepare":
        return int(one * x.element_size())
    step = a["BW"] - 2 * a["HALO"]

    def touched(rows: int, columns: int) -> int:
        """Pixels of a clip's plane that tiles with so many rows and columns around them read."""
        down = sum(min(t + a["BH"] + rows, height) - max(t - rows, 0) for t in range(0, height, a["BH"]))
        across = sum(min(t + step + columns, width) - max(t - columns, 0) for t in range(0, width, step))
        return int(clips * down * across)

    row_count = a["JP"] * a["TP"]
    if launch.name == "fuse":
        return planes * touched(1, a["HALO"]) * x.element_size() + one * a["y"].element_size()
    if launch.name == "sweep":
        dz = a["dz_out"]
        read = planes * touched(1, a["HALO"]) * x.element_size() + one * a["grad"].element_size()
        return int(read + dz.numel() * dz.element_size())
    if launch.name == "weigh":
        return planes * touched(1, 0) * x.element_size() + row_count * touched(0, 1) * int(a["dz"].element_size())
    direct = one * (a["direct"].element_size() + x.element_size())
    return row_count * touched(1, a["HALO"]) * int(a["dz"].element_size()) + int(direct)
