"""SOAP on the CPU against plain PyTorch: times, shares of the machine's limits, growth, memory, share of a backbone.

    python -m benchmarks --device cpu            all of it, into benchmarks/results/ (about 10 minutes)
    python -m benchmarks --device cpu --quick    the table of providers alone, without torch.compile
    python -m benchmarks --smallest --out build  once, on the smallest shapes, without torch.compile: that it all runs

All providers run interleaved in one process and medians are compared, so that a busy machine slows them alike. Memory
is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.providers import Work
from soap_kernels import SOAP
from soap_kernels.backends import cpp
from soap_net.versions import processor

RESULTS = Path(__file__).resolve().parent / "results"
Calls = dict[str, Callable[[], object]]


def interleaved(calls: Calls, repeats: int) -> dict[str, dict[str, float]]:
    """Median and minimum milliseconds of each call, taken in turn, each after one of its own that is not timed.

    Without that one, a call finds the allocator and the caches as the call before it left them.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median": statistics.median(s), "min": min(s)} for n, s in spent.items()}


def provider_calls(work: Work, compiled: bool) -> tuple[Calls, Calls]:
    """Forward and forward + backward by provider's name."""
    sizes = work.tuple_sizes
    forwards = {
        "plain": providers.plain(sizes),
        "folded": providers.folded(sizes),
        "soap": providers.kernels(sizes, "cpp"),
        "soap strict": providers.kernels(sizes, "cpp", "strict"),
    }
    if compiled:
        forwards["plain compiled"] = torch.compile(providers.plain(sizes))
        forwards["folded compiled"] = torch.compile(providers.folded(sizes))
    weights = dict.fromkeys(forwards, work.weights)
    forwards["conv alone"], weights["conv alone"] = providers.conv_alone(work)
    one: Calls = {n: partial(providers.run_forward, forward, work, weights[n]) for n, forward in forwards.items()}
    both: Calls = {n: partial(providers.run_training, forward, work, weights[n]) for n, forward in forwards.items()}
    for isa in cpp.isas()[1:]:
        one[f"soap {isa}"] = _with_isa(isa, one["soap"])
        both[f"soap {isa}"] = _with_isa(isa, both["soap"])
    y = torch.empty_like(work.x)
    one["copy of x"] = lambda: y.copy_(work.x)
    return one, both


