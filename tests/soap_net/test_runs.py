from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net import checkpoint
from soap_net.config import Config, TrainConfig, from_dict, to_dict
from soap_net.errors import UserError, WriteError
from soap_net.runs import MetricsLog, Progress, RunFolder, difference, episode_seconds, with_files_of


def test_what_a_run_folder_lacks_is_empty(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    assert run.read_versions() == {}
    assert run.read_result() is None
    with pytest.raises(UserError, match=r"not a run folder: there is no config\.yaml in it"):
        run.read_config()


def test_a_run_in_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="/file/run: "), RunFolder(tmp_path / "file" / "run").held():
        pass


# ------------------------------------------------------------------------------------------------------ config.yaml


@pytest.fixture
def begun(tiny_run: Callable[..., Config]) -> tuple[RunFolder, Config]:
    """A run folder with its config and last.pt."""
    config = tiny_run()
    run = RunFolder(config.out)
    run.begin(config, resume=False)
    checkpoint.save(run.last, {"config": to_dict(config), "model": {}, "progress": {"episode": config.train.episodes}})
    return run, config


def cuts(content: bytes) -> list[bytes]:
    """Cut after each line and in the middle of some, emptied, holes of zeros, and of another kind."""
    lines = [content[: match.end()] for match in re.finditer(rb"\n", content)][:-1]
    others = [b"", b"\0" * len(content), b"\xff\xfe", b"- a\n- b\n", b"null\n", b"train: {lr: 0.1", content[:-1]]
    return [*lines, *(content[:size] for size in range(1, len(content), 97)), *others]


def test_a_damaged_config_is_taken_from_the_checkpoint(begun: tuple[RunFolder, Config]) -> None:
    run, config = begun
    whole = run.config.read_bytes()
    for damaged in cuts(whole):
        run.config.write_bytes(damaged)
        assert from_dict(run.read_config()) == config
    run.begin(config, resume=True)
    assert run.config.read_bytes() == whole, "written anew"
    run.config.unlink()
    with pytest.raises(UserError, match="holds this run already"):
        run.begin(config, resume=False)
    run.last.rename(run.best)
    run.last.write_bytes(run.best.read_bytes()[:1000])
    assert from_dict(run.read_config()) == config, "best.pt has it, too"


def test_a_damaged_config_without_a_checkpoint_says_what_to_do(begun: tuple[RunFolder, Config]) -> None:
    run, config = begun
    whole, last = run.config.read_bytes(), run.last.read_bytes()
    for damaged in cuts(whole)[::6]:
        run.config.write_bytes(damaged)
        for left in (last[:1000], None):
            run.last.unlink(missing_ok=True)
            if left is not None:
                run.last.write_bytes(left)
            with pytest.raises(UserError, match=r"config\.yaml: .*; .*: begin anew in another --out$") as raised:
                run.read_config()
            assert "\n" not in str(raised.value)
        run.begin(config, resume=False)  # nothing is there to be lost
        assert run.config.read_bytes() == whole


def test_a_damaged_config_beside_damaged_checkpoints_is_not_begun_over(begun: tuple[RunFolder, Config]) -> None:
    run, config = begun
    run.config.write_bytes(b"")
    run.last.write_bytes(b"damaged")
    for resume in (False, True):
        with pytest.raises(UserError, match="begin anew in another --out"):
            run.begin(config, resume)
    assert (run.config.read_bytes(), run.last.read_bytes()) == (b"", b"damaged")


def test_a_config_of_an_older_version_need_not_have_all_settings(begun: tuple[RunFolder, Config]) -> None:
    run, config = begun
    lines = [line for line in run.config.read_text().splitlines(keepends=True) if "max_failed_share" not in line]
    run.config.write_text("".join(lines))
    run.last.unlink()
    assert from_dict(run.read_config()) == config


# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def test_the_log_goes_on_after_the_last_episode_that_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with MetricsLog(run, 0, active=True) as log:
        for episode in (2, 4, 6):
            log.write(episode, loss=1 / episode, episodes_per_second=float(episode))
        log.write(6, val_accuracy=math.inf)
        log.flush()
    with run.metrics.open("a") as file:
        file.write('{"episode": 8, "lo')  # cut off by a crash
    kept = run.metrics.read_text().splitlines()[:2]
    with MetricsLog(run, 4, active=True) as log:
        assert run.metrics.read_text().splitlines() == kept
        log.write(6, loss=0.5)
        log.flush()
        assert run.read_metrics()[-1] == {"episode": 6, "loss": 0.5}, "there at once, for who watches"
    assert [entry["episode"] for entry in run.read_metrics()] == [2, 4, 6]
    assert episode_seconds(run.read_metrics()) == (1 / 2 + 1 / 4) / 2
    assert episode_seconds([{"episode": 1, "val_accuracy": 3.0}]) is None


