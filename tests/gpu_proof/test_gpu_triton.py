"""Every op of the Triton backend on a GPU, held to the float64 equations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from soap_kernels import equations
from soap_kernels.backends import Fusion, Needs, Options, Priors, reference
from soap_kernels.frames import as_float
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# (frames, channels, tuple sizes, height, width)
SHAPES = [
    (8, 3, (1, 2, 3), 224, 224),
    (8, 3, (1, 2, 3), 37, 51),
    (8, 3, (1,), 1, 1),
    (2, 1, (1,), 5, 3),
    (5, 4, (2, 4), 19, 64),
    (16, 3, (1, 2), 33, 48),
    (4, 2, (1, 3), 1, 300),
    (8, 3, (1, 2, 3), 300, 1),
    (4, 16, (1, 2), 14, 14),
]
# Of y and of the gradients relative to the largest: rounding of the products, and of y itself in half precision.
TOLERANCE = {
    ("default", torch.float32): (1e-4, 1e-4),
    ("strict", torch.float32): (1e-5, 1e-5),
    ("fast", torch.float32): (5e-3, 5e-3),
    ("default", torch.float16): (4e-3, 4e-3),
    ("default", torch.bfloat16): (3e-2, 2e-2),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def backend() -> Any:
    from soap_kernels.backends.triton import BACKEND

    return BACKEND


def weights_of(frames: int, channels: int, sizes: Sequence[int], parts: Sequence[str] = PARTS) -> list[Tensor]:
    return [w.detach().cuda() for w in SOAP(frames, channels, sizes, parts=parts).weights().flatten()]


def options_of(
    parts: Sequence[str],
    sizes: Sequence[int],
    precision: str,
    out: torch.dtype,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    channels_last: bool = False,
    centred: bool = False,
) -> Options:
    offset = -0.5 * len(parts) if centred else 0.0
    return Options(tuple(parts), tuple(sizes), precision, mean, std, out, channels_last, offset)


def worst(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    assert not torch.isnan(difference)
    return float(difference / expected.double().abs().max().clamp(min=1e-3))


def check(x: Tensor, weights: list[Tensor], options: Options, tolerance: tuple[float, float], needs_x: bool) -> None:
    y, prepared = backend().soap_forward(x, weights, options)
    exact = [w.double().requires_grad_() for w in weights]
    frames = as_float(x, options.mean, options.std).double().requires_grad_()
    sizes = options.tuple_sizes
    expected = equations.soap(frames, Weights.unflatten(exact, options.parts, len(sizes)), sizes, options.offset != 0)
    assert worst(y, expected) < tolerance[0]
    grad = torch.randn(y.shape, device="cuda").to(y.dtype)
    dx, dweights = backend().soap_backward(grad, x, prepared, weights, options, Needs(needs_x, True))
    wanted = torch.autograd.grad(expected, [frames, *exact], grad.double())
    for found, gradient in zip(dweights, wanted[1:], strict=True):
        assert worst(found, gradient) < tolerance[1]
    if needs_x:
        assert worst(dx, wanted[0]) < max(tolerance)


@pytest.mark.parametrize(("precision", "dtype"), TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soap_equals_the_equations(
    shape: tuple[int, int, tuple[int, ...], int, int], precision: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    frames, channels, sizes, height, width = shape
    x = torch.randn(2, frames, channels, height, width, device="cuda").to(dtype)
    options = options_of(PARTS, sizes, precision, dtype)
    check(x, weights_of(frames, channels, sizes), options, TOLERANCE[precision, dtype], True)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("parts", [p for n in range(4) for p in itertools.combinations(PARTS, n)], ids=str)
def test_any_subset_of_the_parts_centred_or_not(parts: tuple[str, ...], centred: bool) -> None:
    x = torch.randn(2, 8, 3, 40, 56, device="cuda")
    options = options_of(parts, (1, 2, 3), "default", x.dtype, centred=centred)
    check(x, weights_of(8, 3, (1, 2, 3), parts), options, (1e-4, 1e-4), True)


def test_centred_uint8_frames_and_feature_maps() -> None:
    frames = torch.randint(0, 256, (2, 8, 3, 64, 96), dtype=torch.uint8, device="cuda")
    normalised = options_of(PARTS, (1, 2, 3), "default", torch.float32, MEAN, STD, True, centred=True)
    check(frames, weights_of(8, 3, (1, 2, 3)), normalised, (1e-4, 1e-4), False)
    features = torch.randn(2, 4, 16, 14, 14, device="cuda")
    options = options_of(PARTS, (1, 2), "default", torch.float32, centred=True)
    check(features, weights_of(4, 16, (1, 2)), options, (1e-4, 1e-4), True)


@pytest.mark.parametrize("view", ["channels_last", "time_last", "sliced", "expanded"])
def test_any_strides(view: str) -> None:
    x = {
        "channels_last": lambda: torch.randn(2, 8, 40, 56, 3, device="cuda").movedim(-1, 2),
        "time_last": lambda: torch.randn(2, 3, 40, 56, 8, device="cuda").movedim(-1, 1),
        "sliced": lambda: torch.randn(2, 8, 3, 40, 113, device="cuda")[..., 1::2],
        "expanded": lambda: torch.randn(1, 8, 3, 40, 56, device="cuda").expand(2, -1, -1, -1, -1),
    }[view]()
    check(x, weights_of(8, 3, (1, 2, 3)), options_of(PARTS, (1, 2, 3), "default", x.dtype), (1e-4, 1e-4), True)


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (33, 45)], ids=str)
def test_uint8_frames_are_normalised_on_the_way(out: torch.dtype, channels_last: bool, size: tuple[int, int]) -> None:
    x = torch.randint(0, 256, (2, 8, 3, *size), dtype=torch.uint8, device="cuda")
    weights = weights_of(8, 3, (1, 2, 3))
    options = options_of(PARTS, (1, 2, 3), "default", out, MEAN, STD, channels_last)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[out]
    check(x, weights, options, (tolerance, tolerance), False)
    y, _ = backend().soap_forward(x, weights, options)
    if channels_last:
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()


def test_same_input_gives_the_same_bits() -> None:
    x = torch.randn(6, 8, 3, 112, 112, device="cuda")
    weights, options = weights_of(8, 3, (1, 2, 3)), options_of(PARTS, (1, 2, 3), "default", x.dtype)
    grad = torch.randn_like(x)

    def run() -> list[Tensor]:
        y, prepared = backend().soap_forward(x, weights, options)
        dx, dweights = backend().soap_backward(grad, x, prepared, weights, options, Needs(True, True))
        return [y, dx, *dweights]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_every_output_is_written() -> None:
    x = torch.randn(3, 8, 3, 50, 70, device="cuda")
    weights, options = weights_of(8, 3, (1, 2, 3)), options_of(PARTS, (1, 2, 3), "default", x.dtype)
    torch.full((40 * x.numel(),), float("nan"), device="cuda")  # freed at once: what is allocated next starts as NaN
    y, prepared = backend().soap_forward(x, weights, options)
    dx, dweights = backend().soap_backward(y, x, prepared, weights, options, Needs(True, True))
    assert all(torch.isfinite(v).all() for v in [y, dx, *dweights])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("given", ["stencil gate weight bias", "stencil", "gate", "weight", "stencil gate"])
@pytest.mark.parametrize("channels", [3, 16])
def test_fuse_priors_equals_the_reference(
    given: str, multiplicative: bool, interleaved: bool, channels: int
) -> None:  # fmt: skip
    torch.manual_seed(0)
    b, t, height, width = 2, 6, 35, 48
    x = torch.randn(b, t, channels, height, width, device="cuda")
    planes = t * channels
    made = {
        "stencil": torch.randn(1, 1, 3, 3, 3, device="cuda") / 5,
        "gate": torch.rand(b, t, channels, device="cuda"),
        "weight": torch.randn(planes, planes, 3, 3, device="cuda") / (3 * planes**0.5),
        "bias": torch.randn(planes, device="cuda"),
    }
    inputs = Priors(*(made[name] if name in given.split() else None for name in made))
    fusion = Fusion(multiplicative, 4.0, interleaved, "default")
    exact = Priors(*(None if v is None else v.double() for v in inputs))
    expected = reference.BACKEND.fuse_priors(x.double(), exact, fusion)
    assert worst(backend().fuse_priors(x, inputs, fusion), expected) < 1e-4
    grad = torch.randn_like(x)
    needs = [True, *(v is not None for v in inputs)]
    found = backend().fuse_priors_backward(grad, x, inputs, fusion, needs)
    wanted = reference.BACKEND.fuse_priors_backward(grad.double(), x.double(), exact, fusion, needs)
    for a, e in zip(found, wanted, strict=True):
        if e is not None:
            assert a.shape == e.shape
            assert worst(a, e) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(224, 224), (1, 1), (1, 7), (9, 1), (33, 65)], ids=str)
def test_window_sums_equal_the_reference(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, *size, device="cuda").to(dtype)
    expected = reference.BACKEND.window_sums(x.double())
    assert worst(backend().window_sums(x), expected) < 1e-4
    assert worst(backend().window_sums(x.movedim(1, -1).contiguous().movedim(-1, 1)), expected) < 1e-4
    grad = torch.randn(3, 5, 3, 3, device="cuda")
    wanted = reference.BACKEND.window_sums_backward(grad.double(), x.double())
    assert worst(backend().window_sums_backward(grad, x), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_clips_beyond_32_bit_offsets() -> None:
    x = torch.zeros(1, 1, 1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(1, 8, 3, 9600, 9600).contiguous()
    x[:, :, :, -64:] = torch.randn(1, 8, 3, 64, 9600, device="cuda")
    weights, options = weights_of(8, 3, (1, 2, 3)), options_of(PARTS, (1, 2, 3), "default", x.dtype)
    y, _ = backend().soap_forward(x, weights, options)
    expected = reference.soap(x[..., -64:, :].float(), Weights.unflatten(weights, PARTS, 3), (1, 2, 3))
    difference = (y[..., -32:, :].float() - expected[..., -32:, :]).abs()
    # The gate differs, since it averages the whole clip: a constant per plane.
    assert float((difference - difference.mean((3, 4), keepdim=True)).abs().max()) < 5e-2


def test_module_compiles_without_a_graph_break_and_trains() -> None:
    module = SOAP(backend="triton").cuda()
    x = torch.randn(2, 8, 3, 32, 32, device="cuda")
    plain = module(x)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x), plain)
    compiled(x).square().sum().backward()
    compiled_gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    module(x).square().sum().backward()
    gradients = [p.grad for p in module.parameters()]
    assert len(compiled_gradients) == len(gradients)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(compiled_gradients, gradients, strict=True))


def test_backward_saves_x_and_little_else() -> None:
    x = torch.randn(6, 8, 3, 224, 224, device="cuda")
    module = SOAP(backend="triton").cuda()
    module(x)
    before = torch.cuda.memory_allocated()
    y = module(x)
    kept = torch.cuda.memory_allocated() - before - y.numel() * 4
    assert kept < 0.02 * x.numel() * 4


def test_launches() -> None:
    from soap_kernels.backends.triton.plan import LAUNCHES

    x = torch.randn(2, 8, 3, 32, 32, device="cuda")
    module = SOAP(backend="triton").cuda()
    module(x).sum().backward()
    LAUNCHES.clear()
    y = module(x)
    assert LAUNCHES.total() <= 2
    LAUNCHES.clear()
    y.sum().backward()
    assert LAUNCHES.total() <= 4


def test_current_stream_is_used() -> None:
    x = torch.randn(2, 8, 3, 64, 64, device="cuda")
    weights, options = weights_of(8, 3, (1, 2, 3)), options_of(PARTS, (1, 2, 3), "default", x.dtype)
    expected, _ = backend().soap_forward(x, weights, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = backend().soap_forward(x, weights, options)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
