"""SOAP-Net as a folder of Hugging Face's hub: what is written, what is read, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, hub_mixin

from soap_net import checkpoint
from soap_net.cli import main
from soap_net.config import Config, to_dict
from soap_net.errors import UserError, WriteError
from soap_net.models import SOAPNet, build_model

RESULT = {"accuracy": 61.25, "ci95": 0.5, "tasks": 100, "way": 5, "shot": 1, "split": "test", "queries": 1}


@pytest.fixture
def config(tiny_run: Callable[..., Config]) -> Config:
    return tiny_run(data__workers=0)


@pytest.fixture
def net(config: Config) -> SOAPNet:
    return build_model(config.model, config.data.frames, seed=0).eval()


@pytest.fixture
def folder(tmp_path: Path, net: SOAPNet, config: Config) -> Path:
    net.save_pretrained(tmp_path / "net", config=config)
    return tmp_path / "net"


def test_what_is_saved_comes_back_the_same_with_its_settings_but_for_the_machines(
    folder: Path, net: SOAPNet, config: Config, tiny_data: Path
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    back = SOAPNet.from_pretrained(folder)
    assert isinstance(back, SOAPNet)
    assert not back.training
    torch.testing.assert_close(back.state_dict(), net.state_dict(), rtol=0, atol=0)
    clips = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(back.features(clips), net.features(clips), rtol=0, atol=0)
    assert back.config is not None
    assert (back.config.model, back.config.episode, back.config.train) == (config.model, config.episode, config.train)
    assert back.config.data.crop == config.data.crop
    written = json.loads((folder / "config.json").read_text())
    assert written["data"]["root"] == "tiny_data0"
    assert str(tiny_data.parent) not in "".join(path.read_text(errors="replace") for path in folder.iterdir())
    assert str(config.out) not in (folder / "config.json").read_text()
    assert checkpoint.load(folder, net)["config"] == written


def test_a_backbone_from_a_folder_of_this_machine_is_refused_and_a_file_is_told_by_name(
    net: SOAPNet, config: Config, tmp_path: Path
) -> None:
    config.model.weights = f"{tmp_path}/secret/w.pth"
    for backbone in (f"hf:{tmp_path}/secret/vm", "hf:vm"):
        config.model.backbone = backbone
        with pytest.raises(UserError, match=f"^model.backbone is {backbone}, a folder of this .* as hf:owner/model$"):
            net.save_pretrained(tmp_path / "net", config=config)
        assert not (tmp_path / "net").exists()
    config.model.backbone = "hf:owner/model"
    net.save_pretrained(tmp_path / "net", config=config)
    assert json.loads((tmp_path / "net" / "config.json").read_text())["model"]["weights"] == "w.pth"
    assert str(tmp_path) not in "".join(path.read_text(errors="replace") for path in (tmp_path / "net").iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(net: SOAPNet, config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="/file/net: "):
        net.save_pretrained(tmp_path / "file" / "net", config=config)


def test_the_weights_are_safetensors_that_any_program_reads(folder: Path, net: SOAPNet) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.testing.assert_close(state, dict(net.state_dict()), rtol=0, atol=0)


def test_commands_take_the_folder_as_a_checkpoint(
    folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], net: SOAPNet, config: Config
) -> None:
    checkpoint.save(tmp_path / "best.pt", {"config": to_dict(config), "model": net.state_dict()})
    options = ["--data.root", str(tiny_data), "--device", "cpu"]
    results = []
    for path in (folder, tmp_path / "best.pt"):
        assert main(["eval", "--checkpoint", str(path), *options]) == 0
        results.append(json.loads(((path if path.is_dir() else path.parent) / "eval.json").read_text()))
    assert results[0]["confusion"] == results[1]["confusion"]
    support = tmp_path / "support"
    for name in ("test (class 0)", "test (class 1)"):
        shutil.copytree(tiny_data / name, support / name)
    shutil.copytree(folder, tmp_path / "moved")
    learn = ["learn", "--support", str(support), "--checkpoint", str(folder), "--out", str(tmp_path / "my.classifier")]
    assert main(learn) == 0
    answers = []
    for options in ([], ["--checkpoint", str(tmp_path / "moved")]):
        capsys.readouterr()
        classify = ["classify", "--classifier", str(tmp_path / "my.classifier"), str(support / name / "v0"), *options]
        assert main(classify) == 0
        answers.append(capsys.readouterr().out)
        shutil.rmtree(folder, ignore_errors=True)
    assert answers[0] == answers[1]
    assert "test (class 1)" in answers[0]


def test_the_card_names_the_accuracies_of_eval_json_with_their_intervals(
    folder: Path, net: SOAPNet, tmp_path: Path
) -> None:
    assert "It was not evaluated." in (folder / "README.md").read_text()
    (tmp_path / "eval.json").write_text(json.dumps({**RESULT, "classes": ["a"]}))
    single = {**RESULT, "shot": 5, "accuracy": 80, "ci95": None, "tasks": 1}
    net.save_pretrained(tmp_path / "card", model_card_kwargs={"results": [tmp_path / "eval.json", single]})
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert "| tiny_data0 | test | 5-way 1-shot | 61.25 % | +- 0.50 | 100 |" in card.text
    assert "| tiny_data0 | test | 5-way 5-shot | 80.00 % | none, of a single task | 1 |" in card.text
    found = [(one.metric_value, one.metric_name) for one in card.data.eval_results]
    assert found == [
        (61.25, "5-way 1-shot accuracy, +- 0.50"),
        (80, "5-way 5-shot accuracy, none, of a single task"),
    ]
    assert card.data.library_name == "soap-net"
    assert {"few-shot", "pytorch_model_hub_mixin"} <= set(card.data.tags)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"accuracy": 50.0}, r"the result: not an eval\.json: there is no ci95 in it"),
        ({**RESULT, "accuracy": 101.0}, r"the result: accuracy is 101\.0: it must be at most 100"),
        ("gone.json", r"gone\.json: no such file; soap-net eval writes one"),
    ],
)
def test_a_result_that_is_none_is_refused_and_nothing_written(
    net: SOAPNet, config: Config, tmp_path: Path, result: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        net.save_pretrained(tmp_path / "new", config=config, model_card_kwargs={"results": [result]})
    assert not (tmp_path / "new").exists()


def test_a_net_without_its_settings_or_with_weights_not_finite_is_not_written(
    net: SOAPNet, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"say with which config the net was trained"):
        net.save_pretrained(tmp_path / "new")
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=r"new: not written, as the weight \S+ is not finite"):
        net.save_pretrained(tmp_path / "new", config=config)
    assert not (tmp_path / "new").exists()


def change(folder: Path, **settings: Any) -> None:
    """Of the model's settings one is another, or beside the groups there is one more."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in settings.items():
        (content["model"] if key in content["model"] else content)[key] = value
    path.write_text(json.dumps(content))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {key: value.clone() for key, value in state.items()}
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, backbone="os.system"), "unknown backbone 'os.system'"),
        (lambda f: change(f, auto_map={"AutoModel": "evil.Net"}), r"config\.json: unknown key 'auto_map\.AutoModel'"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json: not a YAML file"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not a YAML file"),
        (lambda f: change(f, backbone="resnet18"), "checkpoint of another architecture"),
        (
            lambda f: weights(f, lambda s: s.pop("soap.three_dem.conv.weight")),
            "1 weights missing, first soap.three_dem",
        ),
        (lambda f: weights(f, lambda s: s.update(more=torch.ones(1))), "1 weights unknown, first more"),
        (
            lambda f: weights(f, lambda s: s["soap.three_dem.conv.weight"].fill_(float("inf"))),
            "the weight 'soap.three_dem.conv.weight' holds values that are not finite",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02cos\nsystem\n."), "not a whole checkpoint"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model: there is no model\.safetensors in it"),
        (lambda f: (f / "config.json").unlink(), r"no model: there is no config\.json in it"),
    ],
)
def test_a_folder_that_is_damaged_or_asks_for_code_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        SOAPNet.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_what_the_hub_has_cached_is_found_without_a_network(folder: Path, tmp_path: Path, net: SOAPNet) -> None:
    cached = tmp_path / "hub" / "models--me--net"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    back = SOAPNet.from_pretrained("me/net", cache_dir=tmp_path / "hub", local_files_only=True)
    torch.testing.assert_close(back.state_dict(), net.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"no folder me/other, and Hugging Face's hub does not give it: \S+") as raised:
        SOAPNet.from_pretrained("me/other", cache_dir=tmp_path / "hub", local_files_only=True)
    assert "\n" not in str(raised.value)


def test_push_to_hub_uploads_the_folder_and_its_card(
    net: SOAPNet, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:  # stands for the hub's API
        def __init__(self, **options: object) -> None: ...

        def create_repo(self, repo_id: str, **options: object) -> object:
            return type("Made", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> str:
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    card = {"results": [RESULT], "repo_id": "me/net"}
    assert net.push_to_hub("me/net", config=config, model_card_kwargs=card) == "https://example.org/me/net"
    back = SOAPNet.from_pretrained(tmp_path / "hub" / "me" / "net")
    torch.testing.assert_close(back.state_dict(), net.state_dict(), rtol=0, atol=0)
    text = (tmp_path / "hub" / "me" / "net" / "README.md").read_text()
    assert "hf download me/net --local-dir FOLDER" in text
    assert re.search(r"61\.25 % \| \+- 0\.50", text)
