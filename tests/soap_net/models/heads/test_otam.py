import math

import pytest
import torch
from torch import Tensor

from soap_net.errors import UserError
from soap_net.models.heads import OTAMHead, build_head
from soap_net.models.heads.otam import alignment_cost


def soft_minimum(values: list[float], smoothing: float) -> float:
    return -smoothing * math.log(sum(math.exp(-v / smoothing) for v in values))


def plain_loop(distances: Tensor, smoothing: float) -> float:
    """The paper's recursion, cell by cell, on the distances with their two columns of zeros."""
    rows, columns = distances.shape[0], distances.shape[1] + 2
    d = torch.zeros(rows, columns, dtype=torch.float64)
    d[:, 1:-1] = distances
    cost = [[0.0] * columns for _ in range(rows)]
    for l in range(rows):
        for m in range(1, columns):
            if l == 0:
                reached = [cost[0][m - 1]]
            else:
                reached = [cost[l - 1][m - 1], cost[l][m - 1]]
                if m in (1, columns - 1):
                    reached.append(cost[l - 1][m])
            cost[l][m] = float(d[l, m]) + soft_minimum(reached, smoothing)
    return cost[-1][-1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 2), (5, 5), (8, 8), (3, 6)])
@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_alignment_equals_the_recursion_cell_by_cell(shape: tuple[int, int], smoothing: float) -> None:
    torch.manual_seed(0)
    distances = 2 * torch.rand(3, 2, *shape, dtype=torch.float64)
    expected = torch.tensor([[plain_loop(d, smoothing) for d in row] for row in distances], dtype=torch.float64)
    torch.testing.assert_close(alignment_cost(distances, smoothing), expected)
    torch.testing.assert_close(alignment_cost(distances.float(), smoothing), expected.float(), rtol=1e-4, atol=1e-5)


def test_alignment_has_the_gradient_of_its_cost() -> None:
    torch.manual_seed(0)
    distances = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: alignment_cost(d, 0.1), (distances,))


def test_head_adds_both_directions_and_averages_shots() -> None:
    torch.manual_seed(0)
    head = OTAMHead(5, 4)
    support, query = torch.randn(5, 4, 5).double(), torch.randn(3, 4, 5).double()
    labels = torch.tensor([1, 0, 1, 2, 1])
    expected = torch.empty(3, 3, dtype=torch.float64)
    for q in range(3):
        for c in range(3):
            costs = []
            for s in range(5):
                if labels[s] == c:
                    distances = torch.empty(4, 4, dtype=torch.float64)
                    for t in range(4):
                        for u in range(4):
                            a, b = query[q, t], support[s, u]
                            distances[t, u] = 1 - (a @ b) / (a.norm() * b.norm())
                    costs.append(plain_loop(distances, 0.1) + plain_loop(distances.T, 0.1))
            expected[q, c] = -sum(costs) / len(costs)
    torch.testing.assert_close(head(support, labels, query, 3), expected)


def test_order_in_time_matters() -> None:
    torch.manual_seed(0)
    clip = torch.randn(1, 8, 16)
    logits = OTAMHead(16, 8)(torch.cat([clip, clip.flip(1)]), torch.tensor([0, 1]), clip, 2)
    assert logits[0, 0] > logits[0, 1] + 1


def test_a_smoothing_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"head otam: smoothing is 0\.0, expected more than 0"):
        build_head("otam", 5, 4, smoothing=0.0)
