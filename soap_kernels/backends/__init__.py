"""Which implementations of the ops there are, which are present here, and which one a tensor gets.

A backend brings its own forward and backward for each op and has no autograd of its own: ``soap_kernels.op`` holds
schemas, shapes and autograd once for all of them. Each lives in a module of its own, imported when first asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Fusion:
    """How ``fuse_priors`` joins the priors to its input, already checked."""

    multiplicative: bool
    offset: float
    interleaved: bool
    precision: str


class Backend(Protocol):
    """Forward and backward of every op, on arguments that the op has checked.

    Shapes are those of :mod:`soap_kernels.op`. ``weights`` are the tensors of the parts that are on, in state_dict
    order. ``prepared`` is one float32 vector of ``prepared_numel`` numbers that forward leaves for backward; what it
    holds is the backend's own business.
    """

    name: str

    def why_absent(self, device: torch.device) -> str | None:
        """None where tensors on ``device`` can be served, else one line: why not, and how to get it."""

    def prepared_numel(self, x: Tensor, options: Options) -> int: ...

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        """``(y, prepared)``."""

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
        """``(dx, dweights)``; dx is empty(0) unless needed, dweights ``[]`` unless needed."""

    def window_sums(self, x: Tensor) -> Tensor: ...

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor: ...

    def fuse_priors(
        self,
        x: Tensor,
        stencil: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        fusion: Fusion,
    ) -> Tensor: ...

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
        """Gradients of x, stencil, gate, weight, bias; empty(0) where not needed or not given."""


# The best first: "auto" takes the first that is present for the tensor's device.
MODULES = {
    "cuda": "soap_kernels.backends.cuda",
    "triton": "soap_kernels.backends.triton",
    "cpp": "soap_kernels.backends.cpp",
    "reference": "soap_kernels.backends.reference",
}
NAMES = ("auto", *MODULES)


@cache
def get(name: str) -> Backend:
    """The backend called ``name``, present or not.

    Raises:
        ValueError: no backend bears that name.
    """
    if name not in MODULES:
        text = f"backend {name!r} is unknown; there are {', '.join(NAMES)}"
        raise ValueError(text + ("; equations is for the modules (SOAP, HMEM, ...)" if name == "equations" else ""))
    backend: Backend = import_module(MODULES[name]).BACKEND
    return backend


@cache
def _choose(name: str, device_type: str, dtype: torch.dtype) -> Backend:
    device = torch.device(device_type)
    if name != "auto":
        backend = get(name)
        if (why := backend.why_absent(device)) is not None:
            raise RuntimeError(f"backend {name!r} is absent for tensors on {device_type}: {why}")
        # Native kernels accumulate in fp32; fp64 is asked for to get fp64.
        return get("reference") if dtype == torch.float64 else backend
    if dtype == torch.float64:
        return get("reference")
    best = next(get(n) for n in MODULES if get(n).why_absent(device) is None)
    if best.name == "reference" and device_type == "cpu":
        _warn_of_missing_kernels()
    return best


@cache
def _warn_of_missing_kernels() -> None:
    """Once a process: "auto" would pass over them in silence, and pip hides what a build said of them."""
    why = get("cpp").why_absent(torch.device("cpu"))
    warnings.warn(f"the C++ kernels are left out, SOAP runs on the slower PyTorch reference: {why}", stacklevel=4)


def choose(name: str, x: Tensor) -> Backend:
    """The backend that serves ``x``: the one called ``name``, or for ``"auto"`` the best that is present.

    float64 goes to the reference whatever the name.

    Raises:
        ValueError: no backend bears that name.
        RuntimeError: it is absent here; the text says why, and how to get it.
    """
    return _choose(name, x.device.type, x.dtype)


def status(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Each backend's name with None where it is present for ``device``, else the reason why it is absent."""
    return {name: get(name).why_absent(torch.device(device)) for name in MODULES}
