"""Prints what can be known of the GPU kernels without a GPU: launches, bytes, registers, machine code, rooflines.

    python tests/gpu_proof/report.py [--architectures 80 90] [--no-cuda-kernels]

Nothing here is timed. Triton's kernels are compiled by Triton, the CUDA kernels by nvcc where it is at hand (minutes);
tests hold the same figures to their limits.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soap_kernels import equations
from soap_kernels.backends import reference
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import dispatched  # noqa: E402
import static_gpu  # noqa: E402

SIZES = (1, 2, 3)
SHAPE = (6, 8, 3, 224, 224)
PIXELS = SHAPE[0] * SHAPE[3] * SHAPE[4]  # places of a clip, with all their planes
FRAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
STAGES = ("prepare", "fuse", "sweep", "reduce", "finish")


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: bytes and bf16 operations a second, warp instructions it can issue a second."""

    name: str
    bandwidth: float
    tensor: float
    issue: float


A100 = Device("A100", 2.04e12, 312e12, 108 * 4 * 1.41e9)
H100 = Device("H100", 3.35e12, 989e12, 132 * 4 * 1.83e9)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]


def program(soap: Callable[..., Tensor]) -> dispatched.Program:
    def run(x: Tensor, weights: list[Tensor]) -> Tensor:
        return soap(x, Weights.unflatten([w.to(x.dtype) for w in weights], PARTS, len(SIZES)), SIZES)

    return run


def cuda_bytes(itemsize: int, processors: int) -> tuple[int, int]:
    """Forward and backward, by the launches' plan (see :func:`static_gpu.cuda_touched`)."""
    clips, frames, channels, height, width = SHAPE
    fuse, sweep = static_gpu.cuda_touched(clips, (height, width), processors)
    one = clips * frames * channels * height * width
    return itemsize * (2 * one + frames * channels * fuse), itemsize * (frames * channels * sweep + one)


def launches_and_bytes(architecture: int) -> Iterator[str]:
    weights = SOAP().weights().flatten()
    rows: list[list[object]] = []
    for name, dtype in FRAMES.items():
        x = torch.empty(SHAPE, dtype=dtype, device="meta")

        def row(
            variant: str,
            launches: tuple[int, int],
            moved: tuple[int, int],
            saved: int,
            name: str = name,
            once: int = x.nbytes,
        ) -> list[object]:
            return [variant, name, *launches, *(f"{m / once:.2f}" for m in (*moved, saved))]

        for variant, soap in (("plain", equations.soap), ("folded, plain ops", reference.soap)):
            c = dispatched.count(program(soap), x, weights)
            pair = (c.forward_launches, c.backward_launches), (c.forward_bytes, c.backward_bytes)
            rows.append(row(variant, *pair, c.saved_bytes))
        launches = static_gpu.soap_launches(dtype, architecture=architecture)
        first = [launch.name for launch in launches].index("sweep")
        moved = [static_gpu.triton_bytes(launch) for launch in launches]
        pixels = [sum(m.pixels for m in part) for part in (moved[:first], moved[first:])]
        saved = x.nbytes + launches[0].arguments["pieces"].folded.untyped_storage().nbytes()
        rows.append(row("triton", (first, len(launches) - first), (pixels[0], pixels[1]), saved))
        forward, backward = cuda_bytes(x.element_size(), static_gpu.PROCESSORS[architecture])
        rows.append(row("cuda", (2, 3), (forward, backward), saved))
    yield "Launches; bytes in units of x's. Of plain PyTorch each op's operands; of ours each address once a program,"
    yield "halo included, partial sums not."
    yield ""
    header = ("", "frames", "launches forward", "backward", "bytes forward", "backward", "saved for backward")
    yield from table(header, rows)


def per_pixel(launch: static_gpu.Launch, facts: static_gpu.Facts) -> float | None:
    """Warp instructions for a pixel that a program writes, what it does once for a run of tiles left out."""
    a = launch.arguments
    if launch.name not in ("fuse", "sweep", "weigh", "fuse_dx"):
        return None
    own = a["block"].height * a["block"].step
    walks = launch.name in ("sweep", "weigh")
    executed = facts.executed(1, 3) - facts.depths[0] if walks else facts.executed(3)
    return executed * facts.threads / 32 / own


def products(launch: static_gpu.Launch) -> float:
    """Operations of the tensor cores, padding included."""
    a = launch.arguments
    if launch.name not in ("fuse", "sweep", "weigh"):
        return 0.0
    rows, columns = a["layout"].rows, a["layout"].columns
    times = a["numbers"].split + 1
    wide = a["block"].width / a["block"].step
    if launch.name == "weigh":
        return 2.0 * PIXELS * 4 * rows * (3 * columns * times + 16 * min(times, 2))
    return 2.0 * PIXELS * 9 * rows * columns * times * wide


def roofline(device: Device, moved: float, operations: float, instructions: float) -> str:
    limits = {
        "bytes": moved / device.bandwidth,
        "tensor cores": operations / device.tensor,
        "issue": instructions / device.issue,
    }
    bound = max(limits, key=lambda name: limits[name])
    return f"{1e6 * limits[bound]:.0f} us ({bound})"


