"""The C++ backend on the CPU against the float64 equations, for every instruction set of this machine."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from soap_kernels import backends, equations, op
from soap_kernels.backends import Fusion, Priors, cpp, reference
from soap_kernels.frames import as_float
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights

WHY_ABSENT = cpp.BACKEND.why_absent(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_ABSENT is not None, reason=str(WHY_ABSENT))
ISAS = [] if WHY_ABSENT else cpp.isas()
SUBSETS = [s for n in range(1, 4) for s in itertools.combinations(PARTS, n)]

# Largest error of y on unit-scale frames, and relative (Frobenius) error of gradients, by dtype of x and y. The fp16
# and bf16 ones are the rounding of y itself (half a unit in the last place at |y| < 8).
TOLERANCE = {torch.float32: (5e-6, 2e-5), torch.float16: (4e-3, 1e-3), torch.bfloat16: (3.2e-2, 8e-3)}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpp.set_isa(request.param)
    yield request.param
    cpp.set_isa("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def soap_module(frames: int, channels: int, parts: Sequence[str] = PARTS, sizes: Sequence[int] = (1, 2, 3)) -> SOAP:
    return SOAP(frames, channels, [o for o in sizes if o < frames], 16, parts, backend="cpp")


def oracle(x: Tensor, m: SOAP, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dx and dweights in float64, from the equations."""
    y, dx, dweights, _ = oracle_with_norms(x, m, grad)
    return y, dx, dweights


def oracle_with_norms(x: Tensor, m: SOAP, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[float]]:
    """y, dx, dweights in float64, and the norm that each weight's gradient has for random gradients of y.

    A weight of one number sums thousands of terms of either sign, which may all but cancel for one gradient of y. The
    rounding of the terms stays, so an error is measured against the largest of four gradients' norms, not that one's.
    """
    x = x.detach().double().requires_grad_()
    flat = [w.detach().double().requires_grad_() for w in m.weights().flatten()]
    y = equations.soap(x, Weights.unflatten(flat, m.parts, len(m.tuple_sizes)), m.tuple_sizes)
    dx, *dweights = torch.autograd.grad(y, [x, *flat], grad.double(), retain_graph=True)
    norms = [float(d.norm()) for d in dweights]
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        other = torch.randn(y.shape, generator=draw, dtype=torch.float64)
        others = torch.autograd.grad(y, flat, other, retain_graph=True)
        norms = [max(n, float(d.norm())) for n, d in zip(norms, others, strict=True)]
    return y.detach(), dx, dweights, norms


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def check(x: Tensor, m: SOAP, precision: str = "default") -> None:
    absolute, share = TOLERANCE[x.dtype]
    leaves = [x.detach().requires_grad_(), *(w.detach().requires_grad_() for w in m.weights().flatten())]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    y = op.soap(leaves[0], leaves[1:], m.parts, m.tuple_sizes, precision, backend="cpp")
    dx, *dweights = torch.autograd.grad(y, leaves, grad)
    y64, dx64, dw64, norms = oracle_with_norms(x, m, grad)
    centred = op.soap(x, leaves[1:], m.parts, m.tuple_sizes, precision, backend="cpp", centred=True)
    assert float((centred.detach().double() - (y64 - 0.5 * len(m.parts))).abs().max()) < absolute
    assert y.is_contiguous()
    assert y.dtype == x.dtype
    assert float((y.detach().double() - y64).abs().max()) < absolute
    assert relative(dx, dx64) < share
    names = (n for n, _ in m.named_parameters())
    for name, found, expected, norm in zip(names, dweights, dw64, norms, strict=True):
        assert found.dtype == torch.float32
        assert float((found.double() - expected).norm()) < 2e-5 * max(norm, 1e-12), name


@pytest.mark.parametrize("precision", ["default", "strict"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_every_subset_of_parts_equals_the_equations(isa: str, parts: tuple[str, ...], precision: str) -> None:
    torch.manual_seed(0)
    check(torch.randn(2, 4, 3, 9, 35), soap_module(4, 3, parts), precision)


@pytest.mark.parametrize(
    "frames",
    [
        2,
        3,
        5,
        9,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (4, 6, 7, 8)),
        *(pytest.param(t, marks=pytest.mark.slow) for t in range(10, 17)),
        17,
    ],
)
def test_any_number_of_frames_with_every_tuple_size_below_it(frames: int) -> None:
    torch.manual_seed(frames)
    check(torch.randn(1, frames, 2, 5, 7), soap_module(frames, 2, PARTS, range(1, frames)))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 33, 224])
