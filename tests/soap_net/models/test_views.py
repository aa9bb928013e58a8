"""The views head against brute-force loops, and what SOAP-Net hands it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soap_net.errors import UserError
from soap_net.models import SOAPNet, build_backbone, build_head
from soap_net.models.heads import ViewsHead, group_by_class
from soap_net.models.heads.views import AUTO, MIXTURES, SHARPNESS, leave_one_out

T, D = 4, 6


def clips(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2 * T - 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def views_of(clip: Tensor) -> list[Tensor]:
    frames, differences = clip[:T], clip[T:]
    found = [frames.mean(0), (frames - frames.mean(0)).flatten(), differences.flatten()]
    return [view / view.norm() for view in found]


def brute_force(support: Tensor, labels: list[int], queries: Tensor, way: int, names: tuple[str, ...]) -> Tensor:
    """Probabilities by loops over views, supports, classes and mixtures."""
    members = [[views_of(clip) for clip, label in zip(support, labels, strict=True) if label == c] for c in range(way)]
    rows: list[tuple[int, list[list[float]]]] = []  # a left-out support's class, and its scores by view and class
    for c in range(way):
        for i in range(len(members[c])):
            if len(members[c]) == 1:
                continue
            scores = []
            for v in range(3):
                line = []
                for other in range(way):
                    lost = [i] if other == c else range(len(members[other]))
                    found = []
                    for k in lost:
                        rest = [m[v] for at, m in enumerate(members[other]) if at != k] or [members[other][0][v]]
                        found.append(cos(members[c][i][v], torch.stack(rest).mean(0)))
                    line.append(sum(found) / len(found))
                scores.append(line)
            rows.append((c, scores))
    held = torch.tensor([scores for _, scores in rows], dtype=torch.float64)  # (S, V, way)
    spread = (held - held.mean(2, keepdim=True)).square().mean((0, 2)).sqrt()
    weights, answers = [], []
    for name in names:
        for sharpness in SHARPNESS:
            total = 0.0
            for c, scores in rows:
                mixed = sum(
                    w / float(s) * torch.tensor(x) for w, s, x in zip(MIXTURES[name], spread, scores, strict=True)
                )
                total += float((sharpness * mixed).log_softmax(0)[c])
            weights.append(math.exp(total))
            answer = []
            for query in queries:
                mixed = torch.zeros(way, dtype=torch.float64)
                for v, view in enumerate(views_of(query)):
                    protos = [torch.stack([m[v] for m in members[c]]).mean(0) for c in range(way)]
                    mixed += MIXTURES[name][v] / spread[v] * torch.tensor([cos(view, p) for p in protos])
                answer.append((sharpness * mixed).softmax(0))
            answers.append(torch.stack(answer))
    total = sum(weights)
    return sum(w / total * answer for w, answer in zip(weights, answers, strict=True))


@pytest.mark.parametrize("by", ["auto", "motion", "both"])
@pytest.mark.parametrize("labels", [[0, 1, 2] * 3, [0, 1, 0, 2, 1, 0], [2, 0, 0, 1, 1, 1, 1]])
def test_probabilities_equal_a_brute_force_average_over_mixtures(labels: list[int], by: str) -> None:
    head = ViewsHead(D, 2 * T - 1, by=by)
    support, queries = clips(len(labels), 0), clips(5, 1)
    logits = head(support, torch.tensor(labels), queries, 3)
    expected = brute_force(support, labels, queries, 3, AUTO if by == "auto" else (by,))
    torch.testing.assert_close(logits.exp(), expected)


def test_a_left_out_support_is_compared_with_prototypes_of_one_clip_less() -> None:
    labels = [0, 1, 0, 1, 0]
    vectors = F.normalize(clips(5, 2)[:, 0], dim=1)
    found = leave_one_out(vectors @ vectors.T, group_by_class(torch.tensor(labels), 2))
    own = cos(vectors[0], vectors[[2, 4]].mean(0))
    other = (cos(vectors[0], vectors[1]) + cos(vectors[0], vectors[3])) / 2
    torch.testing.assert_close(found[0], torch.tensor([own, other], dtype=torch.float64))


def test_one_clip_a_class_leaves_the_mixtures_equal_and_a_named_view_decides() -> None:
    support, query = clips(3, 3), clips(4, 4)
    labels = torch.arange(3)
    auto = ViewsHead(D, 2 * T - 1)
    assert auto.choose(auto.embed(support), group_by_class(labels, 3)).tolist() == [0.5, 0.5]
    answers = ViewsHead(D, 2 * T - 1, by="motion")(support, labels, query, 3).argmax(1)
    motion = [[cos(views_of(q)[1], views_of(s)[1]) for s in support] for q in query]
    assert answers.tolist() == torch.tensor(motion).argmax(1).tolist()


def test_auto_takes_the_view_in_which_the_classes_differ() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(4)
    noise = torch.randn(12, 2 * T - 1, D)
    still, moving = noise.clone(), noise.clone()
    still[:, :T] += 5 * torch.eye(3, D)[labels][:, None]  # the same in every frame
    moving[:, :T] += 20 * torch.eye(D)[:3].unsqueeze(1)[labels] * torch.linspace(-1, 1, T)[None, :, None]
    head = ViewsHead(D, 2 * T - 1)
    for features, chosen in ((still, 0), (moving, 1)):
        weights = head.choose(head.embed(features), group_by_class(labels, 3))
        assert weights.argmax() == chosen
        assert weights.max() > 0.9


def test_held_out_equals_the_loop_over_supports_where_prototypes_are_as_large() -> None:
    # The plain loop leaves the other classes whole; it is the base class's, and other heads' own.
    head = build_head("prototype", D, T)
    support, labels = clips(6, 5)[:, :T].float(), torch.tensor([0, 1, 2, 0, 1, 2])
    embedded, classes = head.embed(support), group_by_class(labels, 3)
    held_out = head.held_out(embedded, classes)
    for row in range(6):
        rest = [at for at in range(6) if at != row]
        expected = head(support[rest], labels[rest], support[row, None], 3)[0]
        torch.testing.assert_close(held_out.logits[row], expected)
        torch.testing.assert_close(held_out.familiar[row], expected.max())


def test_soap_net_hands_over_frames_and_what_changes_between_them() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("tiny").eval()
    net = SOAPNet(None, backbone, build_head("views", backbone.dim, 5), backbone.mean, backbone.std).eval()
    clip = torch.randint(0, 256, (2, 3, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        features = net.features(clip)
        x = (clip / 255 - net.mean) / net.std
        still = backbone(torch.zeros(1, 3, 24, 24))[0]
        for b in range(2):
            expected = [backbone(x[b, t, None])[0] for t in range(3)]
            expected += [backbone((x[b, t + 1] - x[b, t])[None])[0] - still for t in range(2)]
            torch.testing.assert_close(features[b], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_clips_that_do_not_move_are_told_apart_by_appearance() -> None:
    still = torch.zeros(4, 2 * T - 1, D)
    still[:, :T] = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]).repeat(1, 3)[:, None]
    logits = ViewsHead(D, 2 * T - 1)(still, torch.tensor([0, 1, 0, 1]), still[:2], 2)
    assert logits.argmax(1).tolist() == [0, 1]
    assert logits.isfinite().all()


@pytest.mark.parametrize(("options", "text"), [({"by": "motoin"}, "did you mean motion"), ({"by": 3}, "by is 3")])
def test_an_unknown_view_is_refused_by_name(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        build_head("views", D, 7, **options)


def test_a_single_frame_shows_no_change() -> None:
    with pytest.raises(UserError, match="at least 2 frames"):
        build_head("views", D, 1)


@pytest.mark.parametrize("by", ["motion", "appearance"])
def test_differences_that_a_mixture_ignores_are_not_embedded_and_change_no_score(by: str) -> None:
    backbone = build_backbone("tiny")
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, T, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    seen: list[int] = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    head = build_head("views", backbone.dim, 2 * T - 1, by=by)
    net = SOAPNet(None, backbone, head, (0.5,) * 3, (0.2,) * 3).eval()
    found = net(pixels[:4], labels, pixels[4:], 2)
    assert seen == [6 * T]
    head.ignores_differences = False
    assert torch.equal(net(pixels[:4], labels, pixels[4:], 2), found)
    assert seen[1] == 6 * T + 6 * (T - 1) + 1
    fresh = [build_head("views", backbone.dim, 2 * T - 1, by=by) for _ in range(2)]
    assert torch.equal(net.with_head(fresh[0], same_features=True).features(pixels), net.features(pixels))
    assert net.with_head(fresh[1]).head.ignores_differences
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
