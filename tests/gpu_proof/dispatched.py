"""What a PyTorch program would launch and move on a GPU, counted by its dispatch over fake tensors, without running it.

Launches are its ops that compute: no views, no allocations. One op may launch more than one kernel, so this is the
least. Bytes are those of each op's operands and results, each tensor once an op, as if every op met a cold cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Program = Callable[[Tensor, list[Tensor]], Tensor]


def tensor_bytes(t: Tensor) -> int:
    """Of the distinct addresses: what is expanded lies in memory once."""
    numel = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        numel *= size if stride else 1
    return numel * t.element_size() if t.numel() else 0


class Dispatched(TorchDispatchMode):
    launches = 0
    moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        outputs = [v for v in tree_leaves(out) if isinstance(v, Tensor)]
        allocates = "empty" in func.overloadpacket.__name__
        storages = {v.untyped_storage()._cdata for v in inputs}
        views = not func._schema.is_mutable and all(v.untyped_storage()._cdata in storages for v in outputs)
        if not (allocates or views):
            self.launches += 1
            self.moved += sum(map(tensor_bytes, (*inputs, *outputs)))
        return out


@dataclass(frozen=True)
class Counts:
    """Of a forward and of a backward to all weights."""

    forward_launches: int
    backward_launches: int
    forward_bytes: int
    backward_bytes: int
    saved_bytes: int  # of what the forward keeps for the backward, the weights left out


def count(run: Program, x: Tensor, weights: Sequence[Tensor]) -> Counts:
    """``x`` and ``weights`` lend their shapes and dtypes only."""
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with FakeTensorMode():
        frames = torch.empty(x.shape, dtype=x.dtype)
        leaves = [torch.empty(w.shape, dtype=w.dtype, requires_grad=True) for w in weights]
        with Dispatched() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = run(frames, leaves)
        grad = torch.empty(y.shape, dtype=y.dtype)
        with Dispatched() as backward:
            torch.autograd.grad(y, leaves, grad)
        for leaf in leaves:
            saved.pop(leaf.untyped_storage()._cdata, None)
    return Counts(forward.launches, backward.launches, forward.moved, backward.moved, sum(saved.values()))
