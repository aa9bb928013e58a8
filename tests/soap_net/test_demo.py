"""The demo: from nothing to a table, a report and a summary, and again after an interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from soap_net import demo
from soap_net.config import Config, load_config
from soap_net.data.motion import MotionConfig
from soap_net.demo import NETS, run_demo
from soap_net.errors import UserError, WriteError
from soap_net.experiments.processes import Job, perform
from soap_net.interrupts import Interrupted
from soap_net.runs import RunFolder

MOTION = MotionConfig(size=24, seconds=0.5, dots=20, train_clips=2, val_clips=2, test_clips=3)
SETTINGS = (
    "--data.resize=24",
    "--data.crop=24",
    "--episode.queries=1",
    "--train.episodes=2",
    "--train.val_every=0",
    "--eval.tasks=20",
    "--device=cpu",
)


def _config(out: Path, *settings: str) -> Config:
    return load_config("demo", [*SETTINGS, *settings, f"--out={out}"])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert run_demo(_config(out), MOTION, progress=False) == out / "report.html"
    return out


def test_it_ends_with_a_summary_and_a_report(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text(encoding="utf-8"))
    for name, shown in NETS.items():
        assert summary[name].keys() == {"accuracy", "ci95", "tasks"}
        assert 0 <= summary[name]["accuracy"] <= 100
        assert summary[name]["tasks"] == 20
        assert shown in (done / "report.html").read_text(encoding="utf-8")
        evaluated = json.loads((done / name / "eval.json").read_text(encoding="utf-8"))
        assert summary[name]["accuracy"] == evaluated["accuracy"]
        assert evaluated["split"] == "test"
    assert summary["seconds"] >= summary["training_and_evaluation_seconds"] > 0


def test_the_nets_differ_in_soap_alone(done: Path) -> None:
    with_soap, without = (load_config(done / name / "config.yaml") for name in NETS)
    assert with_soap.model.soap.enabled
    assert not without.model.soap.enabled
    without.model.soap.enabled, without.out = True, with_soap.out
    assert with_soap == without
    assert with_soap.data.root == done / "motion"


def test_the_table_gives_accuracy_and_time_of_an_episode(done: Path) -> None:
    results = {name: demo.result(RunFolder(done / name)) for name in NETS}
    lines = demo.table(results, _config(done)).splitlines()
    assert "5-way 1-shot" in lines[0]
    assert "chance is 20 %" in lines[0]
    assert [line[:14].strip() for line in lines[3:]] == list(NETS.values())
    assert all("±" in line and line.count("ms/episode") == 1 for line in lines[3:])
    alone = {name: {**one, "ci95": None, "tasks": 1} for name, one in results.items()}
    assert all("of one task" in line and "±" not in line for line in demo.table(alone, _config(done)).splitlines()[3:])


def _cleared(out: Path, *settings: str) -> list[str]:
    demo.clear(demo.net_configs(_config(out, *settings)), out / "summary.json")
    return sorted(path.name for path in out.iterdir())


def test_an_unfinished_demo_keeps_its_runs_and_any_other_starts_anew(done: Path, tmp_path: Path) -> None:
    def leave(finished: bool) -> Path:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for name in NETS:
            (out / name).mkdir(parents=True)
            text = (done / name / "config.yaml").read_text(encoding="utf-8").replace(str(done), str(out))
            (out / name / "config.yaml").write_text(text, encoding="utf-8")
        if finished:
            (out / "summary.json").write_text("{}", encoding="utf-8")
        return out

    assert _cleared(leave(finished=False)) == list(NETS)
    assert _cleared(leave(finished=False), "--device=auto") == list(NETS)  # each process may have its own GPU
    assert _cleared(leave(finished=False), "--train.lr=0.1") == []
    assert _cleared(leave(finished=True)) == []
    out = leave(finished=False)
    (out / "with_soap" / "config.yaml").rename(out / "with_soap" / ".config.yaml.0123abcd.part")  # killed at its start
    assert _cleared(out) == ["without_soap"]
    out = leave(finished=False)
    (out / "with_soap" / "config.yaml").rename(out / "with_soap" / "thesis.txt")
    with pytest.raises(UserError, match="holds other files than a run of the demo"):
        _cleared(out)
    assert (out / "with_soap" / "thesis.txt").exists()


def test_what_a_net_process_refuses_arrives_as_one_line(tmp_path: Path) -> None:
    net = demo.net_configs(_config(tmp_path))["with_soap"]
    with pytest.raises(UserError, match=r"^with SOAP: .*motion") as caught:
        list(perform([Job("with SOAP", demo.learn, net)], 1))
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = _config(tmp_path / "out")
    config.eval.way = 1
    with pytest.raises(UserError, match=r"eval\.way is 1"):
        run_demo(config, MOTION, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="/file/demo/motion: "):
        run_demo(_config(tmp_path / "file" / "demo"), MOTION, progress=False)


def test_an_interrupted_demo_saves_and_goes_on_where_it_stopped(done: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "out", "--train.episodes=60")
    log = config.out / "without_soap" / "metrics.jsonl"

    def interrupt() -> None:
        while not log.exists() or log.read_text(encoding="utf-8").count("\n") < 5:
            time.sleep(0.05)
        for child in multiprocessing.active_children():  # as a terminal's Ctrl-C reaches all
            os.kill(child.pid or 0, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(Interrupted):
        run_demo(config, MOTION, progress=False)
    watcher.join()
    assert not multiprocessing.active_children()
    assert not (config.out / "summary.json").exists()
    reached = log.read_text(encoding="utf-8").count("\n")
    assert reached < 60
    run_demo(config, MOTION, progress=False)
    assert log.read_text(encoding="utf-8").count("\n") == 60


@pytest.mark.slow
def test_soap_tells_unseen_motions_apart_and_the_same_net_without_it_does_not(tmp_path: Path) -> None:
    run_demo(load_config("demo", [f"--out={tmp_path / 'out'}"]), progress=False)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["with_soap"]["accuracy"] >= 70
    assert summary["with_soap"]["accuracy"] >= summary["without_soap"]["accuracy"] + 30
