from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soap_net.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    SoapConfig,
    flatten,
    from_dict,
    load_config,
    parse,
    presets,
    read_settings,
    save_config,
    to_dict,
)
from soap_net.errors import UserError
from soap_net.models.backbones import BACKBONES
from soap_net.models.heads import HEADS
from soap_net.settings import field_docs, kinds

FIELD = {"kinetics": 10_000, "ucf101": 10_000, "hmdb51": 10_000, "ssv2_cmn": 75_000, "ssv2_otam": 75_000}


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("name", FIELD)
def test_published_presets_hold_the_fields_settings(name: str, shot: int) -> None:
    config = load_config(f"{name}_5way_{shot}shot")
    drops = (2000, 6000, 8000) if FIELD[name] == 10_000 else (20_000, 40_000, 60_000)
    assert (config.train.episodes, config.train.milestones) == (FIELD[name], drops)
    assert (config.train.optimizer, config.train.lr, config.train.tasks_per_batch) == ("sgd", 1e-3, 16)
    assert (config.model.backbone, config.data.frames, config.data.resize, config.data.crop) == (
        "resnet50",
        8,
        256,
        224,
    )
    assert (config.episode.way, config.episode.shot, config.eval.way, config.eval.shot) == (5, shot, 5, shot)
    assert (config.eval.tasks, config.eval.queries) == (10_000, 1)
    assert config.data.flip is not name.startswith("ssv2"), "left and right tell Something-Something's classes apart"
    assert config.out == Path(f"runs/{name}_5way_{shot}shot")
    assert (config.data.root, config.data.workers) == (Path(f"data/{name}"), 8)
    assert (config.model.head, config.model.weights, config.model.soap) == ("soap", "imagenet", SoapConfig())
    assert (config.episode.queries, config.train.schedule, config.train.gamma) == (5, "multistep", 0.1)
    assert (config.train.val_every, config.train.val_tasks) == (1000 if FIELD[name] == 10_000 else 5000, 500)
    assert config.model.checkpoint_backbone is (shot == 5), "an episode's 50 clips fill a large GPU"


def test_the_demo_takes_minutes_on_two_cores() -> None:
    config = load_config("demo")
    data, train = config.data, config.train
    assert (data.frames, data.interval, data.resize, data.crop, data.flip, data.workers) == (8, 1, 48, 48, False, 0)
    assert (config.model.backbone, config.model.weights, config.model.head) == ("tiny", "random", "soap")
    assert (config.model.head_options, config.model.channels_last) == ({"out_dim": 128}, True)
    assert (config.episode.way, config.episode.shot, config.episode.queries) == (5, 1, 3)
    assert (train.episodes, train.tasks_per_batch, train.optimizer, train.schedule) == (240, 1, "adamw", "cosine")
    assert (train.lr, train.weight_decay, train.val_every, train.val_tasks) == (0.004, 0.01, 60, 300)
    assert config.eval == EvalConfig(tasks=2000, way=5, shot=1, queries=1)


@pytest.mark.parametrize("name", presets())
def test_presets_hold_what_differs_from_the_defaults(name: str) -> None:
    defaults = flatten(to_dict(Config()))
    own = flatten(read_settings(presets()[name]))
    assert [key for key, value in own.items() if value == defaults[key]] == []
    assert own["out"] == f"runs/{name}"


def test_options_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("train: {lr: 0.5, momentum: 0.5}\nmodel: {soap: {parts: [cwem]}}\n")
    config = load_config(path, ["--train.lr", "0.25", "--model.head_options.out_dim=64"])
    assert (config.train.lr, config.train.momentum, config.train.gamma) == (0.25, 0.5, 0.1)
    assert config.model.soap.parts == ("cwem",)
    assert config.model.head_options == {"out_dim": 64}
    assert parse(["--train.lr=0.25", f"--config={path}"]).train.lr == 0.25, "wherever they stand on the line"
    (tmp_path / "second.yaml").write_text("train.lr: 1e-3\n")
    assert load_config(path, [f"--config={tmp_path / 'second.yaml'}"]).train.lr == 1e-3, "the later file wins"


