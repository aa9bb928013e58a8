"""Several machines of one training, each a network namespace: how they meet, what one of them lost costs the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from soap_net import checkpoint
from soap_net.config import Config, save_config
from soap_net.train import train

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

#: `soap-net` whose rank 1, before its third step of the first start, does what the first argument says.
DYING = """
import os, signal, sys
from soap_net.cli import main
from soap_net.train import Training
what, step = sys.argv.pop(1), Training.step
def step_or_die(self, batch):
    if self.ranks.rank == 1 and batch.start == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if what == "machine":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
Training.step = step_or_die
sys.exit(main())
"""
#: Two processes of which rank 1 falls silent, without a word to the other: where it meets it, or later, by its cable.
SILENT = """
import os, subprocess, sys, time
from datetime import timedelta
import torch
from soap_net import ranks
ranks.PATIENCE, meet = timedelta(seconds=6), ranks.meet
def met(*args):
    name = meet(*args)
    if sys.argv[1] == "meeting" and os.environ["RANK"] == "1":
        os._exit(0)
    return name
ranks.meet = met
try:
    with ranks.join("cpu") as here:
        here.sum([torch.ones(1)])
        if here.rank == 1:
            subprocess.run(["ip", "link", "set", "wire", "down"], check=True)
            time.sleep(60)
        began = time.monotonic()
        here.sum([torch.ones(1)])
except ranks.UserError as error:
    print(f"{error}\\n{time.monotonic() - began if sys.argv[1] == 'cable' else 0}")
    os._exit(2)
"""


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address, and the commands that run in it."""

    name: str
    address: str

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        here = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, *command],
            env={**os.environ, **here, "GLOO_SOCKET_IFNAME": "wire", **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two machines and a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2), which makes network namespaces")
    two = [Machine(f"soap{os.getpid()}{name}", f"10.77.0.{number}") for number, name in enumerate("ab", 1)]
    first, second = (machine.name for machine in two)
    setup = [
        f"netns add {first}",
        f"netns add {second}",
        f"link add name wire netns {first} type veth peer name wire netns {second}",
        *(f"-n {machine.name} addr add {machine.address}/24 dev wire" for machine in two),
        *(f"-n {machine.name} link set {link} up" for machine in two for link in ("lo", "wire")),
    ]
    try:
        for command in setup:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces can't be made here: {done.stderr.strip()}")
        yield two
    finally:
        for machine in two:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def elastic(machine: Machine, nodes: str, *command: str) -> subprocess.Popen[str]:
    """`torchrun` as docs/machines.md has it, the first machine being the place where all meet."""
    first = "1" if machine.address.endswith(".1") else "0"
    return machine.start(
        *("-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "job"),
        *("--rdzv-conf", f"is_host={first},last_call_timeout=20", "--local-addr", machine.address),
        *command,
    )


@pytest.mark.parametrize(("lost", "nodes"), [("rank", "2"), ("machine", "1:2")])
def test_two_machines_train_as_one_though_one_is_lost(
    machines: list[Machine], tiny_run: Callable[..., Config], tmp_path: Path, lost: str, nodes: str
) -> None:
    config = tiny_run(out=str(tmp_path / "two"), train__val_every=0)
    save_config(config, tmp_path / "c.yaml")
    (tmp_path / "dying.py").write_text(DYING)
    command = (str(tmp_path / "dying.py"), lost, "train", "--config", str(tmp_path / "c.yaml"))
    agents = [elastic(machine, nodes, *command) for machine in machines]
    try:
        said = [agent.communicate(timeout=250)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    codes = [agent.returncode for agent in agents]
    assert codes[0] == 0, said
    assert (codes[1] == 0) == (lost == "rank"), "a machine that is gone stays gone, and the other goes on alone"
    assert (tmp_path / "two" / "metrics.jsonl").read_text().count('"lr"') == 6, "a line for each step, none done twice"
    assert "another process of this run was lost" in said[0]

    # One process that nothing happens to.
    alone = train(tiny_run(out=str(tmp_path / "one"), train__val_every=0), progress=False)
    two, one = (checkpoint.load(folder / "last.pt") for folder in (tmp_path / "two", alone))
    assert two["progress"]["episode"] == one["progress"]["episode"] == 12
    for name, weight in one["model"].items():
        if (
            "running_" not in name and weight.is_floating_point()
        ):  # those of several processes differ, see docs/training.md
            torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["meeting", "cable"])
def test_a_machine_that_falls_silent_is_waited_for_no_longer_than_patience(
    machines: list[Machine], tmp_path: Path, where: str
) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    place = {"MASTER_ADDR": machines[0].address, "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    first, second = (
        machine.start(str(tmp_path / "silent.py"), where, **place, RANK=str(rank))
        for rank, machine in enumerate(machines)
    )
    try:
        said, errors = first.communicate(timeout=100)
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 2, errors
    line, seconds = said.splitlines()[-2:]
    expected = {"meeting": "the 2 processes of this run did not find each other: ", "cable": "another process of this "}
    assert line.startswith(expected[where])
    assert float(seconds) < 12
