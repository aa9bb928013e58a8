"""The CPU backend in C++ (csrc/): arguments to the library's form, nothing else.

The library is built with the package and chooses the best instruction set of the machine when it is loaded.
``SOAP_KERNELS_ISA=avx512|avx2|plain`` or :func:`set_isa` forces a lower one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors
from soap_kernels.weights import PARTS

_library = torch.library.Library("soap_kernels", "FRAGMENT")
_library.define(
    "cpp_soap(Tensor x, Tensor[] weights, int parts, int[] tuple_sizes, bool strict, float[] mean, float[] std,"
    " ScalarType out_dtype, bool out_channels_last) -> (Tensor, Tensor)"
)
_library.define(
    "cpp_soap_backward(Tensor grad, Tensor x, Tensor prepared, Tensor[] weights, int parts, int[] tuple_sizes,"
    " bool strict, float[] mean, float[] std, bool needs_x, bool needs_weights) -> (Tensor, Tensor[])"
)
_library.define("cpp_window_sums(Tensor x) -> Tensor")
_library.define("cpp_window_sums_backward(Tensor grad, Tensor x) -> Tensor")
_library.define(
    "cpp_fuse_priors(Tensor x, Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias, bool multiplicative,"
    " float offset, bool interleaved, bool strict) -> Tensor"
)
_library.define(
    "cpp_fuse_priors_backward(Tensor grad, Tensor x, Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias,"
    " bool multiplicative, float offset, bool interleaved, bool strict, bool needs_x) -> Tensor[]"
)


@cache
def _load() -> ModuleType | str:
    """The extension module, or why there is none."""
    try:
        _cpp = import_module("soap_kernels._cpp")
    except ImportError as error:
        return (
            f"the C++ library is not there ({error}); build it with `pip install --no-build-isolation .`,"
            " which needs a C++ compiler"
        )
    wanted = os.environ.get("SOAP_KERNELS_ISA", "auto")
    if not _cpp.set_isa(wanted):
        why = f"SOAP_KERNELS_ISA is {wanted!r}, expected auto or one of {', '.join(_cpp.isas())} on this machine"
        warnings.warn(f"{why}: the C++ kernels are left out", stacklevel=2)  # "auto" would pass over them in silence
        return why
    return _cpp


def _module() -> ModuleType:
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(f"backend 'cpp' is absent: {module}")
    return module


def isas() -> list[str]:
    """The instruction sets that this machine can run, best first: of ``avx512``, ``avx2``, ``plain``."""
    return list(_module().isas())


def isa() -> str:
    """The instruction set in use."""
    return str(_module().isa())


def set_isa(name: str) -> None:
    """Use another instruction set, for the whole process; ``"auto"`` for the best.

    Raises:
        ValueError: unknown, or this machine has not got it.
        RuntimeError: there is no C++ library.
    """
    if not _module().set_isa(name):
        raise ValueError(f"isa is {name!r}, expected auto or one of {', '.join(isas())} on this machine")


def build_info() -> dict[str, str]:
    """With what the library was built: compiler, torch, and the torch whose stable ABI it needs at least."""
    return dict(_module().build_info())


def _parts(parts: Sequence[str]) -> int:
    return sum(1 << k for k, p in enumerate(PARTS) if p in parts)


def _fusion(fusion: Fusion) -> tuple[bool, float, bool, bool]:
    return fusion.multiplicative, fusion.offset, fusion.interleaved, fusion.precision == "strict"


class CppBackend:
    name = "cpp"

    def why_absent(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        module = _load()
        return module if isinstance(module, str) else None

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        # Means and gates of all planes: CWEM's. In Python arithmetic, since sizes may be symbols while compiling.
        return 2 * x.shape[0] * x.shape[1] * x.shape[2] if "cwem" in options.parts else 0

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        y, prepared = torch.ops.soap_kernels.cpp_soap(
            x,
            weights,
            _parts(options.parts),
            options.tuple_sizes,
            options.precision == "strict",
            options.mean or (),
            options.std or (),
            options.out_dtype,
            options.out_channels_last,
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
        dx, dweights = torch.ops.soap_kernels.cpp_soap_backward(
            grad,
            x,
            prepared,
            weights,
            _parts(options.parts),
            options.tuple_sizes,
            options.precision == "strict",
            options.mean or (),
            options.std or (),
            needs_x,
            needs_weights,
        )
        return dx, dweights

    def window_sums(self, x: Tensor) -> Tensor:
        sums: Tensor = torch.ops.soap_kernels.cpp_window_sums(x)
        return sums

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = torch.ops.soap_kernels.cpp_window_sums_backward(grad, x)
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        y: Tensor = torch.ops.soap_kernels.cpp_fuse_priors(x, *priors, *_fusion(fusion))
        return y

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> list[Tensor]:
        found: list[Tensor] = torch.ops.soap_kernels.cpp_fuse_priors_backward(
            grad, x, *priors, *_fusion(fusion), needs[0]
        )
        return found


BACKEND = CppBackend()
