import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soap_net.errors import UserError
from soap_net.models.heads import HEADS, Positions, build_head, group_by_class


def test_supports_are_grouped_by_class_in_any_order_and_number() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    classes = group_by_class(labels, 3)
    groups = [classes.shots[c][classes.present[c]].tolist() for c in range(3)]
    assert groups == [[1, 5], [3], [0, 2, 4]]
    assert classes.one_hot(6).long().tolist() == [[int(label) == c for label in labels] for c in range(3)]


def test_class_mean_averages_over_each_class_s_own_shots() -> None:
    labels = torch.tensor([1, 0, 1, 1])
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    mean = group_by_class(labels, 2).mean(x, dim=1)
    expected = torch.stack([x[:, [1]].mean(1), x[:, [0, 2, 3]].mean(1)], dim=1)
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    ("labels", "way", "message"),
    [
        ([0, 1, 3], 3, "run from 0 to 3, expected 0 to 2"),
        ([0, -1, 1], 3, "run from -1 to 1"),
        ([0, 2, 2], 3, "class 1 of 3 has no support"),
        ([0, 1], 3, "3 classes can't be told from 2 supports"),
    ],
)
def test_labels_that_leave_no_episode_are_refused(labels: list[int], way: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_by_class(torch.tensor(labels), way)


@pytest.mark.parametrize("dim", [6, 7])
def test_positions_are_sines_and_cosines_scaled(dim: int) -> None:
    positions = Positions(dim, 5, scale=0.1, dropout=0.5).eval()
    out = positions(torch.zeros(1, 5, dim))[0]
    for t in range(5):
        for i in range(dim):
            angle = t / 10000 ** ((i - i % 2) / dim)
            assert math.isclose(out[t, i], 0.1 * (math.cos if i % 2 else math.sin)(angle), abs_tol=1e-6)
    assert not positions.state_dict()
    assert (positions.train()(torch.ones(1, 5, dim)) == 0).any()


@pytest.mark.parametrize("name", HEADS)
def test_every_head_takes_unequal_shots_and_gives_gradients(name: str) -> None:
    torch.manual_seed(0)
    head = build_head(name, 16, 4)
    support = torch.randn(5, 4, 16, requires_grad=True)
    query = torch.randn(3, 4, 16, requires_grad=True)
    logits = head(support, torch.tensor([1, 0, 2, 1, 1]), query, 3)
    assert logits.shape == (3, 3)
    assert logits.dtype == torch.float32
    logits.log_softmax(1)[:, 0].sum().backward()
    for tensor in (support, query, *head.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert support.grad.abs().sum() > 0


@pytest.mark.parametrize("name", HEADS)
def test_every_head_scores_classes_whatever_the_order_of_supports_and_queries(name: str) -> None:
    torch.manual_seed(0)
    head = build_head(name, 16, 4).eval()
    support, query = torch.randn(6, 4, 16), torch.randn(5, 4, 16)
    labels = torch.tensor([1, 0, 2, 1, 2, 2])
    expected = head(support, labels, query, 3)
    s, q, c = torch.randperm(6), torch.randperm(5), torch.tensor([2, 0, 1])
    torch.testing.assert_close(head(support[s], labels[s], query[q], 3), expected[q])
    renamed = head(support, c[labels], query, 3)
    torch.testing.assert_close(renamed[:, c], expected)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_runs_under_autocast_and_returns_at_least_float32(name: str) -> None:
    torch.manual_seed(0)
    head = build_head(name, 16, 4).eval()
    support, query, labels = torch.randn(4, 4, 16), torch.randn(3, 4, 16), torch.tensor([0, 1, 0, 1])
    expected = head(support, labels, query, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(support.bfloat16(), labels, query.bfloat16(), 2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", HEADS)
def test_no_head_loops_over_queries_classes_or_shots(name: str) -> None:
    head = build_head(name, 16, 4).eval()

    def operations(way: int, shots: int, queries: int) -> int:
        support, labels = torch.randn(way * shots, 4, 16), torch.arange(way).repeat(shots)
        with CountOperations() as mode, torch.no_grad():
            head(support, labels, torch.randn(queries, 4, 16), way)
        return mode.count

    assert operations(2, 2, 2) == operations(6, 3, 11)  # one shot is less work where supports are left out


@pytest.mark.parametrize("name", HEADS)
def test_every_head_takes_no_queries(name: str) -> None:
    head = build_head(name, 16, 4).eval()
    assert head(torch.randn(2, 4, 16), torch.tensor([0, 1]), torch.randn(0, 4, 16), 2).shape == (0, 2)


def test_features_of_another_clip_length_are_refused() -> None:
    head = build_head("soap", 16, 4)
    with pytest.raises(UserError, match=r"query features are \(3, 5, 16\), expected \(clips, 4 frames, 16 features\)"):
        head(torch.randn(2, 4, 16), torch.tensor([0, 1]), torch.randn(3, 5, 16), 2)
    with pytest.raises(UserError, match="2 supports, but labels of shape"):
        head(torch.randn(2, 4, 16), torch.tensor([0, 1, 1]), torch.randn(3, 4, 16), 2)


def test_an_unknown_head_or_option_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown head 'saop'; did you mean soap"):
        build_head("saop", 16, 4)
    with pytest.raises(UserError, match="head soap has no option 'outdim'; did you mean out_dim"):
        build_head("soap", 16, 4, outdim=3)
    with pytest.raises(UserError, match="head soap: "):
        build_head("soap", 16, 4, out_dim="wide")
