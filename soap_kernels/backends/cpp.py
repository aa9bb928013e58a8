"""The CPU backend in C++ (csrc/): arguments to the library's form, nothing else.

The library is built with the package and chooses the best instruction set of the machine when it is loaded.
``SOAP_KERNELS_ISA=avx512|avx2|plain`` or :func:`set_isa` forces a lower one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from soap_kernels.backends import Fusion, Gradients, Needs, Options, Priors
from soap_kernels.frames import empty_frames

_library = torch.library.Library("soap_kernels", "FRAGMENT")
# The parts by name; HMEM is on where there are tuple sizes. What is to be filled comes last.
_SOAP = "Tensor[] weights, bool three_dem, bool cwem, int[] tuple_sizes, bool strict, float[] mean, float[] std"
_PRIORS = "Tensor? stencil, Tensor? gate, Tensor? weight, Tensor? bias"
_FUSION = "bool multiplicative, float offset, bool interleaved, bool strict"
_library.define(f"cpp_soap(Tensor x, {_SOAP}, float offset, Tensor(a!) y, Tensor(b!) prepared) -> ()")
_library.define(
    f"cpp_soap_backward(Tensor grad, Tensor x, Tensor prepared, {_SOAP}, Tensor(a!)? dx, Tensor(b!)[] dweights) -> ()"
)
_library.define("cpp_window_sums(Tensor x, Tensor(a!) sums) -> ()")
_library.define("cpp_window_sums_backward(Tensor grad, Tensor(a!) dx) -> ()")
_library.define(f"cpp_fuse_priors(Tensor x, {_PRIORS}, {_FUSION}, Tensor(a!) y) -> ()")
_library.define(
    f"cpp_fuse_priors_backward(Tensor grad, Tensor x, {_PRIORS}, {_FUSION}, Tensor(a!)? dx, Tensor(b!)? dstencil,"
    " Tensor(c!)? dgate, Tensor(d!)? dweight, Tensor(e!)? dbias) -> ()"
)


@cache
def _load() -> ModuleType | str:
    """The extension module, or why there is none."""
    try:
        _cpp = import_module("soap_kernels._cpp")
    except ImportError as error:
        found = "is not there" if isinstance(error, ModuleNotFoundError) else "does not load"
        return (
            f"the C++ library {found} ({error}). To build it in a checkout or unpacked sdist, on Linux with g++ 11 or"
            " newer: `pip install 'setuptools>=77' ninja pybind11`, then"
            " `SOAP_KERNELS_CPU=1 pip install --no-build-isolation --no-deps .`"
        )
    wanted = os.environ.get("SOAP_KERNELS_ISA", "auto")
    if not _cpp.set_isa(wanted):
        return f"SOAP_KERNELS_ISA is {wanted!r}, expected auto or one of {', '.join(_cpp.isas())} on this machine"
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


def _soap(options: Options) -> tuple[bool, bool, Sequence[int], bool, Sequence[float], Sequence[float]]:
    """What ``_SOAP`` names behind the weights."""
    sizes = options.tuple_sizes if "hmem" in options.parts else ()
    strict = options.precision == "strict"
    return "3dem" in options.parts, "cwem" in options.parts, sizes, strict, options.mean or (), options.std or ()


def _fusion(fusion: Fusion) -> tuple[bool, float, bool, bool]:
    """What ``_FUSION`` names."""
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
        y = empty_frames(x, options.out_dtype, options.out_channels_last)
        prepared = x.new_empty(self.prepared_numel(x, options), dtype=torch.float32)
        torch.ops.soap_kernels.cpp_soap(x, weights, *_soap(options), options.offset, y, prepared)
        return y, prepared

    def soap_backward(
        self, grad: Tensor, x: Tensor, prepared: Tensor, weights: Sequence[Tensor], options: Options, needs: Needs
    ) -> Gradients:
        dx = empty_frames(x, x.dtype) if needs.x else None
        dweights = [torch.empty_like(w, dtype=torch.float32) for w in weights] if needs.weights else []
        torch.ops.soap_kernels.cpp_soap_backward(grad, x, prepared, weights, *_soap(options), dx, dweights)
        return dx, dweights

    def window_sums(self, x: Tensor) -> Tensor:
        sums = x.new_empty((*x.shape[:2], 3, 3), dtype=torch.float32)
        torch.ops.soap_kernels.cpp_window_sums(x, sums)
        return sums

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx = empty_frames(x, x.dtype)
        torch.ops.soap_kernels.cpp_window_sums_backward(grad, dx)
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        y = empty_frames(x, x.dtype)
        torch.ops.soap_kernels.cpp_fuse_priors(x, *priors, *_fusion(fusion), y)
        return y

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        dx = empty_frames(x, x.dtype) if needs[0] else None
        dpriors = [
            None if prior is None or not need else torch.empty_like(prior, dtype=torch.float32)
            for prior, need in zip(priors, needs[1:], strict=True)
        ]
        torch.ops.soap_kernels.cpp_fuse_priors_backward(grad, x, *priors, *_fusion(fusion), dx, *dpriors)
        return [dx, *dpriors]


BACKEND = CppBackend()
