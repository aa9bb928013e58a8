"""Launches, bytes and what is saved for backward: our kernels against plain PyTorch, counted without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dispatched
from soap_kernels import equations
from soap_kernels.modules import SOAP
from soap_kernels.weights import PARTS, Weights
from static_gpu import soap_launches, triton_bytes

SIZES = (1, 2, 3)
SHAPE = (6, 8, 3, 224, 224)


def plain(x: Tensor, weights: list[Tensor]) -> Tensor:
    return equations.soap(x, Weights.unflatten([w.to(x.dtype) for w in weights], PARTS, len(SIZES)), SIZES)


def ours(x: Tensor, weights: list[Tensor]) -> Tensor:
    settings = (list(PARTS), list(SIZES), "default", None, None, None, False, 0.0, "triton")
    y: Tensor = torch.ops.soap_kernels.soap(x, weights, *settings)[0]
    return y


def counted(run: dispatched.Program, dtype: torch.dtype) -> dispatched.Counts:
    return dispatched.count(run, torch.empty(SHAPE, dtype=dtype, device="meta"), SOAP().weights().flatten())


def test_the_count_itself() -> None:
    """Two products and a sum of two 4 x 8 matrices; views and allocations are free."""
    x, w = torch.empty(4, 8), torch.empty(8)

    def run(x: Tensor, weights: list[Tensor]) -> Tensor:
        return (torch.empty(4, 8).copy_(x) * weights[0].expand(4, 8)).view(8, 4)

    found = dispatched.count(run, x, [w])
    assert found.forward_launches == 2
    assert found.forward_bytes == 4 * (2 * 32 + 32 + 8 + 32) + 4 * 32  # copy_ takes its target as an operand too
    assert found.saved_bytes == 4 * 32
    assert found.backward_launches == 2  # the product with what was saved, and the sum over 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_and_bytes_beside_plain_pytorch(dtype: torch.dtype) -> None:
    theirs = counted(plain, dtype)
    launches = soap_launches(dtype)
    names = [launch.name for launch in launches]
    forward, backward = names.index("sweep"), len(names) - names.index("sweep")
    assert (forward, backward) == (2, 4)
    assert theirs.forward_launches >= 30 * forward
    assert theirs.backward_launches >= 30 * backward
    moved = [triton_bytes(launch) for launch in launches]
    both = [m.pixels + m.partial for m in moved]
    assert theirs.forward_bytes >= 10 * sum(both[:forward])
    assert theirs.backward_bytes >= 6 * sum(both[forward:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_for_backward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the op's own autograd: x and 2 % of it; plain PyTorch keeps nine times x in fp32 and more."""
    from soap_kernels.backends.triton import TritonBackend

    monkeypatch.setattr(TritonBackend, "why_absent", lambda self, device: None)
    x = torch.empty(SHAPE, dtype=dtype, device="meta").nbytes
    assert x <= counted(ours, dtype).saved_bytes <= 1.02 * x
    assert counted(plain, dtype).saved_bytes >= 9 * x
