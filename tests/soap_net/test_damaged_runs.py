"""Damaged checkpoints and configs, drawn by a seed: each ends in the weights that were saved, or in one line."""

from __future__ import annotations

import copy
import gzip
import io
import math
import os
import pickle
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from soap_net import checkpoint
from soap_net.cli import main
from soap_net.config import Config, from_dict
from soap_net.errors import UserError
from soap_net.runs import RunFolder
from soap_net.train import train

Damage = Callable[[random.Random, bytes], bytes]

# ------------------------------------------------------------------------------------- damage to the bytes of any file


def flipped(draw: random.Random, whole: bytes) -> bytes:
    damaged = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 8, 64])):
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(draw: random.Random, whole: bytes) -> bytes:
    return whole[: draw.choice([0, 1, len(whole) - 1, draw.randrange(len(whole))])]


def zeroed(draw: random.Random, whole: bytes) -> bytes:
    start, size = draw.randrange(len(whole)), draw.choice([1, 16, 512, 4096])
    return whole[:start] + bytes(min(size, len(whole) - start)) + whole[start + size :]


def moved(draw: random.Random, whole: bytes) -> bytes:
    """A range is missing, there twice, or strange bytes are in its place."""
    start, size = draw.randrange(len(whole)), draw.choice([1, 3, 64, 700])
    part = draw.choice([b"", whole[start : start + size] * 2, draw.randbytes(size)])
    return whole[:start] + part + whole[start + size :]


def joined(draw: random.Random, whole: bytes) -> bytes:
    return draw.choice([whole + draw.randbytes(100), draw.randbytes(100) + whole, whole + whole])


BYTES: list[Damage] = [flipped, flipped, cut, zeroed, moved, joined]

# --------------------------------------------------------------------------- damage to an archive, its check sums right


def archived(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def members_of(whole: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def swapped(draw: random.Random, whole: bytes) -> bytes:
    """Two members of different sizes, the values of two weights say, in each other's place."""
    members = members_of(whole)
    one, other = draw.sample(range(len(members)), 2)
    while len(members[one][1]) == len(members[other][1]):
        one, other = draw.sample(range(len(members)), 2)
    names = members[one][0], members[other][0]
    members[one], members[other] = (names[0], members[other][1]), (names[1], members[one][1])
    return archived(members)


def lacking(draw: random.Random, whole: bytes) -> bytes:
    members = members_of(whole)
    del members[draw.choice([n for n, (name, _) in enumerate(members) if "/data" in name])]
    return archived(members)


def repickled(draw: random.Random, whole: bytes) -> bytes:
    """Damage to what describes the tensors, with a check sum that is right."""
    damage = draw.choice([cut, zeroed, moved])
    return archived([(n, damage(draw, data) if n.endswith("data.pkl") else data) for n, data in members_of(whole)])


def compressed(draw: random.Random, whole: bytes) -> bytes:
    return archived(members_of(whole), draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]))


ARCHIVES: list[Damage] = [swapped, lacking, repickled, compressed]

# ------------------------------------------------------------------------------------------------- wrong contents


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.proof,)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


