"""Several processes of one training: what one lacks or loses, and how they go on."""

from __future__ import annotations

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
from soap_net.config import Config, save_config
from soap_net.interrupts import Interrupted
from soap_net.train import Step, Training, TrainingStopped, train

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

DYING = """
import os, signal, sys
from soap_net.cli import main
from soap_net.train import Training
rank, episode, restarts = map(int, sys.argv.pop(1).split(","))
step = Training.step
def step_or_die(self, batch):
    if (self.ranks.rank, int(os.environ["TORCHELASTIC_RESTART_COUNT"])) == (rank, restarts) and batch.start == episode:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
Training.step = step_or_die
sys.exit(main())
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def at_once(commands: Sequence[Sequence[str]]) -> list[tuple[int, list[str]]]:
    """Runs a `soap-net` command as each rank of one run, as on machines of their own; exit codes and last lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(len(commands)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "soap_net", *command],
            env={**place, "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    said = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    lines = [[line for line in one if line.startswith("soap-net: ") or "Traceback" in line] for one in said]
    return [(process.returncode, one) for process, one in zip(processes, lines, strict=True)]


def stop_at_4(training: Training, step: Step) -> None:
    if training.state.episode == 4:
        raise Interrupted


def flip_a_bit(source: Path, target: Path) -> None:
    """Copies a checkpoint with one bit of its weights changed."""
    content = checkpoint.load(source)
    next(iter(content["model"].values())).view(torch.uint8).view(-1)[0] ^= 1
    checkpoint.save(target, content)


@pytest.mark.slow
def test_machines_without_a_common_folder_end_unless_they_are_at_the_same_place(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_run(out=str(tmp_path / "a"))
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callback=stop_at_4)
    save_config(config, tmp_path / "c.yaml")
    a, b = (["train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / name)] for name in "ab")
    host = socket.gethostname()

    for first, second, there, here in ((a, b, "there", "missing"), (b, a, "missing", "there")):
        (code, line), (other_code, other_line) = at_once([first, second])
        assert (code, other_code) == (2, 2)
        assert line == other_line
        assert len(line) == 1
        assert line[0].startswith(
            f"soap-net: the processes are not at the same run: last.pt is {here!r} in rank 1 on {host} and {there!r} "
            f"in rank 0 on {host}, episode is "
        )
    flip_a_bit(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    (code, [line]), other = at_once([a, b])
    assert (code, [line]) == other
    assert "not at the same run: digest of the weights is " in line
    shutil.copy(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    assert at_once([a, [*b, "--train.lr", "0.5"]])[0][1][0].startswith(
        f"soap-net: the processes are not at the same run: train.lr is 0.5 in rank 1 on {host} and 0.01 in rank 0"
    )
    assert checkpoint.load(tmp_path / "a" / "last.pt")["progress"]["episode"] == 4
    assert [code for code, _ in at_once([a, b])] == [0, 0]
    assert checkpoint.load(tmp_path / "a" / "last.pt")["progress"]["episode"] == 12

    flip_a_bit(tmp_path / "a" / "best.pt", tmp_path / "b" / "best.pt")
    (code, [line]), other = at_once([["eval", "--checkpoint", str(tmp_path / name / "best.pt")] for name in "ab"])
    assert (code, [line]) == other
    assert "not at the same run: digest of the weights is " in line


@pytest.mark.slow
def test_a_lost_process_costs_nothing_that_is_done_again_bit_for_bit(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)

    def launch(name: str, dies: str, *options: str) -> subprocess.CompletedProcess[str]:
        config = tiny_run(out=str(tmp_path / name), train__optimizer="adamw")
        save_config(config, tmp_path / f"{name}.yaml")
        command = [*TORCHRUN, *options, str(tmp_path / "dying.py"), dies, "train", "--config"]
        return subprocess.run(
            [*command, str(tmp_path / f"{name}.yaml")],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )

    lost = launch("lost", "1,4,0")
    assert lost.returncode != 0
    assert "soap-net: another process of this run was lost, whose own last line may say why: " in lost.stderr
    # The command that was given before, as a batch system does; and again a process is lost, which torchrun replaces.
    again = launch("lost", "0,8,0", "--max-restarts=1")
    assert again.returncode == 0, again.stderr
    assert "lost holds this run, stopped after episode 4: going on with it" in again.stderr
    assert launch("straight", "0,-1,0").returncode == 0
    content, straight = (checkpoint.load(tmp_path / name / "last.pt") for name in ("lost", "straight"))
    del content["config"], straight["config"]
    torch.testing.assert_close(content, straight, rtol=0, atol=0)
    for name in ("lost", "straight"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().count('"lr"')
        assert lines == 6