def _with_isa(isa: str, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        cpp.set_isa(isa)
        call()
        cpp.set_isa("auto")

    return run


def fma_peak(threads: int) -> float:
    """Multiply-adds a second, from a loop of independent ones compiled for this machine."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).resolve().parent / "peak.cpp"
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library), "-pthread"], check=True)
        loop = ctypes.CDLL(str(library)).fma_peak
        loop.restype = ctypes.c_double
        return max(float(loop(threads, ctypes.c_double(0.3))) for _ in range(3))


def multiply_adds(frames: int, channels: int) -> int:
    """Per pixel of a clip in the forward's Winograd products: 36 points of 16 pixels, the conv and the stencil.

    The conv reads the first frame at 16 of the points: it has no taps but the centre's there.
    """
    planes = frames * channels
    return (36 * (planes * planes + 3 * frames - 2) - 20 * channels * planes) // 16


def growth(repeats: int, smallest: bool) -> dict[str, list[dict[str, float]]]:
    """Times as clips, size, frames grow; per pixel of a plane they must stay flat but for frames (quadratic)."""
    cases: dict[str, list[tuple[int, int, int, int]]] = {
        "clips": [(n, 8, 3, 224) for n in (1, 2, 4, 8, 16, 30)],
        "size": [(6, 8, 3, s) for s in (56, 112, 160, 224, 320)],
        "frames": [(4, t, 3, 224) for t in (4, 8, 16, 32)],
        "features": [(n, 8, 64, 56) for n in (1, 4)],
    }
    table: dict[str, list[dict[str, float]]] = {}
    for name, shapes in cases.items():
        table[name] = []
        for clips, frames, channels, size in shapes[:2] if smallest else shapes:
            clips, size = (1, 16) if smallest else (clips, size)
            work = Work.make(clips, frames, channels, size)
            forward = providers.kernels(work.tuple_sizes, "cpp")
            calls: Calls = {
                "forward": partial(providers.run_forward, forward, work, work.weights),
                "both": partial(providers.run_training, forward, work, work.weights),
            }
            if name == "features":
                conv = providers.conv_alone(work)
                calls["conv alone"] = partial(providers.run_forward, conv[0], work, conv[1])
                calls["conv alone both"] = partial(providers.run_training, conv[0], work, conv[1])
            found = interleaved(calls, repeats)
            row: dict[str, float] = {"clips": clips, "frames": frames, "channels": channels, "size": size}
            table[name].append(row | {k: v["median"] for k, v in found.items()})
    return table


def forms(clips: int, size: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Times of the centred form, and of the paper's once more, over the paper's: quartiles over pairs of calls.

    The two of a pair follow one another, in either order in turns. What a form differs by from itself is the machine's.
    """
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    frames = torch.randint(0, 256, (clips, 8, 3, size, size), dtype=torch.uint8)
    table: dict[str, dict[str, list[float]]] = {}
    for dtype, x, normalize in (("fp32", frames / 255, None), ("uint8", frames, imagenet)):
        paper, again, centred = (SOAP(backend="cpp", normalize=normalize, centred=c) for c in (False, False, True))
        grad = torch.ones_like(x, dtype=torch.float32)
        for name, run in (("forward", _forward), ("forward + backward", _training)):
            rivals = {"centred": partial(run, centred, x, grad), "itself": partial(run, again, x, grad)}
            own = partial(run, paper, x, grad)
            ratios: dict[str, list[float]] = {rival: [] for rival in rivals}
            for turn in range(repeats):
                for rival, call in rivals.items():
                    ratios[rival].append(_ratio(call, own, first=turn % 2 == 0))
            quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            table[f"{dtype}, {name}"] = {
                rival: torch.tensor(found, dtype=torch.float64).quantile(quartiles).tolist()
                for rival, found in ratios.items()
            }
    return table


def _forward(soap: SOAP, x: torch.Tensor, grad: torch.Tensor) -> None:
    with torch.no_grad():
        soap(x)


def _training(soap: SOAP, x: torch.Tensor, grad: torch.Tensor) -> None:
    torch.autograd.grad(soap(x), list(soap.parameters()), grad)


def _ratio(call: Callable[[], object], other: Callable[[], object], first: bool) -> float:
    """How many times as long one takes as the other, each after one of its own that is not timed."""
    spent = {}
    for run in (call, other) if first else (other, call):
        run()
        start = time.perf_counter()
        run()
        spent[run] = time.perf_counter() - start
    return spent[call] / spent[other]


MEMORY = """
import gc, re, sys, torch
sys.path.insert(0, {root!r})
from benchmarks.providers import Work, kernels
torch.set_num_threads({threads})
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
small = Work.make(1, size=64)
torch.autograd.grad(kernels(small.tuple_sizes, "cpp")(small.x, small.weights), small.weights, small.grad)
work = Work.make({clips}, size={size})
work.x.add_(0); work.grad.add_(0)
gc.collect()
forward = kernels(work.tuple_sizes, "cpp")
x_bytes = work.x.numel() * 4
def peak_of(call):
    gc.collect()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    kept = call()
    return status("VmHWM") - before, kept
with torch.no_grad():
    used, y = peak_of(lambda: forward(work.x, work.weights))
beyond_forward = (used - y.numel() * 4) / x_bytes
del y
used, y = peak_of(lambda: forward(work.x, work.weights))
kept = status("VmRSS")
saved = sum(t.numel() * t.element_size() for t in y.grad_fn.saved_tensors
            if t.data_ptr() != work.x.data_ptr()) / x_bytes
used, _ = peak_of(lambda: torch.autograd.grad(y, work.weights, work.grad))
print(beyond_forward, saved, used / x_bytes)
"""


def memory(clips: int, size: int, threads: int) -> dict[str, float]:
    """Shares of x: forward beyond y, saved for backward beside x, peak of backward beyond x, y and the gradient."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    code = MEMORY.format(root=str(RESULTS.parents[1]), threads=threads, clips=clips, size=size)
    # Freed memory goes back at once, so that a peak is seen as one.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {}
    forward, saved, backward = map(float, done.stdout.split())
    return {"clips": clips, "forward": forward, "saved": saved, "backward": backward}


def backbones(repeats: int, size: int) -> dict[str, dict[str, float]]:
    """SOAP's share of a backbone's forward and training step on the same frames (one clip of 8 frames, size x size)."""
    import timm
    from torch import nn
    from torchvision.models import resnet18, resnet50

    lite0 = timm.create_model("tf_efficientnet_lite0")
    models = {"ResNet-18": resnet18(), "ResNet-50": resnet50(), "EfficientNet-Lite0": lite0}

    def forward(module: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            module(x)

    def training(module: nn.Module, x: torch.Tensor) -> None:
        module.zero_grad()
        module(x).sum().backward()

    table = {}
    for name, model in models.items():
        x = torch.randn(1, 8, 3, size, size)
        soap, images = SOAP(backend="cpp"), x.flatten(0, 1)
        calls: Calls = {
            "forward": partial(forward, model.eval(), images),
            "training": partial(training, model, images),
            "soap": partial(forward, soap, x),
            "soap training": partial(training, soap, x),
        }
        found = {k: v["median"] for k, v in interleaved(calls, repeats).items()}
        table[name] = found | {
            "share forward": found["soap"] / found["forward"],
            "share training": found["soap training"] / found["training"],
        }
    return table


def machine() -> dict[str, Any]:
    git = ["git", "-C", str(RESULTS.parents[1]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpp.isa(),
        "torch": torch.__version__,
        "compiler": cpp.build_info()["compiler"],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def slug(processor: str) -> str:
    """Intel(R) Xeon(R) Processor: intel-xeon-processor."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", processor.lower())).strip("-")


