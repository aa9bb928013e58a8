from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from soap_kernels import SOAP
from soap_net import checkpoint
from soap_net.cli import main
from soap_net.config import Config
from soap_net.errors import UserError
from soap_net.experiments.command import EXPERIMENTS, build, default_seeds, presets_of
from soap_net.experiments.experiment import Experiment, run_config, run_experiment
from soap_net.experiments.overhead import added, kept_bytes, trace
from soap_net.experiments.results import Results
from soap_net.interrupts import Interrupted
from soap_net.models.heads import HEADS
from soap_net.runs import RunFolder
from soap_net.train import Training, train

PARTS = ("3dem", "cwem", "hmem")


def run(name: str, options: list[str], folder: Path) -> tuple[Experiment, Results]:
    experiment = build(name, "quick", options)
    return experiment, run_experiment(experiment, folder, seeds=[0], jobs=1, progress=False)


def test_parts_trains_each_subset_of_the_parts(tiny: list[str]) -> None:
    runs = build("parts", "quick", tiny).runs([0], Results({}))
    assert len({run.cell for run in runs}) == 8
    assert {run.cell: run.changes for run in runs}["cwem+hmem"]["model.soap.parts"] == ["cwem", "hmem"]
    assert {run.cell: run.changes for run in runs}["none"]["model.soap.enabled"] is False


def test_order_tests_every_net_on_every_order(tiny: list[str], tmp_path: Path) -> None:
    experiment, results = run("order", tiny, tmp_path)
    assert len(experiment.rows(results)) == 18
    tests = results.finished["soap-forward", 0]["tests"]
    assert set(tests) == {"forward", "reversed", "shuffled"}
    assert (tmp_path / "plot.svg").exists()


