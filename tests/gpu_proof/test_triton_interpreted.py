"""The Triton kernels run by Triton's interpreter on the CPU, held to the float64 equations.

``TRITON_INTERPRET=1`` has to be set before Triton is imported: test_triton.py runs this file in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from published import check_in_single_precision
from soap_kernels import equations, op
from soap_kernels.backends import Fusion, Priors, reference
from soap_kernels.compat import TriplePrior
from soap_kernels.frames import as_float
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py with TRITON_INTERPRET=1"
)

MEAN, STD = (0.45, 0.4, 0.5, 0.3), (0.2, 0.25, 0.22, 0.3)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def check(
    shape: tuple[int, int, int, int, int],
    sizes: Sequence[int] = (1, 2),
    parts: Sequence[str] = PARTS,
    dtype: torch.dtype = torch.float32,
    precision: str = "default",
    out: torch.dtype | None = None,
    channels_last: bool = False,
    view: str = "",
    needs_x: bool = True,
    tolerance: float = 1e-5,
    centred: bool = False,
) -> None:
    """Forward and backward through the op's autograd, as a user meets them."""
    torch.manual_seed(0)
    module = SOAP(shape[1], shape[2], sizes, 4, parts=parts)
    weights = [w.detach().requires_grad_() for w in module.weights().flatten()]
    mean, std = (MEAN[: shape[2]], STD[: shape[2]]) if dtype == torch.uint8 else (None, None)
    x = torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
    if view == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif view == "every other column":
        x = torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    needs_x = needs_x and x.is_floating_point()
    x.requires_grad_(needs_x)
    normalize = None if mean is None else (mean, std)
    y = op.soap(x, weights, parts, sizes, precision, normalize, out, channels_last, "triton", centred)
    exact = [w.detach().double().requires_grad_() for w in weights]
    frames = as_float(x.detach(), mean, std).double().requires_grad_()
    expected = equations.soap(frames, Weights.unflatten(exact, parts, len(sizes)), sizes, centred)
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(y.dtype, 0.0)
    assert worst(y, expected) < tolerance + rounding
    if channels_last:
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad)
    wanted = torch.autograd.grad(expected, [frames, *exact], grad.double())
    for w, gradient in zip(weights, wanted[1:], strict=True):
        assert w.grad is not None
        assert worst(w.grad, gradient) < tolerance + rounding
    if needs_x:
        assert x.grad is not None
        assert worst(x.grad, wanted[0]) < tolerance + rounding


def test_all_parts_in_two_launches_and_four() -> None:
    from soap_kernels.backends.triton.plan import LAUNCHES

    LAUNCHES.clear()
    check((1, 3, 2, 3, 9), needs_x=False)
    assert LAUNCHES == {"prepare": 1, "fuse": 1, "sweep": 1, "weigh": 1, "reduce": 1, "finish": 1}


def test_uint8_frames_in_channels_last() -> None:
    check((1, 3, 3, 2, 16), sizes=(1,), dtype=torch.uint8, channels_last=True)


def test_bf16_frames_with_any_strides_and_one_part() -> None:
    check((2, 2, 3, 3, 5), parts=("3dem",), dtype=torch.bfloat16, view="every other column")


def test_frames_need_a_gradient() -> None:
    check((1, 2, 1, 2, 5), sizes=(1,))


@pytest.mark.parametrize("parts", [PARTS, ("hmem",), ("cwem",)], ids="+".join)
def test_centred(parts: tuple[str, ...]) -> None:
    check((1, 2, 2, 2, 5), sizes=(1,), parts=parts, centred=True)


def test_centred_uint8_frames_and_feature_maps() -> None:
    check((1, 2, 3, 2, 5), sizes=(1,), dtype=torch.uint8, centred=True)
    check((1, 4, 16, 3, 5), sizes=(1,), centred=True)


def check_like_the_reference(run: Callable[[list[Tensor], str], Tensor], inputs: Sequence[Tensor], size: float) -> None:
    """Gradients of a loss as large as ``size``: finite where the reference's are, and equal to them."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [v.detach().clone().requires_grad_() for v in inputs]
        y = run(leaves, backend)
        found.append(torch.autograd.grad(y, leaves, torch.full_like(y, size)))
    for gradient, expected in zip(*found, strict=True):
        finite = expected.isfinite()
        assert torch.equal(gradient.isfinite(), finite)
        if finite.any():
            assert worst(gradient[finite], expected[finite].double()) < 5e-3


@pytest.mark.parametrize(
    ("shape", "out", "size"),
    [((1, 4, 3, 5, 6), torch.float32, 6e5), ((1, 4, 3, 5, 6), torch.float16, 6e4), ((1, 3, 64, 4, 4), None, 6e3)],
    ids=["frames, fp16 to fp32", "frames, fp16", "features, fp16"],
)
def test_gradients_of_fp16_frames_overflow_no_sooner_than_the_reference(
    shape: tuple[int, int, int, int, int], out: torch.dtype | None, size: float
) -> None:
    """A loss scaler's gradients: what lies between them and those of the weights is not kept in fp16."""
    torch.manual_seed(0)
    weights = SOAP(*shape[1:3], (1, 2)).weights().flatten()

    def run(leaves: list[Tensor], backend: str) -> Tensor:
        return op.soap(leaves[0], leaves[1:], tuple_sizes=(1, 2), out_dtype=out, backend=backend)

    check_like_the_reference(run, [torch.randn(shape).half(), *weights], size)


