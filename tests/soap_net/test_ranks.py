from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from soap_net.errors import UserError
from soap_net.ranks import Ranks, digest, join, meet, pick_device, started_again

REPOSITORY = Path(__file__).parents[2]

TWO = """
import json, sys, torch
from torch import nn
from soap_net.ranks import RankLost, join
said = {}
def error(name, work):
    try:
        work()
    except Exception as raised:
        said[name] = [type(raised).__name__, str(raised)]
def fail(*who):
    with ranks.together():
        if ranks.rank in who:
            raise KeyError(f"a fault in {ranks.rank}")
with join("cpu") as ranks:
    said["gathered"] = list(ranks.gather({1 - ranks.rank: ranks.rank, 5 + ranks.rank: "x"}).items())
    copied = torch.full((2,), float(ranks.rank), dtype=torch.float64)
    ranks.copy_first([copied])
    said["copied"] = copied.tolist()
    summed = [torch.full((2,), 1.0 + ranks.rank), torch.tensor(ranks.rank, dtype=torch.float64)]
    ranks.sum(summed)
    said["sums"] = [one.tolist() for one in summed]
    model = nn.BatchNorm1d(1)
    model.unused, model.used_once = nn.Linear(1, 1), nn.Linear(1, 1)
    model.frozen = nn.BatchNorm1d(1).eval()
    model.frozen.running_mean.fill_(ranks.rank / 3)
    model.running_mean.fill_(3.0 * ranks.rank)
    model.weight.grad = torch.tensor([1.0 + ranks.rank])
    if ranks.first:
        model.used_once.bias.grad = torch.tensor([7.0])
    said["totals"] = ranks.sum_step(model, [1.5, ranks.rank])
    said["step"] = [model.weight.grad.item(), model.used_once.bias.grad.item(), model.running_mean.item()]
    said["frozen"] = model.frozen.running_mean.item()
    said["no gradient"] = model.unused.weight.grad is None
    error("none fails", fail)
    error("one fails", lambda: fail(1))
    error("both fail", lambda: fail(0, 1))
    error("same", lambda: ranks.agree({"episode": 8, "data": "abc"}, "-"))
    error("other", lambda: ranks.agree({"episode": 8 * ranks.rank, "data": "abc", f"only{ranks.rank}": 1}, "mend"))
    error("many", lambda: ranks.agree({str(i): ranks.rank for i in range(9)}, "mend"))
    print(json.dumps(said), flush=True)
    if ranks.first:
        sys.exit()
    try:
        for _ in range(9):
            ranks.sum([torch.zeros(1)])
    except RankLost as lost:
        print(json.dumps(str(lost)))
"""


@pytest.fixture(scope="module")
def two() -> list[list[Any]]:
    """What each of two processes printed that ran `TWO` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO],
            env={**place, "RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], done
    return [[json.loads(line) for line in output.splitlines()] for output, _ in done]


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "xpu", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device is 'cuda:1': not on this machine, which has .*cpu"):
            pick_device("cuda:1")


def test_a_device_without_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"device is 'cuda:abc': behind the colon goes a number"):
        pick_device("cuda:abc")


def test_alone_a_sum_is_the_value_itself_and_an_error_ones_own() -> None:
    with join("cpu") as ranks:
        assert ranks == Ranks(torch.device("cpu"), 0, 1)
        assert ranks.first
        value = torch.tensor([3.0])
        ranks.sum([value])
        ranks.copy_first([value])
        assert value == 3
        ranks.agree({"anything": 1}, "-")
        with pytest.raises(KeyError), ranks.together():
            raise KeyError


def test_processes_sum_tensors_of_any_type(two: list[list[Any]]) -> None:
    assert [said["sums"] for said, *_ in two] == [[[3.0, 3.0], 1.0]] * 2


def test_processes_sum_gradients_and_average_statistics(two: list[list[Any]]) -> None:
    for said, *_ in two:
        assert said["totals"] == [3.0, 1.0]
        assert said["step"] == [3.0, 7.0, 1.5]
        assert said["no gradient"], "weight decay leaves alone what no process used"
    assert [said["frozen"] for said, *_ in two] == pytest.approx([0, 1 / 3]), "what is frozen is left as it is"


def test_processes_gather_in_the_order_of_keys_and_take_on_the_first_ones_tensors(two: list[list[Any]]) -> None:
    for said, *_ in two:
        assert said["gathered"] == [[0, 1], [1, 0], [5, "x"], [6, "x"]]
        assert said["copied"] == [0.0, 0.0]


def test_what_fails_in_one_process_ends_all_each_with_one_line(two: list[list[Any]]) -> None:
    first, second = (said for said, *_ in two)
    assert "none fails" not in {*first, *second}
    assert second["one fails"] == ["KeyError", "'a fault in 1'"], "where it failed, with its own error"
    assert first["one fails"] == ["UserError", f"rank 1 on {socket.gethostname()}: 'a fault in 1'"]
    assert [said["both fail"] for said in (first, second)] == [["KeyError", f"'a fault in {i}'"] for i in range(2)]


def test_processes_that_differ_all_end_with_the_line_that_says_in_what(two: list[list[Any]]) -> None:
    first, second = (said for said, *_ in two)
    assert "same" not in {*first, *second}
    assert first["other"] == second["other"]
    kind, line = first["other"]
    here, there = (f"rank {i} on {socket.gethostname()}" for i in (1, 0))
    assert kind == "UserError"
    assert line == (
        f"the processes are not at the same run: episode is 8 in {here} and 0 in {there}, "
        f"only0 is None in {here} and 1 in {there}, only1 is 1 in {here} and None in {there}; mend"
    )
    assert first["many"][1].endswith(", and 6 more; mend")


def test_a_lost_process_is_one_line_in_the_others(two: list[list[Any]]) -> None:
    line = two[1][-1]
    assert line.startswith("another process of this run was lost, whose own last line may say why: ")
    assert "\n" not in line


def test_a_digest_tells_single_bits_types_and_places_apart() -> None:
    weights = nn.Linear(3, 2).state_dict()
    content = {"model": weights, "steps": [1, {"a": torch.tensor(2.0)}]}
    same = {"steps": [1, {"a": torch.tensor(2.0)}], "model": {name: w.clone() for name, w in weights.items()}}
    assert digest(content) == digest(same)
    assert len(digest(content)) == 64
    flipped = weights["bias"].clone()
    flipped.view(torch.uint8)[0] ^= 1
    others = [
        {**content, "model": {**weights, "bias": flipped}},
        {**content, "model": {**weights, "bias": weights["bias"].bfloat16()}},
        {**content, "model": {**weights, "weight": weights["weight"].reshape(3, 2)}},
        {**content, "model": {"weights": weights["weight"], "bias": weights["bias"]}},
        {**content, "steps": [1, {"a": torch.tensor(3.0)}]},
        {**content, "steps": [1, {"a": torch.tensor(2.0)}, []]},
        {**content, "steps": ["1", {"a": torch.tensor(2.0)}]},
    ]
    assert len({digest(content), *map(digest, others)}) == 1 + len(others)


def test_torchruns_restarts_are_told_from_first_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not started_again()
    for count, again in (("0", False), ("1", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert started_again() is again


def test_processes_find_each_other_in_a_store_that_still_knows_those_before() -> None:
    store = dist.HashStore()

    def come(rank: int, late: float) -> str:
        time.sleep(late)
        return meet(store, rank, 3)

    names = []
    for lateness in ((0.0, 0.1, 0.0), (0.0, 0.1, 0.2), (0.1, 0.0, 0.0)):
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(come, range(3), lateness))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3, "another each time"
