from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from soap_net.cli import main
from soap_net.config import Config, from_dict
from soap_net.data.memory import ClipMemory
from soap_net.errors import UserError
from soap_net.experiments.command import build
from soap_net.experiments.experiment import Experiment, ExperimentStopped, Run, run_experiment, seeded
from soap_net.experiments.results import Result, Results, Row
from soap_net.interrupts import Interrupted

TASKS = 50


class Toy(Experiment):
    """Two settings whose accuracies are made up."""

    name = "toy"
    title = "Toy"
    columns = ("setting",)
    difference = "less plain"
    paper = "paper"

    def __init__(self, config: Config, preset: str = "quick") -> None:
        super().__init__(config, preset)
        self.done: list[str] = []
        self.stop_before = ""
        self.fail = ""

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        return seeded([("plain", {}), ("better", {"train.lr": 0.5})], seeds)

    def rows(self, results: Results) -> list[Row]:
        return [Row(("plain",), "plain", x="plain"), Row(("better",), "better", "test", ("plain", "test"), 81.1, x="b")]

    def work(self, run: Run, config: Config, stop: Callable[[], bool], memory: ClipMemory) -> Result:
        if run.folder == self.stop_before:
            raise Interrupted
        if run.folder == self.fail:
            raise UserError("no such clip")
        self.done.append(run.folder)
        assert config.episode.seed == run.seed
        correct = [(3 if config.train.lr == 0.5 else 2) + (run.seed + i) % 2 for i in range(TASKS)]
        test = {"accuracy": 20 * np.mean(correct), "ci95": 1.0, "tasks": TASKS, "answers": 5, "correct": correct}
        times = {"train_seconds": 1.0, "test_seconds": 1.0, "parameters": 10, "soap_parameters": 2}
        return {"tests": {"test": test}, **times}


@pytest.fixture
def toy() -> Toy:
    return Toy(Config())


def run(experiment: Experiment, folder: Path, seeds: int = 2) -> Results:
    return run_experiment(experiment, folder, seeds=range(seeds), jobs=1, command=["soap-net", "toy"], progress=False)


def test_table_shows_accuracies_paired_differences_and_the_papers_figures(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path / "toy")
    lines = (tmp_path / "toy/table.md").read_text().splitlines()
    assert lines[2] == "| setting | accuracy, % | less plain | paper |"
    assert lines[5].startswith("| better | 70.0 ± ")
    assert lines[5].endswith("| +20.0 ± 0.0 | 81.1 |")
    assert any(line.startswith("Made by `soap-net toy` on ") for line in lines)
    assert (tmp_path / "toy/plot.svg").read_text().startswith("<?xml")


