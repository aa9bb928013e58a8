from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soap_net.cli import main
from soap_net.errors import UserError
from soap_net.models.heads import SOAPHead, TRXHead, build_head
from soap_net.models.heads.trx import TupleAttention


def plain_loop(head: TRXHead, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
    """The paper's equations with a loop for each index; tuples are concatenated and mapped as they are."""
    support = support + head.positions.table.double()
    query = query + head.positions.table.double()
    total = torch.zeros(len(query), way, dtype=torch.float64)
    for attention in head.attentions:
        cardinality, out_dim = attention.slots, attention.keys.out_features
        for q, clip in enumerate(query):
            for c in range(way):
                tuples = [
                    torch.cat([shot[i] for i in chosen])
                    for shot, label in zip(support, labels, strict=True)
                    if label == c
                    for chosen in combinations(range(len(shot)), cardinality)
                ]
                keys = torch.stack([attention.norm(attention.keys(t)) for t in tuples])
                values = torch.stack([attention.values(t) for t in tuples])
                own = list(combinations(range(len(clip)), cardinality))
                distance = torch.zeros((), dtype=torch.float64)
                for chosen in own:
                    one = torch.cat([clip[i] for i in chosen])
                    weights = (keys @ attention.norm(attention.keys(one)) / out_dim**0.5).softmax(0)
                    distance = distance + ((attention.values(one) - weights @ values) ** 2).sum()
                total[q, c] -= distance / len(own)
    return total / len(head.attentions)


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("cardinalities", [(2, 3), (1,), (2,), (4,), (3, 1, 2)])
@pytest.mark.parametrize("labels", [[1, 0, 2, 1, 2], [2, 0, 1]], ids=["unequal shots", "one shot"])
def test_head_and_its_gradients_equal_a_plain_loop_s(
    cardinalities: tuple[int, ...], labels: list[int], frames: int
) -> None:
    torch.manual_seed(0)
    head = TRXHead(6, frames, cardinalities, out_dim=5).double().eval()
    for attention in head.attentions:  # LayerNorm begins as ones and zeros, which hide a wrong use of them
        torch.nn.init.normal_(attention.norm.weight)
        torch.nn.init.normal_(attention.norm.bias)
    support = torch.randn(len(labels), frames, 6).double().requires_grad_()
    query = torch.randn(3, frames, 6).double().requires_grad_()
    got, expected = (f(support, torch.tensor(labels), query, 3) for f in (head, partial(plain_loop, head)))
    torch.testing.assert_close(got, expected)
    inputs, weight = [support, query, *head.parameters()], torch.randn(3, 3).double()
    grads = [torch.autograd.grad((logits * weight).sum(), inputs) for logits in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cardinalities", [(1,), (2, 3)])
def test_keys_that_hardly_vary_are_normed_as_layer_norm_does(cardinalities: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = TRXHead(6, 4, cardinalities, out_dim=5).double().eval()
    support, query = torch.randn(3, 4, 6).double(), torch.randn(2, 4, 6).double()
    for attention in head.attentions:
        torch.nn.init.normal_(attention.norm.bias)
        # The same key, but for 1e-4, in every dimension: less variance than LayerNorm's epsilon, and none below.
        with torch.no_grad():
            attention.keys.weight.copy_(attention.keys.weight[:1] + 1e-4 * torch.randn_like(attention.keys.weight))
            attention.keys.bias.fill_(100.0)
    support[1] = query[1] = -head.positions.table.double()  # features of zero: keys that don't vary at all
    support.requires_grad_()
    query.requires_grad_()
    labels = torch.tensor([0, 1, 1])
    got, expected = head(support, labels, query, 2), plain_loop(head, support, labels, query, 2)
    torch.testing.assert_close(got, expected)
    inputs, weight = [support, query, *head.parameters()], torch.randn(2, 2).double()
    grads = [torch.autograd.grad((logits * weight).sum(), inputs) for logits in (got, expected)]
    torch.testing.assert_close(*grads)


def test_clips_that_are_nearly_alike_keep_the_digits_of_their_distances() -> None:
    torch.manual_seed(0)
    head = TRXHead(64, 8, out_dim=48).eval()
    head.positions.table.zero_()
    alike = 10 + 0.01 * torch.randn(8, 8, 64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    got = head(alike[:5], labels, alike[5:], 3)
    torch.testing.assert_close(
        got.double(), plain_loop(head.double(), alike[:5].double(), labels, alike[5:].double(), 3), rtol=1e-4, atol=0
    )


def largest(call: Callable[[], object]) -> int:
    """Numbers in the largest tensor that any operation of ``call`` gives."""
    found = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal found
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                found = max(found, out.numel())
            return out

    with Watch(), torch.no_grad():
        call()
    return found


def test_no_tensor_holds_out_dim_numbers_for_each_tuple() -> None:
    head = TRXHead(6, 8, out_dim=1000).eval()
    numbers = largest(lambda: head(torch.randn(5, 8, 6), torch.arange(5), torch.randn(2, 8, 6), 5))
    assert numbers <= 5 * 18 * 1000  # of 5 clips, 18 pairs of a slot and a frame for 56 triples


def test_chunks_that_bound_memory_change_neither_logits_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = TRXHead(6, 5, out_dim=4).double().eval()
    support, query = torch.randn(4, 5, 6).double().requires_grad_(), torch.randn(7, 5, 6).double().requires_grad_()
    labels, weight = torch.tensor([1, 0, 1, 1]), torch.randn(7, 2).double()
    inputs = [support, query, *head.parameters()]
    whole = head(support, labels, query, 2)
    whole_grads = torch.autograd.grad((whole * weight).sum(), inputs)
    for attention in head.attentions:
        attention.memory = 2000  # a few tuples at once
    chunked = head(support, labels, query, 2)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad((chunked * weight).sum(), inputs), whole_grads)
    with torch.no_grad():
        torch.testing.assert_close(head(support, labels, query, 2), whole)


def test_memory_for_scores_and_attended_values_stays_under_its_bound() -> None:
    head = TRXHead(8, 8, out_dim=16, memory_mib=1).eval()
    numbers = largest(lambda: head(torch.randn(25, 8, 8), torch.arange(5).repeat(5), torch.randn(25, 8, 8), 5))
    assert 4 * numbers <= 2**20


def test_soap_head_is_the_cardinality_of_one() -> None:
    torch.manual_seed(0)
    soap = SOAPHead(6, 4, out_dim=5).eval()
    trx = TRXHead(6, 4, (1,), out_dim=5).eval()
    trx.attentions[0].load_state_dict(soap.attention.state_dict())
    support, query, labels = torch.randn(3, 4, 6), torch.randn(2, 4, 6), torch.tensor([0, 1, 1])
    torch.testing.assert_close(soap(support, labels, query, 2), trx(support, labels, query, 2))


def test_a_tuple_longer_than_the_clip_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as refused:
        build_head("trx", 6, 4, cardinalities=(2, 5))
    assert str(refused.value) == "head trx: a tuple of 5 frames can't be drawn from a clip of 4"
    for bad in ((), (2, 2), (0,)):
        with pytest.raises(UserError):
            build_head("trx", 6, 4, cardinalities=bad)


@pytest.mark.parametrize(("frames", "cardinality"), [(2000, 2), (64, 12), (10**9, 10**8), (10**9, 10**9)])
def test_more_tuples_than_memory_holds_are_refused_before_they_are_made(frames: int, cardinality: int) -> None:
    with pytest.raises(UserError, match=f"tuples of {cardinality} frames of {frames} would hold more than 1048576"):
        TupleAttention(1, frames, cardinality, 1)


def test_the_command_refuses_such_a_tuple_before_it_makes_a_folder(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "data.root": tiny_data, "data.frames": 3, "model.backbone": "tiny", "model.weights": "random",
        "model.head": "trx", "model.head_options": '{"cardinalities": [2, 9]}', "model.soap.tuple_sizes": "[1]",
        "episode.way": 2, "episode.queries": 1, "train.val_every": 0, "out": tmp_path / "run",
    }  # fmt: skip
    assert main(["train", *(f"--{key}={value}" for key, value in options.items())]) == 2
    error = capsys.readouterr().err
    assert error == "soap-net: head trx: a tuple of 9 frames can't be drawn from a clip of 3\n"
    assert not (tmp_path / "run").exists()
