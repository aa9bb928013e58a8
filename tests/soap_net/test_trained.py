"""What of a net is trained, and how fast: frozen parts, rates by part, warm-up, the moving average of the weights."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

from soap_net import checkpoint
from soap_net.callbacks import EachStep
from soap_net.config import Config, TrainConfig, save_config
from soap_net.data.clips import Clip
from soap_net.errors import UserError
from soap_net.interrupts import Interrupted
from soap_net.models import build_model
from soap_net.optimizers import build_average, build_optimizer, learning_rate
from soap_net.steps import Step
from soap_net.train import Training, TrainingStopped, train

REPOSITORY = Path(__file__).parents[2]


def weights_of(config: Config, name: str = "last.pt") -> dict[str, Tensor]:
    return checkpoint.load(config.out / name)["model"]


def untrained(config: Config) -> dict[str, Tensor]:
    return build_model(config.model, config.data.frames, config.episode.seed).state_dict()


def moved(config: Config) -> set[str]:
    """Names of the weights and statistics that training changed."""
    before, after = untrained(config), weights_of(config)
    return {name for name in before if not torch.equal(before[name], after[name])}


def stop_at(episode: int) -> Callable[[Training, Step], None]:
    def stop(training: Training, step: Step) -> None:
        if training.state.episode == episode:
            raise Interrupted

    return stop


def assert_goes_on_bit_for_bit(make: Callable[[str], Config]) -> dict[str, Any]:
    """Stops a run in the middle, goes on, and compares with one never stopped; returns what that left in last.pt."""
    whole, stopped = make("whole"), make("stopped")
    train(whole, progress=False)
    with pytest.raises(TrainingStopped):
        train(stopped, progress=False, callbacks=[EachStep(stop_at(6))])
    train(stopped, progress=False)
    for name in ("last.pt", "best.pt"):
        contents = [checkpoint.load(config.out / name) for config in (whole, stopped)]
        for content in contents:
            del content["config"]
        torch.testing.assert_close(contents[0], contents[1], rtol=0, atol=0)
    return checkpoint.load(whole.out / "last.pt")


# ----------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize(
    ("frozen", "still"),
    [
        (["backbone"], ["backbone."]),
        (["soap", "head"], ["soap.", "head."]),
        (["backbone.net.stages.0", "head.attention.norm.bias"], ["backbone.net.stages.0.", "head.attention.norm.bias"]),
    ],
)
def test_what_is_frozen_stands_still_with_its_statistics_and_all_else_is_trained(
    tiny_run: Callable[..., Config], frozen: list[str], still: list[str]
) -> None:
    config = tiny_run(
        train__freeze=frozen, train__episodes=4, train__val_every=2, train__weight_decay=0.1, train__optimizer="adamw"
    )
    train(config, progress=False)
    changed = moved(config)
    names = {name for name in untrained(config) if not name.endswith("num_batches_tracked")}
    assert not [name for name in changed if name.startswith(tuple(still))]
    statistics = [name for name in names if "running" in name]
    assert statistics
    for part in ("soap.", "backbone.net.stages.2", "head."):
        if not any(part.startswith(prefix) for prefix in still):
            assert any(name.startswith(part) for name in changed), part


def test_a_frozen_net_is_in_evaluation_mode_whatever_its_mode(tiny_run: Callable[..., Config]) -> None:
    model = build_model(tiny_run().model, 3)
    model.freeze(["backbone"])
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for module in model.backbone.modules())
        assert model.head.training is mode
    assert not model.features_stand_still, "SOAP before it is trained"
    model.freeze(["soap"])
    assert model.features_stand_still
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ["bakbone"]}, r"can't freeze 'bakbone': the net has no .* of that name; did you mean backbone\?"),
        ({"freeze": [""]}, "can't freeze '': the net has no module"),
        ({"freeze": ["backbone", "soap", "head"]}, r"nothing is left to train: .* train\.freeze holds all of them"),
        (
            {"lr_scale": {"backbone.net.stage": 0.1}},
            r"train\.lr_scale names 'backbone\.net\.stage': nothing of that name is trained; did you mean backbone",
        ),
        ({"freeze": ["backbone"], "lr_scale": {"backbone": 0.1}}, r"names 'backbone': nothing of that name is trained"),
    ],
)
def test_what_names_nothing_or_leaves_nothing_is_refused_in_words(
    tiny_run: Callable[..., Config], settings: dict[str, Any], message: str
) -> None:
    config = tiny_run(**{f"train__{key}": value for key, value in settings.items()})
    with pytest.raises(UserError, match=message):
        train(config, progress=False)
    assert not config.out.exists()


@pytest.mark.slow
def test_a_frozen_backbone_is_the_same_in_each_process(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    """With three, whose mean of equal numbers is not always that number."""
    config = tiny_run(train__freeze=["backbone"], train__episodes=6, train__tasks_per_batch=3, train__val_every=0)
    save_config(config, tmp_path / "c.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "soap_net", "train", "--config", str(tmp_path / "c.yaml")]
    processes = [subprocess.Popen(command, env={**place, "RANK": str(rank)}, cwd=REPOSITORY) for rank in range(3)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0, 0]
    changed = moved(config)
    assert changed
    assert not [name for name in changed if name.startswith("backbone.")]


# ---------------------------------------------------------------------------------------------- features kept


def still(tiny_run: Callable[..., Config], name: str, **changes: Any) -> Config:
    """A run whose features stand still, but for its head's dropout."""
    settings = {"data__augment": False, "train__freeze": ["backbone", "soap"], "train__optimizer": "adamw", **changes}
    return tiny_run(**settings, out=str(tiny_run().out.with_name(name)))


