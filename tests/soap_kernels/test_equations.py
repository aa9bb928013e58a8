"""The equations against loops over single numbers, written straight from the paper's section 3."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soap_kernels import SOAP
from soap_kernels.weights import CWEMWeights, HMEMWeights, Weights, count_maps, count_weights


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def at(plane: Tensor, h: int, w: int) -> float:
    """The plane's value, zero outside it."""
    inside = 0 <= h < plane.shape[0] and 0 <= w < plane.shape[1]
    return plane[h, w].item() if inside else 0.0


def loop_three_dem(x: Tensor, conv: Tensor) -> Tensor:
    frames, channels, height, width = x.shape
    out = torch.zeros(frames, 1, height, width, dtype=x.dtype)
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                z = 0.0
                for k, i, j in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
                    if 0 <= t + k - 1 < frames:
                        mean = sum(at(x[t + k - 1, c], h + i - 1, w + j - 1) for c in range(channels)) / channels
                        z += conv[0, 0, k, i, j].item() * mean
                out[t, 0, h, w] = sigmoid(z)
    return out


def loop_cwem(x: Tensor, w: CWEMWeights) -> Tensor:
    frames, channels = x.shape[:2]
    hidden = w.expand.shape[0]
    means = [[x[t, c].mean().item() for c in range(channels)] for t in range(frames)]
    expanded = [
        [sum(w.expand[r, c, 0, 0].item() * means[t][c] for c in range(channels)) for r in range(hidden)]
        for t in range(frames)
    ]
    out = torch.zeros(frames, channels, 1, 1, dtype=x.dtype)
    for t in range(frames):
        mixed = []
        for r in range(hidden):
            z = w.temporal_bias[r].item()
            for k in range(3):
                if 0 <= t + k - 1 < frames:
                    z += sum(w.temporal[r, q, k].item() * expanded[t + k - 1][q] for q in range(hidden))
            mixed.append(z)
        for c in range(channels):
            out[t, c] = sigmoid(sum(w.squeeze[c, r, 0, 0].item() * mixed[r] for r in range(hidden)))
    return out


def loop_hmem(x: Tensor, w: HMEMWeights, tuple_sizes: tuple[int, ...]) -> Tensor:
    frames, channels, height, width = x.shape
    maps = []
    for k, o in enumerate(tuple_sizes):
        for i in range(frames - o):
            now = [x[i + f, c] for f in range(o) for c in range(channels)]
            then = [x[i + 1 + f, c] for f in range(o) for c in range(channels)]
            projected = torch.zeros(channels, height, width, dtype=x.dtype)
            for h in range(height):
                for v in range(width):
                    for p in range(o * channels):
                        moved = w.motion_bias[k][p].item()
                        for q in range(o * channels):
                            for a in range(3):
                                for b in range(3):
                                    moved += w.motion[k][p, q, a, b].item() * at(then[q], h + a - 1, v + b - 1)
                        difference = now[p][h, v].item() - moved
                        for c in range(channels):
                            projected[c, h, v] += w.project[k][c, p, 0, 0].item() * difference
            maps.append(projected + w.project_bias[k][:, None, None])
    out = torch.zeros_like(x)
    for t in range(frames):
        z = sum(w.restore[t, m].item() * maps[m] for m in range(len(maps))) + w.restore_bias[t]
        out[t] = torch.sigmoid(z)
    return out


@pytest.fixture(scope="module")
def case() -> tuple[SOAP, Tensor]:
    torch.manual_seed(0)
    module = SOAP(frames=4, channels=2, tuple_sizes=(1, 3), hidden_channels=3, backend="equations").double()
    return module, torch.randn(2, 4, 2, 3, 4, dtype=torch.float64)


def test_three_dem_equals_a_loop_over_the_paper_s_sums(case: tuple[SOAP, Tensor]) -> None:
    module, x = case
    expected = torch.stack([loop_three_dem(clip, module.three_dem.conv.weight) for clip in x])
    torch.testing.assert_close(module.three_dem.prior(x), expected)


def test_cwem_equals_a_loop_over_the_paper_s_sums(case: tuple[SOAP, Tensor]) -> None:
    module, x = case
    weights = module.cwem.weights().cwem
    assert weights is not None
    torch.testing.assert_close(module.cwem.prior(x), torch.stack([loop_cwem(clip, weights) for clip in x]))


def test_hmem_equals_a_loop_over_the_paper_s_sums(case: tuple[SOAP, Tensor]) -> None:
    module, x = case
    weights = module.hmem.weights().hmem
    assert weights is not None
    expected = torch.stack([loop_hmem(clip, weights, (1, 3)) for clip in x])
    torch.testing.assert_close(module.hmem.prior(x), expected)


def test_soap_is_the_frames_plus_the_three_priors(case: tuple[SOAP, Tensor]) -> None:
    module, x = case
    torch.testing.assert_close(module(x), x + sum(p.expand_as(x) for p in module.priors(x).values()))


def test_centred_soap_is_the_frames_plus_each_prior_less_one_half(case: tuple[SOAP, Tensor]) -> None:
    module, x = case
    centred = SOAP(4, 2, (1, 3), 3, backend="equations", centred=True).double()
    centred.load_state_dict(module.state_dict())
    expected = sum((p - 0.5).expand_as(x) for p in module.priors(x).values())
    torch.testing.assert_close(centred(x), x + expected)
    torch.testing.assert_close(sum(p.expand_as(x) for p in centred.priors(x).values()), expected)


def test_the_default_has_the_paper_s_number_of_difference_maps_and_weights() -> None:
    assert count_maps(8, (1, 2, 3)) == 7 + 6 + 5
    assert sum(p.numel() for p in SOAP().parameters()) == 2274


def test_weights_flatten_and_unflatten_are_inverse() -> None:
    for parts in [(), ("3dem",), ("cwem", "hmem"), ("3dem", "cwem", "hmem")]:
        flat = SOAP(parts=parts).weights().flatten()
        again = Weights.unflatten(flat, parts, 3).flatten()
        assert [id(t) for t in flat] == [id(t) for t in again]
        assert len(flat) == count_weights(parts, 3)
