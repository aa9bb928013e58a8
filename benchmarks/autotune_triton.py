"""Finds the fastest tiles of the Triton kernels on the GPU at hand, and prints them as entries of ``plan.TILES_OF``.

    python benchmarks/autotune_triton.py [--kinds fp32 bf16 ...] [--kernels fuse weigh ...] [--clips 6] [--size 224]

Times are medians of a kernel alone on the device, with other launches' arguments as the backend makes them.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import torch
import triton

from soap_kernels.backends import Needs, Options
from soap_kernels.backends.triton import BACKEND, plan
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS

SIZES = (1, 2, 3)
KINDS: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
    "fp32": (torch.float32, torch.float32, "default"),
    "bf16": (torch.bfloat16, torch.bfloat16, "default"),
    "fp16": (torch.float16, torch.float16, "default"),
    "fast": (torch.float32, torch.float32, "fast"),
    "strict": (torch.float32, torch.float32, "strict"),
    "uint8": (torch.uint8, torch.bfloat16, "default"),
    "uint8-fp32": (torch.uint8, torch.float32, "default"),
}
TILES = [
    plan.Tile(pixels, warps, stages, registers, halo)
    for pixels, warps in ((32, 4), (32, 8), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8), (256, 16))
    for stages, registers, halo in itertools.product((1, 2, 3), (None, 128), (None, 4))
]


def case(kind: str, clips: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor], Options]:
    dtype, out, precision = KINDS[kind]
    shape = (clips, 8, 3, size, size)
    norm = dtype == torch.uint8
    x = torch.randn(shape, device="cuda").to(dtype)
    if norm:
        x = torch.randint(0, 256, shape, dtype=dtype, device="cuda")
    weights = [w.detach().cuda() for w in SOAP(tuple_sizes=SIZES).weights().flatten()]
    mean, std = ((0.45,) * 3, (0.22,) * 3) if norm else (None, None)
    return x, weights, Options(PARTS, SIZES, precision, mean, std, out, False)


def kernel_time(kernel: str, x: torch.Tensor, weights: list[torch.Tensor], options: Options) -> float:
    """Milliseconds of one launch of ``kernel``; infinite where the tile does not compile or fit."""
    launched: list[tuple[Any, ...]] = []
    real = plan.launch

    def record(function: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        if plan.stage_of(function) == kernel:
            launched.append((function, grid, args, kwargs))
        real(function, grid, *args, **kwargs)

    plan.launch = record
    try:
        y, prepared = BACKEND.soap_forward(x, weights, options)
        if kernel != "fuse":
            BACKEND.soap_backward(y, x, prepared, weights, options, Needs(x.dtype != torch.uint8, True))
        function, grid, args, kwargs = launched[-1]
        compiled = function[grid](*args, **kwargs)
        if getattr(compiled, "n_spills", 0):
            return float("inf")
        again = partial(function[grid], *args, **kwargs)
        return float(triton.testing.do_bench(again, warmup=3, rep=15, return_mode="median"))
    except (triton.CompilationError, triton.OutOfResources, RuntimeError):
        return float("inf")
    finally:
        plan.launch = real


def candidates(kernel: str, itemsize: int, pixels: list[int] | None) -> list[plan.Tile]:
    """Stages mean nothing to weigh, and rows of wider numbers start at 16 bytes with a halo of 4 anyway."""
    return [
        t
        for t in TILES
        if (not pixels or t.pixels in pixels)
        and not (kernel == "weigh" and (t.stages > 1 or t.halo))
        and not (kernel != "weigh" and t.halo and itemsize == 4)
    ]


def tune(kinds: list[str], kernels: list[str], clips: int, size: int, pixels: list[int] | None) -> None:
    """Prints the fastest tiles and leaves them in ``plan.TILES``."""
    for kind, kernel in itertools.product(kinds, kernels):
        x, weights, options = case(kind, clips, size)
        of_gradient = kernel in ("weigh", "fuse_dx")
        numbers = plan.Numbers.of_frames(x.dtype, options.out_dtype, options.precision)
        if of_gradient:
            numbers = plan.Numbers.of_gradient(x.dtype, options.out_dtype, options.precision, False)
        key = (kernel, numbers.kind, 32)
        found = []
        for candidate in candidates(kernel, x.element_size(), pixels):
            plan.TILES[key] = candidate
            plan.tile.cache_clear()
            found.append((kernel_time(kernel, x, weights, options), candidate))
        found.sort(key=lambda entry: entry[0])
        for milliseconds, candidate in found[:4]:
            print(f"#   {kind} {kernel} {1000 * milliseconds:8.1f} us  {candidate}", flush=True)
        plan.TILES[key] = found[0][1]
        plan.tile.cache_clear()
        print(f"{key!r}: {found[0][1]!r},", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--kernels", nargs="+", choices=("fuse", "sweep", "weigh", "fuse_dx"), default=["fuse", "weigh"]
    )
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pixels", type=int, nargs="+", help="only tiles of so many pixels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: tiles are measured, not guessed")
    major, minor = torch.cuda.get_device_capability()
    print(f"# {torch.cuda.get_device_name()}, TILES_OF[{10 * major + minor}]")
    tune(arguments.kinds, arguments.kernels, arguments.clips, arguments.size, arguments.pixels)


if __name__ == "__main__":
    main()
