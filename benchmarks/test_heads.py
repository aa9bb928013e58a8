"""Few-shot heads against plain loops over queries and classes, each on one 5-way 5-shot task with a query per class.

    python -m pytest benchmarks/test_heads.py --benchmark-group-by=param:name

The plain versions are what the papers' text suggests: for each query, for each class, for each of its shots. TRX's maps
whole tuples, as its authors' code does. Both versions give the same logits, which is checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soap_net.models.heads import HEADS, FewShotHead, build_head

WAY, SHOT, QUERIES, FRAMES, DIM, OUT_DIM = 5, 5, 5, 8, 512, 256
OPTIONS = {"soap": {"out_dim": OUT_DIM}, "trx": {"out_dim": OUT_DIM}}

Score = Callable[[FewShotHead, Tensor, Tensor], Tensor]


def cosines(query: Tensor, support: Tensor) -> Tensor:
    return F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT


def prototype(head: FewShotHead, shots: Tensor, query: Tensor) -> Tensor:
    return head.scale * cosines(query.mean(0, keepdim=True), shots.mean(dim=(0, 1))[None])[0, 0]


def tsn(head: FewShotHead, shots: Tensor, query: Tensor) -> Tensor:
    return head.scale * cosines(query, shots.mean(dim=(0, 1))[None]).mean()


def alignment(distances: Tensor, smoothing: float) -> Tensor:
    d = F.pad(distances, (1, 1))
    rows, columns = d.shape
    cost = [[d.new_zeros(())] * columns for _ in range(rows)]
    for l in range(rows):
        for m in range(1, columns):
            reached = [cost[l][m - 1]]
            if l:
                reached.append(cost[l - 1][m - 1])
                if m in (1, columns - 1):
                    reached.append(cost[l - 1][m])
            cost[l][m] = d[l, m] - smoothing * torch.logsumexp(-torch.stack(reached) / smoothing, dim=0)
    return cost[-1][-1]


def otam(head: FewShotHead, shots: Tensor, query: Tensor) -> Tensor:
    costs = []
    for shot in shots:
        distances = 1 - cosines(query, shot)
        costs.append(alignment(distances, head.smoothing) + alignment(distances.T, head.smoothing))
    return -torch.stack(costs).mean()


def bimhm(head: FewShotHead, shots: Tensor, query: Tensor) -> Tensor:
    distances = [1 - cosines(query, shot) for shot in shots]
    return -head.scale * torch.stack([d.amin(1).mean() + d.amin(0).mean() for d in distances]).mean()


def trx(head: FewShotHead, shots: Tensor, query: Tensor) -> Tensor:
    shots, query = head.positions(shots), head.positions(query)
    total = query.new_zeros(())
    attentions = [head.attention] if hasattr(head, "attention") else head.attentions
    for attention in attentions:
        chosen = torch.tensor(list(combinations(range(FRAMES), attention.slots)))
        tuples, own = shots[:, chosen].flatten(2).flatten(0, 1), query[chosen].flatten(1)
        keys, own_keys = attention.norm(attention.keys(tuples)), attention.norm(attention.keys(own))
        weights = (own_keys @ keys.T / OUT_DIM**0.5).softmax(dim=1)
        difference = attention.values(own) - weights @ attention.values(tuples)
        total = total - difference.square().sum() / len(own)
    return total / len(attentions)


def hyrsm(head: FewShotHead, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    def intra(clip: Tensor) -> Tensor:
        clip = head.positions(clip[None] * head.feature_scale)
        normed = head.intra_norm(clip)
        return F.relu(clip + head.intra(normed, normed, normed, need_weights=False)[0])[0]

    related = [intra(clip) for clip in support]
    rows = []
    for query in queries:
        clips = [
            torch.stack([r for r, label in zip(related, labels, strict=True) if label == c]).mean(0) for c in range(WAY)
        ]
        clips.append(intra(query))
        task = torch.stack([clip.mean(0) for clip in clips])[None]
        task = F.relu(head.inter_norm(task + head.inter(task, task, task, need_weights=False)[0]))[0]
        blended = [head.blend(torch.cat([clip, task[i].expand(FRAMES, -1)], 1)) for i, clip in enumerate(clips)]
        scores = []
        for c in range(WAY):
            d = 1 - cosines(blended[-1], blended[c])
            scores.append(-head.scale * (d.amin(1).mean() + d.amin(0).mean()))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


PLAIN: dict[str, Score] = {"soap": trx, "prototype": prototype, "tsn": tsn, "otam": otam, "trx": trx, "bimhm": bimhm}


def plain(name: str, head: FewShotHead, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    if name == "hyrsm":
        return hyrsm(head, support, labels, queries)
    return torch.stack(
        [torch.stack([PLAIN[name](head, support[labels == c], query) for c in range(WAY)]) for query in queries]
    )


@pytest.mark.parametrize("version", ["plain", "ours"])
# Views has a query's score depend on the other classes; its loops, in its tests, take minutes at this size.
@pytest.mark.parametrize("name", [name for name in HEADS if name != "views"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_head(benchmark: Callable[..., None], name: str, version: str, training: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = build_head(name, DIM, FRAMES, **OPTIONS.get(name, {})).eval()
    support, queries = torch.randn(WAY * SHOT, FRAMES, DIM), torch.randn(QUERIES, FRAMES, DIM)
    support.requires_grad_(training)
    labels = torch.arange(WAY).repeat(SHOT)
    truth = torch.arange(WAY).repeat(QUERIES // WAY)
    with torch.no_grad():
        expected = plain(name, head, support, labels, queries)
        torch.testing.assert_close(head(support, labels, queries, WAY), expected, rtol=1e-3, atol=1e-3)

    def run() -> None:
        with torch.set_grad_enabled(training):
            logits = (
                plain(name, head, support, labels, queries)
                if version == "plain"
                else head(support, labels, queries, WAY)
            )
            if training:
                F.cross_entropy(logits, truth, reduction="sum").backward()

    slow = version == "plain" and name == "otam"  # a hundred thousand cells, one by one
    benchmark.pedantic(run, rounds=1 if slow else 5, warmup_rounds=0 if slow else 1)  # type: ignore[attr-defined]