def test_any_height_and_width(isa: str, size: int) -> None:
    torch.manual_seed(size)
    other = 5 if size == 224 else size + 1
    for height, width in ((size, other), (other, size)):
        check(torch.randn(1, 3, 2, height, width), soap_module(3, 2))


@pytest.mark.parametrize("channels", [1, 2, 5, 16, 20])
def test_any_number_of_channels(isa: str, channels: int) -> None:
    torch.manual_seed(channels)
    check(torch.randn(1, 7, channels, 6, 9), soap_module(7, channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_frames_accumulate_in_fp32(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(torch.randn(2, 8, 3, 13, 37).to(dtype), soap_module(8, 3))


def views() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "sliced": torch.randn(2, 6, 4, 12, 40)[:, 1:5, 1:, 2:, 3:36],
        "every second pixel": torch.randn(2, 4, 3, 12, 66)[..., ::2],
        "transposed": torch.randn(2, 4, 3, 33, 10).transpose(3, 4),
        "channels_last": torch.randn(2, 4, 10, 33, 3).movedim(-1, 2),
        "frames behind channels": torch.randn(2, 3, 4, 10, 33).transpose(1, 2),
        "expanded batch": torch.randn(1, 4, 3, 10, 33).expand(2, -1, -1, -1, -1),
        "zero strides": torch.randn(1, 4, 3, 1, 1).expand(2, 4, 3, 10, 33),
        "flipped view": torch.randn(2, 4, 3, 10, 33).flip(1),
    }


@pytest.mark.parametrize("name", list(views()))
def test_views_of_any_stride_are_read_in_place(isa: str, name: str) -> None:
    check(views()[name], soap_module(4, 3))


@pytest.mark.parametrize("name", ["zero strides", "channels_last", "sliced"])
def test_incoming_gradients_of_any_stride(name: str) -> None:
    m = soap_module(4, 3)
    grad = views()[name]
    flat = [w.detach().requires_grad_() for w in m.weights().flatten()]
    x = torch.randn(grad.shape, requires_grad=True)
    y = op.soap(x, flat, m.parts, m.tuple_sizes, backend="cpp")
    dx, *dweights = torch.autograd.grad(y, [x, *flat], grad)
    _, dx64, dw64 = oracle(x, m, grad)
    assert relative(dx, dx64) < 2e-5
    assert max(relative(a, b) for a, b in zip(dweights, dw64, strict=True)) < 2e-5


def test_uint8_frames_are_normalised_before_padding(isa: str) -> None:
    torch.manual_seed(0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    m = soap_module(4, 3)
    for x in (
        torch.randint(0, 256, (2, 4, 3, 11, 35), dtype=torch.uint8),
        torch.randint(0, 256, (2, 4, 11, 35, 3), dtype=torch.uint8).movedim(-1, 2),
    ):
        frames = as_float(x, mean, std)
        grad = torch.randn(x.shape)
        y64, _, dw64 = oracle(frames, m, grad)
        flat = [w.detach().requires_grad_() for w in m.weights().flatten()]
        y = op.soap(x, flat, m.parts, m.tuple_sizes, normalize=(mean, std), backend="cpp")
        assert y.dtype == torch.float32
        assert float((y.detach().double() - y64).abs().max()) < 5e-6
        for found, expected in zip(torch.autograd.grad(y, flat, grad), dw64, strict=True):
            assert relative(found, expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_in_channels_last_and_another_dtype(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m = soap_module(4, 3)
    flat = [w.detach() for w in m.weights().flatten()]
    x = torch.randn(2, 4, 3, 11, 35)
    plain = op.soap(x, flat, m.parts, m.tuple_sizes, backend="cpp")
    y = op.soap(x, flat, m.parts, m.tuple_sizes, out_dtype=dtype, out_channels_last=True, backend="cpp")
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, plain.to(dtype))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_winograd_loses_at_most_ten_times_the_direct_path_error(scale: float, offset: float) -> None:
    torch.manual_seed(0)
    m = soap_module(8, 3)
    x = torch.randn(2, 8, 3, 40, 70) * scale + offset
    y64, _, _ = oracle(x, m, torch.ones_like(x))
    flat = [w.detach() for w in m.weights().flatten()]
    error = {
        p: float((op.soap(x, flat, m.parts, m.tuple_sizes, p, backend="cpp").double() - y64).abs().max())
        for p in ("default", "strict")
    }
    assert error["default"] <= 10 * error["strict"]


def test_strict_has_the_error_of_an_ordinary_fp32_convolution() -> None:
    torch.manual_seed(0)
    m = soap_module(8, 3)
    x = torch.randn(2, 8, 3, 40, 70)
    y64, _, _ = oracle(x, m, torch.ones_like(x))
    flat = [w.detach() for w in m.weights().flatten()]
    ours = op.soap(x, flat, m.parts, m.tuple_sizes, "strict", backend="cpp")
    plain = op.soap(x, flat, m.parts, m.tuple_sizes, backend="reference")
    assert float((ours - y64).abs().max()) <= 2 * float((plain - y64).abs().max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_goes_where_the_equations_have_it_and_no_further_than_a_tile(isa: str, value: float) -> None:
    torch.manual_seed(0)
    m = soap_module(5, 2, ("3dem", "hmem"))
    x = torch.randn(1, 5, 2, 17, 40)
    x[0, 2, 1, 9, 18] = value
    x[0, 0, 0, 0, 39] = value
    y64, _, _ = oracle(x, m, torch.ones_like(x))
    flat = [w.detach() for w in m.weights().flatten()]
    strict = op.soap(x, flat, m.parts, m.tuple_sizes, "strict", backend="cpp")
    default = op.soap(x, flat, m.parts, m.tuple_sizes, backend="cpp")
    # An infinite pre-activation is NaN in ours (the equations' maps often cancel it to one, but not always).
    if value != value:
        assert torch.equal(strict.isnan(), y64.isnan())
    assert bool((strict.isnan() | ~y64.isnan()).all())
    seen = torch.nn.functional.max_pool2d((~x.isfinite()).float().amax(1), 3, 1, 1).amax(1)
    assert not bool((strict.isnan().any(1).any(1) & (seen == 0)).any())
    assert bool((default.isnan() | ~y64.isnan()).all())
    spread = default.isnan()[0].flatten(0, 1).any(0)
    tiles = (~x.isfinite())[0].flatten(0, 1).any(0).nonzero() // 4
    assert {tuple((p // 4).tolist()) for p in spread.nonzero()} <= {
        (r + a, c + b) for r, c in tiles.tolist() for a in (-1, 0, 1) for b in (-1, 0, 1)
    }


def test_results_are_the_same_bit_for_bit_with_any_number_of_threads(isa: str, threads: None) -> None:
    torch.manual_seed(0)
    m = soap_module(8, 3)
    flat = [w.detach().requires_grad_() for w in m.weights().flatten()]
    for shape in ((1, 8, 3, 70, 66), (3, 8, 3, 40, 50), (40, 8, 3, 7, 9)):
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
        results = []
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            y = op.soap(x, flat, m.parts, m.tuple_sizes, backend="cpp")
            results.append([y.detach(), *torch.autograd.grad(y, [x, *flat], grad)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    frames=st.integers(2, 9),
    channels=st.integers(1, 5),
    height=st.integers(1, 21),
    width=st.integers(1, 37),
    parts=st.sampled_from(SUBSETS),
    precision=st.sampled_from(["default", "strict"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_equations(
    batch: int, frames: int, channels: int, height: int, width: int, parts: tuple[str, ...], precision: str, seed: int
) -> None:
    torch.manual_seed(seed)
    check(torch.randn(batch, frames, channels, height, width), soap_module(frames, channels, parts), precision)


# ---- window_sums and fuse_priors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 2, 2, 5), (1, 2, 5, 1), (3, 4, 33, 70)])
def test_window_sums_and_their_gradient(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)):
        x64 = x.double().requires_grad_()
        expected = op.window_sums(x64, backend="reference")
        x = x.requires_grad_()
        found = op.window_sums(x, backend="cpp")
        grad = torch.randn(expected.shape)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
        (dx,) = torch.autograd.grad(found, x, grad)
        (dx64,) = torch.autograd.grad(expected, x64, grad.double())
        assert relative(dx, dx64) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("precision", ["default", "strict"])
@pytest.mark.parametrize("given_priors", range(8))
@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fuse_priors_and_its_gradients(
    isa: str, interleaved: bool, multiplicative: bool, given_priors: int, precision: str
) -> None:
    torch.manual_seed(given_priors)
    b, t, c, height, width = 2, 4, 3, 9, 19
    x = torch.randn(b, t, c, height, width)
    stencil = torch.randn(1, 1, 3, 3, 3) * 0.3 if given_priors & 1 else None
    gate = torch.rand(b, t, c) if given_priors & 2 else None
    weight = torch.randn(t * c, t * c, 3, 3) * 0.1 if given_priors & 4 else None
    bias = torch.randn(t * c) * 0.3 if given_priors & 4 else None
    priors = Priors(stencil, gate, weight, bias)
    wide = Priors(*(None if p is None else p.double() for p in priors))
    fusion = Fusion(multiplicative, 2.5, interleaved, precision)
    grad = torch.randn(x.shape)
    needs = [True, *(p is not None for p in priors)]
    y = cpp.BACKEND.fuse_priors(x, priors, fusion)
    y64 = reference.BACKEND.fuse_priors(x.double(), wide, fusion)
    assert float((y - y64).abs().max()) < (5e-5 if multiplicative else 5e-6)
    found = cpp.BACKEND.fuse_priors_backward(grad, x, priors, fusion, needs)
    expected = reference.BACKEND.fuse_priors_backward(grad.double(), x.double(), wide, fusion, needs)
    for a, e in zip(found, expected, strict=True):
        if e is not None:
            assert a.shape == e.shape
            assert relative(a, e) < 2e-5


# ---- as a torch op ----


@pytest.mark.slow
def test_compiles_as_one_graph_with_a_dynamic_batch() -> None:
    m = soap_module(4, 3)
    compiled = torch.compile(m, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 3, 12, 20, requires_grad=True)
        expected, found = m(x), compiled(x)
        assert torch.equal(found, expected)
        a = torch.autograd.grad(found.square().sum(), [x, *m.parameters()])
        e = torch.autograd.grad(expected.square().sum(), [x, *m.parameters()])
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-5) for p, q in zip(a, e, strict=True))


def test_auto_takes_cpp_on_the_cpu() -> None:
    assert backends.choose("auto", torch.zeros(1)).name == "cpp"


# ---- processes, threads, instruction sets ----


def test_a_lower_instruction_set_can_be_forced_and_an_unknown_one_is_refused() -> None:
    cpp.set_isa("plain")
    assert cpp.isa() == "plain"
    cpp.set_isa("auto")
    assert cpp.isa() == cpp.isas()[0]
    with pytest.raises(ValueError, match="isa is 'mmx', expected auto or one of"):
        cpp.set_isa("mmx")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_environment_variable_forces_an_instruction_set() -> None:
    code = "import soap_kernels.backends.cpp as c; print(c.isa())"
    assert run_python(code, SOAP_KERNELS_ISA="plain").stdout.strip() == "plain"
    assert "SOAP_KERNELS_ISA is 'mmx', expected auto or one of" in run_python(code, SOAP_KERNELS_ISA="mmx").stderr
    auto = "import torch, soap_kernels.backends as b; print(b.choose('auto', torch.zeros(1)).name)"
    passed_over = run_python(auto, SOAP_KERNELS_ISA="mmx")
    assert passed_over.stdout.strip() == "reference"
    assert "the C++ kernels are left out" in passed_over.stderr


class Clips(torch.utils.data.Dataset[Tensor]):
    def __init__(self, m: SOAP) -> None:
        self.m = m

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.m(torch.full((1, 4, 3, 20, 20), float(index)))
        return y


def test_dataloader_workers_use_the_op(threads: None) -> None:
    torch.set_num_threads(2)
    clips = Clips(soap_module(4, 3))
    here = [clips[k] for k in range(4)]  # the parent's thread pool is up before the workers fork
    loaded = list(torch.utils.data.DataLoader(clips, batch_size=None, num_workers=2, timeout=60))
    assert all(torch.equal(a, b) for a, b in zip(here, loaded, strict=True))


@pytest.mark.slow
def test_a_fork_of_a_process_set_to_one_thread_computes_the_same() -> None:
    code = """
import os, torch
from soap_kernels import SOAP
torch.set_num_threads(1)
m, x = SOAP(4, 3, backend="cpp"), torch.randn(2, 4, 3, 20, 20)
y = m(x); y.sum().backward()
child = os.fork()
if child == 0:
    same = torch.equal(m(x), y); m(x).sum().backward()
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# ---- misuse ----


def test_a_tensor_on_another_device_is_refused_by_name() -> None:
    m = soap_module(4, 3)
    flat = [w.detach() for w in m.weights().flatten()]
    with pytest.raises(
        RuntimeError, match=r"backend 'cpp' is absent for tensors on meta: it serves tensors on the CPU"
    ):
        op.soap(
            torch.zeros(1, 4, 3, 8, 8, device="meta"),
            [w.to("meta") for w in flat],
            m.parts,
            m.tuple_sizes,
            backend="cpp",
        )
