"""Each unfold is its fold's adjoint: equal to autograd through the fold, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soap_kernels import SOAP, fold

CASES = [(2, 1, (1,)), (5, 2, (2,)), (8, 3, (1, 2, 3)), (7, 1, (1, 2, 3, 4)), (6, 4, (1, 5))]


def weights_of(frames: int, channels: int, tuple_sizes: tuple[int, ...]) -> SOAP:
    torch.manual_seed(frames)
    return SOAP(frames, channels, tuple_sizes, hidden_channels=5).double()


def check_adjoint(
    outputs: tuple[Tensor, ...], inputs: list[Tensor], unfolded: list[Tensor], grads: list[Tensor]
) -> None:
    expected = torch.autograd.grad(outputs, inputs, grads)
    for ours, theirs in zip(unfolded, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("frames", "channels", "tuple_sizes"), CASES)
def test_unfold_hmem_is_the_adjoint_of_fold_hmem(frames: int, channels: int, tuple_sizes: tuple[int, ...]) -> None:
    w = weights_of(frames, channels, tuple_sizes).hmem.weights()
    assert w.hmem is not None
    folded = fold.fold_hmem(w.hmem, tuple_sizes)
    grads = [torch.randn_like(f) for f in folded]
    unfolded = fold.unfold_hmem(w.hmem, tuple_sizes, *grads)
    check_adjoint(folded, w.flatten(), type(w)(None, None, unfolded).flatten(), grads)


@pytest.mark.parametrize(("frames", "channels", "tuple_sizes"), CASES)
def test_unfold_cwem_is_the_adjoint_of_fold_cwem(frames: int, channels: int, tuple_sizes: tuple[int, ...]) -> None:
    w = weights_of(frames, channels, tuple_sizes).cwem.weights()
    assert w.cwem is not None
    folded = fold.fold_cwem(w.cwem)
    grads = [torch.randn_like(f) for f in folded]
    check_adjoint(folded, w.flatten(), type(w)(None, fold.unfold_cwem(w.cwem, *grads), None).flatten(), grads)


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_unfold_three_dem_is_the_adjoint_of_fold_three_dem(frames: int) -> None:
    w = SOAP(parts=("3dem",)).double().three_dem.weights()
    assert w.three_dem is not None
    rows = fold.fold_three_dem(w.three_dem, frames)
    grad = torch.randn_like(rows)
    check_adjoint((rows,), w.flatten(), [fold.unfold_three_dem(grad).conv], [grad])
