"""SOAP's ops in CUDA C++ (csrc/cuda), through a library that a torch without CUDA never loads.

A forward is two launches (``prepare``, ``fuse``), a backward to all weights three (``sweep``, ``reduce``, ``finish``).
These serve clips of up to 3 channels whose tile fits shared memory (40 frames of fp32, 90 of fp16, bf16 or uint8); for
feature maps the folded convolution is cuDNN's, with one kernel around it (:mod:`soap_kernels.backends.wide`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from soap_kernels.backends import Fusion, Gradients, Needs, Options, Priors
from soap_kernels.backends.reference import Prepared
from soap_kernels.backends.wide import Wide
from soap_kernels.frames import empty_frames

_library = torch.library.Library("soap_kernels", "FRAGMENT")
# The parts by name; HMEM is on where there are tuple sizes. What is to be filled comes last.
_SOAP = (
    "Tensor[] weights, bool three_dem, bool cwem, int[] tuple_sizes, bool strict, bool fast, float[] mean, float[] std"
)
_PRIORS = "Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias"
_FUSION = "bool multiplicative, float offset, bool interleaved, bool strict, bool fast"
_library.define(f"cuda_soap(Tensor x, {_SOAP}, float offset, Tensor(a!) y, Tensor(b!) prepared) -> ()")
_library.define(
    f"cuda_soap_backward(Tensor grad, Tensor x, Tensor prepared, {_SOAP}, Tensor(a!)[] dweights, Tensor(b!)? dz,"
    " Tensor(c!)? through, Tensor(d!)? dense, Tensor(e!)? dmeans) -> ()"
)
_library.define(f"cuda_fuse_priors(Tensor x, {_PRIORS}, {_FUSION}, Tensor(a!) y) -> ()")
_library.define(
    f"cuda_fuse_priors_backward(Tensor grad, Tensor x, {_PRIORS}, {_FUSION}, Tensor(a!)? dstencil, Tensor(b!)? dgate,"
    " Tensor(c!)? dweight, Tensor(d!)? dbias, Tensor(e!)? dz, Tensor(f!)? through, Tensor(g!)? dense) -> ()"
)
_JOINED = "Tensor? z, Tensor? bias, Tensor? gate, bool planes, bool stencil, bool multiplicative, float offset"
_library.define(f"cuda_join(Tensor x, {_JOINED}, Tensor(a!) y) -> ()")
_library.define(f"cuda_join_backward(Tensor grad, Tensor x, {_JOINED}, Tensor(a!)? dz, Tensor(b!)? direct) -> Tensor")
_library.define("cuda_window_sums(Tensor x, Tensor(a!) sums) -> ()")
_library.define("cuda_window_sums_backward(Tensor grad, Tensor(a!) dx) -> ()")
_library.define(
    "cuda_sizes(int frames, int channels, int hidden, ScalarType x, ScalarType y, bool three_dem, bool cwem, bool conv,"
    " int[] tuple_sizes, bool strict, bool fast) -> (int fixed, int per_clip, int shared_memory)"
)
_library.define("cuda_launches() -> int")

# As in csrc/cuda/kernels.h.
MAX_CHANNELS, MAX_TUPLE_SIZES, MAX_STRICT_FRAMES = 3, 8, 8


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


@dataclass(frozen=True)
class Plan:
    """Of a call what decides how large things are; the library says how large."""

    frames: int
    channels: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    precision: str
    three_dem: bool
    cwem: bool
    conv: bool = False  # HMEM's convolution is given as it is
    tuple_sizes: tuple[int, ...] = ()
    hidden: int = 0

    @classmethod
    def of_soap(cls, x: Tensor, options: Options, hidden: int = 0) -> Plan:
        three_dem, cwem, sizes, *_ = _soap(options)
        frames, channels = int(x.shape[1]), int(x.shape[2])
        return cls(
            frames, channels, x.dtype, options.out_dtype, options.precision, three_dem, cwem, False, sizes, hidden
        )

    @classmethod
    def of_priors(cls, x: Tensor, priors: Priors, fusion: Fusion) -> Plan:
        given = priors.stencil is not None, False, priors.weight is not None
        return cls(x.shape[1], x.shape[2], x.dtype, x.dtype, fusion.precision, *given)

    @property
    def rows(self) -> bool:
        """Whether there is anything for the folded convolution to do."""
        return self.three_dem or self.conv or bool(self.tuple_sizes)

    @cache  # noqa: B019
    def sizes(self) -> tuple[int, int, int]:
        """Of ``prepared`` the numbers whatever the clips, and those a clip; bytes of shared memory of a block."""
        strict, fast = self.precision == "strict", self.precision == "fast"
        parts = self.three_dem, self.cwem, self.conv, self.tuple_sizes
        shape = self.frames, self.channels, self.hidden
        found: tuple[int, int, int] = torch.ops.soap_kernels.cuda_sizes(
            *shape, self.dtype, self.out_dtype, *parts, strict, fast
        )
        return found

    def fits(self, device: torch.device) -> bool:
        """One tile holds the planes; else they are feature maps."""
        return (
            self.channels <= MAX_CHANNELS
            and len(self.tuple_sizes) <= MAX_TUPLE_SIZES
            and (self.precision != "strict" or self.frames <= MAX_STRICT_FRAMES)
            and self.sizes()[2] <= shared_memory_limit(device)
        )


def _soap(options: Options) -> tuple[bool, bool, tuple[int, ...], bool, bool, Sequence[float], Sequence[float]]:
    """What ``_SOAP`` names behind the weights."""
    sizes = options.tuple_sizes if "hmem" in options.parts else ()
    strict, fast = options.precision == "strict", options.precision == "fast"
    return "3dem" in options.parts, "cwem" in options.parts, sizes, strict, fast, options.mean or (), options.std or ()


def _fusion(fusion: Fusion) -> tuple[bool, float, bool, bool, bool]:
    """What ``_FUSION`` names."""
    strict, fast = fusion.precision == "strict", fusion.precision == "fast"
    return fusion.multiplicative, fusion.offset, fusion.interleaved, strict, fast


class WayBack:
    """Room for what x's gradient is made of, and that: dz back through the folded convolution, and what passes by."""

    def __init__(self, x: Tensor, plan: Plan, needs_x: bool, multiplicative: bool = False) -> None:
        b, t, c, height, width = x.shape

        def room(*shape: int, on: bool) -> Tensor | None:
            return x.new_empty(shape, dtype=torch.float32) if needs_x and on else None

        self.dz = room(b, (c + 1) * t, height, width, on=plan.rows)
        self.through = room(*x.shape, on=multiplicative)
        self.dense = room((c + 1) * t, t * c, 3, 3, on=plan.rows)
        self.dmeans = room(b, t, c, on=plan.cwem)
        if self.dense is not None:
            self.dense.zero_()

    def gradient(self, grad: Tensor) -> Tensor:
        dx = grad.float() if self.through is None else self.through
        if self.dz is not None and self.dense is not None:
            dx = dx + F.conv_transpose2d(self.dz, self.dense, padding=1).view(grad.shape)
        if self.dmeans is not None:
            dx = dx + self.dmeans[..., None, None] / (grad.shape[3] * grad.shape[4])
        return dx


