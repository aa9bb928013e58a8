"""The supports of a classifier: added to, taken from, kept in a file that is refused where it is damaged."""

from __future__ import annotations

import contextlib
import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from soap_net.errors import UserError, WriteError
from soap_net.supports import KEY, Supports, load_supports


@pytest.fixture
def supports() -> Supports:
    features = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    return Supports(features, torch.tensor([0, 1, 1, 2]), ("a", "b", "c"), ("a/1", "b/1", "b/2", "c/1"))


def test_added_clips_join_their_class_and_replace_those_of_their_name(supports: Supports) -> None:
    more = Supports(torch.ones(3, 2, 3), torch.tensor([0, 1, 1]), ("d", "b"), ("d/1", "b/1", "b/3"))
    joined = supports.joined(more)
    assert joined.classes == ("a", "b", "c", "d")
    assert joined.counts() == {"a": 1, "b": 3, "c": 1, "d": 1}
    by_name = dict(zip(joined.clips, joined.features, strict=True))
    torch.testing.assert_close(by_name["b/1"], torch.ones(2, 3))
    torch.testing.assert_close(by_name["b/2"], supports.features[2])


def test_a_class_goes_whole_or_with_its_last_clip(supports: Supports) -> None:
    assert supports.without("b").clips == ("a/1", "c/1")
    assert supports.without("b").labels.tolist() == [0, 1]
    assert supports.without("b/1").counts() == {"a": 1, "b": 1, "c": 1}
    assert supports.without("c/1").classes == ("a", "b")
    with pytest.raises(UserError, match=r"no class or clip 'b/11' to drop; did you mean b/1"):
        supports.without("b/11")


def test_a_file_gives_back_what_went_in(supports: Supports, tmp_path: Path) -> None:
    path = tmp_path / "new" / "my.classifier"
    supports.save(path, {"accept": 0.9})
    found, about = load_supports(path)
    assert torch.equal(found.features, supports.features)
    assert torch.equal(found.labels, supports.labels)
    assert (found.classes, found.clips, about["accept"]) == (supports.classes, supports.clips, 0.9)


def test_a_place_that_cannot_be_written_to_is_one_line(supports: Supports, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"/file/my\.classifier: "):
        supports.save(tmp_path / "file" / "my.classifier", {})


def test_damaged_files_are_read_or_refused(supports: Supports, tmp_path: Path) -> None:
    path = tmp_path / "my.classifier"
    supports.save(path, {})
    whole, rng = path.read_bytes(), random.Random(5)
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(1, 9)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # bits of the features may flip unseen, as in any safetensors file
            load_supports(path)


@pytest.mark.parametrize(
    ("tensors", "about", "text"),
    [
        ({"features": torch.zeros(1, 2, 3)}, '{"format": 1}', "not a classifier"),
        ({}, '{"format": 2}', "format 2, this version reads 1"),
        ({"labels": torch.tensor([0, 5])}, None, "don't fit each other"),
        ({"features": torch.full((2, 2, 3), torch.nan)}, None, "don't fit each other"),
        ({"features": torch.zeros(2, 6)}, None, "don't fit each other"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, torch.Tensor], about: str | None, text: str, tmp_path: Path
) -> None:
    whole = {"features": torch.zeros(2, 2, 3), "labels": torch.tensor([0, 1]), **tensors}
    about = about or '{"format": 1, "classes": ["a", "b"], "clips": ["a/1", "b/1"]}'
    path = tmp_path / "my.classifier"
    path.write_bytes(safetensors.torch.save(whole, {KEY: about}))
    with pytest.raises(UserError, match=text):
        load_supports(path)


def test_a_missing_file_and_a_foreign_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such classifier"):
        load_supports(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a classifier"):
        load_supports(tmp_path / "text")


def test_alike_are_those_of_one_class_within_a_share_of_their_size() -> None:
    torch.manual_seed(0)
    features = torch.randn(7, 3, 4)
    features[4] = 1.2 * features[1]
    features[6] = features[0]
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    found = Supports(features, labels, ("a", "b"), tuple("abcdefg")).alike(0.5)
    flat = features.flatten(1).tolist()
    expected = [
        (i, j)
        for i in range(7)
        for j in range(i + 1, 7)
        if labels[i] == labels[j]
        and math.dist(flat[i], flat[j]) < 0.5 * max(math.hypot(*flat[i]), math.hypot(*flat[j]))
    ]
    assert sorted(found) == expected == [(1, 4)]
