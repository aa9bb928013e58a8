"""The folded reference and its recomputing backward against the equations and their autograd, in float64."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import soap_kernels
from soap_kernels import SOAP
from soap_kernels.backends import reference
from soap_kernels.weights import PARTS, Weights

SUBSETS = list(chain.from_iterable(combinations(PARTS, n) for n in range(4)))
TUPLE_SETS = [(1,), (2,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
SHAPES = [(2, 8, 3, 6, 7), (1, 5, 1, 1, 1), (3, 7, 2, 1, 9), (2, 6, 5, 5, 2)]


def forward_and_gradients(module: SOAP, backend: str, x: Tensor, grad: Tensor) -> list[Tensor]:
    module.backend = backend
    x = x.clone().requires_grad_()
    y = module(x)
    found = torch.autograd.grad(y, [x, *module.parameters()], grad)
    return [y.detach(), *found]


def check(module: SOAP, x: Tensor) -> None:
    grad = torch.randn_like(x)
    for module.centred in (False, True):
        for ours, oracle in zip(
            forward_and_gradients(module, "reference", x, grad),
            forward_and_gradients(module, "equations", x, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, oracle)


@pytest.mark.parametrize("parts", SUBSETS[1:], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_equations_for_every_subset_of_parts(parts: tuple[str, ...], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(SOAP(shape[1], shape[2], (1, 2), 4, parts).double(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("tuple_sizes", TUPLE_SETS, ids=str)
@pytest.mark.parametrize("frames", [5, 8])
def test_reference_equals_equations_for_every_set_of_tuple_sizes(tuple_sizes: tuple[int, ...], frames: int) -> None:
    torch.manual_seed(1)
    check(SOAP(frames, 3, tuple_sizes).double(), torch.randn(2, frames, 3, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_reference_is_right_for_frames_that_are_not_contiguous(layout: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 8, 3, 6, 7, dtype=torch.float64)
    x = {
        "transposed": x.transpose(3, 4).contiguous().transpose(3, 4),
        "sliced": torch.randn(3, 16, 3, 8, 9, dtype=torch.float64)[:, ::2, :, 1:7, 2:],
        "expanded": x[:1].expand(3, -1, -1, -1, -1),
        "channels_last": x.movedim(2, -1).contiguous().movedim(-1, 2),
    }[layout]
    assert not x.is_contiguous()
    check(SOAP().double(), x)


def test_the_reference_as_plain_code_is_differentiable_and_passes_gradcheck() -> None:
    torch.manual_seed(3)
    module = SOAP(3, 2, (1, 2), 2).double()
    x = torch.randn(1, 3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    flat = [w.detach().requires_grad_() for w in module.weights().flatten()]

    def call(x: Tensor, *flat: Tensor) -> Tensor:
        return reference.soap(x, Weights.unflatten(flat, PARTS, 2), (1, 2))

    assert torch.autograd.gradcheck(call, (x, *flat))


def test_the_op_on_the_reference_passes_gradcheck() -> None:
    torch.manual_seed(4)
    module = SOAP(3, 2, (1, 2), 2).double()
    x = torch.randn(1, 3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    flat = [w.detach().requires_grad_() for w in module.weights().flatten()]
    assert torch.autograd.gradcheck(
        lambda x, *w: soap_kernels.soap(x, w, tuple_sizes=(1, 2), backend="reference"), (x, *flat)
    )


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 1, 1), (2, 2, 1, 4), (1, 2, 3, 1), (1, 1, 2, 2)])
def test_window_sums_are_what_a_conv_before_a_global_pool_needs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, shape[1], 3, 3, dtype=torch.float64)
    pooled = torch.einsum("nchw,ochw->no", soap_kernels.window_sums(x, "reference"), weight)
    oracle = F.conv2d(x, weight, padding=1).sum((2, 3))
    torch.testing.assert_close(pooled, oracle)
    assert torch.autograd.gradcheck(lambda v: soap_kernels.window_sums(v, "reference"), (x,))
    grad = torch.randn_like(oracle)
    torch.testing.assert_close(torch.autograd.grad(pooled, x, grad)[0], torch.autograd.grad(oracle, x, grad)[0])


def plain_fuse(
    x: Tensor,
    stencil: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplicative: bool,
    offset: float,
    interleaved: bool,
) -> Tensor:
    t, c = x.shape[1:3]
    total = torch.zeros_like(x)
    if stencil is not None:
        planes = x.flatten(1, 2)
        slots = [planes[:, s::t] if interleaved else planes[:, s * c : (s + 1) * c] for s in range(t)]
        means = torch.stack([s.mean(1) for s in slots], 1)
        total = total + torch.sigmoid(F.conv3d(means[:, None], stencil, padding=1)).transpose(1, 2)
    if gate is not None:
        total = total + gate[..., None, None]
    if weight is not None:
        total = total + torch.sigmoid(F.conv2d(x.flatten(1, 2), weight, bias, padding=1)).view(x.shape)
    return x * (offset + total) if multiplicative else x + offset + total


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("given", ["sgwb", "s", "g", "w", "gwb", "sg", "sw"])
def test_fuse_priors_equals_plain_ops_forward_and_backward(multiplicative: bool, interleaved: bool, given: str) -> None:
    torch.manual_seed(6)
    b, t, c = 2, 4, 3
    x = torch.randn(b, t, c, 5, 4, dtype=torch.float64, requires_grad=True)
    shapes = {"s": (1, 1, 3, 3, 3), "g": (b, t, c), "w": (t * c, t * c, 3, 3), "b": (t * c,)}
    tensors = [
        torch.randn(shape, dtype=torch.float64).requires_grad_() if name in given else None
        for name, shape in shapes.items()
    ]
    ours = soap_kernels.fuse_priors(x, *tensors, multiplicative, 4.0, interleaved, backend="reference")
    oracle = plain_fuse(x, *tensors, multiplicative, 4.0, interleaved)
    torch.testing.assert_close(ours, oracle)
    inputs = [x, *(v for v in tensors if v is not None)]
    grad = torch.randn_like(x)
    for g, o in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(oracle, inputs, grad), strict=True):
        torch.testing.assert_close(g, o)


def test_only_the_gradients_asked_for_are_computed() -> None:
    x = torch.randn(1, 4, 3, 5, 5)
    gate = torch.rand(1, 4, 3, requires_grad=True)
    weight = torch.randn(12, 12, 3, 3)
    soap_kernels.fuse_priors(x, None, gate, weight, backend="reference").sum().backward()
    torch.testing.assert_close(gate.grad, torch.full((1, 4, 3), 25.0))
