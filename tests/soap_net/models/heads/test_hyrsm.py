import pytest
import torch
from torch import Tensor, nn

from soap_net.errors import UserError
from soap_net.models.heads import BiMHMHead, HyRSMHead, build_head


def hausdorff(a: Tensor, b: Tensor) -> Tensor:
    """The metric's definition, frame by frame."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return 1 - (x @ y) / (x.norm() * y.norm())

    forth = [min(distance(x, y) for y in b) for x in a]
    back = [min(distance(x, y) for x in a) for y in b]
    return sum(forth) / len(forth) + sum(back) / len(back)


def attend(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Multi-head self attention of tokens (N, D), a head and a token at a time."""
    dim, heads = attention.embed_dim, attention.num_heads
    size = dim // heads
    q, k, v = (tokens @ attention.in_proj_weight.T + attention.in_proj_bias).split(dim, dim=1)
    rows = []
    for i in range(len(tokens)):
        parts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = torch.stack([q[i, part] @ k[j, part] / size**0.5 for j in range(len(tokens))]).softmax(0)
            parts.append(sum(w * v[j, part] for j, w in enumerate(weights)))
        rows.append(attention.out_proj(torch.cat(parts)))
    return torch.stack(rows)


def plain_loop(head: HyRSMHead, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
    def intra(clip: Tensor) -> Tensor:
        clip = clip * (head.dim / 10) ** 0.5 + head.positions.table.double()
        return torch.relu(clip + attend(head.intra, head.intra_norm(clip)))

    related = [intra(clip) for clip in support]
    logits = torch.empty(len(query), way, dtype=torch.float64)
    for q, clip in enumerate(query):
        clips = []
        for c in range(way):
            shots = [shot for shot, label in zip(related, labels, strict=True) if label == c]
            clips.append(sum(shots) / len(shots))
        clips.append(intra(clip))
        task = torch.stack([one.mean(0) for one in clips])
        task = torch.relu(head.inter_norm(task + attend(head.inter, task)))
        blended = [
            torch.stack([head.blend(torch.cat([frame, task[i]])) for frame in one]) for i, one in enumerate(clips)
        ]
        for c in range(way):
            logits[q, c] = -head.scale * hausdorff(blended[-1], blended[c])
    return logits


@pytest.fixture
def episode() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3, 8).double(), torch.tensor([1, 0, 1, 2, 1]), torch.randn(4, 3, 8).double()


@pytest.mark.parametrize("scale", [None, 2.5])
def test_set_matching_equals_a_plain_loop(episode: tuple[Tensor, Tensor, Tensor], scale: float | None) -> None:
    support, labels, query = episode
    expected = torch.empty(4, 3, dtype=torch.float64)
    for q in range(4):
        for c in range(3):
            shots = [hausdorff(query[q], shot) for shot, label in zip(support, labels, strict=True) if label == c]
            expected[q, c] = -(scale or 3) * sum(shots) / len(shots)
    torch.testing.assert_close(BiMHMHead(8, 3, scale)(support, labels, query, 3), expected)


def test_set_matching_ignores_order_in_time(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = BiMHMHead(8, 3)
    torch.testing.assert_close(head(support.flip(1), labels, query, 3), head(support, labels, query, 3))


def test_hybrid_relations_equal_a_plain_loop(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = HyRSMHead(8, 3, attention_heads=2).double().eval()
    nn.init.normal_(head.intra.in_proj_bias)
    nn.init.normal_(head.inter.out_proj.bias)
    torch.testing.assert_close(head(support, labels, query, 3), plain_loop(head, support, labels, query, 3))


def test_a_query_s_scores_do_not_depend_on_the_other_queries(episode: tuple[Tensor, Tensor, Tensor]) -> None:
    support, labels, query = episode
    head = HyRSMHead(8, 3, attention_heads=2).double().eval()
    torch.testing.assert_close(head(support, labels, query[1:2], 3), head(support, labels, query, 3)[1:2])


def test_attention_heads_that_do_not_divide_the_features_are_refused() -> None:
    with pytest.raises(UserError, match="head hyrsm: attention_heads is 3, which doesn't divide 8 features"):
        build_head("hyrsm", 8, 3, attention_heads=3)
