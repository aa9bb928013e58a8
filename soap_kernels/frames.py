"""Dtypes and layouts of frames on their way in and out, and the guard against autocast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What priors are computed in: fp64 for fp64 frames, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tensor(x: Any) -> None:
    """Raises TypeError unless x is a dense tensor, with a line for what ``torch.fx`` puts in the place of one."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "SOAP checks shapes, which torch.fx.symbolic_trace has not: use torch.export.export, or a torch.fx.Tracer"
            " whose is_leaf_module keeps SOAP whole"
        )
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
        kind = f"{'nested' if x.is_nested else x.layout} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"SOAP: x is a {kind}, expected a dense tensor")


class without_autocast(AbstractContextManager[None]):
    """Autocast off: y has x's dtype under autocast too, and accumulation stays in fp32."""

    def __init__(self, x: Tensor) -> None:
        # Only where it is on: there is none for some devices, such as meta.
        kind = x.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.off = torch.autocast(kind, enabled=False) if on else None

    def __enter__(self) -> None:
        if self.off:
            self.off.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.off:
            self.off.__exit__(*error)


def as_float(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Frames in the dtype of the computation; with ``mean`` and ``std`` (units of 0..1) uint8 frames, normalised."""
    if mean is None or std is None:
        return x.to(compute_dtype(x))
    shape = (1, 1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=x.device).view(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=x.device).view(shape)
    return (x.to(torch.float32) / 255 - centre) / scale


def as_output(y: Tensor, out_dtype: torch.dtype, channels_last: bool) -> Tensor:
    """``y`` as ``out_dtype``, contiguous, or with ``y.flatten(0, 1)`` contiguous in channels_last."""
    if not channels_last:
        return y.to(out_dtype).contiguous()
    return y.to(out_dtype).movedim(2, -1).contiguous().movedim(-1, 2)


def empty_frames(x: Tensor, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """Frames of x's shape that hold nothing yet, in the layout of :func:`as_output`."""
    if not channels_last:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    b, t, c, height, width = x.shape
    return x.new_empty((b, t, height, width, c), dtype=dtype).movedim(-1, 2)
