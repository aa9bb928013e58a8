from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from soap_net.errors import UserError
from soap_net.runs import MetricsLog, RunFolder, difference, episode_seconds


def test_what_a_run_folder_lacks_is_empty(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    assert run.read_versions() == {}
    assert run.read_result() is None
    with pytest.raises(UserError, match=r"not a run folder: there is no config\.yaml in it"):
        run.read_config()


def test_a_damaged_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {lr: 0.1")
    with pytest.raises(UserError, match=r"config\.yaml: not a YAML file: ") as raised:
        RunFolder(tmp_path).read_config()
    assert "\n" not in str(raised.value)


def test_the_log_goes_on_after_the_last_episode_that_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with MetricsLog(run, 0, active=True) as log:
        for episode in (2, 4, 6):
            log.write(episode, loss=1 / episode, episodes_per_second=float(episode))
        log.write(6, val_accuracy=math.inf)
    with run.metrics.open("a") as file:
        file.write('{"episode": 8, "lo')  # cut off by a crash
    kept = run.metrics.read_text().splitlines()[:2]
    with MetricsLog(run, 4, active=True) as log:
        assert run.metrics.read_text().splitlines() == kept
        log.write(6, loss=0.5)
        assert run.read_metrics()[-1] == {"episode": 6, "loss": 0.5}, "there at once, for who watches"
    assert [entry["episode"] for entry in run.read_metrics()] == [2, 4, 6]
    assert episode_seconds(run.read_metrics()) == (1 / 2 + 1 / 4) / 2
    assert episode_seconds([{"episode": 1, "val_accuracy": 3.0}]) is None


def test_only_the_first_process_writes_the_log(tmp_path: Path) -> None:
    with MetricsLog(RunFolder(tmp_path), 0, active=False) as log:
        log.write(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"accuracy": 3.0}))
    assert RunFolder(tmp_path).read_result() == {"accuracy": 3.0}


def test_a_difference_names_three_settings_and_counts_the_others() -> None:
    there = {"a": 1, "b": "x", "free": 1, "gone": 2}
    assert difference(there, {**there, "free": 5}, lambda key: key == "free") == ""
    assert difference(there, {"a": 1, "b": "y", "free": 5, "new": 3}, lambda key: key == "free") == (
        "b is 'x' there and 'y' here, new is None there and 3 here, gone is 2 there and None here"
    )
    assert difference({}, dict.fromkeys("abcde", 1), lambda key: False).endswith(", and 2 more")
