"""What the CUDA kernels are tried on, the same under the shim on the CPU and on a device, with the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from soap_kernels.backends import Backend, Fusion, Needs, Options, Priors
from soap_kernels.backends.reference import BACKEND as REFERENCE

PARTS = ("3dem", "cwem", "hmem")
NORMALIZE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Case:
    """One call of ``soap``. ``layout``: how the frames lie in memory."""

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: str = "float32"
    parts: tuple[str, ...] = PARTS
    sizes: tuple[int, ...] = (1, 2, 3)
    precision: str = "default"
    out_dtype: str | None = None
    channels_last: bool = False
    layout: str = "contiguous"
    weight_dtype: str = "float32"
    centred: bool = False

    @property
    def out(self) -> torch.dtype:
        name = self.out_dtype or ("float32" if self.dtype == "uint8" else self.dtype)
        found: torch.dtype = getattr(torch, name)
        return found

    @property
    def _sloppy(self) -> bool:
        return self.precision == "fast" or "bfloat16" in (self.dtype, self.out_dtype)

    @property
    def y_tolerance(self) -> float:
        return max(ROUNDING[self.out], 2e-3 if self._sloppy else 0.0)

    @property
    def weight_tolerance(self) -> float:
        halves = {self.dtype, self.out_dtype, self.weight_dtype} & {"bfloat16", "float16"}
        if self.precision == "strict" and not halves:
            return 4e-6
        return 3e-2 if self._sloppy or halves else 5e-4


SOAPS = (
    Case("fp32", (2, 8, 3, 11, 40)),
    Case("bf16", (2, 8, 3, 11, 40), dtype="bfloat16"),
    Case("fp16", (1, 8, 3, 11, 40), dtype="float16"),
    Case("fp32 fast", (1, 8, 3, 11, 40), precision="fast"),
    Case("fp32 strict", (1, 8, 3, 11, 40), precision="strict"),
    Case("fp32 odd size", (1, 8, 3, 9, 37)),
    Case("bf16 odd size", (1, 8, 3, 7, 35), dtype="bfloat16"),
    Case("one pixel", (1, 8, 3, 1, 1)),
    Case("5 frames, 2 channels", (1, 5, 2, 7, 33), dtype="bfloat16"),
    Case("grey", (1, 8, 1, 13, 40)),
    Case("11 frames", (1, 11, 3, 8, 34), sizes=(1, 2)),
    Case("16 grey frames", (1, 16, 1, 7, 40), dtype="bfloat16"),
    Case("2 frames", (1, 2, 3, 6, 32), sizes=(1,)),
    Case("uint8 to fp32", (1, 8, 3, 11, 40), dtype="uint8"),
    Case("uint8 to bf16, channels last", (1, 8, 3, 11, 40), dtype="uint8", out_dtype="bfloat16", channels_last=True),
    Case("uint8 to fp16, odd", (1, 8, 3, 9, 37), dtype="uint8", out_dtype="float16", channels_last=True),
    Case("uint8 strict", (1, 8, 3, 9, 37), dtype="uint8", precision="strict"),
    Case("fp32 channels last", (1, 8, 3, 11, 40), channels_last=True),
    Case("fp32 to bf16", (1, 8, 3, 6, 32), out_dtype="bfloat16"),
    Case("strides", (1, 8, 3, 9, 40), layout="sliced"),
    Case("channels innermost", (1, 8, 3, 9, 40), dtype="float16", layout="innermost"),
    Case("3DEM alone", (1, 8, 3, 9, 37), parts=("3dem",)),
    Case("CWEM alone", (1, 8, 3, 9, 37), parts=("cwem",)),
    Case("HMEM alone", (1, 8, 3, 9, 37), parts=("hmem",)),
    Case("3DEM and CWEM", (1, 8, 3, 9, 37), parts=("3dem", "cwem"), dtype="bfloat16"),
    Case("strict, 4 frames, 2 channels", (1, 4, 2, 9, 37), precision="strict", sizes=(1, 3)),
    Case("bf16 weights", (1, 8, 3, 9, 37), weight_dtype="bfloat16"),
    Case("centred", (2, 8, 3, 11, 40), centred=True),
    Case("centred fp16", (1, 8, 3, 9, 37), dtype="float16", centred=True),
    Case("centred strict", (1, 8, 3, 9, 37), precision="strict", centred=True),
    Case("centred HMEM alone", (1, 8, 3, 9, 37), parts=("hmem",), dtype="bfloat16", centred=True),
    Case("centred uint8", (1, 8, 3, 9, 37), dtype="uint8", out_dtype="bfloat16", channels_last=True, centred=True),
)

# Feature maps: the folded convolution is a library's, the rest one kernel.
WIDES = (
    Case("features fp32", (2, 4, 8, 16, 16)),
    Case("features bf16", (1, 4, 9, 12, 16), dtype="bfloat16"),
    Case("features fp16, odd", (1, 3, 10, 7, 7), dtype="float16", sizes=(1, 2)),
    Case("features strict", (1, 4, 4, 5, 9), dtype="bfloat16", precision="strict"),
    Case("features, strides", (1, 5, 4, 9, 13), layout="sliced"),
    Case("features, channels innermost", (1, 4, 16, 12, 12), layout="innermost", channels_last=True),
    Case("9 uint8 frames to bf16", (1, 9, 3, 12, 16), dtype="uint8", out_dtype="bfloat16", precision="strict"),
    Case("features 3DEM alone", (1, 6, 17, 16, 9), parts=("3dem",)),
    Case("features CWEM alone", (1, 6, 4, 8, 16), parts=("cwem",), dtype="bfloat16"),
    Case("features HMEM alone", (1, 4, 5, 8, 16), parts=("hmem",)),
    Case("features bf16 weights", (1, 4, 8, 16, 16), weight_dtype="bfloat16"),
    Case("9 strict frames", (1, 9, 3, 8, 16), precision="strict"),
    Case("features centred", (2, 4, 8, 16, 16), centred=True),
    Case("features centred, 3DEM alone", (1, 6, 17, 16, 9), parts=("3dem",), dtype="bfloat16", centred=True),
)


@dataclass(frozen=True)
class FusionCase:
    """One call of ``fuse_priors``; ``given``: which of stencil, gate, weight, bias."""

    name: str
    shape: tuple[int, int, int, int, int]
    given: str = "sgwb"
    dtype: str = "float32"
    multiplicative: bool = False
    interleaved: bool = False
    precision: str = "default"
    offset: float = 4.0

    @property
    def y_tolerance(self) -> float:
        return ROUNDING[getattr(torch, self.dtype)]

    @property
    def weight_tolerance(self) -> float:
        return 1e-4 if self.dtype == "float32" else 3e-2


FUSIONS = (
    FusionCase("additive", (1, 8, 3, 9, 37)),
    FusionCase("multiplicative, interleaved", (1, 8, 3, 9, 40), multiplicative=True, interleaved=True),
    FusionCase("bf16 multiplicative", (1, 8, 3, 9, 40), dtype="bfloat16", multiplicative=True),
    FusionCase("fp16, 5 frames, 2 channels", (1, 5, 2, 9, 40), dtype="float16", multiplicative=True, interleaved=True),
    FusionCase("strict", (1, 8, 3, 9, 37), multiplicative=True, interleaved=True, precision="strict"),
    FusionCase("gate alone", (1, 8, 3, 9, 37), given="g", multiplicative=True),
    FusionCase("11 frames, stencil and gate", (1, 11, 3, 9, 37), given="sg", multiplicative=True, interleaved=True),
)
WIDE_FUSIONS = (
    FusionCase("features", (1, 4, 8, 16, 16)),
    FusionCase("features multiplicative, interleaved", (2, 4, 5, 7, 9), multiplicative=True, interleaved=True),
    FusionCase("features bf16 multiplicative", (1, 4, 8, 16, 16), dtype="bfloat16", multiplicative=True),
    FusionCase("features fp16 stencil and gate", (1, 6, 4, 8, 16), given="sg", dtype="float16", multiplicative=True),
    FusionCase("features gate alone", (1, 4, 8, 9, 9), given="g", multiplicative=True),
    FusionCase("features, no bias", (1, 4, 6, 9, 9), given="w", precision="strict"),
)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; NaN counts as infinitely wrong."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float("inf") if torch.isnan(difference) else difference.item()


def _uniform(bound: float, *shape: int) -> Tensor:
    return (torch.rand(*shape) * 2 - 1) * bound


def soap_weights(case: Case) -> list[Tensor]:
    frames, channels, hidden = case.shape[1], case.shape[2], 16
    weights: list[Tensor] = []
    if "3dem" in case.parts:
        weights.append(_uniform(27**-0.5, 1, 1, 3, 3, 3))
    if "cwem" in case.parts:
        weights += [
            _uniform(channels**-0.5, hidden, channels, 1, 1),
            _uniform(48**-0.5, hidden, hidden, 3),
            _uniform(48**-0.5, hidden),
            _uniform(hidden**-0.5, channels, hidden, 1, 1),
        ]
    if "hmem" in case.parts:
        for o in case.sizes:
            bound = (9 * o * channels) ** -0.5
            weights += [_uniform(bound, o * channels, o * channels, 3, 3), _uniform(bound, o * channels)]
        for o in case.sizes:
            bound = (o * channels) ** -0.5
            weights += [_uniform(bound, channels, o * channels, 1, 1), _uniform(bound, channels)]
        maps = sum(frames - o for o in case.sizes)
        weights += [_uniform(maps**-0.5, frames, maps), _uniform(maps**-0.5, frames)]
    return weights


def soap_tensors(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, weights and an incoming gradient."""
    torch.manual_seed(0)
    b, t, c, height, width = case.shape
    if case.dtype == "uint8":
        x = torch.randint(0, 256, case.shape, dtype=torch.uint8)
    elif case.layout == "sliced":
        x = torch.randn(b, c, t + 3, height + 1, 2 * width)[:, :, 2 : t + 2, 1:, ::2].transpose(1, 2)
    elif case.layout == "innermost":
        x = torch.randn(b, t, height, width, c).movedim(-1, 2)
    else:
        x = torch.randn(case.shape)
    if case.dtype != "uint8":
        x = x.to(getattr(torch, case.dtype))
    weights = [w.to(device, getattr(torch, case.weight_dtype)) for w in soap_weights(case)]
    grad = torch.randn(case.shape).to(case.out)
    if case.channels_last:
        grad = grad.movedim(2, -1).contiguous().movedim(-1, 2)
    return x.to(device), weights, grad.to(device)


def options(case: Case, out_dtype: torch.dtype | None = None) -> Options:
    mean, std = NORMALIZE if case.dtype == "uint8" else (None, None)
    offset = -0.5 * len(case.parts) if case.centred else 0.0
    return Options(case.parts, case.sizes, case.precision, mean, std, out_dtype or case.out, case.channels_last, offset)


def oracle(case: Case, x: Tensor, weights: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dx and the weights' gradients, in float64."""
    exact = options(case, torch.float64)
    frames = x if x.dtype == torch.uint8 else x.double()
    doubles = [w.double() for w in weights]
    y, prepared = REFERENCE.soap_forward(frames, doubles, exact)
    needs_x = x.dtype != torch.uint8
    dx, dweights = REFERENCE.soap_backward(grad.double(), frames, prepared, doubles, exact, Needs(needs_x, True))
    return y, dx, dweights


def fusion_tensors(case: FusionCase, device: torch.device) -> tuple[Tensor, Priors, Tensor]:
    torch.manual_seed(0)
    b, t, c = case.shape[:3]
    planes = t * c
    dtype = getattr(torch, case.dtype)
    given = [
        torch.randn(1, 1, 3, 3, 3) * 0.2 if "s" in case.given else None,
        torch.rand(b, t, c) if "g" in case.given else None,
        torch.randn(planes, planes, 3, 3) * 0.05 if "w" in case.given else None,
        torch.randn(planes) * 0.1 if "b" in case.given else None,
    ]
    x, grad = torch.randn(case.shape).to(dtype), torch.randn(case.shape).to(dtype)
    return x.to(device), Priors(*(None if g is None else g.to(device) for g in given)), grad.to(device)


def fusion(case: FusionCase) -> Fusion:
    return Fusion(case.multiplicative, case.offset, case.interleaved, case.precision)


def oracle_fusion(case: FusionCase, x: Tensor, given: Priors, grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    doubles = Priors(*(None if g is None else g.double() for g in given))
    y = REFERENCE.fuse_priors(x.double(), doubles, fusion(case))
    gradients = REFERENCE.fuse_priors_backward(grad.double(), x.double(), doubles, fusion(case), [True] * 5)
    return y, gradients


def _as_the_op(work: Callable[..., None]) -> Callable[..., None]:
    """Called like this a backend misses what the op does around it: convolutions by PyTorch are fp32, not TF32."""

    @wraps(work)
    def wrapped(*args: Any) -> None:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            work(*args)

    return wrapped


@_as_the_op
def check_soap(case: Case, backend: Backend, device: torch.device) -> None:
    """Forward and backward through the backend itself, each launch counted.

    Raises:
        AssertionError: a result is wrong or a launch too many.
    """
    x, weights, grad = soap_tensors(case, device)
    y_oracle, dx_oracle, dw_oracle = oracle(case, x, weights, grad)
    needs_x = x.dtype != torch.uint8
    before = torch.ops.soap_kernels.cuda_launches()
    y, prepared = backend.soap_forward(x, weights, options(case))
    between = torch.ops.soap_kernels.cuda_launches()
    _, dweights = backend.soap_backward(grad, x, prepared, weights, options(case), Needs(False, True))
    after = torch.ops.soap_kernels.cuda_launches()
    # Around a library's convolution one each way.
    assert (between - before, after - between) == ((1, 1) if case in WIDES else (2, 3)), "launches"
    assert prepared.numel() == backend.prepared_numel(x, options(case))
    assert y.dtype == case.out
    flat = y.flatten(0, 1)
    assert flat.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    assert relative(y, y_oracle) < case.y_tolerance, f"y is off by {relative(y, y_oracle):.1e}"
    for k, (found, expected) in enumerate(zip(dweights, dw_oracle, strict=True)):
        off = relative(found, expected)
        assert off < case.weight_tolerance, f"gradient of weight {k} is off by {off:.1e}"
    if needs_x:
        dx, _ = backend.soap_backward(grad, x, prepared, weights, options(case), Needs(True, False))
        assert relative(dx, dx_oracle) < case.y_tolerance, f"x's gradient is off by {relative(dx, dx_oracle):.1e}"


@_as_the_op
def check_fusion(case: FusionCase, backend: Backend, device: torch.device) -> None:
    x, given, grad = fusion_tensors(case, device)
    y_oracle, expected = oracle_fusion(case, x, given, grad)
    y = backend.fuse_priors(x, given, fusion(case))
    assert relative(y, y_oracle) < case.y_tolerance, f"y is off by {relative(y, y_oracle):.1e}"
    found = backend.fuse_priors_backward(grad, x, given, fusion(case), [True] * 5)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is not None:
            assert relative(a, b) < case.weight_tolerance, f"gradient {k} is off by {relative(a, b):.1e}"


def check_window_sums(backend: Backend, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((2, 3, 5, 8), (1, 2, 1, 7), (1, 1, 1, 1), (1, 2, 9, 1), (1, 3, 16, 33)):
            torch.manual_seed(0)
            x, grad = torch.randn(shape, device=device).to(dtype), torch.randn((*shape[:2], 3, 3), device=device)
            assert (backend.window_sums(x).double() - REFERENCE.window_sums(x.double())).abs().max() < 1e-4
            expected = REFERENCE.window_sums_backward(grad.double(), x.double())
            assert relative(backend.window_sums_backward(grad, x), expected) < ROUNDING[dtype]