def test_sensitivity_shows_the_test_classes_to_the_best_choice_and_the_papers_alone(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soap_net.experiments import sensitivity

    monkeypatch.setattr(sensitivity, "SETS", ((1,), (1, 2, 3)))
    monkeypatch.setattr(sensitivity, "HIDDEN", (4, 16))
    experiment, results = run("sensitivity", tiny, tmp_path)
    assert isinstance(experiment, sensitivity.Sensitivity)
    seen = {cell for (cell, _), result in results.finished.items() if "test" in result["tests"]}
    assert seen == {"test-O1-2-3-C16", sensitivity.tested_cell(experiment.best(results))}
    assert len(results.finished) == 4 + len(seen)


def test_frame_rate_takes_each_interval_and_native_rates_on_the_motion_set_alone(tiny: list[str]) -> None:
    for preset, intervals in (("quick", [1, 2, 4, 8]), ("paper", list(range(1, 9)))):
        elsewhere = build("frame-rate", preset, tiny).runs([0], Results({}))
        assert sorted({run.changes["data.interval"] for run in elsewhere}) == intervals
    elsewhere = build("frame-rate", "quick", tiny).runs([0], Results({}))
    motion = build("frame-rate", "quick", []).runs([0], Results({}))
    assert len(motion) == len(elsewhere) + 10
    roots = {run.cell: run.changes["data.root"] for run in motion}
    assert roots["soap-240fps"].endswith("240fps")


def test_frame_rate_is_done_with_one_rendering_before_the_next() -> None:
    roots = [run.changes["data.root"] for run in build("frame-rate", "quick", []).runs([0, 1], Results({}))]
    changes = sum(a != b for a, b in pairwise(roots))
    assert changes == len(set(roots)) - 1


def test_heads_trains_every_head_with_and_without_soap(tiny: list[str]) -> None:
    runs = build("heads", "quick", tiny).runs([0], Results({}))
    assert {run.changes["model.head"] for run in runs} == set(HEADS)
    for cell in ("otam", "prototype-euclidean", "soap-3d"):
        on = [run.changes["model.soap.enabled"] for run in runs if run.cell.rpartition("-")[0] == cell]
        assert on == [True, False]


def test_overhead_counts_parameters_and_bytes_kept_and_traces_gradients(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soap_net.experiments import overhead

    monkeypatch.setattr(overhead, "BACKBONES", {"quick": ("tiny",)})
    monkeypatch.setattr(overhead, "REPEATS", {"quick": 3})
    monkeypatch.setattr(overhead, "SECONDS", 0.0)
    monkeypatch.setattr(overhead, "SIZE", 16)
    _, results = run("overhead", tiny, tmp_path)
    cost = results.finished["cost-tiny", 0]
    assert cost["soap_parameters"] == 2274
    assert 0 < cost["kept_without"] < cost["kept_with"]
    assert all(len(cost[f"{kind}_{name}"]) == 3 for kind in ("forward", "step") for name in ("without", "with"))
    assert cost["threads"] == torch.get_num_threads()
    curves = results.finished["curve-soap", 0]["curves"]
    assert set(curves) == {"loss", "accuracy", "backbone", "head", "3DEM", "CWEM", "HMEM"}
    assert all(len(values) == 2 and min(values) >= 0 for values in curves.values())
    assert (tmp_path / "table.md").read_text().count("| tiny |") == 1
    assert (tmp_path / "plot.svg").exists()
    assert (tmp_path / "plot-cost.svg").exists()


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_overhead_traces_the_training_that_train_does(
    amp: str, tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    def config(out: str) -> Config:
        return tiny_run(
            train__episodes=5, train__amp=amp, train__clip_norm=0.01, model__head="trx", model__head_options={},
            out=str(tmp_path / out),
        )  # fmt: skip

    curves = trace(config("traced"), lambda: False)["curves"]
    train(config("trained"), progress=False)
    traced, trained = (checkpoint.load(RunFolder(tmp_path / out).last)["model"] for out in ("traced", "trained"))
    assert traced.keys() == trained.keys()
    assert all(torch.equal(traced[name], trained[name]) for name in trained)
    logged = [entry["loss"] for entry in RunFolder(tmp_path / "trained").read_metrics() if "loss" in entry]
    by_batch = [np.mean(curves["loss"][i : i + 2]) for i in (0, 2, 4)]
    assert by_batch == pytest.approx(logged)


def test_overhead_notes_the_gradients_before_they_are_clipped(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    configs = [tiny_run(train__episodes=2, train__clip_norm=norm, out=str(tmp_path / f"{norm}")) for norm in (0, 1e-3)]
    free, clipped = (trace(config, lambda: False)["curves"] for config in configs)
    for name in ("backbone", "3DEM", "CWEM", "HMEM"):
        assert clipped[name] == pytest.approx(free[name], rel=1e-4)


def test_overhead_notes_no_norm_of_a_step_that_overflowed(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Training._update

    def overflowing(self: Training, lr: float) -> float:
        if self.state.episode == 4:
            next(self.model.backbone.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        return update(self, lr)

    monkeypatch.setattr(Training, "_update", overflowing)
    config = tiny_run(train__episodes=6, train__amp="fp16", train__clip_norm=1.0, train__val_every=0)
    curves = trace(config, lambda: False)["curves"]
    assert len(curves["backbone"]) == len(curves["head"]) == 3
    assert math.isnan(curves["backbone"][-1])
    assert np.isfinite(curves["loss"]).all()


def test_overhead_begins_a_stopped_trace_again(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_run(train__episodes=6, out=str(tmp_path / "run"))
    answers = iter([*[False] * 4, *[True] * 4])
    with pytest.raises(Interrupted):
        trace(config, lambda: next(answers))
    assert checkpoint.load(RunFolder(config.out).last)["progress"]["episode"] == 2
    assert len(trace(config, lambda: False)["curves"]["loss"]) == 6


def test_overhead_adds_up_to_the_quartiles_of_neighbouring_turns() -> None:
    cost = {"step_without": [1.0, 2.0, 4.0, 1.0, 1.0], "step_with": [1.1, 2.4, 4.0, 1.3, 1.5]}
    assert added(cost, "step") == pytest.approx([5.0, 20.0, 40.0])
    assert added({"step_without": [2.0], "step_with": [3.0]}, "step") == [50.0] * 3


def test_kept_bytes_counts_each_block_once_and_no_parameters() -> None:
    soap = SOAP(frames=4, tuple_sizes=(1,), backend="reference")
    x = torch.randn(1, 4, 3, 8, 8, requires_grad=True)
    plain = kept_bytes(torch.nn.Identity(), lambda: (x * 2).sin().sum())
    assert plain == x.numel() * 4
    assert kept_bytes(soap, lambda: soap(x).sum()) >= x.numel() * 4


def test_the_largest_grids_take_fewer_seeds_at_the_quick_preset_alone() -> None:
    assert {name: default_seeds(name, "quick") for name in ("parts", "heads", "frame-rate")} == {
        "parts": 3, "heads": 2, "frame-rate": 2,
    }  # fmt: skip
    assert {default_seeds(name, "paper") for name in EXPERIMENTS} == {3}
    assert [default_seeds("real", size) for size in presets_of("real")] == [1, 3, 3]


def test_unknown_experiment_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "framerate"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'frame-rate'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_runs_of_possible_settings_in_both_presets(name: str) -> None:
    for preset in presets_of(name):
        experiment = build(name, preset, [])
        assert experiment.name == name, "which experiment.json holds, and old folders hold it too"
        runs = experiment.runs([0], Results({}))
        assert len({run.folder for run in runs}) == len(runs)
        run_config(experiment.config, runs[-1], Path("out"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("overhead", "real")])
def test_every_experiment_runs_whole_on_another_data_set(name: str, tiny: list[str], tmp_path: Path) -> None:
    # `overhead` is run above, with smaller backbones, and `real` in a file of its own.
    experiment, results = run(name, tiny, tmp_path)
    rows = experiment.rows(results)
    shown = [row for row in rows if results.seeds(row.cell)]
    expected = len(rows) if name != "sensitivity" else sum(row.labels[2] == "val" for row in rows) + 2
    assert len(shown) in (expected, expected - 1)  # sensitivity's best choice may be the paper's own
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(shown) + 2
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    for (cell, _), result in results.finished.items():
        off = cell == "none" or "plain" in cell
        assert (result["soap_parameters"] == 0) == off


def test_unknown_preset_and_setting_are_refused() -> None:
    with pytest.raises(UserError, match="unknown preset 'slow'"):
        build("parts", "slow", [])
    with pytest.raises(UserError, match=r"unknown option --train.lrr; did you mean --train.lr\?"):
        build("parts", "quick", ["--train.lrr=1"])


def test_command_prints_the_table(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tuples"
    assert main(["experiment", "tuples", "--seeds=1", "--jobs=1", f"--out={folder}", *tiny]) == 0
    assert "| {1,2,3} | " in capsys.readouterr().out
    assert json.loads((folder / "experiment.json").read_text())["experiment"] == "tuples"