def _joined(p: Prepared, fusion: Fusion) -> tuple[Tensor | None, Tensor | None, bool, bool, bool, float]:
    """What ``_JOINED`` names behind z."""
    return p.bias, p.gate, p.weight is not None, p.rows is not None, fusion.multiplicative, fusion.offset


def _join(x: Tensor, z: Tensor | None, p: Prepared, fusion: Fusion, y: Tensor) -> None:
    torch.ops.soap_kernels.cuda_join(x, z, *_joined(p, fusion), y)


def _join_backward(
    grad: Tensor, x: Tensor, z: Tensor | None, p: Prepared, fusion: Fusion, dz: Tensor | None, direct: Tensor | None
) -> Tensor:
    shares: Tensor = torch.ops.soap_kernels.cuda_join_backward(grad, x, z, *_joined(p, fusion), dz, direct)
    return shares


WIDE = Wide(_join, _join_backward)


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

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        plan = Plan.of_soap(x, options)
        if not plan.fits(x.device):
            return 0
        fixed, per_clip, _ = plan.sizes()
        return fixed + x.shape[0] * per_clip

    def _plan(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> Plan:
        cwem = options.unflatten(weights).cwem
        return Plan.of_soap(x, options, 0 if cwem is None else cwem.expand.shape[0])

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        y = empty_frames(x, options.out_dtype, options.out_channels_last)
        prepared = x.new_empty(self.prepared_numel(x, options), dtype=torch.float32)
        if self._plan(x, weights, options).fits(x.device):
            torch.ops.soap_kernels.cuda_soap(x, weights, *_soap(options), options.offset, y, prepared)
        else:
            WIDE.soap_forward(x, weights, options, y)
        return y, prepared

    def soap_backward(
        self, grad: Tensor, x: Tensor, prepared: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
    ) -> Gradients:
        plan = self._plan(x, weights, options)
        if not plan.fits(x.device):
            return WIDE.soap_backward(grad, x, weights, options, needs)
        dweights = [torch.empty_like(w) for w in weights] if needs.weights else []
        way = WayBack(x, plan, needs.x)
        torch.ops.soap_kernels.cuda_soap_backward(
            grad, x, prepared, weights, *_soap(options), dweights, way.dz, way.through, way.dense, way.dmeans
        )
        return way.gradient(grad) if needs.x else None, dweights

    def window_sums(self, x: Tensor) -> Tensor:
        sums = x.new_empty((*x.shape[:2], 3, 3), dtype=torch.float32)
        torch.ops.soap_kernels.cuda_window_sums(x, sums)
        return sums

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx = empty_frames(x, x.dtype)
        torch.ops.soap_kernels.cuda_window_sums_backward(grad, dx)
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        y = empty_frames(x, x.dtype)
        if Plan.of_priors(x, priors, fusion).fits(x.device):
            torch.ops.soap_kernels.cuda_fuse_priors(x, *priors, *_fusion(fusion), y)
        else:
            WIDE.fuse_priors(x, priors, fusion, y)
        return y

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan = Plan.of_priors(x, priors, fusion)
        if not plan.fits(x.device):
            return WIDE.fuse_priors_backward(grad, x, priors, fusion, needs)
        dpriors = [
            torch.empty_like(prior) if need and prior is not None else None
            for prior, need in zip(priors, needs[1:], strict=True)
        ]
        way = WayBack(x, plan, needs[0], fusion.multiplicative)
        torch.ops.soap_kernels.cuda_fuse_priors_backward(
            grad, x, *priors, *_fusion(fusion), *dpriors, way.dz, way.through, way.dense
        )
        return [way.gradient(grad) if needs[0] else None, *dpriors]


BACKEND = CudaBackend()