def test_gradients_of_fp16_frames_that_are_multiplied_overflow_no_sooner_than_the_reference() -> None:
    torch.manual_seed(0)
    stencil, x = torch.randn(1, 1, 3, 3, 3) / 50, 30 * torch.randn(1, 4, 3, 5, 6).half()

    def run(leaves: list[Tensor], backend: str) -> Tensor:
        return op.fuse_priors(leaves[0], leaves[1], multiplicative=True, backend=backend)

    check_like_the_reference(run, [x, stencil], 6e4)


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("channels", [3, 8])
def test_fuse_priors_interleaved(channels: int, multiplied: bool) -> None:
    torch.manual_seed(0)
    shape = (1, 2 if channels == 3 else 8, channels, 2, 5)
    planes = shape[1] * channels
    x, grad = torch.randn(shape), torch.randn(shape)
    inputs = (torch.randn(1, 1, 3, 3, 3), torch.rand(shape[:3]), torch.randn(planes, planes, 3, 3), torch.randn(planes))
    settings = (multiplied, 4.0, True, "default", "triton")
    y = torch.ops.soap_kernels.fuse_priors(x, *inputs, *settings)
    exact = Priors(*(v.double() for v in inputs))
    fusion = Fusion(multiplied, 4.0, True, "default")
    assert worst(y, reference.BACKEND.fuse_priors(x.double(), exact, fusion)) < 1e-5
    needs = [True] * 5
    found = torch.ops.soap_kernels.fuse_priors_backward(grad, x, *inputs, *settings[:4], needs, "triton")
    wanted = reference.BACKEND.fuse_priors_backward(grad.double(), x.double(), exact, fusion, needs)
    assert max(worst(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-5


def test_the_authors_module_equals_the_published_equations() -> None:
    from soap_kernels.backends.triton.plan import LAUNCHES

    LAUNCHES.clear()
    check_in_single_precision(TriplePrior(backend="triton"), torch.randn(8, 3, 2, 5))
    assert sum(LAUNCHES.values()) > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (6, 9)], ids=str)
def test_window_sums_and_their_adjoint(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size).movedim(1, -1).contiguous().movedim(-1, 1)
    assert worst(torch.ops.soap_kernels.window_sums(x, "triton"), reference.BACKEND.window_sums(x.double())) < 1e-5
    grad = torch.randn(2, 3, 3, 3)
    found = torch.ops.soap_kernels.window_sums_backward(grad, x, "triton")
    assert worst(found, reference.BACKEND.window_sums_backward(grad.double(), x.double())) < 1e-5


def test_empty_batch() -> None:
    module = SOAP(3, 2, (1,), 4, backend="triton")
    y = module(torch.empty(0, 3, 2, 4, 4))
    y.sum().backward()
    assert y.shape == (0, 3, 2, 4, 4)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "sizes", "parts", "dtype", "view"),
    [
        ((2, 8, 3, 3, 30), (1, 2, 3), PARTS, torch.float32, "channels_last"),
        ((1, 5, 4, 2, 16), (2, 4), PARTS, torch.float32, ""),
        ((1, 3, 3, 2, 9), (1, 2), ("3dem", "hmem"), torch.float16, ""),
        ((2, 3, 2, 5, 7), (1, 2), ("cwem",), torch.float32, "every other column"),
        ((1, 4, 3, 1, 1), (1, 3), ("hmem",), torch.float32, ""),
        ((1, 4, 4, 2, 9), (1,), PARTS, torch.uint8, ""),
        ((1, 4, 16, 5, 7), (1, 2), PARTS, torch.float32, "channels_last"),
        ((1, 3, 1, 9, 70), (1,), ("3dem", "cwem"), torch.bfloat16, ""),
        ((3, 2, 1, 5, 80), (1,), PARTS, torch.float32, ""),  # runs of tiles go on in the next column and clip
    ],
    ids=str,
)
def test_general_shapes(
    shape: tuple[int, int, int, int, int], sizes: tuple[int, ...], parts: tuple[str, ...], dtype: torch.dtype, view: str
) -> None:
    check(shape, sizes, parts, dtype, view=view)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["strict", "fast"])
def test_precisions(precision: str) -> None:
    check((1, 3, 2, 3, 9), (1,), precision=precision)
