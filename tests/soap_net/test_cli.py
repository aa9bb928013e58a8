from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soap_net.cli import COMMANDS, main
from soap_net.config import Config, save_config
from soap_net.train import train


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The message on stderr, which is one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("soap-net: ")
    return lines[0]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "ssv2_otam_5way_5shot" in shown


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train",
        "eval",
        "learn",
        "classify",
        "app",
        "export",
        "report",
        "data check",
        "data pack",
        "data motion",
        "experiment",
        "info",
    ],
)
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert "usage: soap-net " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["data", "chek"], "unknown command 'data chek'; did you mean 'data check'?"),
        (["train", "--train.optimiser", "sgd"], "unknown option --train.optimiser; did you mean --train.optimizer?"),
        (["train", "--train.schedule", "cosin"], "train.schedule is 'cosin': it must be one of multistep, cosine; did"),
        (["train", "--config", "kinetics"], "kinetics: no such config file, nor a preset of that name"),
        (["train", "--data.root", "/nowhere", "--model.backbone", "tiny"], "/nowhere: no such data set folder"),
        (["train", "--resume", "/nowhere"], "/nowhere: not a run folder: there is no config.yaml in it"),
        (["learn"], "the following arguments are required: --out; see soap-net learn --help"),
        (["eval", "--data.root", "/nowhere"], "/nowhere: no such data set folder"),
        (["eval", "--checkpoint", "/nowhere.pt"], "/nowhere.pt: no such checkpoint"),
        (["classify", "--checkpoint", "a", "--support", "/nowhere", "--query", "b"], "<clip>: /nowhere: no such data"),
        (["data", "check", "/nowhere"], "/nowhere: no such data set folder"),
        (["data", "pack", "a"], "say what to pack and where to: soap-net data pack SOURCE OUT.zip"),
        (["data", "motion"], "say into which folder to write the data set"),
        (["info", "--jsn"], "unknown option --jsn"),
        (["classify", "--checkpoint", "a", "--suport", "b", "--query", "c"], "--suport; did you mean --support?"),
        (["eval", "--chekpoint=a"], "unknown option --chekpoint=a; did you mean --checkpoint?"),
        (["experiment", "prats"], "unknown experiment 'prats'; did you mean 'parts'?"),
        (["experiment", "parts", "--episode.seed", "7"], "episode.seed is set by the experiment, 0 for its first"),
        (["data", "pack", "a", "b.zip", "--data.roots", "c", "d"], "data.roots can't be set here"),
        (["demo", "--data.root", "clips"], "--data.root can't be set here: the demo sets it itself"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert message in one_line(capsys)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--checkpoint", "/nowhere.pt", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    tiny_run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run()
    save_config(config, tmp_path / "c.yaml")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))  # room for all but checkpoints
    try:
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soap-net: ")]
    assert errors == [f"soap-net: {config.out / 'last.pt'}: file too large"]