def test_a_validation_that_is_to_be_done_again_is_not_logged_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with MetricsLog(run, 0, active=True) as log:
        log.write(2, loss=1.0)
        log.write(2, val_accuracy=50.0)
        log.flush()
    with MetricsLog(run, 2, active=True, validated=0):
        pass
    assert run.read_metrics() == [{"episode": 2, "loss": 1.0}]


@pytest.mark.parametrize(
    "junk", [b"\0" * 50, b"\xff\xfe", b"7", b"[1]", b'{"loss": 1}', b'{"episode": "2"}', b"[" * 99999]
)
def test_what_is_no_entry_is_left_out_and_costs_no_other(tmp_path: Path, junk: bytes) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(b'{"episode": 2, "loss": 1.0}\n' + junk + b'\n{"episode": 4, "loss": 0.5}')
    entries = [{"episode": 2, "loss": 1.0}, {"episode": 4, "loss": 0.5}]
    assert run.read_metrics() == entries
    with MetricsLog(run, 4, active=True):
        assert run.metrics.read_bytes() == b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def test_only_the_first_process_writes_the_log(tmp_path: Path) -> None:
    with MetricsLog(RunFolder(tmp_path), 0, active=False) as log:
        log.write(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"accuracy": 3.0}))
    assert RunFolder(tmp_path).read_result() == {"accuracy": 3.0}
    (tmp_path / "versions.json").write_text("{")
    with pytest.raises(UserError, match=r"versions\.json is damaged"):
        RunFolder(tmp_path).read_versions()


@pytest.mark.parametrize(
    "change",
    [
        {"episode": 14}, {"episode": 3}, {"episode": -2}, {"episode": 2.0}, {"episode": True}, {"episode": None},
        {"episode": 2**70}, {"validated": 10}, {"best_episode": 10}, {"best_accuracy": math.nan}, {"clips_read": -1},
        {"best_accuracy": 101.0}, {"other": 1},
    ],
)  # fmt: skip
def test_a_progress_that_no_run_comes_by_is_refused(change: dict[str, object]) -> None:
    cfg = TrainConfig(episodes=13, tasks_per_batch=2)
    values = {
        "episode": 8,
        "validated": 4,
        "best_accuracy": 50.0,
        "best_episode": 4,
        "clips_read": 9,
        "clips_failed": 0,
    }
    assert Progress.of({"progress": values}, cfg, Path("last.pt")) == Progress(**values)  # type: ignore[arg-type]
    assert Progress.of({"progress": {**values, "episode": 13}}, cfg, Path("last.pt")).episode == 13
    with pytest.raises(UserError, match=r"^last\.pt: "):
        Progress.of({"progress": {**values, **change}}, cfg, Path("last.pt"))


@pytest.mark.parametrize("content", [{}, {"progress": {}}, {"progress": None}, {"progress": 3}, {"progress": [1]}])
def test_a_checkpoint_without_progress_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^last\.pt: "):
        Progress.of(content, TrainConfig(), Path("last.pt"))


def test_a_difference_names_three_settings_and_counts_the_others() -> None:
    there = {"a": 1, "b": "x", "free": 1, "gone": 2}
    assert difference(there, {**there, "free": 5}, lambda key: key == "free") == ""
    assert difference(there, {"a": 1, "b": "y", "free": 5, "new": 3}, lambda key: key == "free") == (
        "b is 'x' there and 'y' here, new is None there and 3 here, gone is 2 there and None here"
    )
    assert difference({}, dict.fromkeys("abcde", 1), lambda key: False).endswith(", and 2 more")


def test_a_models_files_are_the_same_where_they_are_or_have_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm").mkdir()
    (tmp_path / "w.pth").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.pth").touch()

    def same(weights: tuple[str | None, str | None], backbone: tuple[str, str] = ("tiny", "tiny")) -> bool:
        there, here = ({"model.weights": weights[i], "model.backbone": backbone[i]} for i in (0, 1))
        return with_files_of(here, there) == here

    now = f"{tmp_path}/w.pth"
    assert same((now, now))
    assert same(("w.pth", now))
    assert same(("/gone/w.pth", now))
    assert not same(("other/w.pth", now))
    assert not same(("/gone/v.pth", now))
    assert not same(("random", now))
    assert not same((None, now))
    assert not same((now, "imagenet"))
    assert not same(("/gone/w.pth", "/gone/too/w.pth"))
    assert same((None, None), ("hf:vm", f"hf:{tmp_path}/vm"))
    assert not same((None, None), (f"hf:{tmp_path}/other", f"hf:{tmp_path}/vm"))
    assert not same((None, None), ("hf:owner/a", "hf:owner/b"))
