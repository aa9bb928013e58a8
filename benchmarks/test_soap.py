"""SOAP and its ops, provider by provider: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import providers
from benchmarks.providers import Forward, Work
from soap_kernels import backends, op

PRESENT = [n for n, why in backends.status("cpu").items() if why is None and n in ("cpp", "reference")]
NAMES = ["plain", "folded", *(n for n in PRESENT if n != "reference"), "conv alone"]


@pytest.fixture(scope="module")
def work(smallest: bool) -> Work:
    torch.set_num_threads(2)
    return Work.make(1, size=16) if smallest else Work.make(2)


def provider(name: str, work: Work) -> tuple[Forward, list[torch.Tensor]]:
    if name == "conv alone":
        return providers.conv_alone(work)
    made = {"plain": providers.plain, "folded": providers.folded}
    forward = made[name](work.tuple_sizes) if name in made else providers.kernels(work.tuple_sizes, name)
    return forward, work.weights


@pytest.mark.parametrize("name", NAMES)
def test_forward(benchmark: Any, work: Work, name: str) -> None:
    benchmark.group = "SOAP forward"
    forward, weights = provider(name, work)
    benchmark(providers.run_forward, forward, work, weights)


@pytest.mark.parametrize("name", NAMES)
def test_training(benchmark: Any, work: Work, name: str) -> None:
    benchmark.group = "SOAP forward + backward"
    forward, weights = provider(name, work)
    benchmark(providers.run_training, forward, work, weights)


@pytest.mark.parametrize("name", PRESENT)
def test_window_sums(benchmark: Any, work: Work, name: str) -> None:
    benchmark.group = "window_sums"
    benchmark(op.window_sums, work.x.flatten(0, 1), name)


@pytest.mark.parametrize("name", PRESENT)
def test_fuse_priors(benchmark: Any, work: Work, name: str) -> None:
    benchmark.group = "fuse_priors"
    b, t, c = work.x.shape[:3]
    stencil, gate, weight = torch.randn(1, 1, 3, 3, 3), torch.rand(b, t, c), 0.05 * torch.randn(t * c, t * c, 3, 3)
    benchmark(lambda: op.fuse_priors(work.x, stencil, gate, weight, multiplicative=True, offset=4.0, backend=name))
