"""SOAP's ops in CUDA C++ (csrc/cuda), through a library that a torch without CUDA never loads.

A forward is two launches (``prepare``, ``fuse``), a backward to all weights three (``sweep``, ``reduce``, ``finish``).
These serve clips of up to 3 channels whose tile fits shared memory (40 frames of fp32, 90 of fp16, bf16 or uint8); for
feature maps the folded convolution is cuDNN's, with one kernel around it (:mod:`soap_kernels.backends.wide`).
fp64 goes to the reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors
from soap_kernels.backends.reference import Prepared
from soap_kernels.backends.wide import Wide
from soap_kernels.frames import empty_frames

_library = torch.library.Library("soap_kernels", "FRAGMENT")
_library.define(
    "cuda_forward(Tensor x, Tensor[] weights, int[] settings, float[] numbers, Tensor(a!) y, Tensor(b!) prepared) -> ()"
)
_library.define("cuda_prepare(Tensor x, Tensor[] weights, int[] settings, float[] numbers, Tensor(a!) prepared) -> ()")
_library.define(
    "cuda_backward(Tensor grad, Tensor x, Tensor prepared, Tensor[] weights, int[] settings, float[] numbers,"
    " Tensor(a!)[] dweights, Tensor(b!)? dz, Tensor(c!)? through, Tensor(d!)? dense, Tensor(e!)? dmeans) -> ()"
)
_library.define(
    "cuda_join(Tensor x, Tensor? z, Tensor? bias, Tensor? gate, int[] settings, float offset, Tensor(a!) y) -> ()"
)
_library.define(
    "cuda_part(Tensor grad, Tensor x, Tensor? z, Tensor? bias, Tensor? gate, int[] settings, float offset,"
    " Tensor(a!)? dz, Tensor(b!)? direct) -> Tensor"
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
            "the CUDA library is not built; `SOAP_KERNELS_CUDA=1 pip install --no-build-isolation .` builds it, which"
            " needs nvcc and a PyTorch with CUDA"
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


def _settings(flags: int, mode: int, options: Options) -> list[int]:
    return [flags, mode, *options.tuple_sizes] if flags & HMEM else [flags, mode]


def _wide_settings(p: Prepared, fusion: Fusion) -> tuple[Tensor | None, Tensor | None, list[int], float]:
    return p.bias, p.gate, [p.weight is not None, p.rows is not None, fusion.multiplicative], float(fusion.offset)


def _join(x: Tensor, z: Tensor | None, p: Prepared, fusion: Fusion, y: Tensor) -> None:
    torch.ops.soap_kernels.cuda_join(x, z, *_wide_settings(p, fusion), y)


def _part(
    grad: Tensor, x: Tensor, z: Tensor | None, p: Prepared, fusion: Fusion, dz: Tensor | None, direct: Tensor | None
) -> Tensor:
    shares: Tensor = torch.ops.soap_kernels.cuda_part(grad, x, z, *_wide_settings(p, fusion), dz, direct)
    return shares


WIDE = Wide(_join, _part)


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
        frames, channels = x.shape[1:3]
        limit = shared_memory_limit(x.device)
        return (
            channels <= MAX_CHANNELS
            and len(tuple_sizes) <= MAX_TUPLE_SIZES
            and (mode != EXACT or frames <= 8)
            and shared_memory(frames, channels, mode) <= limit
            and folding_memory(frames, channels, tuple_sizes, weights) <= limit
        )

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        mode = choose_mode(x.dtype, options.precision, options.out_dtype)
        return prepared_numel(x, _flags(options), mode) if self._fits(x, mode, options.tuple_sizes) else 0

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        mode, flags = choose_mode(x.dtype, options.precision, options.out_dtype), _flags(options)
        y = empty_frames(x, options.out_dtype, options.out_channels_last)
        if not self._fits(x, mode, options.tuple_sizes, weights):
            WIDE.soap_forward(x, weights, options, y)
            return y, x.new_empty(self.prepared_numel(x, options), dtype=torch.float32)
        prepared = _new_prepared(x, flags, mode)
        torch.ops.soap_kernels.cuda_forward(
            x, weights, _settings(flags, mode, options), _numbers(0.0, options.mean, options.std), y, prepared
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
    ) -> tuple[Tensor | None, Sequence[Tensor] | None]:
        mode, flags = choose_mode(x.dtype, options.precision, options.out_dtype), _flags(options)
        if not self._fits(x, mode, options.tuple_sizes, weights):
            return WIDE.soap_backward(grad, x, weights, options, needs_x, needs_weights)
        dweights = [torch.empty_like(w) for w in weights] if needs_weights else []
        numbers = _numbers(0.0, options.mean, options.std)
        settings = _settings(flags, mode, options)
        return self._backward(grad, x, prepared, weights, settings, numbers, dweights, needs_x), dweights

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
            weights,
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
            dx = dx + F.conv_transpose2d(dz, dense, padding=1).view(x.shape)
        if dmeans is not None:
            dx = dx + dmeans[..., None, None] / (height * width)
        return dx

    def window_sums(self, x: Tensor) -> Tensor:
        sums = x.new_empty((*x.shape[:2], 3, 3), dtype=torch.float32)
        torch.ops.soap_kernels.cuda_window_sums(x, sums)
        return sums

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx = x.new_empty(x.shape)
        torch.ops.soap_kernels.cuda_window_sums_backward(grad, dx)
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        given, settings = self._given(x, priors, fusion)
        y = x.new_empty(x.shape)
        if not self._fits(x, settings[1]):
            WIDE.fuse_priors(x, priors, fusion, y)
            return y
        prepared = _new_prepared(x, settings[0], settings[1])
        torch.ops.soap_kernels.cuda_forward(x, given, settings, _numbers(fusion.offset), y, prepared)
        return y

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given, settings = self._given(x, priors, fusion)
        if not self._fits(x, settings[1]):
            return WIDE.fuse_priors_backward(grad, x, priors, fusion, needs)
        dgiven = [torch.empty_like(w) for w in given]
        numbers = _numbers(fusion.offset)
        prepared = _new_prepared(x, settings[0], settings[1])
        torch.ops.soap_kernels.cuda_prepare(x, given, settings, numbers, prepared)
        dx = self._backward(grad, x, prepared, given, settings, numbers, dgiven, needs[0])
        rest = iter(dgiven)
        return [dx, *(None if prior is None else next(rest) for prior in priors)]

    @staticmethod
    def _given(x: Tensor, priors: Priors, fusion: Fusion) -> tuple[list[Tensor], list[int]]:
        flags = (MULTIPLICATIVE if fusion.multiplicative else 0) | (INTERLEAVED if fusion.interleaved else 0)
        flags |= sum(f for prior, f in zip(priors, (STENCIL, GATE, CONV, BIAS), strict=True) if prior is not None)
        given = [prior for prior in priors if prior is not None]
        return given, [flags, choose_mode(x.dtype, fusion.precision, x.dtype)]


BACKEND = CudaBackend()
