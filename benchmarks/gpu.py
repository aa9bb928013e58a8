"""SOAP on a GPU: every backend against plain PyTorch, its compiled forms, a copy, and the backbone it feeds.

    python -m benchmarks --device cuda                     everything, into benchmarks/results/
    python -m benchmarks --device cuda --only cuda,copy    some variants

Times are medians over CUDA-graph replays that rotate through several inputs, more than the L2 cache holds: time on the
device. `eager` is the same call from Python, launch overhead included. What can be known without a GPU (launches,
bytes, registers, machine code, rooflines) is printed by tests/gpu_proof/report.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.providers import Forward, Work
from soap_kernels import backends
from soap_kernels.op import soap

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (1, 2, 3)
NORMALIZE = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INPUTS = 4


@dataclass
class Row:
    """One measurement: medians in microseconds, of the forward and of the forward and backward together."""

    variant: str
    frames: str
    shape: str
    forward_us: float | None = None
    both_us: float | None = None
    eager_forward_us: float | None = None
    peak_mb: float | None = None
    gb_per_s: float | None = None
    note: str = ""


def make_weights(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    return Work.make(1, shape[1], shape[2], 8, str(device)).weights


def median_us(call: Callable[[], object], repeats: int) -> float:
    start = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    stop = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for a, b in zip(start, stop, strict=True):
        a.record()
        call()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(start, stop, strict=True)) * 1e3


def graphed_us(call: Callable[[int], object], repeats: int = 30) -> float:
    """Device time of one call: a graph of one call per input, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(INPUTS):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(INPUTS):
            call(i)
    for _ in range(3):
        graph.replay()
    return median_us(graph.replay, repeats) / INPUTS


def measure(
    variant: str,
    frames: str,
    clips: str,
    run: Forward,
    xs: list[Tensor],
    weights: list[Tensor],
) -> Row:
    row = Row(variant, frames, clips)
    try:
        with torch.no_grad():
            row.forward_us = graphed_us(lambda i: run(xs[i], weights))
            for i in range(INPUTS):
                run(xs[i], weights)
            inputs = itertools.cycle(xs)
            row.eager_forward_us = median_us(lambda: run(next(inputs), weights), 30)
        grad = torch.randn_like(run(xs[0], weights))

        def both(i: int) -> object:
            return torch.autograd.grad(run(xs[i], weights), weights, grad)

        both(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(0)
        row.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        row.both_us = graphed_us(both)
        moved = 2 * xs[0].numel() * xs[0].element_size() + grad.numel() * grad.element_size()
        row.gb_per_s = moved / row.forward_us / 1e3
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return row


def kernels_here(device: torch.device) -> list[str]:
    return [n for n in ("cuda", "triton") if n in backends.MODULES and backends.get(n).why_absent(device) is None]


def variants(device: torch.device) -> dict[str, Forward]:
    found = {"plain": providers.plain(SIZES), "folded": providers.folded(SIZES)}
    found |= {f"{name} compiled": torch.compile(run, dynamic=False) for name, run in found.items()}
    found |= {name: providers.kernels(SIZES, name) for name in kernels_here(device)}
    if "cuda" in found:
        found |= {f"cuda {precision}": providers.kernels(SIZES, "cuda", precision) for precision in ("strict", "fast")}
    return found


def backbone_us(name: str, images: int, dtype: torch.dtype, device: torch.device) -> float:
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).to(device, dtype, memory_format=torch.channels_last).eval()
    xs = [
        torch.randn(images, 3, 224, 224, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(INPUTS)
    ]
    with torch.no_grad():
        return graphed_us(lambda i: model(xs[i]), 10)


def run_all(only: set[str], shape: tuple[int, ...], device: torch.device, with_backbone: bool) -> list[Row]:
    rows: list[Row] = []

    def wanted(name: str) -> bool:
        return not only or name in only

    def add(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)

    weights, clips = make_weights(shape, device), "x".join(map(str, shape))
    for frames in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, frames)
        xs = [torch.randn(shape, device=device).to(dtype) for _ in range(INPUTS)]
        if wanted("copy"):
            ys = [torch.empty_like(x) for x in xs]
            time = graphed_us(lambda i, ys=ys, xs=xs: ys[i].copy_(xs[i]))
            add(Row("copy", frames, clips, time, gb_per_s=2 * xs[0].nbytes / time / 1e3))
        for name, run in variants(device).items():
            if wanted(name) and not (frames != "float32" and name == "cuda fast"):
                add(measure(name, frames, clips, run, xs, weights))
        if wanted("backbone") and with_backbone and frames != "float16":
            for name in ("resnet50", "resnet18"):
                add(Row(f"{name} forward", frames, clips, backbone_us(name, shape[0] * shape[1], dtype, device)))
    for backend in kernels_here(device):
        if not wanted(f"{backend} uint8"):
            continue
        xs = [torch.randint(0, 256, shape, device=device, dtype=torch.uint8) for _ in range(INPUTS)]
        for out in (torch.bfloat16, torch.float32):
            run = partial(soap, normalize=NORMALIZE, out_dtype=out, out_channels_last=True, backend=backend)
            frames = f"uint8 to {out} channels_last".replace("torch.", "")
            add(measure(f"{backend} uint8", frames, clips, run, xs, weights))
    return rows


def stage_table(shape: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds of each kernel of the CUDA backend, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    table: dict[str, dict[str, float]] = {}
    weights = make_weights(shape, device)
    for frames in ("float32", "bfloat16", "float16"):
        xs = [torch.randn(shape, device=device).to(getattr(torch, frames)) for _ in range(INPUTS)]
        grad = torch.randn_like(xs[0])

        def both(i: int, xs: list[Tensor] = xs, grad: Tensor = grad) -> None:
            torch.autograd.grad(soap(xs[i % INPUTS], weights, backend="cuda"), weights, grad)

        for i in range(5):
            both(i)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for i in range(20):
                both(i)
            torch.cuda.synchronize()
        table[frames] = {
            e.key.replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]: e.device_time_total
            / e.count
            for e in profiler.key_averages()
            if e.device_time_total > 0
        }
    return table


def as_markdown(rows: Sequence[Row], device_name: str) -> str:
    lines = [
        f"Measured on {device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}.",
        "",
        "| variant | frames | clips | forward us | forward + backward us | eager forward us | GB/s forward | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cell = lambda v: "" if v is None else f"{v:.1f}" if v < 100 else f"{v:.0f}"  # noqa: E731
    for r in rows:
        numbers = " | ".join(cell(v) for v in (r.forward_us, r.both_us, r.eager_forward_us, r.gb_per_s, r.peak_mb))
        lines.append(f"| {r.variant}{' (' + r.note + ')' if r.note else ''} | {r.frames} | {r.shape} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="comma-separated variants")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--no-backbone", action="store_true")
    parser.add_argument("--stages", action="store_true", help="kernel by kernel, by the profiler")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print(
            "no GPU here, so nothing is timed; tests/gpu_proof/report.py prints what is known without", file=sys.stderr
        )
        return 2
    name = torch.cuda.get_device_name(device)
    rows = run_all(
        set(filter(None, options.only.split(","))), (options.clips, 8, 3, 224, 224), device, not options.no_backbone
    )
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{name.lower().replace(' ', '-')}"
    record = {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
        "rows": [asdict(r) for r in rows],
    }
    if options.stages:
        record["stages"] = stage_table((options.clips, 8, 3, 224, 224), device)
        print(json.dumps(record["stages"], indent=1))
    (options.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = as_markdown(rows, name)
    (options.out / f"{stem}.md").write_text(table)
    print(table)
    return 0
