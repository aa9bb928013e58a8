"""Weights that a module holds under the names of PyTorch's own layers, and reads instead of calling the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Held(nn.Module):
    """A layer's ``weight`` and ``bias``, with the initial values that PyTorch's layer of that shape draws.

    It is no ``nn.Conv2d`` or ``nn.Linear``, so that tools which quantise, prune, shard or convert those by their type
    leave it alone: nobody calls it, so nothing put around its call would run. What acts on the tensors themselves works
    as anywhere (optimisers, ``torch.nn.utils.parametrizations``, ``to``, hooks on tensors).

    Args:
        shape: of the weight, outputs first.
        bias: whether there is one; None otherwise.
    """

    def __init__(self, *shape: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both anew, as whoever built the module on meta asks of PyTorch's layers."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        # `to(memory_format=torch.channels_last)` asks it of all tensors of 4 and 5 dimensions, and 5 can't be.
        super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.dim() > 3 else fn(t), recurse)
        return self

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, bias={self.bias is not None}"


def state_to_keep(module: nn.Module, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The module's state_dict, to fill the gaps of ``loaded``, a state_dict that is about to be loaded into it.

    The weights of a module on meta have no values: they are drawn anew, on the device of ``loaded``.
    """
    if any(p.is_meta for p in module.parameters()):
        device = next((t.device for t in loaded.values() if isinstance(t, Tensor)), None)
        module = deepcopy(module).to_empty(device=device)
        for held in module.modules():
            if isinstance(held, Held):
                held.reset_parameters()
    return module.state_dict()