def values() -> list[Any]:
    weights = [
        torch.tensor([math.nan]), torch.zeros(3, dtype=torch.int8), torch.zeros(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros(1).expand(10**12), torch.zeros(0),
    ]  # fmt: skip
    numbers = [-1, 2**70, 10**9, 1.5, math.inf, math.nan, True, 3j]
    others = [None, "", "a\0b", "x" * 9999, [], {}, {1: 2}, [1, "a"], nested(40), {"class_path": "os.system"}, b"ab"]
    return [*weights, *numbers, *others]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value in nested dictionaries."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))


def changed(draw: random.Random, whole: bytes) -> bytes:
    """One or two values that are of another kind, missing, or there beside the others."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    for _ in range(draw.choice([1, 1, 2])):
        *way, last = draw.choice([*places(content)])
        place = content
        for key in way:
            place = place[key]
        act = draw.randrange(4)
        if act == 0:
            del place[last]
        elif act == 1 and isinstance(place, dict):
            place[draw.choice(["strange", 7, "é", None])] = draw.choice(values())
        else:
            place[last] = draw.choice(values())
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def rescaled(draw: random.Random, whole: bytes) -> bytes:
    """Weights that are no numbers any more, or of another shape."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    weights = content["model"]
    name = draw.choice([name for name, weight in weights.items() if weight.is_floating_point()])
    wrong = [weights[name] / 0, weights[name].long(), weights[name][..., None], weights[name].to(torch.complex64)]
    weights[name] = draw.choice(wrong)
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def alien(draw: random.Random, whole: bytes) -> bytes:
    """A file of another kind."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save(content["model"], weights := io.BytesIO())
    torch.save(content, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script := io.BytesIO())
    others = [
        pickle.dumps({"format": 1}),
        gzip.compress(whole),
        b"PK\5\6" + bytes(18),
        b"\x89PNG\r\n",
        b"text",
        bytes(10**6),
    ]
    return draw.choice([weights.getvalue(), old.getvalue(), script.getvalue(), archived([("a/b", b"c")]), *others])


CONTENTS: list[Damage] = [changed, changed, changed, rescaled, alien]

# ------------------------------------------------------------------------------------------------------- the campaign


class Saved:
    """A finished run, and what became of copies of it that were damaged."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run = RunFolder(train(config, progress=False))
        self.last, self.yaml = self.run.last.read_bytes(), self.run.config.read_bytes()
        self.content = checkpoint.load(self.run.last)
        self.loaded, self.refused = 0, 0

    def restore(self) -> None:
        self.run.last.write_bytes(self.last)
        self.run.config.write_bytes(self.yaml)

    def outcome(self, read: Callable[[], dict[str, torch.Tensor] | None], strict: bool) -> None:
        """Reads: the weights that were saved, unless it is not `strict`, or one line."""
        began = time.perf_counter()
        weights, said = None, ""
        try:
            weights = read()
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
        if weights is None:
            self.refused += 1
        else:
            assert all(torch.isfinite(weight).all() for weight in weights.values())
            if strict:
                torch.testing.assert_close(weights, self.content["model"], rtol=0, atol=0)
            self.loaded += 1
        assert time.perf_counter() - began < 10

    def resumed(self) -> dict[str, torch.Tensor]:
        train(self.config, resume=True, progress=False)
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load(self.run.last)["model"]

    def rebuilt(self) -> dict[str, torch.Tensor]:
        return checkpoint.load_model(self.run.last)[0].state_dict()


@pytest.fixture
def saved(tiny_run: Callable[..., Config]) -> Saved:
    return Saved(tiny_run(train__episodes=4, train__optimizer="adamw", train__val_tasks=2))


def damage_checkpoints(saved: Saved, seed: int, count: int, kinds: list[Damage], strict: bool) -> None:
    """`count` damaged last.pt, each read in one of three ways, whose best.pt and config.yaml are whole.

    One whose bytes were damaged is refused, unless the damage lies between the members and spoils none of them.
    """
    draw = random.Random(seed)
    readers = [saved.weights, saved.rebuilt, saved.resumed]
    for number in range(count):
        saved.restore()
        damaged = draw.choice(kinds)(draw, saved.last)
        saved.run.last.write_bytes(damaged)
        refused = saved.refused
        saved.outcome(readers[number % 3], strict)
        if kinds is BYTES and saved.refused == refused:
            assert members_of(damaged) == members_of(saved.last)


def damage_configs(saved: Saved, seed: int, count: int) -> None:
    """`count` damaged config.yaml beside a whole last.pt: gone on with, or another setting that is seen."""
    draw = random.Random(seed)
    for _ in range(count):
        saved.restore()
        saved.run.config.write_bytes(draw.choice(BYTES)(draw, saved.yaml))
        saved.outcome(lambda: train(from_dict({**saved.run.read_config(), "out": str(saved.run.path)}), resume=True,
                                    progress=False) and saved.weights(), strict=True)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch, about sparse tensors and the old format
def test_damaged_bytes_give_the_weights_saved_or_one_line(saved: Saved) -> None:
    damage_checkpoints(saved, seed=3, count=18, kinds=BYTES, strict=True)
    damage_checkpoints(saved, seed=4, count=6, kinds=ARCHIVES, strict=True)
    assert saved.refused > 15


@pytest.mark.filterwarnings("ignore")
def test_wrong_contents_give_sound_weights_or_one_line(saved: Saved) -> None:
    damage_checkpoints(saved, seed=5, count=12, kinds=CONTENTS, strict=False)
    assert saved.refused > 5


def test_a_damaged_config_gives_the_run_or_one_line(saved: Saved) -> None:
    damage_configs(saved, seed=6, count=6)
    assert saved.loaded > 2


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
def test_hundreds_of_damaged_checkpoints(saved: Saved) -> None:
    damage_checkpoints(saved, seed=103, count=240, kinds=BYTES, strict=True)
    damage_checkpoints(saved, seed=104, count=90, kinds=ARCHIVES, strict=True)
    damage_checkpoints(saved, seed=105, count=300, kinds=CONTENTS, strict=False)


@pytest.mark.slow
def test_hundreds_of_damaged_configs(saved: Saved) -> None:
    damage_configs(saved, seed=106, count=120)
    assert saved.loaded > 60


@pytest.mark.parametrize("place", ["config", "model", "optimizer", "progress", "format"])
def test_no_code_in_a_checkpoint_is_run(saved: Saved, tmp_path: Path, place: str) -> None:
    proof = tmp_path / "ran"
    content = copy.deepcopy(saved.content)
    content[place] = Code(str(proof)) if place == "format" else {**content[place], "code": Code(str(proof))}
    torch.save(content, saved.run.last)
    shutil.copy(saved.run.last, saved.run.best)
    for read in (saved.weights, saved.rebuilt, saved.resumed, lambda: checkpoint.load_config(saved.run.best)):
        with pytest.raises(UserError, match=r"(last|best)\.pt: .* is made by 'posix mkdir'"):
            read()
    assert main(["eval", "--checkpoint", str(saved.run.best)]) == 2
    assert not proof.exists()
