"""SOAP's ops in Triton: for every GPU that Triton serves, with no compiler of the user's own.

A forward is two launches (``prepare``, ``fuse``), a backward to all weights four (``sweep``, ``weigh``, ``reduce``,
``finish``), one more (``fuse_dx``) for x's gradient. Triton is imported when the backend is first asked to work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from soap_kernels.backends import Fusion, Options, Priors


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _driver() -> str | None:
    """None where Triton finds a driver or interprets, else why it does not."""
    try:
        import triton

        if not _interpreted():
            triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError) as error:
        return f"Triton is installed but finds no GPU driver ({str(error).splitlines()[0][:100]})"
    return None


def _ops() -> ModuleType:
    from soap_kernels.backends.triton import ops

    return ops


class TritonBackend:
    name = "triton"

    def why_absent(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; `pip install triton` (it comes with PyTorch for CUDA on Linux)"
        if device.type == "cpu" and not _interpreted():
            return "its kernels run on a GPU; move the tensors to one, or interpret them with TRITON_INTERPRET=1"
        if device.type not in ("cpu", "cuda", "xpu"):
            return f"Triton has no kernels for {device.type}"
        return _driver()

    def prepared_numel(self, x: Tensor, options: Options) -> int:
        return int(_ops().prepared_numel(x, options))

    def soap_forward(self, x: Tensor, weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor]:
        y, prepared = _ops().soap_forward(x, weights, options)
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
        dx, dweights = _ops().soap_backward(grad, x, prepared, weights, options, needs_x, needs_weights)
        return dx, dweights

    def window_sums(self, x: Tensor) -> Tensor:
        found: Tensor = _ops().window_sums(x)
        return found

    def window_sums_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        dx: Tensor = _ops().window_sums_backward(grad, x)
        return dx

    def fuse_priors(self, x: Tensor, priors: Priors, fusion: Fusion) -> Tensor:
        y: Tensor = _ops().fuse_priors(x, priors, fusion)
        return y

    def fuse_priors_backward(
        self, grad: Tensor, x: Tensor, priors: Priors, fusion: Fusion, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = _ops().fuse_priors_backward(grad, x, priors, fusion, needs)
        return found


BACKEND = TritonBackend()