def test_a_frozen_nets_clips_are_read_once_and_train_as_if_read_each_time(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = Clip.read
    monkeypatch.setattr(Clip, "read", lambda self, indices: reads.append(self.name) or read(self, indices))  # type: ignore[func-returns-value]
    once = still(tiny_run, "once", train__val_every=0)
    train(once, progress=False)
    assert len(reads) == len(set(reads)), "each clip once"
    assert len(reads) <= 12
    monkeypatch.setattr("soap_net.frozen.FEATURES_LIMIT", 0)
    each = still(tiny_run, "each", train__val_every=0)
    reads.clear()
    train(each, progress=False)
    assert len(reads) == 12 * 4, "two classes of a support and a query in each of 12 episodes"
    torch.testing.assert_close(weights_of(once), weights_of(each), rtol=1e-4, atol=1e-5)


def test_features_are_kept_only_where_they_stand_still(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not to be embedded once")

    monkeypatch.setattr("soap_net.train.embedded_episodes", refuse)
    for name, changes in {
        "augmented": {"data__augment": True}, "trained": {"train__freeze": ["backbone"]},
    }.items():  # fmt: skip
        train(still(tiny_run, name, train__episodes=2, train__val_every=0, **changes), progress=False)


def test_without_augmentation_a_clip_is_the_one_of_evaluation(tiny_run: Callable[..., Config]) -> None:
    from soap_net.data.splits import load_split
    from soap_net.data.transforms import clip_loader

    config = tiny_run(data__augment=False)
    clip = load_split(config.data.root, "train").clips[0][0]
    plain, evaluated = (clip_loader(config.data, train=train)(clip) for train in (True, False))
    assert torch.equal(plain, evaluated)


def test_a_broken_clip_is_replaced_and_counted_where_features_are_kept(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from soap_net.errors import ClipError

    read = Clip.read

    def broken(self: Clip, indices: Any) -> Tensor:
        if self.name == "train (class 1)/v2":
            raise ClipError(self.path, "broken")
        return read(self, indices)

    monkeypatch.setattr(Clip, "read", broken)
    contents = []
    for limit in (2**30, 0):
        monkeypatch.setattr("soap_net.frozen.FEATURES_LIMIT", limit)
        config = still(tiny_run, f"limit{limit}", train__max_failed_share=1, train__val_every=0)
        train(config, progress=False)
        contents.append(checkpoint.load(config.out / "last.pt"))
    assert contents[0]["progress"]["clips_failed"] > 0
    assert contents[0]["progress"] == contents[1]["progress"]
    torch.testing.assert_close(contents[0]["model"], contents[1]["model"], rtol=1e-4, atol=1e-5)


def test_a_run_with_kept_features_goes_on_bit_for_bit(tiny_run: Callable[..., Config]) -> None:
    assert_goes_on_bit_for_bit(lambda name: still(tiny_run, name))


# ------------------------------------------------------------------------------------------------- rates by part


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_part_learns_at_its_own_rate(tiny_run: Callable[..., Config], optimizer: str) -> None:
    scales = {"backbone": 0.5, "backbone.net.stages.1": 0.0, "head": 2.0}
    config = tiny_run(
        train__lr_scale=scales, train__episodes=2, train__val_every=0, train__optimizer=optimizer,
        train__weight_decay=0.0,
    )  # fmt: skip
    gradients: dict[str, Tensor | None] = {}

    def note(training: Training, step: Step) -> None:
        assert step.lr == config.train.lr, "what is logged is the rate of what has no factor"
        gradients.update({name: p.grad for name, p in training.model.named_parameters()})

    train(config, progress=False, callbacks=[EachStep(note)])
    before, after = untrained(config), weights_of(config)
    for name, gradient in gradients.items():
        scale = 0.0 if ".stages.1" in name else {"backbone": 0.5, "head": 2.0, "soap": 1.0}[name.partition(".")[0]]
        expected = before[name]
        if gradient is not None:
            towards = gradient if optimizer == "sgd" else gradient / (gradient.abs() + 1e-8)  # AdamW's first step
            expected = before[name] - scale * config.train.lr * towards
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "resnet10t"])
def test_layer_decay_gives_each_weight_the_factor_that_timm_gives_it_below_a_classifier(
    tiny_run: Callable[..., Config], name: str
) -> None:
    config = tiny_run(model__backbone=f"timm:{name}", train__layer_decay=0.7, train__lr_scale={"backbone": 0.5})
    model = build_model(config.model, 3, seed=0)
    groups = build_optimizer(config.train, model).param_groups
    factors = {parameter: group["scale"] for group in groups for parameter in group["params"]}
    ours = {name: factors[parameter] for name, parameter in model.named_parameters()}
    net = timm.create_model(name)
    of = {parameter: f"backbone.net.{name}" for name, parameter in net.named_parameters()}
    theirs = {
        of[parameter]: 0.5 * group["lr_scale"]
        for group in param_groups_layer_decay(net, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert len({*theirs.values()}) > 4
    for name, factor in ours.items():
        assert factor == pytest.approx(theirs[name] if name.startswith("backbone.") else 1.0), name


def test_a_run_with_drop_path_goes_on_bit_for_bit(tiny_run: Callable[..., Config]) -> None:
    assert_goes_on_bit_for_bit(
        lambda name: tiny_run(
            model__backbone="timm:test_resnet", model__drop_path=0.5, out=str(tiny_run().out.with_name(name))
        )
    )


def test_runs_with_rates_by_part_and_frozen_modules_go_on_bit_for_bit(tiny_run: Callable[..., Config]) -> None:
    assert_goes_on_bit_for_bit(
        lambda name: tiny_run(
            train__lr_scale={"head": 0.1, "soap": 3},
            train__layer_decay=0.5,
            train__freeze=["backbone.net.stages.0"],
            train__optimizer="adamw",
            train__warmup=8,
            train__ema=0.7,
            out=str(tiny_run().out.with_name(name)),
        )
    )


def test_the_rate_rises_to_the_schedules_in_the_warm_up() -> None:
    for schedule in ("multistep", "cosine"):
        plain = TrainConfig(episodes=40, lr=0.3, milestones=(15,), schedule=schedule)  # type: ignore[arg-type]
        warm = TrainConfig(episodes=40, lr=0.3, milestones=(15,), schedule=schedule, warmup=10)  # type: ignore[arg-type]
        for episode in range(40):
            share = min(1.0, (episode + 1) / 10)
            assert learning_rate(warm, episode) == pytest.approx(share * learning_rate(plain, episode))
    assert learning_rate(warm, 0) > 0


# ------------------------------------------------------------------------------------------------ moving average


def test_the_average_is_that_of_weights_and_statistics_after_each_step(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__ema=0.6, train__val_every=0)
    average: dict[str, Tensor] = {}

    def note(training: Training, step: Step) -> None:
        for name, weight in training.model.state_dict().items():
            if weight.is_floating_point():
                average[name] = 0.6 * average.get(name, weight) + 0.4 * weight

    train(config, progress=False, callbacks=[EachStep(note)])
    best, last = weights_of(config, "best.pt"), weights_of(config)
    assert any("running" in name for name in average)
    for name, expected in average.items():
        torch.testing.assert_close(best[name], expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(best[name], last[name]) for name in average), "last.pt goes on from the weights"


class Steps(torch.nn.Module):
    """What moves at each call, in every kind of number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("statistics", torch.rand(3, dtype=torch.float64))
        self.register_buffer("phase", torch.complex(torch.rand(2), torch.rand(2)))
        self.register_buffer("index", torch.arange(1000) * 1_000_003)
        self.register_buffer("places", torch.arange(500), persistent=False)
        self.register_buffer("mask", torch.arange(40) % 3 == 0)

    @torch.no_grad()
    def move(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.weight += torch.randn(5, generator=draw)
        self.statistics += torch.rand(3, generator=draw)
        self.phase *= 1j
        self.index += 1
        self.mask.logical_not_()


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_average_has_the_models_own_counters_indices_and_masks(decay: float) -> None:
    model = Steps()
    average = build_average(TrainConfig(ema=decay), model)
    assert average is not None
    expected = {}
    for step in range(50):
        model.move(step)
        average.update_parameters(model)
        for name in ("weight", "statistics", "phase"):
            now = getattr(model, name).detach().to(torch.complex128)
            expected[name] = decay * expected[name] + (1 - decay) * now if step else now
    for name in ("index", "places", "mask"):
        assert torch.equal(getattr(average.module, name), getattr(model, name)), name
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(average.module, name).to(torch.complex128), value, rtol=1e-5, atol=1e-5, msg=name
        )


def test_the_averaged_net_of_a_run_compares_the_same_pairs_of_frames(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__ema=0.9, train__episodes=50, train__tasks_per_batch=1, train__val_every=0, data__frames=5)
    averages: list[tuple[Any, torch.nn.Module]] = []
    note = EachStep(lambda training, step: averages.append((training.average, training.model)))
    train(config, progress=False, callbacks=[note])
    average, model = averages[-1]
    indices = {name: t for name, t in model.named_buffers() if not t.is_floating_point() and t.ndim}
    assert any(name.endswith("pairs") for name in indices)
    for name, index in indices.items():
        assert torch.equal(average.module.get_buffer(name), index), name


def test_the_average_is_what_is_validated(tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(train__ema=0.9, train__episodes=4)
    seen = []
    evaluate = train.__globals__["evaluate"]

    def noting(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr("soap_net.train.evaluate", noting)
    train(config, progress=False)
    assert len(seen) == 1
    torch.testing.assert_close(dict(weights_of(config, "best.pt")), seen[0], rtol=0, atol=0)


def test_a_last_pt_without_the_average_or_with_another_is_refused(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(train__ema=0.6)
    with pytest.raises(TrainingStopped):
        train(config, progress=False, callbacks=[EachStep(stop_at(6))])
    path = config.out / "last.pt"
    content = checkpoint.load(path)
    average = content.pop("average")
    checkpoint.save(path, content)
    with pytest.raises(UserError, match=r"holds no moving average of the weights, which train\.ema asks for"):
        train(config, progress=False, resume=True)
    name = next(name for name in average if average[name].ndim)
    for broken, message in (
        ({**average, name: torch.zeros(2, 3, 5, 7)}, f"1 weights of another shape, first {name}"),
        ({**average, name: average[name] * math.nan}, "values that are not finite"),
        ({**average, name: 3}, "its average holds other things than weights"),
        (7, "its average holds other things than weights"),
    ):
        checkpoint.save(path, {**content, "average": broken})
        with pytest.raises(UserError, match=message):
            train(config, progress=False, resume=True)


def test_settings_say_what_a_factor_may_be(tiny_run: Callable[..., Config]) -> None:
    for value, message in (
        ({"head": -1}, r"train\.lr_scale\.head is -1\.0: it must be at least 0"),
        ({"head": "x"}, r"train\.lr_scale\.head is 'x': it must be a number"),
        (3, r"train\.lr_scale is 3: it must be numbers by part or module, such as \{backbone: 0\.01\}"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_run(train__lr_scale=value)
    config = tiny_run(train__lr_scale={"head": 1, "backbone.net.stages.0": 0.5})
    train(config, progress=False)
    train(config, progress=False, resume=True)
