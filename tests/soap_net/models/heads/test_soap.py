import torch
from torch import Tensor

from soap_net.models.heads import SOAPHead


def plain_loop(head: SOAPHead, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
    """The head's equations, one query, class and frame at a time."""
    attention = head.attention
    out_dim = attention.keys.out_features
    support = support + head.positions.table.double()
    query = query + head.positions.table.double()
    logits = torch.empty(len(query), way, dtype=torch.float64)
    for q, clip in enumerate(query):
        for c in range(way):
            frames = [frame for shot, label in zip(support, labels, strict=True) if label == c for frame in shot]
            distance = torch.zeros((), dtype=torch.float64)
            for frame in clip:
                own_key = attention.norm(attention.keys(frame))
                own_value = attention.values(frame)
                scores = torch.stack([own_key @ attention.norm(attention.keys(f)) / out_dim**0.5 for f in frames])
                weights = scores.exp() / scores.exp().sum()
                prototype = sum(w * attention.values(f) for w, f in zip(weights, frames, strict=True))
                distance = distance + ((own_value - prototype) ** 2).sum()
            logits[q, c] = -distance / len(clip)
    return logits


def test_head_equals_a_plain_loop_with_unequal_shots() -> None:
    torch.manual_seed(0)
    head = SOAPHead(12, 5, out_dim=10).double().eval()
    support, query = torch.randn(6, 5, 12).double(), torch.randn(4, 5, 12).double()
    labels = torch.tensor([2, 0, 1, 2, 2, 1])
    expected = plain_loop(head, support, labels, query, 3)
    torch.testing.assert_close(head(support, labels, query, 3), expected)


def test_gradients_equal_those_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    head = SOAPHead(6, 3, out_dim=4).double().eval()
    support, query = torch.randn(4, 3, 6).double(), torch.randn(2, 3, 6).double()
    labels = torch.tensor([1, 0, 0, 0])
    inputs = [support.requires_grad_(), query.requires_grad_(), *head.parameters()]
    weight = torch.randn(2, 2).double()
    got = torch.autograd.grad((head(support, labels, query, 2) * weight).sum(), inputs)
    expected = torch.autograd.grad((plain_loop(head, support, labels, query, 2) * weight).sum(), inputs)
    torch.testing.assert_close(got, expected)


def test_a_query_equal_to_its_support_is_recognised() -> None:
    torch.manual_seed(0)
    head = SOAPHead(64, 8).eval()
    support = torch.randn(5, 8, 64)
    logits = head(support, torch.arange(5), support + 0.01 * torch.randn_like(support), 5)
    assert logits.argmax(1).tolist() == list(range(5))