def test_a_config_survives_yaml_and_dictionaries(tmp_path: Path) -> None:
    config = parse(["--train.milestones=[3,7]", "--data.val_split=v.txt", "--model.head_options={a: 1}", "--out=größe"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.optimiser=sgd", "unknown option --train.optimiser; did you mean --train.optimizer?"),
        ("--lr=1", "unknown option --lr; did you mean --train.lr?"),
        ("--train.optimizer=sgdd", "train.optimizer is 'sgdd': it must be one of sgd, adamw; did you mean sgd?"),
        (
            "--model.soap.parts=[3dm]",
            "model.soap.parts is '3dm': it must be one of 3dem, cwem, hmem; did you mean 3dem?",
        ),
        ("--train.lr=fast", "train.lr is 'fast': it must be a number"),
        ("--train.episodes=1.5", "train.episodes is '1.5': it must be a whole number"),
        ("--data.interval=often", "data.interval is 'often': it must be a whole number"),
        ("--data.flip=perhaps", "data.flip is 'perhaps': it must be true or false"),
        ("--train.tasks_per_batch=0", "train.tasks_per_batch is 0: it must be at least 1"),
        ("--episode.way=1", "episode.way is 1: it must be at least 2"),
        ("--train.lr=-1", "train.lr is -1.0: it must be at least 0"),
        ("--train.lr=.nan", "train.lr is nan: it must be a finite number"),
        ("--data.crop=300", "data.crop is 300: it must be at most data.resize, which is 256"),
        ("--train.milestones=[5,2]", "train.milestones is [5, 2]: they must rise, as in [2, 5]"),
        ("--model.soap.tuple_sizes=[1,8]", "with data.frames 8 a size is 1 to 7, the nearest is 7"),
        ("--train.max_failed_share=2", "train.max_failed_share is 2.0: it must be at most 1"),
        ("--device=gpu", "device is 'gpu': it must be one of auto, cpu, cuda, cuda:0, mps, xpu; did you mean cuda?"),
        ("--config=kinetics_5way_1shots", "did you mean kinetics_5way_1shot?"),
        ("--config", "argument --config: expected one argument"),
        ("--data.interval=0", "data.interval is 0: it must be at least 1"),
        ("--episode.seed=-1", "episode.seed is -1: it must be at least 0"),
        ("--train.milestones=[0]", "train.milestones is 0: it must be at least 1"),
        ("--train={lr: 1", "--train: while parsing a flow mapping"),
        ("--model.head_options.x={a: 1}", "model.head_options.x is {'a': 1}: it must be a number, text, true, false"),
        ("--model.head_options=null", "model.head_options is 'null': it must be settings such as {out_dim: 64}"),
        ("train.lr", "unrecognized arguments: 'train.lr'"),
    ],
)
def test_a_bad_option_is_named_in_one_line_with_the_nearest_right_one(option: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse([option])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {optimiser: sgd}", "unknown key 'train.optimiser'; did you mean train.optimizer?"),
        ("trian: {lr: 1}", "unknown key 'trian.lr'; did you mean train.lr?"),
        ("train: 3", "train is 3: it must hold settings"),
        ("data: {root: null}", "data.root is null: it must be a folder"),
        ("[1, 2]", "expected settings such as"),
        ("{", "not a YAML file"),
        ("train: {lr: x}", "bad.yaml: train.lr is 'x': it must be a number"),
        ("train: {lr: 1}\ntrain: {gamma: 1}", "bad.yaml: not a YAML file: the key 'train' is there twice"),
        ("train: &a {lr: 1}", "bad.yaml: not a YAML file: anchors and aliases are not taken"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_several_settings_of_a_group_come_as_one_option_or_as_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("{lr: 0.5, milestones: [3]}")
    config = parse([f"--train={tmp_path / 'train.yaml'}", "--train", "{lr: 0.25}", "--model.soap={parts: [hmem]}"])
    assert (config.train.lr, config.train.milestones, config.model.soap.parts) == (0.25, (3,), ("hmem",))


def test_options_of_the_head_come_one_by_one_over_those_there_are() -> None:
    base = {"model": {"head_options": {"a": 1, "b": 2}}}
    config = parse(["--model.head_options.b=1e-3", "--model.head_options.c", "[x, 1]"], base=base)
    assert config.model.head_options == {"a": 1, "b": 0.001, "c": ["x", 1]}
    assert parse(["--model.head_options={c: true}"], base=base).model.head_options == {"c": True}


def test_a_config_that_was_changed_is_checked_again() -> None:
    config = Config()
    config.train.lr = -1.0
    with pytest.raises(UserError, match=r"train\.lr is -1\.0: it must be at least 0"):
        config.check()
    config = Config()
    config.model.head_options = {"out_dim": object()}
    with pytest.raises(UserError, match=r"model\.head_options\.out_dim is <object"):
        config.check()


def test_a_file_of_comments_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file, nor a preset"):
        load_config(tmp_path / "nowhere.yaml")


def test_tuple_sizes_count_only_where_hmem_is_on() -> None:
    assert parse(["--model.soap.tuple_sizes=[9]", "--model.soap.parts=[cwem]"]).model.soap.tuple_sizes == (9,)


def test_keys_are_dotted() -> None:
    keys = {"data.root", "model.soap.parts", "model.head_options", "out"}
    assert keys <= set(kinds(Config))
    assert flatten(to_dict(Config())).keys() == kinds(Config).keys()


def test_help_and_configs_need_no_torch() -> None:
    code = "import sys, soap_net.config, soap_net.cli; soap_net.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_help_names_every_head_and_backbone() -> None:
    docs = field_docs(ModelConfig)
    assert all(re.search(rf"\b{name}\b", docs["head"]) for name in HEADS)
    assert all(re.search(rf"\b{name}\b", docs["backbone"]) for name in BACKBONES)


@pytest.mark.parametrize("given", [["a", "b c"], ["[a, b c]"], ["a"]])
def test_a_lists_items_may_be_arguments_of_their_own(given: list[str]) -> None:
    config = parse(["--data.roots", *given, "--train.lr", "2"])
    assert config.data.roots == (Path("a"), Path("b c"))[: 1 if given == ["a"] else 2]
    assert config.data.place == config.data.roots
    assert config.train.lr == 2
    assert parse(["--model.soap.tuple_sizes", "1", "3"]).model.soap.tuple_sizes == (1, 3)
    with pytest.raises(UserError, match="unrecognized arguments: 'b'"):
        parse(["--data.root", "a", "b"])


def test_another_place_of_the_clips_brings_its_own_lists(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").touch()
    a, b, elsewhere = tmp_path / "a", tmp_path / "b", tmp_path / "list.txt"
    one = DataConfig(root=a, test_split=a / "test.txt", val_split=a / "val.txt", train_split=elsewhere)
    moved = replace(one, root=b).instead_of(one)
    assert moved.split_files == {"train": elsewhere, "val": None, "test": b / "test.txt"}
    assert one.instead_of(one) == one
    several = DataConfig(roots=(a, b), test_split=elsewhere)
    assert several.instead_of(several) == several
    alone = replace(several, root=b).instead_of(several)
    assert (alone.place, alone.test_split) == (b, None)
    others = replace(one, roots=(a, b)).instead_of(one)
    assert (others.place, {*others.split_files.values()}) == ((a, b), {None})
    given = replace(several, root=b, test_split=b / "mine.txt").instead_of(several)
    assert given.test_split == b / "mine.txt"


def test_files_of_the_model_are_named_absolutely_and_names_stay_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "vm").mkdir(parents=True)
    for name in ("w.pth", "imagenet", "resnet18"):  # files of the names of weights or nets stand for neither
        (tmp_path / name).touch()

    def absolute(backbone: str, weights: str | None) -> tuple[str, str | None]:
        model = Config(model=ModelConfig(backbone=backbone, weights=weights)).absolute().model
        return model.backbone, model.weights

    assert absolute("hf:models/vm", "w.pth") == (f"hf:{tmp_path}/models/vm", f"{tmp_path}/w.pth")
    assert absolute(f"hf:{tmp_path}/models/vm", f"{tmp_path}/w.pth") == absolute("hf:models/vm", "w.pth")
    for names in [
        ("hf:owner/net", "pretrained"),
        ("timm:resnet18", "imagenet"),
        ("tiny", "random"),
        ("resnet18", None),
        ("hf:gone", "gone.pth"),
    ]:
        assert absolute(*names) == names


def test_a_portable_config_tells_no_folder_and_no_other_setting_changes(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(root=tmp_path / "set", roots=(tmp_path / "a", tmp_path / "b"), test_split=tmp_path / "t.txt"),
        model=ModelConfig(backbone=f"hf:{tmp_path}/secret/vm", weights=f"{tmp_path}/w.pth", head="trx"),
        out=tmp_path / "out",
        device="cuda:1",
    )
    config.model.soap.backend, config.data.workers = "cpp", 7
    portable = config.portable()
    assert str(tmp_path) not in str(portable)
    assert (portable.model.backbone, portable.model.weights, portable.data.root) == ("hf:vm", "w.pth", Path("a+b"))
    assert portable == portable.portable() == from_dict(to_dict(portable))
    expected = Config(
        data=DataConfig(root=Path("a+b")), model=ModelConfig(backbone="hf:vm", weights="w.pth", head="trx")
    )
    assert portable == expected
    named = ModelConfig(backbone="hf:owner/net", weights="pretrained")
    assert Config(model=named).portable().model == named
