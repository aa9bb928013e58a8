"""Several processes of one training: what one lacks or loses, and how they go on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from soap_net import checkpoint
from soap_net.callbacks import EachStep
from soap_net.config import Config, save_config
from soap_net.interrupts import Interrupted
from soap_net.steps import Step
from soap_net.train import Training, TrainingStopped, train

REPOSITORY = Path(__file__).parents[2]

COMMANDS = """
import contextlib, io, json, sys
from soap_net.cli import main
for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(command)
    lines = [line for line in said.getvalue().splitlines() if "soap-net: " in line or "holds this run" in line]
    print(json.dumps([code, lines]), file=sys.stderr)
"""
DYING = """
import os, signal, sys
from soap_net.cli import main
from soap_net.train import Training
step, restart = Training.step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def step_or_die(self, batch):
    if (self.ranks.rank, batch.start) == [(1, 4), (0, 8)][restart]:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
Training.step = step_or_die
sys.exit(main())
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def as_ranks(commands: Sequence[Sequence[Sequence[str]]]) -> list[list[tuple[int, list[str]]]]:
    """Runs pairs of `soap-net` commands, one pair after the other, as two machines would: exit codes and lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_RANK="0")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, json.dumps([pair[rank] for pair in commands])],
            env={**place, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=250)[1].splitlines()[-len(commands) :] for process in processes]
    return [[(code, lines) for code, lines in map(json.loads, pair)] for pair in zip(*said, strict=True)]


def stop_at_4(training: Training, step: Step) -> None:
    if training.state.episode == 4:
        raise Interrupted


def flip_a_bit(path: Path) -> None:
    content = checkpoint.load(path)
    next(iter(content["model"].values())).view(torch.uint8).view(-1)[0] ^= 1
    checkpoint.save(path, content)


@pytest.mark.slow
def test_machines_without_a_common_folder_end_unless_they_are_at_the_same_place(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_run(out=str(tmp_path / "stopped"))
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callbacks=[EachStep(stop_at_4)])
    save_config(config, tmp_path / "c.yaml")

    def commands(case: str, copies: str, *options: str) -> list[list[str]]:
        """Of a case in which the two have the folders a and b for their own; those of `copies` hold the stopped run."""
        for name in copies:
            shutil.copytree(tmp_path / "stopped", tmp_path / case / name)
        train = ["train", "--config", str(tmp_path / "c.yaml"), "--out"]
        return [[*train, str(tmp_path / case / "a")], [*train, str(tmp_path / case / "b"), *options]]

    missing, swapped, flipped = commands("missing", "a"), commands("swapped", "a")[::-1], commands("flipped", "ab")
    other, same = commands("other", "", "--train.lr", "0.5"), commands("same", "ab")
    flip_a_bit(tmp_path / "flipped" / "b" / "last.pt")
    for name in "ab":
        shutil.copytree(tmp_path / "stopped", tmp_path / "eval" / name)
    flip_a_bit(tmp_path / "eval" / "b" / "last.pt")
    evaluated = [["eval", "--checkpoint", str(tmp_path / "eval" / name / "last.pt")] for name in "ab"]

    *refused, gone_on = as_ranks([missing, swapped, flipped, other, evaluated, same])
    host = socket.gethostname()
    differences = (
        f"last.pt is 'missing' in rank 1 on {host} and 'there' in rank 0 on {host}, episode is 0 in",
        f"last.pt is 'there' in rank 1 on {host} and 'missing' in rank 0 on {host}, episode is 4 in",
        "digest of the weights is ",
        f"train.lr is 0.5 in rank 1 on {host} and 0.01 in rank 0 on {host}; all need the same command, data and",
        "digest of the weights is ",
    )
    for ((code, lines), rank_1), difference in zip(refused, differences, strict=True):
        lines = [line for line in lines if line.startswith("soap-net: ")]
        assert rank_1 == (code, lines)
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith(f"soap-net: the processes are not at the same run: {difference}")
    assert [code for code, _ in gone_on] == [0, 0]
    reached = {
        case: checkpoint.load(tmp_path / case / "a" / "last.pt")["progress"]["episode"]
        for case in ("missing", "swapped", "flipped", "same")
    }
    assert reached == {"missing": 4, "swapped": 4, "flipped": 4, "same": 12}
    assert not [*tmp_path.glob("other/*/last.pt")]


@pytest.mark.slow
def test_a_process_without_an_episode_embeds_its_share_of_a_frozen_nets_clips(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    """All that is left of the run is one episode, for two processes."""
    alone, shared = (
        tiny_run(
            out=str(tmp_path / name), train__episodes=5, train__freeze=["backbone", "soap"], data__augment=False,
            train__val_every=0,
        )
        for name in ("alone", "shared")
    )  # fmt: skip
    train(alone, progress=False)
    with pytest.raises(TrainingStopped):
        train(shared, progress=False, callbacks=[EachStep(stop_at_4)])
    save_config(shared, tmp_path / "c.yaml")
    command = ["train", "--config", str(tmp_path / "c.yaml")]

    [ended] = as_ranks([[command, command]])
    assert [code for code, _ in ended] == [0, 0], ended
    contents = [checkpoint.load(config.out / "last.pt") for config in (shared, alone)]
    assert contents[0]["progress"] == contents[1]["progress"]
    torch.testing.assert_close(contents[0]["model"], contents[1]["model"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_lost_processes_cost_nothing_that_is_not_done_again_bit_for_bit(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    commands = []
    for name in ("lost", "straight"):
        save_config(tiny_run(out=str(tmp_path / name), train__optimizer="adamw"), tmp_path / f"{name}.yaml")
        commands.append(["train", "--config", str(tmp_path / f"{name}.yaml")])

    # torchrun starts both processes again after the first loss, and gives up after the second.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    lost = subprocess.run(
        [*torchrun, str(tmp_path / "dying.py"), *commands[0]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert lost.returncode != 0
    assert "soap-net: another process of this run was lost, whose own last line may say why: " in lost.stderr
    assert checkpoint.load(tmp_path / "lost" / "last.pt")["progress"]["episode"] == 8, lost.stderr
    # The same command anew, as a batch system gives it.
    again, straight = as_ranks([[command, command] for command in commands])
    assert again[0] == (0, [f"{tmp_path / 'lost'} holds this run, stopped after episode 8: going on with it"])
    assert straight == [(0, []), (0, [])]
    contents = [checkpoint.load(tmp_path / name / "last.pt") for name in ("lost", "straight")]
    for content in contents:
        del content["config"]
    torch.testing.assert_close(*contents, rtol=0, atol=0)
    for name in ("lost", "straight"):
        assert (tmp_path / name / "metrics.jsonl").read_text().count('"lr"') == 6, "a line for each step"
