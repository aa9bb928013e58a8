import pytest
import torch
from torch import Tensor

from soap_net.errors import UserError
from soap_net.models.heads import FrameAverageHead, PrototypeHead, build_head


def prototypes(support: Tensor, labels: Tensor, way: int) -> list[Tensor]:
    means = []
    for c in range(way):
        frames = [frame for clip, label in zip(support, labels, strict=True) if label == c for frame in clip]
        means.append(sum(frames) / len(frames))
    return means


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


@pytest.fixture
def episode() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, 7).double(), torch.tensor([2, 0, 2, 1, 2, 1]), torch.randn(4, 4, 7).double()


def test_cosine_prototypes_equal_a_plain_loop(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = PrototypeHead(7, 4, scale=3.0).double()
    expected = [[3 * cosine(sum(q) / 4, p) for p in prototypes(support, labels, 3)] for q in query]
    torch.testing.assert_close(head(support, labels, query, 3).detach(), torch.tensor(expected).double())


def test_euclidean_prototypes_equal_a_plain_loop(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = PrototypeHead(7, 4, metric="euclidean").double()
    assert not list(head.parameters())
    expected = [[-((sum(q) / 4 - p) ** 2).sum() for p in prototypes(support, labels, 3)] for q in query]
    torch.testing.assert_close(head(support, labels, query, 3), torch.tensor(expected).double())


def test_frame_average_equals_a_plain_loop(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = FrameAverageHead(7, 4, scale=2.0).double()
    expected = [[sum(2 * cosine(f, p) for f in q) / 4 for p in prototypes(support, labels, 3)] for q in query]
    torch.testing.assert_close(head(support, labels, query, 3).detach(), torch.tensor(expected).double())


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match="head prototype: metric is 'manhattan', expected cosine or euclidean"):
        build_head("prototype", 7, 4, metric="manhattan")
