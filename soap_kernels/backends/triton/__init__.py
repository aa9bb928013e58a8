"""SOAP's ops in Triton: for every GPU that Triton serves, with no compiler of the user's own.

A forward is two launches (``prepare``, ``fuse``), a backward to all weights four (``sweep``, ``weigh``, ``reduce``,
``finish``), one more (``fuse_dx``) for x's gradient. Triton is imported when the backend is first asked to work.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def interpreted() -> bool:
    """Triton's interpreter runs the kernels, on CPU tensors. It gets bf16 and fp16 products wrong: use fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _driver() -> str | None:
    """None where Triton finds a driver or interprets, else why it does not."""
    try:
        import triton

        if not interpreted():
            triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError) as error:
        return f"Triton is installed but finds no GPU driver ({str(error).splitlines()[0][:100]})"
    return None


class TritonBackend:
    name = "triton"

    def why_absent(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; `pip install triton` (it comes with PyTorch for CUDA on Linux)"
        if device.type == "cpu" and not interpreted():
            return "its kernels run on a GPU; move the tensors to one, or interpret them with TRITON_INTERPRET=1"
        if device.type not in ("cpu", "cuda", "xpu"):
            return f"Triton has no kernels for {device.type}"
        return _driver()

    def __getattr__(self, op: str) -> Any:
        """The ops are :mod:`soap_kernels.backends.triton.ops`, which imports Triton: not before one is asked for."""
        return getattr(import_module("soap_kernels.backends.triton.ops"), op)


BACKEND = TritonBackend()