def measure(quick: bool, repeats: int, threads: int, smallest: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    clips, size = (1, 16) if smallest else (6, 224)
    work = Work.make(clips, size=size)
    record: dict[str, Any] = {"machine": machine(), "shape": list(work.x.shape)}
    one, both = provider_calls(work, compiled=not (quick or smallest))
    record["forward"] = interleaved(one, repeats)
    record["training"] = interleaved(both, repeats)
    peak = fma_peak(threads)
    pixels = work.x.shape[0] * work.x.shape[3] * work.x.shape[4]
    seconds = record["forward"]["soap"]["median"] / 1e3
    record["limits"] = {
        "fma peak, G/s": peak / 1e9,
        "copy, GB/s": 8 * work.x.numel() / record["forward"]["copy of x"]["median"] / 1e6,
        "forward's share of the fma peak": multiply_adds(8, 3) * pixels / seconds / peak,
        "forward's share of the copy": record["forward"]["copy of x"]["median"] / record["forward"]["soap"]["median"],
    }
    if not quick:
        del work, one, both
        record["memory"] = memory(5 * clips, size, threads)
        record["growth"] = growth(1 if smallest else max(3, repeats // 2), smallest)
        record["forms"] = forms(clips, size, 1 if smallest else 20 * repeats)
        record["backbones"] = backbones(1 if smallest else max(3, repeats // 3), 2 * size if smallest else size)
    return record


def as_markdown(r: dict[str, Any]) -> str:
    m = r["machine"]
    lines = [
        f"{m['processor']}, {m['threads']} threads of {m['cores']} cores, {m['isa']}; torch {m['torch']},"
        f" {m['compiler']}; {m['date']}, commit {m['commit']}.",
        "",
        f"{r['shape'][0]} clips {'x'.join(map(str, r['shape'][1:]))}, fp32, all three parts; training: gradients for"
        " all weights. Medians (minima) in ms.",
        "",
        "| | forward | times SOAP's | forward + backward | times SOAP's |",
        "|---|---|---|---|---|",
    ]
    for name, f in r["forward"].items():
        b = r["training"].get(name)
        ratio = f["median"] / r["forward"]["soap"]["median"]
        both = (
            ("", "")
            if b is None
            else (f"{b['median']:.1f} ({b['min']:.1f})", f"{b['median'] / r['training']['soap']['median']:.2f}")
        )
        lines.append(f"| {name} | {f['median']:.1f} ({f['min']:.1f}) | {ratio:.2f} | {both[0]} | {both[1]} |")
    lines += ["", "| limit | |", "|---|---|"]
    lines += [f"| {k} | {v:.3g} |" for k, v in r["limits"].items()]
    if memory_of := r.get("memory"):
        lines += [
            "",
            f"Memory at {memory_of['clips']:.0f} clips, in a fresh process, as shares of x: forward beyond y"
            f" {memory_of['forward']:.2%}; saved for backward beside x {memory_of['saved']:.4%}; backward's peak beyond"
            f" x, y and the gradient {memory_of['backward']:.2%}.",
        ]
    if table_of_forms := r.get("forms"):
        lines += [
            "",
            "| SOAP(centred=True) over SOAP: median ratio (quartiles) | centred | SOAP again |",
            "|---|---|---|",
        ]
        for name, found in table_of_forms.items():
            cells = (f"{median:.3f} ({low:.3f} to {high:.3f})" for low, median, high in found.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, rows in r.get("growth", {}).items():
        keys = [k for k in rows[0] if k not in ("clips", "frames", "channels", "size")]
        lines += [
            "",
            f"| {name}: clips x frames x channels x size | {' | '.join(k + ', ms' for k in keys)} | ns a pixel |",
        ]
        lines.append("|---|" + "---|" * (len(keys) + 1))
        for row in rows:
            shape = "x".join(str(int(row[k])) for k in ("clips", "frames", "channels", "size"))
            pixel = 1e6 * row["forward"] / (row["clips"] * row["size"] ** 2)
            lines.append(f"| {shape} | {' | '.join(f'{row[k]:.2f}' for k in keys)} | {pixel:.1f} |")
    if table := r.get("backbones"):
        lines += [
            "",
            "| backbone, 8 frames | forward, ms | SOAP's share | training step, ms | SOAP's share |",
            "|---|---|---|---|---|",
        ]
        for name, b in table.items():
            lines.append(
                f"| {name} | {b['forward']:.0f} | {b['share forward']:.2%} | {b['training']:.0f} |"
                f" {b['share training']:.2%} |"
            )
    return "\n".join(lines) + "\n"


def plot(r: dict[str, Any], path: Path) -> None:
    """Time against clips, log-log, with the limits that copying and multiplying set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = r["growth"]["clips"]
    clips = [row["clips"] for row in rows]
    bytes_of = [n * 8 * 3 * 224 * 224 * 4 for n in clips]
    figure, axes = plt.subplots(figsize=(6, 4.2))
    axes.loglog(clips, [row["forward"] for row in rows], "o-", label="forward")
    axes.loglog(clips, [row["both"] for row in rows], "s-", label="forward + backward")
    copy, peak = r["limits"]["copy, GB/s"] * 1e9, r["limits"]["fma peak, G/s"] * 1e9
    axes.loglog(clips, [2e3 * b / copy for b in bytes_of], "k--", lw=1, label="copy of x")
    work = [multiply_adds(8, 3) * n * 224 * 224 for n in clips]
    axes.loglog(clips, [1e3 * w / peak for w in work], "k:", lw=1, label="forward's products at the FMA peak")
    axes.set_xlabel("clips of 8 frames, 224 x 224")
    axes.set_ylabel("ms")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--smallest", action="store_true", help="once, on the smallest shapes: that it runs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if why := cpp.BACKEND.why_absent(torch.device("cpu")):
        print(f"nothing to time: {why}", file=sys.stderr)
        return 2
    repeats = 1 if options.smallest else options.repeats
    record = measure(options.quick, repeats, options.threads, options.smallest)
    table = as_markdown(record)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"cpu-{slug(record['machine']['processor'])}-{record['machine']['isa']}{'-quick' if options.quick else ''}"
    (options.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(table)
    if "growth" in record:
        plot(record, options.out / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