def test_a_net_trained_on_one_data_set_is_tested_on_another_in_one_command(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    (other / "train (class 0)").rename(other / "Train (Class 0)")  # as test class, named nearly as in training
    (other / "splits" / "test.txt").write_text(
        "\n".join(f"{name}/v{video}" for name in ("Train (Class 0)", "test (class 1)") for video in range(4))
    )
    shutil.rmtree(other / "test (class 0)")
    config = tiny_run(train__val_every=0, data__test_split=str(tiny_data / "splits" / "test.txt"))
    best = str(train(config, progress=False) / "best.pt")
    capsys.readouterr()
    assert main(["eval", "--checkpoint", best, "--data.root", str(other)]) == 0
    said = capsys.readouterr().out
    assert f"trained on {tiny_data}, tested on {other}\n" in said
    assert "1 of its classes are named as training classes: Train (Class 0)\n" in said
    written = json.loads((config.out / "eval.json").read_text())
    assert (written["trained_on"], written["tested_on"]) == (str(tiny_data), str(other))
    assert written["classes"] == ["Train (Class 0)", "test (class 1)"], "the other set's list, not the training's"
    assert main(["report", str(config.out)]) == 0
    assert f"of {other}, trained on {tiny_data}" in (config.out / "report.html").read_text()
    assert main(["eval", "--checkpoint", best]) == 0
    assert "trained on" not in capsys.readouterr().out


def test_train_eval_and_classify_follow_each_other(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(train__episodes=4)
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--train.lr", "0.02"]) == 0
    assert f"soap-net eval --checkpoint {config.out / 'best.pt'}" in capsys.readouterr().out
    whole = (config.out / "config.yaml").read_bytes()
    for size in (0, 200):  # as a full disk leaves it
        (config.out / "config.yaml").write_bytes(whole[:size])
        assert main(["train", "--resume", str(config.out)]) == 0
        assert (config.out / "config.yaml").read_bytes() == whole
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "train.lr is 0.02 there and 0.01 here" in capsys.readouterr().err
    assert main(["train", "--resume", str(config.out), "--out", str(tmp_path / "elsewhere")]) == 2
    assert "goes on in that folder; --out" in one_line(capsys)

    best = str(config.out / "best.pt")
    assert main(["eval", "--checkpoint", best, "--eval.tasks", "30", "--eval.way", "3"]) == 0
    assert "% " in capsys.readouterr().out
    assert json.loads((config.out / "eval.json").read_text())["tasks"] == 30
    assert main(["eval", "--checkpoint", best, "--model.head", "otam"]) == 2
    assert "--model.head can't be set here: an evaluation takes it from the checkpoint" in one_line(capsys)
    assert main(["eval", "--checkpoint", best, "--model.soap.precision", "strict", "--eval.tasks", "4"]) == 0
    capsys.readouterr()
    assert main(["eval", "--checkpoint", best, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 20
    assert main(["eval", "--checkpoint", best, "--eval.way", "9"]) == 2
    assert "9-way episodes need 9 classes, and the test split has 3" in one_line(capsys)

    support = tmp_path / "support"
    support.mkdir()
    for label in (0, 2):
        (support / f"class {label}").symlink_to(tiny_data / f"test (class {label})")
    query = str(tiny_data / "test (class 2)" / "v3")
    assert main(["classify", "--checkpoint", best, "--support", str(support), "--query", query, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["class"] == "class 2", "the query is itself in the support"
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert main(["classify", "--checkpoint", best, "--support", str(support), "--query", query]) == 0
    assert f"{query}  " in capsys.readouterr().out


def test_data_check_lists_what_is_missing_and_broken(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", str(tiny_data), "--data.workers", "0"]) == 0
    *_, sound, findings = capsys.readouterr().out.splitlines()
    assert sound == "every clip is there and can be read"
    assert findings == f"what each clip holds: runs/check/{tiny_data.name}.jsonl"
    assert len(Path(findings.partition(": ")[2]).read_text().splitlines()) == 36
    bad = tmp_path / "clips" / "a class"
    bad.mkdir(parents=True)
    (bad / "text.mp4").write_text("this is no video")
    (bad / "empty.avi").write_bytes(b"")
    assert main(["data", "check", str(tmp_path / "clips"), "--split", "test", "--data.workers", "0"]) == 2
    shown = capsys.readouterr().out
    assert "test   1        2      2" in shown
    assert "0 clips missing, 2 broken" in shown
    assert f"broken in test: {bad / 'text.mp4'}: " in shown
    split = tmp_path / "split.txt"
    split.write_text("a class/text\na class/gone\n")
    args = ["data", "check", str(tmp_path / "clips"), "--split", "test", "--data.test_split", str(split)]
    assert main([*args, "--data.workers", "0"]) == 2
    assert "missing in test: a class/gone" in capsys.readouterr().out
    assert main([*args, "--data.workers", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["splits"][0]["missing"] == ["a class/gone"]


def test_info_names_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "reference   present" in shown
    assert re.search(r"auto +takes (cpp|reference)", shown)


def test_python_m_soap_net_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "soap_net", "nonsense"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("soap-net: unknown command 'nonsense'")