def test_csv_has_a_line_for_each_test_of_each_run(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 4
    assert lines[1].startswith("plain,0,test,50.000,1.000,50,")


def test_stopped_experiment_goes_on_where_it_was(toy: Toy, tmp_path: Path) -> None:
    toy.stop_before = "plain-seed1"
    with pytest.raises(ExperimentStopped, match="2 of 4 runs finished"):
        run(toy, tmp_path)
    assert toy.done == ["plain-seed0", "better-seed0"]
    assert "1 seed;" in (tmp_path / "table.md").read_text()
    again = Toy(Config())
    run(again, tmp_path)
    assert again.done == ["plain-seed1", "better-seed1"]


def test_finished_runs_are_neither_repeated_nor_touched(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = Toy(Config())
    run(again, tmp_path)
    assert again.done == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_experiment_is_of_one_data_set_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(Toy(Config()), tmp_path / "toy")
    asked = json.loads((tmp_path / "toy/experiment.json").read_text())
    assert asked["data.root"] == str(tmp_path / "here" / "data")
    embedded = Toy(Config())
    embedded.motion, embedded.prepare = Path("motion"), lambda folder: None  # type: ignore[method-assign]
    run(embedded, tmp_path / "embedded")
    monkeypatch.chdir(tmp_path / "there")
    run(embedded, tmp_path / "embedded")
    with pytest.raises(UserError, match=r"experiment: data.root is '.*here/data' there and '.*there/data' here"):
        run(Toy(Config()), tmp_path / "toy")


def test_more_seeds_may_be_asked_for_later(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=1)
    assert toy.done == ["plain-seed0", "better-seed0"]
    run(toy, tmp_path, seeds=2)
    assert toy.done[2:] == ["plain-seed1", "better-seed1"]


def test_folder_of_another_config_is_refused_in_one_line(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=1)
    before = (tmp_path / "table.md").read_bytes()
    with pytest.raises(UserError, match=r"another experiment: train\.lr is 0\.001 there and 0\.25 here") as caught:
        run(Toy(from_dict({"train": {"lr": 0.25}})), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "table.md").read_bytes() == before
    with pytest.raises(UserError, match=r"experiment: data\.root is '.*/data' there and '.*/others' here"):
        run(Toy(from_dict({"data": {"root": "others"}})), tmp_path)


def test_with_several_data_sets_it_goes_on_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the one data set would be by default hangs on the folder, and is not looked at."""
    places = {"data": {"roots": [str(tmp_path / "a"), str(tmp_path / "b")]}}
    run(Toy(from_dict(places)), tmp_path / "out", seeds=1)
    monkeypatch.chdir(tmp_path)
    later = Toy(from_dict(places))
    run(later, tmp_path / "out", seeds=2)
    assert later.done == ["plain-seed1", "better-seed1"]
    with pytest.raises(UserError, match=r"another experiment: data\.roots is"):
        run(Toy(from_dict({"data": {"roots": [str(tmp_path / "a")]}})), tmp_path / "out")


def test_folder_of_something_else_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no experiment"):
        run(toy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_run_that_fails_is_named_and_the_finished_ones_kept(toy: Toy, tmp_path: Path) -> None:
    toy.fail = "better-seed0"
    with pytest.raises(UserError, match="run better-seed0: no such clip"):
        run(toy, tmp_path)
    assert (tmp_path / "runs/plain-seed0/result.json").exists()
    assert not (tmp_path / "runs/better-seed0/result.json").exists()


def test_damaged_result_is_named_in_one_line_and_left_alone(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=1)
    damaged = tmp_path / "runs/better-seed0/result.json"
    damaged.write_text('{"tests": ')
    with pytest.raises(UserError, match=r"better-seed0/result\.json is damaged .* delete it") as caught:
        run(Toy(Config()), tmp_path)
    assert "\n" not in str(caught.value)
    assert damaged.read_text() == '{"tests": '


@pytest.mark.parametrize("text", ["[1]", "null", '{"experiment": ', "[" * 100_000])
def test_damaged_experiment_file_is_named_in_one_line(toy: Toy, tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(UserError, match=r"experiment\.json is damaged") as caught:
        run(toy, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_killed_processes_left_goes_when_an_experiment_is_opened(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / ".experiment.json.0123abcd.part").write_text("{")  # killed before it was there
    run(toy, tmp_path)
    left = [tmp_path / ".table.md.0123abcd.part", tmp_path / "runs/plain-seed0/.result.json.0123abcd.part"]
    for path in left:
        path.touch()
    run(toy, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_in_an_experiment_file_is_more_than_compared(toy: Toy, tmp_path: Path) -> None:
    settings = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "run")]}}
    run(toy, tmp_path, seeds=1)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model.backbone": settings}))
    with pytest.raises(UserError, match=r"another experiment: model\.backbone is"):
        run(toy, tmp_path)
    assert not (tmp_path / "run").exists()


def test_impossible_setting_is_found_before_any_run(tmp_path: Path) -> None:
    class Impossible(Toy):
        def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
            return [*super().runs(seeds, results), Run("bad", 0, {"model.soap.tuple_sizes": [9]})]

    experiment = Impossible(Config())
    with pytest.raises(UserError, match=r"model\.soap\.tuple_sizes holds 9"):
        run(experiment, tmp_path)
    assert experiment.done == []


@pytest.mark.slow
def test_experiment_whose_process_was_killed_in_a_training_goes_on_and_ends_as_one_never_killed(
    tiny: list[str], tmp_path: Path
) -> None:
    def command(folder: Path) -> list[str]:
        return ["experiment", "order", "--seeds=1", "--jobs=1", f"--out={folder}", *tiny]

    def tests(folder: Path) -> dict[str, dict[str, object]]:
        found = (folder / "runs").glob("*/result.json")
        return {path.parent.name: json.loads(path.read_text())["tests"] for path in found}

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "soap_net", *command(killed)], env={**os.environ, **threads})
    deadline = time.monotonic() + 120
    while not tests(killed) or len(list((killed / "runs").iterdir())) == len(tests(killed)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = {path: path.read_bytes() for path in (killed / "runs").glob("*/result.json")}
    assert 1 <= len(before) < 6
    assert main(command(killed)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert main(command(whole)) == 0
    assert tests(killed) == tests(whole)


@pytest.mark.slow
def test_runs_in_parallel_processes_give_the_same_results(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread a run in both cases: how many add up a sum decides its last bits.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tables = {}
    for jobs in (1, 2):
        folder = tmp_path / f"jobs{jobs}"
        run_experiment(build("order", "quick", tiny), folder, seeds=[0], jobs=jobs, progress=False)
        found = sorted((folder / "runs").glob("*/result.json"))
        tables[jobs] = {path.parent.name: json.loads(path.read_text())["tests"] for path in found}
    torch.set_num_threads(threads)
    assert len(tables[1]) == 6
    assert tables[1] == tables[2]
    assert not multiprocessing.active_children()
