"""SOAP's ops in CUDA C++ (csrc/cuda), through a library that a torch without CUDA never loads.

A forward is two launches (``prepare``, ``fuse``), a backward to all weights three (``sweep``, ``reduce``, ``finish``).
These serve clips of up to 3 channels whose tile fits shared memory (40 frames of fp32, 90 of fp16, bf16 or uint8); for
feature maps the folded convolution is cuDNN's, with one kernel around it (:mod:`soap_kernels.backends.cuda_wide`).
fp64 goes to the reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Options, cuda_wide
from soap_kernels.backends.reference import BACKEND as LIBRARY

_library = torch.library.Library("soap_kernels", "FRAGMENT")
_library.define(
    "cuda_forward(Tensor x, Tensor[] weights, int[] settings, float[] numbers, Tensor(a!) y, Tensor(b!) prepared) -> ()"
)
_library.define("cuda_prepare(Tensor x, Tensor[] weights, int[] settings, float[] numbers, Tensor(a!) prepared) -> ()")
_library.define(
    "cuda_backward(Tensor grad, Tensor x, Tensor prepared, Tensor[] weights, int[] settings, float[] numbers,"
    " Tensor(a!)[] dweights, Tensor(b!)? dz, Tensor(c!)? through, Tensor(d!)? dense, Tensor(e!)? dmeans) -> ()"
)
_library.define("cuda_window_sums(Tensor x, Tensor(a!) sums) -> ()")
_library.define("cuda_window_sums_backward(Tensor grad, Tensor(a!) dx) -> ()")
_library.define("cuda_launches() -> int")

# As in csrc/cuda/ops.cpp and kernels.h.
STENCIL, CWEM, HMEM, GATE, CONV, BIAS, MULTIPLICATIVE, INTERLEAVED = (1 << k for k in range(8))
BF16X1, BF16X3, F16X1, EXACT = range(4)
MAX_CHANNELS, MAX_TUPLE_SIZES, SEGMENTS = 3, 8, 8
PART_FLAGS = {"3dem": STENCIL, "cwem": CWEM, "hmem": HMEM}
PACKED_TERMS = {BF16X1: 1, BF16X3: 2, F16X1: 3, EXACT: 2}


@cache
def _load() -> str | None:
    """None once the library is loaded, else why it cannot be."""
    spec = importlib.util.find_spec("soap_kernels._cuda")
    if spec is None or spec.origin is None:
        return (
            "the CUDA library is not there: install the distribution soap-kernels-cuda, or build it in a checkout with"
            " nvcc and a PyTorch with CUDA: `SOAP_KERNELS_CUDA=1 pip install --no-build-isolation --no-deps .`"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the CUDA library does not load ({str(error).splitlines()[0]})"
    return None


@cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


def choose_mode(dtype: torch.dtype, precision: str, out_dtype: torch.dtype) -> int:
    """How the folded convolution is multiplied out: csrc/cuda/kernels.h, ``Mode``."""
    if precision == "strict":
        return EXACT
    if dtype == torch.bfloat16:
        return BF16X1
    if dtype == torch.float16:
        return F16X1
    if dtype == torch.float32:
        return BF16X1 if precision == "fast" else BF16X3
    return BF16X3 if out_dtype == torch.float32 and precision == "default" else F16X1


def _padded(channels: int) -> int:
    return 1 if channels <= 1 else 3


def shared_memory(frames: int, channels: int, mode: int) -> int:
    """Bytes of shared memory that the largest kernel needs, the backward's too (whose fp16 goes as two bf16 terms)."""
    padded, octets = _padded(channels), -(-frames // 8)
    if mode == EXACT:
        return 4 * (padded * 8 * 360 + 2048 + (padded + 1) * 8 * 257 + 2 * frames * channels)
    terms, chunk = (1 if mode == BF16X1 else 2), 34 * padded + 9
    small = 4 * (2 * frames * channels) + 2048
    return max(terms * octets * 10 * chunk, terms * (octets * 8 * chunk + 24 * (padded + 1) * 8)) * 16 + small


def folding_memory(frames: int, channels: int, tuple_sizes: Sequence[int], weights: Sequence[Tensor]) -> int:
    """Bytes of shared memory of a block that folds weights or goes back through the fold: it holds them all."""
    row = -(-frames // 8) * _padded(channels) * 8 * 9
    moved = sum(tuple_sizes) * channels * channels * 9
    return 4 * (sum(w.numel() for w in weights) + row + moved + 64)


def prepared_numel(x: Tensor, flags: int, mode: int) -> int:
    """``layout().total`` of csrc/cuda/kernels.h."""
    clips, frames, channels = x.shape[:3]
    padded, octets = _padded(channels), -(-frames // 8)
    rows, columns = octets * (padded + 1) * 8, octets * padded * 8
    words = 9 * rows * columns // 2 if flags & (STENCIL | HMEM | CONV) else 0
    taps = -(-(3 * channels * channels + channels) // 4) * 4 if flags & CWEM else 0
    means = clips * frames * channels * SEGMENTS if flags & CWEM else 0
    return taps + 2 * rows + words * PACKED_TERMS[mode] + means


def _new_prepared(x: Tensor, flags: int, mode: int) -> Tensor:
    numel = prepared_numel(x, flags, mode)
    if flags & (STENCIL | HMEM | CONV):
        return x.new_empty(numel, dtype=torch.float32)
    # Without rows `prepare` writes no biases. The other kernels read them all the same, and take the result 0 times.
    return x.new_zeros(numel, dtype=torch.float32)


def _flags(options: Options) -> int:
    return sum(PART_FLAGS[part] for part in options.parts)


def _numbers(offset: float, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> list[float]:
    """The offset, then what takes a frame's value to a normalised one: value * scale + shift, by channel."""
    scale, shift = [1.0] * MAX_CHANNELS, [0.0] * MAX_CHANNELS
    for c, (m, s) in enumerate(zip(mean or (), std or (), strict=True)):
        scale[c], shift[c] = 1 / (255 * s), -m / s
    return [offset, *scale, *shift]


def _any_double(dtype: torch.dtype, weights: Sequence[Tensor]) -> bool:
    return dtype == torch.float64 or any(w.dtype == torch.float64 for w in weights)


def _like(w: Tensor) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _exact_convolutions(precision: str) -> AbstractContextManager[None]:
    """cuDNN computes fp32 convolutions in TF32 unless told not to."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=True,
        allow_tf32=precision == "fast",
    )


class CudaBackend:
    name = "cuda"

    def why_absent(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels run on an NVIDIA GPU; move the tensors to one"
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        return _load()

    def _fits(self, x: Tensor, mode: int, tuple_sizes: Sequence[int] = (), weights: Sequence[Tensor] = ()) -> bool:
        frames, channels, height, width = x.shape[1:]
        limit = shared_memory_limit(x.device)
        return (
            channels <= MAX_CHANNELS
            and len(tuple_sizes) <= MAX_TUPLE_SIZES
            and (mode != EXACT or frames <= 8)
            and min(height, width) >= 1
            and shared_memory(frames, channels, mode) <= limit
            and folding_memory(frames, channels, tuple_sizes, weights) <= limit
        )

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        mode = choose_mode(x.dtype, options.precision, options.out_dtype)
        return prepared_numel(x, _flags(options), mode) if self._fits(x, mode, options.tuple_sizes) else 0

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        mode, flags = choose_mode(x.dtype, options.precision, options.out_dtype), _flags(options)
        fits = self._fits(x, mode, options.tuple_sizes, weights)
        if _any_double(options.out_dtype, weights) or not (fits or x.numel()):
            with _exact_convolutions(options.precision):
                y, _ = LIBRARY.soap_forward(x, weights, options)
            return y, x.new_empty(self.prepared_numel(x, options), dtype=torch.float32)
        b, t, c, height, width = x.shape
        if options.out_channels_last:
            y = x.new_empty((b, t, height, width, c), dtype=options.out_dtype).movedim(-1, 2)
        else:
            y = x.new_empty(x.shape, dtype=options.out_dtype)
        if not fits:
            with _exact_convolutions(options.precision):
                cuda_wide.soap_forward(x, weights, options, y)
            return y, x.new_empty(self.prepared_numel(x, options), dtype=torch.float32)
        prepared = _new_prepared(x, flags, mode)
        if x.numel():
            torch.ops.soap_kernels.cuda_forward(
                x,
                [w.contiguous() for w in weights],
                [flags, mode, *options.tuple_sizes] if flags & HMEM else [flags, mode],
                _numbers(0.0, options.mean, options.std),
                y,
                prepared,
            )
        return y, prepared

    def soap_backward(
        self,
        grad: Tensor,
        x: Tensor,
        prepared: Tensor,
        weights: Sequence[Tensor],
        options: Options,
        needs_x: bool,
        needs_weights: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        mode, flags = choose_mode(x.dtype, options.precision, options.out_dtype), _flags(options)
        fits = self._fits(x, mode, options.tuple_sizes, weights)
        if _any_double(grad.dtype, weights) or not (fits or x.numel()):
            with _exact_convolutions(options.precision):
                return LIBRARY.soap_backward(grad, x, prepared, weights, options, needs_x, needs_weights)
        if not fits:
            with _exact_convolutions(options.precision):
                dx, dweights = cuda_wide.soap_backward(grad, x, weights, options, needs_x, needs_weights)
            return x.new_empty(0) if dx is None else dx, dweights
        dweights = [_like(w) for w in weights] if needs_weights else []
        settings = [flags, mode, *options.tuple_sizes] if flags & HMEM else [flags, mode]
        numbers = _numbers(0.0, options.mean, options.std)
        if x.numel() == 0:
            return x.new_empty(x.shape if needs_x else 0), [w.zero_() for w in dweights]
        dx = self._backward(grad, x, prepared, weights, settings, numbers, dweights, needs_x)
        return x.new_empty(0) if dx is None else dx, dweights

    def _backward(
        self,
        grad: Tensor,
        x: Tensor,
        prepared: Tensor,
        weights: Sequence[Tensor],
        settings: list[int],
        numbers: list[float],
        dweights: list[Tensor],
        needs_x: bool,
    ) -> Tensor | None:
        """Fills ``dweights``; x's gradient if it is needed."""
        flags, multiplicative = settings[0], bool(settings[0] & MULTIPLICATIVE)
        b, t, c, height, width = x.shape
        dz = through = dense = dmeans = None
        rows = flags & (STENCIL | HMEM | CONV)
        if needs_x:
            dz = x.new_empty((b, (c + 1) * t, height, width), dtype=torch.float32) if rows else None
            dense = x.new_zeros(((c + 1) * t, t * c, 3, 3), dtype=torch.float32) if rows else None
            through = x.new_empty(x.shape, dtype=torch.float32) if multiplicative else None
            dmeans = x.new_empty((b, t, c), dtype=torch.float32) if flags & CWEM else None
        torch.ops.soap_kernels.cuda_backward(
            grad,
            x,
            prepared,
            [w.contiguous() for w in weights],
            settings,
            numbers,
            dweights,
            dz,
            through,
            dense,
            dmeans,
        )
        if not needs_x:
            return None
        dx = grad.float() if through is None else through
        if dz is not None and dense is not None:
            with _exact_convolutions("default"):
                dx = dx + F.conv_transpose2d(dz, dense, padding=1).view(x.shape)
        if dmeans is not None:
            dx = dx + dmeans[..., None, None] / (height * width)
        return dx.to(x.dtype).contiguous()

    def window_sums(self, x: Tensor) -> Tensor:
        sums = x.new_empty((*x.shape[:2], 3, 3), dtype=torch.float32)
        if x.numel() == 0:
            return sums.zero_()
        torch.ops.soap_kernels.cuda_window_sums(x, sums)
        return sums

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx = x.new_empty(x.shape)
        if x.numel():
            torch.ops.soap_kernels.cuda_window_sums_backward(grad.float().contiguous(), dx)
        return dx

    def fuse_priors(
        self,
        x: Tensor,
        stencil: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        fusion: Fusion,
    ) -> Tensor:
        given, settings = self._given(x, stencil, gate, weight, bias, fusion)
        fits = self._fits(x, settings[1])
        if _any_double(x.dtype, given) or not (fits or x.numel()):
            with _exact_convolutions(fusion.precision):
                return LIBRARY.fuse_priors(x, stencil, gate, weight, bias, fusion)
        y = x.new_empty(x.shape)
        if not fits:
            with _exact_convolutions(fusion.precision):
                cuda_wide.fuse_priors(x, stencil, gate, weight, bias, fusion, y)
            return y
        if x.numel():
            prepared = _new_prepared(x, settings[0], settings[1])
            weights = [w.contiguous() for w in given]
            torch.ops.soap_kernels.cuda_forward(x, weights, settings, _numbers(fusion.offset), y, prepared)
        return y

    def fuse_priors_backward(
        self,
        grad: Tensor,
        x: Tensor,
        stencil: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        fusion: Fusion,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        given, settings = self._given(x, stencil, gate, weight, bias, fusion)
        fits = self._fits(x, settings[1])
        if _any_double(x.dtype, given) or not (fits or x.numel()):
            with _exact_convolutions(fusion.precision):
                return LIBRARY.fuse_priors_backward(grad, x, stencil, gate, weight, bias, fusion, needs)
        if not fits:
            with _exact_convolutions(fusion.precision):
                wide = cuda_wide.fuse_priors_backward(grad, x, stencil, gate, weight, bias, fusion, needs)
            return [g if need and g is not None else x.new_empty(0) for g, need in zip(wide, needs, strict=True)]
        dgiven = [_like(w) for w in given]
        dx: Tensor | None = x.new_empty(x.shape)
        if x.numel():
            numbers = _numbers(fusion.offset)
            prepared = _new_prepared(x, settings[0], settings[1])
            torch.ops.soap_kernels.cuda_prepare(x, [w.contiguous() for w in given], settings, numbers, prepared)
            dx = self._backward(grad, x, prepared, given, settings, numbers, dgiven, needs[0])
        else:
            for d in dgiven:
                d.zero_()
        rest = iter(dgiven)
        found = [dx, *(None if w is None else next(rest) for w in (stencil, gate, weight, bias))]
        return [g if need and g is not None else x.new_empty(0) for g, need in zip(found, needs, strict=True)]

    @staticmethod
    def _given(
        x: Tensor,
        stencil: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        fusion: Fusion,
    ) -> tuple[list[Tensor], list[int]]:
        flags = (MULTIPLICATIVE if fusion.multiplicative else 0) | (INTERLEAVED if fusion.interleaved else 0)
        given = []
        for tensor, flag in ((stencil, STENCIL), (gate, GATE), (weight, CONV), (bias, BIAS)):
            if tensor is not None:
                given.append(tensor)
                flags |= flag
        return given, [flags, choose_mode(x.dtype, fusion.precision, x.dtype)]


BACKEND = CudaBackend()