def triton_tables(architectures: Sequence[int]) -> Iterator[str]:
    import triton

    rows: list[list[object]] = []
    roofs: list[list[object]] = []
    for architecture in architectures:
        for name, dtype in FRAMES.items():
            for launch in static_gpu.soap_launches(dtype, needs_x=True, architecture=architecture):
                facts = static_gpu.compile_launch(launch, architecture)
                print(facts, file=sys.stderr, flush=True)
                pixel = per_pixel(launch, facts)
                mma = facts.count("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
                widths = {kind: max(facts.widths(kind), default=0) for kind in ("LDG", "STG")}
                cells = [facts.registers, facts.spilled, facts.threads, f"{100 * facts.occupancy:.0f} %", facts.shared]
                cells += [mma or "", widths["LDG"] or "", widths["STG"] or "", "" if pixel is None else f"{pixel:.0f}"]
                rows.append([f"sm_{architecture}", name, launch.name, *cells])
                device = {80: A100, 90: H100}.get(architecture)
                if device and launch.name in ("prepare", "fuse", "sweep", "weigh"):
                    counted = static_gpu.triton_bytes(launch)
                    moved = counted.pixels + counted.partial
                    operations, instructions = products(launch), PIXELS * (pixel or 0.0)
                    numbers = (f"{moved / 1e6:.0f} MB", f"{operations / 1e9:.1f}", f"{instructions / 1e6:.0f} M")
                    bound = roofline(device, moved, operations, instructions)
                    roofs.append([device.name, name, launch.name, *numbers, bound])
    yield f"Triton {triton.__version__}: registers of a thread, stack and local memory (0: no spill), threads,"
    yield "occupancy, bytes of shared memory, tensor core instructions and the widest global access in bits in the"
    yield "machine code, warp instructions executed for a pixel (a place of a clip with its 24 planes)."
    yield ""
    header = (
        "",
        "frames",
        "kernel",
        "registers",
        "spilled",
        "threads",
        "occupancy",
        "shared",
        "MMA",
        "loads",
        "stores",
    )
    yield from table((*header, "instructions a pixel"), rows)
    yield "The least time of Triton's kernels by data sheets: bytes over bandwidth, operations over the tensor cores'"
    yield "rate, instructions over the issue rate, and the largest of the three."
    yield ""
    yield from table(("", "frames", "kernel", "bytes", "GFLOP", "warp instructions", "at least"), roofs)


def cuda_facts(stage: str, architecture: int, folder: Path) -> Iterator[list[object]]:
    """Of each instantiation in a file: registers, stack, tensor core instructions, widest global accesses."""
    cubin = folder / f"{stage}.{architecture}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{stage}.cu"
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True)
    usage, sass = (
        subprocess.run([static_gpu.tool("cuobjdump"), flag, str(cubin)], capture_output=True, text=True, check=True)
        for flag in ("-res-usage", "-sass")
    )
    used = dict(re.findall(r"Function (\S+):\s+(REG:.*)", usage.stdout))
    for part in sass.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used[name.strip()])
        assert found is not None
        widths = [
            128 if f"{kind}.E.128" in body else 64 if f"{kind}.E.64" in body else 32 if kind in body else ""
            for kind in ("LDG", "STG")
        ]
        plain = subprocess.run(["c++filt", name.strip()], capture_output=True, text=True, check=True).stdout
        short = re.sub(r"\(anonymous namespace\)::|soap::|void |\(.*", "", plain).strip()
        yield [
            f"sm_{architecture}",
            short,
            int(found[1]),
            int(found[2]) + int(found[3]),
            body.count("HMMA") or "",
            *widths,
        ]


def cuda_tables(architectures: Sequence[int]) -> Iterator[str]:
    if NVCC is None or shutil.which("c++filt") is None:
        yield "CUDA: nvcc or c++filt is not here, so the CUDA kernels were not compiled."
        yield ""
        return
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for stage in STAGES:
                rows += cuda_facts(stage, architecture, Path(folder))
                print(f"nvcc {stage} sm_{architecture}", file=sys.stderr, flush=True)
    yield "CUDA: registers, stack and local memory (0: no spill), tensor core instructions, widest global accesses."
    yield ""
    yield from table(("", "kernel", "registers", "spilled", "MMA", "loads", "stores"), rows)


def report(architectures: Sequence[int], with_cuda: bool) -> str:
    """All tables, for 6 clips of 8 x 3 x 224 x 224."""
    lines = [
        "Known without a GPU; nothing here is a time that was measured. "
        f"{' x '.join(map(str, SHAPE))} frames, T = 8, C = 3, tuple sizes 1, 2, 3, torch {torch.__version__}.",
        "",
        *launches_and_bytes(architectures[0]),
    ]
    lines += triton_tables(architectures)
    if with_cuda:
        lines += cuda_tables(architectures)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=static_gpu.ARCHITECTURES)
    parser.add_argument("--no-cuda-kernels", action="store_true", help="leave out nvcc's minutes")
    options = parser.parse_args()
    print(report(options.architectures, not options.no_cuda_kernels))


if __name__ == "__main__":
    main()
