"""What every backend's op must be to PyTorch: schema, fake, autograd, compile, autocast, memory saved, misuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import soap_kernels
from soap_kernels import CWEM, HMEM, SOAP, ThreeDEM, backends, plug
from soap_kernels.compat import TriplePrior
from soap_kernels.weights import PARTS

OPS = torch.ops.soap_kernels
PRESENT = [name for name, why in backends.status("cpu").items() if why is None]


@pytest.fixture(params=PRESENT)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["paper", "centred"])
def centred(request: pytest.FixtureRequest) -> bool:
    return request.param


def soap_arguments(backend: str, **changes: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    arguments = {
        "x": torch.randn(2, 8, 3, 6, 7, requires_grad=True),
        "weights": SOAP().weights().flatten(),
        "parts": list(PARTS),
        "tuple_sizes": [1, 2, 3],
        "precision": "default",
        "mean": None,
        "std": None,
        "out_dtype": None,
        "out_channels_last": False,
        "offset": 0.0,
        "backend": backend,
    }
    return tuple((arguments | changes).values())


def test_soap_passes_opcheck(backend: str) -> None:
    torch.library.opcheck(OPS.soap, soap_arguments(backend))
    torch.library.opcheck(OPS.soap, soap_arguments(backend, offset=-1.5))


def test_soap_passes_opcheck_on_uint8_frames_in_channels_last(backend: str) -> None:
    frames = torch.randint(0, 256, (2, 8, 3, 6, 7), dtype=torch.uint8)
    arguments = soap_arguments(
        backend, x=frames, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2], out_dtype=torch.bfloat16, out_channels_last=True
    )
    torch.library.opcheck(OPS.soap, arguments)


def test_window_sums_and_fuse_priors_pass_opcheck(backend: str) -> None:
    torch.library.opcheck(OPS.window_sums, (torch.randn(2, 3, 5, 4, requires_grad=True), backend))
    x, gate = torch.randn(2, 4, 3, 5, 4, requires_grad=True), torch.rand(2, 4, 3, requires_grad=True)
    stencil, weight = torch.randn(1, 1, 3, 3, 3, requires_grad=True), torch.randn(12, 12, 3, 3, requires_grad=True)
    torch.library.opcheck(OPS.fuse_priors, (x, stencil, gate, weight, None, True, 4.0, True, "default", backend))


def test_fullgraph_compile_equals_eager_forward_and_backward_for_any_batch(backend: str, centred: bool) -> None:
    module = SOAP(backend=backend, centred=centred)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 8, 3, 9, 8)
        eager = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        ours = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
        for e, o in zip(eager, ours, strict=True):
            torch.testing.assert_close(o, e)


def test_autocast_leaves_the_frames_dtype_and_values(backend: str, centred: bool) -> None:
    module, x = SOAP(backend=backend, centred=centred), torch.randn(1, 8, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, module(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_frames_with_fp32_weights_give_half_frames_and_fp32_gradients(
    backend: str, centred: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    module = SOAP(backend=backend, centred=centred)
    x = torch.randn(2, 8, 3, 9, 9).to(dtype).requires_grad_()
    y = module(x)
    oracle = SOAP(backend="equations", centred=centred).double()
    oracle.load_state_dict(module.state_dict())
    exact = oracle(x.detach().double())
    assert y.dtype == dtype
    # Accumulation is fp32: what is lost is the rounding of y alone.
    assert ((y.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_get_gradients_of_their_own_dtype(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, 8, 8)
    flat = [w.detach().to(dtype).requires_grad_() for w in SOAP().weights().flatten()]
    wide = [w.detach().float().requires_grad_() for w in flat]
    y, expected = (soap_kernels.soap(x, weights, backend=backend) for weights in (flat, wide))
    torch.testing.assert_close(y, expected)
    pairs = zip(torch.autograd.grad(y.sum(), flat), torch.autograd.grad(expected.sum(), wide), strict=True)
    for found, exact in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-4)


def saved_bytes(module: SOAP, x: Tensor) -> int:
    held = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        if t.data_ptr() not in {p.data_ptr() for p in module.parameters()}:
            held += t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return held


def test_backward_saves_x_and_at_most_two_percent_beside_it(backend: str, centred: bool) -> None:
    x = torch.randn(4, 8, 3, 96, 96)
    assert saved_bytes(SOAP(backend=backend, centred=centred), x) <= 1.02 * x.nbytes


def test_centred_is_the_paper_s_form_less_one_half_for_each_part_with_the_same_gradients(backend: str) -> None:
    torch.manual_seed(0)
    for parts in (PARTS, ("3dem",), ("cwem",), ("hmem",), ("3dem", "hmem")):
        paper, centred = (SOAP(parts=parts, backend=backend, centred=form) for form in (False, True))
        centred.load_state_dict(paper.state_dict())
        x, grad = torch.randn(2, 8, 3, 9, 20, requires_grad=True), torch.randn(2, 8, 3, 9, 20)
        torch.testing.assert_close(centred(x), paper(x) - len(parts) / 2, rtol=0, atol=2e-6)
        found = [torch.autograd.grad(m(x), [x, *m.parameters()], grad) for m in (centred, paper)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_frames_that_need_no_gradient_get_none(backend: str) -> None:
    module, x = SOAP(backend=backend), torch.randn(2, 8, 3, 6, 6)
    y = module(x)
    y.sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("part", [ThreeDEM, CWEM, HMEM])
def test_a_part_alone_has_the_gradients_of_its_equations(backend: str, part: type[nn.Module]) -> None:
    """Without HMEM there is no tuple size: an empty list among the op's arguments."""
    torch.manual_seed(0)
    module, oracle = part(backend=backend), part(backend="equations")
    oracle.load_state_dict(module.state_dict())
    x, grad = torch.randn(2, 8, 3, 6, 6, requires_grad=True), torch.randn(2, 8, 3, 6, 6)
    found = [torch.autograd.grad(m(x), [x, *m.parameters()], grad) for m in (module, oracle)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_frozen_weights_still_pass_a_gradient_to_x(backend: str, centred: bool) -> None:
    module = SOAP(backend=backend, centred=centred).requires_grad_(False)
    oracle = SOAP(backend="equations", centred=centred).requires_grad_(False)
    oracle.load_state_dict(module.state_dict())
    grad = torch.randn(2, 8, 3, 6, 6)
    x = torch.randn(2, 8, 3, 6, 6, requires_grad=True)
    found = [torch.autograd.grad(m(x), x, grad)[0] for m in (module, oracle)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_double_backward_is_refused_with_its_reason(backend: str, centred: bool) -> None:
    module, x = SOAP(backend=backend, centred=centred), torch.randn(1, 8, 3, 5, 5, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What nobody wrote then shows at once."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(0, 4, 3, 6, 5), (2, 4, 3, 0, 5), (2, 4, 3, 6, 0)], ids=str)
def test_empty_batches_and_planes_sum_to_zero_and_give_zero_gradients(
    backend: str, centred: bool, shape: tuple[int, ...], fresh_memory_is_nan: None
) -> None:
    x = torch.empty(shape, requires_grad=True)
    module = SOAP(4, 3, backend=backend, centred=centred)
    planes = shape[1] * shape[2]
    priors = [
        torch.ones(s, requires_grad=True) for s in ((1, 1, 3, 3, 3), shape[:3], (planes, planes, 3, 3), (planes,))
    ]
    sums = soap_kernels.window_sums(x.flatten(0, 1), backend)
    results = (sums, soap_kernels.fuse_priors(x, *priors, backend=backend), module(x))
    assert sums.shape == (shape[0] * 4, 3, 3, 3)
    assert not sums.any()
    for y in results[1:]:
        assert y.shape == shape
    inputs = [x, *priors, *module.parameters()]
    for found, of in zip(torch.autograd.grad(sum(y.sum() for y in results), inputs), inputs, strict=True):
        assert found.shape == of.shape
        assert not found.any()


@pytest.mark.parametrize("out_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_uint8_frames_are_normalised_then_padded(
    backend: str, centred: bool, out_dtype: torch.dtype | None, channels_last: bool
) -> None:
    torch.manual_seed(2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    module = SOAP(
        backend=backend, centred=centred, normalize=(mean, std), out_dtype=out_dtype, out_channels_last=channels_last
    )
    oracle = SOAP(backend="equations", centred=centred).double()
    oracle.load_state_dict(module.state_dict())
    x = torch.randint(0, 256, (2, 8, 3, 9, 11), dtype=torch.uint8)
    normalised = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    exact = oracle(normalised)
    y = module(x)
    assert y.dtype == (out_dtype or torch.float32)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert y.flatten(0, 1).is_contiguous(memory_format=memory_format)
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=2e-5)
    grad = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, list(oracle.parameters()), grad)
    found = torch.autograd.grad(y, list(module.parameters()), grad.to(y.dtype))
    for o, e in zip(found, expected, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=3e-3 + 10 * eps, atol=float(3 * eps * e.abs().max()) + 1e-3)


MISUSE = {
    "rank": ({"x": torch.randn(8, 3, 6, 6)}, ValueError, r"x has shape \(8, 3, 6, 6\), expected \(B, T, C, H, W\)"),
    "dtype": ({"x": torch.zeros(1, 8, 3, 6, 6, dtype=torch.int32)}, TypeError, "x has dtype int32"),
    "uint8 without normalize": (
        {"x": torch.zeros(1, 8, 3, 6, 6, dtype=torch.uint8)},
        TypeError,
        "or uint8 with mean and std",
    ),
    "channels": ({"x": torch.randn(1, 8, 4, 6, 6)}, ValueError, r"cwem.expand.weight has shape \(16, 3, 1, 1\)"),
    "frames": ({"x": torch.randn(1, 9, 3, 6, 6)}, ValueError, r"hmem.restore.weight has shape \(8, 18\)"),
    "precision": ({"precision": "sloppy"}, ValueError, "precision is 'sloppy'"),
    "tuple sizes": ({"tuple_sizes": [1, 2, 8]}, ValueError, "below the 8 frames"),
    "order": ({"tuple_sizes": [3, 2, 1]}, ValueError, "distinct ascending"),
    "parts": ({"parts": ["hmem", "cwem"]}, ValueError, "in this order"),
    "count": ({"parts": ["cwem"]}, ValueError, "holds 19 tensors, expected 4"),
    "mean alone": ({"mean": [0.5, 0.5, 0.5]}, ValueError, "mean and std go together"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_names_the_argument_and_what_was_expected(case: str) -> None:
    changes, error, text = MISUSE[case]
    with pytest.raises(error, match=text):
        OPS.soap(*soap_arguments("reference", **changes))


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="backend 'cudnn' is unknown; there are auto"):
        OPS.soap(*soap_arguments("cudnn"))


@pytest.mark.parametrize("kind", ["ndarray", "torch.sparse_coo tensor", "torch._mkldnn tensor", "nested tensor"])
def test_what_is_no_dense_tensor_is_refused_at_every_door(kind: str) -> None:
    x = torch.randn(8, 3, 4, 4)
    made = {"ndarray": x.numpy(), "torch.sparse_coo tensor": x.to_sparse(), "torch._mkldnn tensor": x.to_mkldnn()}
    frames = made.get(kind, torch.nested.nested_tensor([x, x]))
    for door in (SOAP(), HMEM(), SOAP(variant="release"), TriplePrior(), soap_kernels.window_sums, plug(nn.ReLU())):
        with pytest.raises(TypeError, match=f"SOAP: x is a {kind}, expected a dense tensor"):
            door(frames)


def test_a_weight_on_another_device_is_named() -> None:
    weights = SOAP().weights().flatten()
    weights[0] = weights[0].to("meta")
    with pytest.raises(ValueError, match=r"three_dem.conv.weight is on meta, x on cpu"):
        OPS.soap(*soap_arguments("reference", weights=weights))


def test_float64_goes_to_the_reference_whatever_the_name(backend: str) -> None:
    assert backends.choose(backend, torch.zeros(1, dtype=torch.float64)).name == "reference"
    assert backends.choose(backend, torch.zeros(1), torch.float32, torch.float64).name == "reference"
    assert backends.choose(backend, torch.zeros(1), torch.float16).name == backend


@pytest.mark.parametrize("double", ["out_dtype", "weights", "priors"])
def test_float64_out_or_in_a_weight_is_served_and_has_gradients_of_its_own(backend: str, double: str) -> None:
    x = torch.randn(1, 8, 3, 6, 7, requires_grad=True)
    if double == "priors":
        gate = torch.rand(1, 8, 3, dtype=torch.float64, requires_grad=True)
        leaves, y = [x, gate], soap_kernels.fuse_priors(x, gate=gate, backend=backend)
    else:
        dtype = torch.float64 if double == "weights" else torch.float32
        leaves = [x, *(w.detach().to(dtype).requires_grad_() for w in SOAP().weights().flatten())]
        out = torch.float64 if double == "out_dtype" else None
        y = soap_kernels.soap(x, leaves[1:], out_dtype=out, backend=backend)
        expected = SOAP(backend="equations")
        expected.load_state_dict({k: w.float() for k, w in zip(expected.state_dict(), leaves[1:], strict=True)})
        torch.testing.assert_close(y.float(), expected(x), rtol=1e-5, atol=1e-5)
    assert y.dtype == (torch.float64 if double == "out_dtype" else torch.float32)
    for found, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)


def test_an_op_returns_no_memory_of_its_own_input(backend: str) -> None:
    x = torch.randn(1, 2, 3, 4, 5, requires_grad=True)
    for y in (
        OPS.soap(*soap_arguments(backend, x=x, weights=[], parts=[]))[0],
        soap_kernels.fuse_priors(x, backend=backend),
    ):
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
        grad = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(dx, grad)
        assert dx.data_ptr() != grad.data_ptr()


def test_fuse_priors_refuses_a_bias_without_its_weight() -> None:
    with pytest.raises(ValueError, match="bias is given without weight"):
        soap_kernels.fuse_priors(torch.randn(1, 2, 1, 3, 3), bias=torch.zeros(2))


def plain_window_sums(x: Tensor) -> Tensor:
    return F.unfold(x, 3, padding=1).sum(-1).view(*x.shape[:2], 3, 3)


@pytest.mark.parametrize("multiplicative", [False, True])
def test_the_sum_that_fuse_priors_adds_or_multiplies_with_starts_from_offset(
    backend: str, multiplicative: bool
) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(2, 4, 3, 5, 6), torch.rand(2, 4, 3)
    for offset, start in ((None, float(multiplicative)), (-1.5, -1.5), (0.25, 0.25)):
        found = soap_kernels.fuse_priors(x, gate=gate, multiplicative=multiplicative, offset=offset, backend=backend)
        total = start + gate[..., None, None]
        torch.testing.assert_close(found, x * total if multiplicative else x + total)


def plain_fuse_priors(x: Tensor, stencil: Tensor, gate: Tensor) -> Tensor:
    prior = torch.sigmoid(F.conv3d(x.mean(2)[:, None], stencil, padding=1))[:, 0, :, None]
    return x * (1.0 + gate[..., None, None] + prior)


def transformed() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each function, the same in plain PyTorch, and what both are called with."""
    torch.manual_seed(0)
    module, oracle, x = SOAP(4, 2, (1, 3), 3), SOAP(4, 2, (1, 3), 3, backend="equations"), torch.randn(1, 4, 2, 3, 4)
    names = list(module.state_dict())
    weights = tuple(w.detach() for w in module.weights().flatten())

    def soap(x: Tensor, *weights: Tensor) -> Tensor:
        return soap_kernels.soap(x, weights, tuple_sizes=(1, 3))

    def centred(x: Tensor, *weights: Tensor) -> Tensor:
        return soap_kernels.soap(x, weights, tuple_sizes=(1, 3), centred=True)

    def equations(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(oracle, dict(zip(names, weights, strict=True)), (x,))

    def fuse_priors(x: Tensor, stencil: Tensor, gate: Tensor) -> Tensor:
        return soap_kernels.fuse_priors(x, stencil, gate, multiplicative=True)

    priors = (x, torch.randn(1, 1, 3, 3, 3), torch.rand(1, 4, 2))
    return {
        "soap": (soap, equations, (x, *weights)),
        "centred soap": (centred, lambda *tensors: equations(*tensors) - 1.5, (x, *weights)),
        "window_sums": (soap_kernels.window_sums, plain_window_sums, (x[0],)),
        "fuse_priors": (fuse_priors, plain_fuse_priors, priors),
    }


@pytest.mark.parametrize("name", ["soap", "centred soap", "window_sums", "fuse_priors"])
def test_transforms_and_forward_mode_give_what_they_give_in_plain_pytorch(name: str) -> None:
    ours, plain, tensors = transformed()[name]
    every = tuple(range(len(tensors)))
    stacked, tangents = [torch.stack([t, 2 * t]) for t in tensors], tuple(torch.randn_like(t) for t in tensors)

    def found(function: Callable[..., Tensor]) -> list[Any]:
        def loss(*tensors: Tensor) -> Tensor:
            return function(*tensors).square().sum()

        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, tensors, tangents)
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
        return [
            torch.vmap(function)(*stacked),
            torch.func.grad(loss, every)(*tensors),
            torch.vmap(torch.func.grad(loss, every))(*stacked),
            torch.func.jacrev(function)(*tensors),
            torch.func.jacfwd(function)(*tensors),
            torch.func.hessian(loss)(*tensors),
            tangent,
        ]

    torch.testing.assert_close(found(ours), found(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(0, 4), (3, 0)])
def test_planes_without_pixels_have_zero_gradients_under_transforms(size: tuple[int, int]) -> None:
    module, x = SOAP(4, 2, (1, 3), 3), torch.zeros(1, 4, 2, *size)
    weights = dict(module.named_parameters())

    def energy(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        fused = soap_kernels.fuse_priors(x, weights["three_dem.conv.weight"])
        sums = soap_kernels.window_sums(x[0])
        return torch.func.functional_call(module, weights, (x,)).sum() + fused.sum() + sums.sum()

    found = torch.func.grad(energy, (0, 1))(weights, x)
    torch.testing.assert_close(found, ({name: torch.zeros_like(w) for name, w in weights.items()}, x))
    assert torch.vmap(module)(torch.stack([x, x])).shape == (2, *x.shape)
    assert torch.jit.trace(module, x)(x).shape == x.shape


def test_gradients_of_each_clip_and_an_ensemble_are_those_of_one_after_another(backend: str, centred: bool) -> None:
    torch.manual_seed(0)
    modules = [SOAP(backend=backend, centred=centred) for _ in range(2)]
    weights, _ = torch.func.stack_module_state(modules)
    x = torch.randn(3, 8, 3, 5, 6)

    def energy(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], weights, (clip[None],)).square().sum()

    each = torch.vmap(torch.vmap(torch.func.grad(energy), (None, 0)), (0, None))(weights, x)
    for m, module in enumerate(modules):
        for k in range(3):
            expected = torch.autograd.grad(module(x[k : k + 1]).square().sum(), list(module.parameters()))
            torch.testing.assert_close([g[m, k] for g in each.values()], list(expected), rtol=1e-4, atol=1e-4)


def test_what_autograd_alone_cannot_do_is_one_line_that_says_what_can(backend: str) -> None:
    x, module = torch.randn(1, 8, 3, 2, 2), SOAP(backend=backend)
    can = r"torch.func \(jacrev, hessian\) and SOAP\(backend=\"equations\"\)"
    for refused in (
        lambda: torch.autograd.functional.jacobian(module, x, vectorize=True),
        lambda: torch.autograd.functional.hvp(lambda x: module(x).sum(), x, x),
        lambda: torch.autograd.functional.jacobian(lambda x: soap_kernels.fuse_priors(x), x, vectorize=True),
    ):
        with pytest.raises(RuntimeError, match=can) as error:
            refused()
        assert "\n" not in str(error.value)


def test_backward_checks_what_it_is_given(backend: str) -> None:
    x, module = torch.randn(1, 8, 3, 6, 6), SOAP(backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        y = module(x)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"prepared has shape|dtype"):
        y.sum().backward()
    settings = [["3dem", "cwem", "hmem"], [1, 2, 3], "default", None, None, False, True, backend]
    weights = [w.detach() for w in module.weights().flatten()]
    with pytest.raises(ValueError, match=r"prepared has shape \(7,\) and dtype torch.float32 on cpu, expected the"):
        OPS.soap_backward(torch.ones_like(x), x, torch.empty(7), weights, *settings)
    with pytest.raises(ValueError, match=r"grad has shape \(1, 1, 1, 1, 1\) on cpu, expected x's \(1, 8, 3, 6, 6\)"):
        OPS.soap_backward(torch.ones(1, 1, 1, 1, 1), x, torch.empty(0), weights, *settings)
    fusion = [False, 0.0, False, "default", [False, False, True, False, False], backend]
    with pytest.raises(ValueError, match=r"fuse_priors_backward: grad has shape \(1, 1, 1, 1, 1\)"):
        OPS.fuse_priors_backward(torch.ones(1, 1, 1, 1, 1), x, None, torch.ones(1, 8, 3), None, None, *fusion)
    with pytest.raises(
        ValueError, match=r"window_sums_backward: grad has shape \(8, 3, 3\) on cpu, expected \(8, 3, 3, 3"
    ):
        OPS.window_sums_backward(torch.ones(8, 3, 3), x[0], backend)


def test_equations_is_no_backend_of_the_functions() -> None:
    with pytest.raises(ValueError, match=r"'equations' is unknown; there are auto, .*; equations is for the modules"):
        soap_kernels.window_sums(torch.randn(1, 1, 2, 2), backend="equations")
