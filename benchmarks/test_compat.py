"""The authors' `TriplePrior`: ours against a plain transcription of the published code, time and memory.

    python -m pytest benchmarks/test_compat.py

Memory is what PyTorch allocates beyond what is there before, at its highest, on the CPU by counting the results of all
operations, on a GPU by asking the allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.compat import TriplePrior


def plain(module: Any, x: Tensor, seq_len: int) -> Tensor:
    """The published forward, with the weights that the module holds in place of convolutions made anew."""

    def conv(name: str, x: Tensor, padding: int = 1) -> Tensor:
        held = module.get_submodule(name)
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[held.weight.dim()]
        return convolve(x, held.weight, held.bias, padding=padding)

    n, c, h, w = x.shape
    b = n // seq_len
    mixed = x.reshape(b, c, seq_len, h, w)
    st = conv("conv_st", mixed.mean(dim=1, keepdim=True)).transpose(1, 2).reshape(n, 1, h, w)
    ch = conv("conv_ch1", x).mean(dim=(2, 3)).reshape(b, seq_len, -1)
    ch = conv("conv_ch2", conv("channel_diff", ch).reshape(n, -1, 1, 1))
    frames, maps = mixed.transpose(1, 2).contiguous(), []
    for k, o in enumerate(module.TUPLE_SIZES):
        for i in range(seq_len - o):
            now, then = (frames[:, j : j + o].reshape(b, o * c, h, w) for j in (i, i + 1))
            maps.append(conv(f"recover.{k}", now - conv(f"frame_diff.{k}", then), padding=0))
    mo = torch.stack(maps, dim=1).mean(dim=1, keepdim=True).expand(b, seq_len, c, h, w).reshape(n, c, h, w)
    mo = mo.mean(dim=(2, 3), keepdim=True)
    return sum((x * prior.sigmoid() + x for prior in (st, ch, mo)), x)


@pytest.mark.parametrize("version", ["plain", "ours"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_triple_prior(benchmark: Any, smallest: bool, version: str, training: bool) -> None:
    torch.manual_seed(0)
    clips, size = (1, 16) if smallest else (6, 224)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = TriplePrior().to(device)
    x = torch.randn(clips * 8, 3, size, size, device=device)
    forward: Callable[[Tensor, int], Tensor] = module if version == "ours" else lambda x, t: plain(module, x, t)
    grad = torch.randn_like(x)

    def run() -> None:
        with torch.set_grad_enabled(training):
            y = forward(x, 8)
            if training:
                y.backward(grad)
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        torch.testing.assert_close(forward(x, 8), plain(module, x, 8), rtol=1e-3, atol=1e-3)
    benchmark.extra_info["peak_mib"] = round(peak(run, device) / 2**20)
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


def peak(run: Callable[[], None], device: str) -> int:
    """The most bytes allocated at once while ``run`` runs, beyond those before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest
