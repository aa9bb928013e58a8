"""The CUDA backend on a device, against the float64 reference: every op, dtype and path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_cases import (
    FUSIONS,
    NORMALIZE,
    SOAPS,
    WIDE_FUSIONS,
    WIDES,
    Case,
    FusionCase,
    fusion_tensors,
    oracle,
    oracle_fusion,
    relative,
    soap_tensors,
)
from soap_kernels import backends
from soap_kernels.op import fuse_priors, soap, window_sums

WHY = backends.get("cuda").why_absent(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY is not None, reason=f"CUDA backend: {WHY}")]
DEVICE = torch.device("cuda")
LARGE = (
    Case("bf16 large", (6, 8, 3, 224, 224), dtype="bfloat16"),
    Case("fp32 large", (6, 8, 3, 224, 224)),
    Case("fp16 large ragged", (3, 8, 3, 223, 221), dtype="float16"),
    Case("strict large", (2, 8, 3, 224, 224), precision="strict"),
    Case("uint8 large", (6, 8, 3, 224, 224), dtype="uint8", out_dtype="bfloat16", channels_last=True),
)


def launches() -> int:
    return int(torch.ops.soap_kernels.cuda_launches())


@pytest.mark.parametrize("case", [*SOAPS, *WIDES, *LARGE], ids=lambda c: c.name)
def test_soap_agrees_with_the_oracle(case: Case) -> None:
    x, weights, grad = soap_tensors(case, DEVICE)
    needs_x = x.dtype != torch.uint8
    y_oracle, dx_oracle, dw_oracle = oracle(case, x, weights, grad)
    leaves = [w.requires_grad_() for w in weights]
    x.requires_grad_(needs_x)
    before = launches()
    normalize = None if needs_x else NORMALIZE
    settings = (case.parts, case.sizes, case.precision, normalize, case.out, case.channels_last, "cuda", case.centred)
    y = soap(x, leaves, *settings)
    if case.parts:
        assert launches() - before == (1 if case in WIDES else 2)
    assert relative(y, y_oracle) < case.y_tolerance
    if not case.parts:
        return
    y.backward(grad)
    for found, expected in zip(leaves, dw_oracle, strict=True):
        assert found.grad is not None
        assert relative(found.grad, expected) < case.weight_tolerance
    if needs_x:
        assert x.grad is not None
        assert relative(x.grad, dx_oracle) < case.y_tolerance


@pytest.mark.parametrize("case", [*FUSIONS, *WIDE_FUSIONS], ids=lambda c: c.name)
def test_fuse_priors_agrees_with_the_oracle(case: FusionCase) -> None:
    x, given, grad = fusion_tensors(case, DEVICE)
    y_oracle, gradients = oracle_fusion(case, x, given, grad)
    leaves = [None if g is None else g.requires_grad_() for g in (x, *given)]
    y = fuse_priors(*leaves, case.multiplicative, case.offset, case.interleaved, case.precision, "cuda")
    assert relative(y, y_oracle) < case.y_tolerance
    y.backward(grad)
    for leaf, expected in zip(leaves, gradients, strict=True):
        if leaf is not None:
            assert leaf.grad is not None
            assert relative(leaf.grad, expected) < case.weight_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 24, 224, 224), (2, 3, 5, 7), (1, 2, 1, 9), (1, 1, 1, 1)])
def test_window_sums_agree_with_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    expected = backends.get("reference").window_sums(x.double())
    assert (window_sums(x, "cuda").double() - expected).abs().max() < 1e-5 * max(1, shape[2] * shape[3]) ** 0.5 * 10
    grad = torch.randn((*shape[:2], 3, 3), device=DEVICE)
    leaf = x.requires_grad_()
    window_sums(leaf, "cuda").backward(grad)
    assert leaf.grad is not None
    assert (
        relative(leaf.grad, backends.get("reference").window_sums_backward(grad.double(), x.detach().double())) < 8e-3
    )


def test_two_runs_give_the_same_bits() -> None:
    x, weights, grad = soap_tensors(LARGE[0], DEVICE)
    leaves = [w.requires_grad_() for w in weights]
    runs: list[list[Tensor]] = []
    for _ in range(2):
        y = soap(x, leaves, backend="cuda")
        runs.append([y, *torch.autograd.grad(y, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    x, weights, _ = soap_tensors(LARGE[0], DEVICE)
    expected = soap(x, weights, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        soap(x, weights, backend="cuda")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = soap(x, weights, backend="cuda")
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_torch_compile_takes_it_whole() -> None:
    x, weights, grad = soap_tensors(SOAPS[0], DEVICE)
    leaves = [w.requires_grad_() for w in weights]
    compiled = torch.compile(lambda v, w: soap(v, w, backend="cuda") * 2, fullgraph=True)
    y = compiled(x, leaves)
    assert torch.equal(y, soap(x, leaves, backend="cuda") * 2)
    y.backward(grad)
    assert all(w.grad is not None for w in leaves)


def test_memory_saved_for_backward_is_x_and_little_more() -> None:
    x, weights, _ = soap_tensors(LARGE[0], DEVICE)
    leaves = [w.requires_grad_() for w in weights]
    saved = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        soap(x, leaves, backend="cuda")
    assert saved <= 1.02 * x.numel() * x.element_size()


def test_large_offsets_do_not_wrap() -> None:
    """The last clip lies beyond 2^31 elements."""
    clips = 2**31 // (24 * 512 * 512) + 2
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of device memory")
    x = torch.zeros(clips, 8, 3, 512, 512, device=DEVICE, dtype=torch.bfloat16)
    x[-1].normal_()
    _, weights, _ = soap_tensors(SOAPS[0], DEVICE)
    weights = [w.detach() for w in weights]
    y = soap(x, weights, backend="cuda")
    assert torch.equal(y[-1:], soap(x[-1:].clone(), weights, backend="cuda"))
