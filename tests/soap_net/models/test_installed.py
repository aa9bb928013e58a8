"""Heads and backbones of other packages: the example's, installed as its users would, and broken ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from soap_net import checkpoint
from soap_net.checkpoint import load_model
from soap_net.cli import main
from soap_net.config import Config, save_config
from soap_net.errors import UserError
from soap_net.models import build_backbone, build_head

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "new_head"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package in it, installed by pip from a copy of its sources."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source")
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pip += ["--no-index", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts a folder of packages on the path; what was imported from it is forgotten afterwards."""
    before = set(sys.modules)

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()

    yield add
    for name in set(sys.modules) - before:
        if name in ("moments", "mosaic") or name.startswith("broken"):
            del sys.modules[name]


def write_package(folder: Path, name: str, entry_points: str, **modules: str) -> None:
    """A package as pip leaves it: modules, and metadata with its entry points."""
    info = folder / f"{name}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


def test_an_installed_head_and_backbone_train_and_are_loaded_again(
    example: Path, on_path: Callable[[Path], None], tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    on_path(example)
    config = tiny_run(
        model__head="moments", model__head_options={"scale": 4.0}, model__backbone="mosaic:3", train__episodes=4
    )
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["eval", "--checkpoint", str(config.out / "best.pt")]) == 0
    assert json.loads((config.out / "eval.json").read_text())["tasks"] == 20
    net, _ = load_model(config.out / "best.pt")
    assert (type(net.head).__module__, type(net.head).__name__) == ("moments", "MomentsHead")
    assert net.backbone.name == "mosaic:3"


def test_the_example_head_equals_a_plain_loop(example: Path, on_path: Callable[[Path], None]) -> None:
    on_path(example)
    head = build_head("moments", 6, 4)
    torch.manual_seed(0)
    support, query, labels = torch.randn(5, 4, 6), torch.randn(3, 4, 6), torch.tensor([1, 0, 1, 2, 1])
    scores = head(support, labels, query, 3)

    def moments(clip: torch.Tensor) -> torch.Tensor:
        return torch.cat([clip.mean(0), clip.std(0, correction=0)])

    for row, clip in enumerate(query):
        for label in range(3):
            prototype = torch.stack([moments(one) for one, own in zip(support, labels, strict=True) if own == label])
            cosine = torch.cosine_similarity(moments(clip), prototype.mean(0), dim=0)
            torch.testing.assert_close(scores[row, label], 10 * cosine, rtol=1e-4, atol=1e-4)


def test_a_name_that_nobody_brings_is_refused_with_those_that_are_there(
    example: Path, on_path: Callable[[Path], None]
) -> None:
    with pytest.raises(UserError, match=r"^unknown head 'moments' \(known: soap, prototype, .*, views\)$"):
        build_head("moments", 6, 4)
    on_path(example)
    with pytest.raises(
        UserError, match=r"^unknown head 'moment'; did you mean moments\? \(known: soap, .*, moments\)$"
    ):
        build_head("moment", 6, 4)
    with pytest.raises(
        UserError, match=r"^unknown backbone 'mosaics'; did you mean mosaic\? \(known: .*, mosaic, timm"
    ):
        build_backbone("mosaics")
    with pytest.raises(UserError, match=r"^head moments has no option 'scal'; did you mean scale\? \(known: scale\)$"):
        build_head("moments", 6, 4, scal=1)
    message = r"^backbone 'mosaic:many' of the package moments-for-soap-net 1\.0: invalid literal for int"
    with pytest.raises(UserError, match=message):
        build_backbone("mosaic:many")


def test_a_package_that_fails_is_named(
    tmp_path: Path, on_path: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    points = """
[soap_net.heads]
lost = broken_import:Head
torn = broken_head:nothing
number = broken_head:NUMBER
prototype = broken_head:NUMBER
[soap_net.backbones]
hollow = broken_head:hollow
"""
    code = "import not_there_at_all\n"
    write_package(
        tmp_path, "broken", points, broken_import=code, broken_head="NUMBER = 3\ndef hollow(name): return 3\n"
    )
    on_path(tmp_path)
    for name, why in {
        "lost": r"is in the package broken 2\.0, where broken_import:Head can't be imported: ModuleNotFoundError: ",
        "torn": r"is in the package broken 2\.0, where broken_head:nothing can't be imported: AttributeError: ",
        "number": r"of the package broken 2\.0 is no FewShotHead",
    }.items():
        with pytest.raises(UserError, match=f"^head '{name}' {why}") as raised:
            build_head(name, 6, 4)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^backbone 'hollow' of the package broken 2\.0: its function gave no Built$"):
        build_backbone("hollow")
    assert type(build_head("prototype", 6, 4)).__name__ == "PrototypeHead", "no package takes the place of our own"
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert "heads of other packages:\n  lost        absent: head 'lost' is in the package broken 2.0, where" in told
    assert "backbones of other packages:\n  hollow      of broken 2.0" in told


def test_a_name_of_two_packages_is_refused(tmp_path: Path, on_path: Callable[[Path], None]) -> None:
    for name in ("first", "second"):
        write_package(tmp_path / name, name, f"[soap_net.heads]\nmine = broken_{name}:Head\n")
        on_path(tmp_path / name)
    on_path(tmp_path / "first")  # twice on the path, and one package all the same
    with pytest.raises(
        UserError, match=r"^head 'mine' is brought by (first 2\.0 and second|second 2\.0 and first) 2\.0: "
    ):
        build_head("mine", 6, 4)


def test_what_no_settings_ask_for_is_not_imported(
    tmp_path: Path, on_path: Callable[[Path], None], tiny_run: Callable[..., Config]
) -> None:
    points = "[soap_net.heads]\nloud = broken_loud:Head\n[soap_net.backbones]\nloud = broken_loud:net\n"
    write_package(tmp_path / "packages", "loud", points, broken_loud="raise SystemExit('imported')\n")
    on_path(tmp_path / "packages")
    config = tiny_run(train__episodes=2, train__val_every=0)
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    load_model(config.out / "best.pt")
    assert "broken_loud" not in sys.modules
    # A module that is there, but is no entry point, is no head whatever a checkpoint says.
    content = checkpoint.load(config.out / "best.pt")
    content["config"]["model"]["head"] = "broken_loud:Head"
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(UserError, match="unknown head 'broken_loud:Head'"):
        load_model(tmp_path / "other.pt")
    assert "broken_loud" not in sys.modules
