"""Which implementations of the ops there are, which are present here, and which one a tensor gets.

A backend brings its own forward and backward for each op and has no autograd of its own: ``soap_kernels.op`` holds
schemas, shapes and autograd once for all of them. Each lives in a module of its own, imported when first asked for.
A new one is an object with the methods of :class:`Backend`, here or handed to :func:`register`: docs/backends.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from soap_kernels.weights import Weights

PRECISIONS = ("default", "strict", "fast")


@dataclass(frozen=True)
class Options:
    """All of a SOAP call that is no tensor, already checked."""

    parts: tuple[str, ...]
    tuple_sizes: tuple[int, ...]
    precision: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    out_dtype: torch.dtype
    out_channels_last: bool
    offset: float = 0.0  # what the sum of the priors starts from

    @property
    def fusion(self) -> Fusion:
        """How SOAP's priors are joined to its input."""
        return Fusion(offset=self.offset, precision=self.precision)

    def unflatten(self, weights: Sequence[Tensor]) -> Weights:
        """The weights by part and name."""
        return Weights.unflatten(weights, self.parts, len(self.tuple_sizes))


class Priors(NamedTuple):
    """What ``fuse_priors`` joins to its input; None for a prior that is left out."""

    stencil: Tensor | None = None  # (1, 1, 3, 3, 3), on the channel means (3DEM)
    gate: Tensor | None = None  # (B, T, C), after its sigmoid
    weight: Tensor | None = None  # (TC, TC, 3, 3) between frame-major planes t * C + c
    bias: Tensor | None = None  # (TC,)

    def contiguous(self) -> Priors:
        return Priors(*(None if prior is None else prior.contiguous() for prior in self))


@dataclass(frozen=True)
class Fusion:
    """How ``fuse_priors`` joins the priors to its input, already checked."""

    multiplicative: bool = False
    offset: float = 0.0  # what the sum of the priors starts from
    interleaved: bool = False
    precision: str = "default"


class Needs(NamedTuple):
    """Which of its two gradients ``soap_backward`` is asked for."""

    x: bool
    weights: bool


Gradients = tuple[Tensor | None, Sequence[Tensor] | None]  # of x and of the weights


class Backend(Protocol):
    """Forward and backward of every op; what a new backend has to write.

    :mod:`soap_kernels.op` is the only caller, and ends every special case before it gets here. All arguments are
    checked; a part is on, and x holds something (no empty batch, no empty plane); tensors are fp32, fp16 or bf16, x
    also uint8 with ``options.mean``, and fp64 for the reference alone; weights, priors, ``prepared`` and the gradient
    of window sums are contiguous, x and the gradient of frames have any strides; autocast is off, the tensors' device
    is current, and convolutions by PyTorch are fp32 where asked (no TF32 unless ``precision`` is "fast").

    Gradients may come back in any floating dtype and with any strides: the op casts them to those of what they are of.
    None stands for one that nobody asked for. Shapes are those of :mod:`soap_kernels.op`.
    """

    name: str

    def why_absent(self, device: torch.device) -> str | None:
        """None where tensors on ``device`` can be served, else one line: why not, and how to get it."""

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        """How many numbers forward leaves for backward. x lends its shape, dtype and device, and may be fake."""

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        """y as ``options`` say, and ``prepared``: one float32 vector, the backend's own business.

        ``weights`` are the tensors of the parts that are on, in state_dict order (:meth:`Options.unflatten`).
        """

    def soap_backward(
        self, grad: Tensor, x: Tensor, prepared: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
    ) -> Gradients:
        """The gradients of x and of the weights."""

    def window_sums(self, x: Tensor) -> Tensor:
        """``(N, C, 3, 3)`` in fp32."""

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x."""

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        """Like x, contiguous."""

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of x and of the priors, as far as they are needed and given."""


# The best first: "auto" takes the first that is present for the tensor's device.
MODULES = {
    "cuda": "soap_kernels.backends.cuda",
    "triton": "soap_kernels.backends.triton",
    "cpp": "soap_kernels.backends.cpp",
    "reference": "soap_kernels.backends.reference",
}
_registered: dict[str, Backend] = {}


def names() -> tuple[str, ...]:
    """What may be asked for: "auto", the backends of this package, and registered ones."""
    return ("auto", *MODULES, *_registered)


def register(backend: Backend) -> None:
    """Makes a backend of your own available under its name (docs/backends.md). "auto" does not take it.

    Raises:
        ValueError: the name is taken.
    """
    if backend.name in (*names(), "equations"):
        raise ValueError(f"there is a backend {backend.name!r} already")
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Takes a registered backend away again; its name is free.

    Raises:
        KeyError: no backend was registered under that name.
    """
    del _registered[name]
    _choose.cache_clear()


def get(name: str) -> Backend:
    """The backend called ``name``, present or not.

    Raises:
        ValueError: no backend bears that name.
    """
    if name in _registered:
        return _registered[name]
    if name not in MODULES:
        text = f"backend {name!r} is unknown; there are {', '.join(names())}"
        raise ValueError(text + ("; equations is for the modules (SOAP, HMEM, ...)" if name == "equations" else ""))
    backend: Backend = import_module(MODULES[name]).BACKEND
    return backend


@cache
def _choose(name: str, device_type: str) -> Backend:
    device = torch.device(device_type)
    if name == "auto":
        best = next(get(n) for n in MODULES if get(n).why_absent(device) is None)
        if best.name == "reference" and device_type == "cpu":
            # Once a process, as the choice is kept: it would be made in silence, and pip hides what a build said.
            why = get("cpp").why_absent(device)
            text = f"the C++ kernels are left out, SOAP runs on the slower PyTorch reference: {why}"
            warnings.warn(text, stacklevel=3)
        return best
    backend = get(name)
    if (why := backend.why_absent(device)) is not None:
        raise RuntimeError(f"backend {name!r} is absent for tensors on {device_type}: {why}")
    return backend


def choose(name: str, x: Tensor, *dtypes: torch.dtype) -> Backend:
    """The backend that serves ``x``: the one called ``name``, or for ``"auto"`` the best that is present.

    float64, be it x's or among ``dtypes`` (of the other tensors in and out), goes to the reference whatever the name:
    native kernels accumulate in fp32.

    Raises:
        ValueError: no backend bears that name.
        RuntimeError: it is absent here; the text says why, and how to get it.
    """
    chosen = _choose(name, x.device.type)
    return get("reference") if torch.float64 in (x.dtype, *dtypes) else chosen


def status(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Each backend's name with None where it is present for ``device``, else the reason why it is absent."""
    return {name: get(name).why_absent(torch.device(device)) for name in MODULES}
