"""The report: one file, safe with any class name, honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.io import write_png

from soap_kernels import SOAP
from soap_net import checkpoint
from soap_net.config import Config, DataConfig, EpisodeConfig, EvalConfig, ModelConfig, SoapConfig, save_config, to_dict
from soap_net.errors import UserError
from soap_net.models import build_model
from soap_net.report import write_report

CLASSES = ['<b>bold & "quoted"\'s', "Über (alt) $x_1$", "plain"]
SIZE = 24


class _Page(HTMLParser):
    """The page's tags with their attributes, and its text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def images(self) -> list[tuple[str, Image.Image]]:
        """Alternative text and picture of the PNGs."""
        found = []
        for tag, attributes in self.tags:
            source = attributes.get("src") or ""
            if tag == "img" and source.startswith("data:image/png;base64,"):
                picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
                found.append((attributes["alt"] or "", picture))
        return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        folder = root / "test" / name / "clip"
        folder.mkdir(parents=True)
        for number in range(8):
            image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
            write_png(image, str(folder / f"{number}.png"))
    return root


def _run(folder: Path, videos: Path, soap: SoapConfig, **result: Any) -> Path:
    folder.mkdir(parents=True)
    config = Config(
        data=DataConfig(root=videos, resize=SIZE, crop=SIZE),
        model=ModelConfig(backbone="tiny", weights="random", head_options={"out_dim": 8}, soap=soap),
        episode=EpisodeConfig(way=2),
        eval=EvalConfig(way=2),
        out=folder,
    )
    save_config(config, folder / "config.yaml")
    content = {"config": to_dict(config), "model": build_model(config.model, 8).state_dict(), "progress": {}}
    checkpoint.save(folder / "last.pt", content)
    (folder / "versions.json").write_text(json.dumps({"torch": "9.9", "gpu": None}), encoding="utf-8")
    lines: list[dict[str, float]] = [
        {"episode": n, "loss": 1 / n, "accuracy": 50.0 + n, "lr": 0.1, "episodes_per_second": 4.0} for n in range(1, 31)
    ]
    lines += [{"episode": 30, "val_accuracy": 71.0, "val_ci95": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut off', "utf-8")
    values = {
        "accuracy": 87.654,
        "ci95": 1.234,
        "tasks": 432,
        "way": 2,
        "shot": 1,
        "split": "test",
        "episodes_per_second": 80.0,
        "classes": CLASSES,
        "confusion": [[9, 1, 0], [0, 10, 0], [0, 0, 0]],
    }
    (folder / "eval.json").write_text(json.dumps(values | result), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "with <i>SOAP</i> $": _run(root / "with", videos, SoapConfig()),
        "_without": _run(root / "without", videos, SoapConfig(enabled=False), accuracy=21.25, ci95=0.75),
    }


@pytest.fixture(scope="module")
def html(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, runs, title="A & B", clips=3)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_names_are_shown_as_they_are_and_never_become_tags(html: str) -> None:
    page = _Page(html)
    assert not [tag for tag, attributes in page.tags if tag == "script" or "quoted" in str(attributes.keys())]
    assert "<b>bold" not in html
    assert "<i>SOAP" not in html
    for name in (*CLASSES, "with <i>SOAP</i> $", "_without", "A & B"):
        assert name in page.text


def test_the_file_needs_no_network(html: str) -> None:
    page = _Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert sources
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    assert "url(" not in html
    assert "@import" not in html


def test_accuracies_intervals_times_and_confusion_are_shown(html: str) -> None:
    text = re.sub(r"\s+", " ", _Page(html).text)
    assert "87.7 ± 1.2 %" in text
    assert "21.2 ± 0.8 %" in text
    assert "2-way 1-shot on the 3 classes of the test split" in text
    assert "250 ms" in text  # a training episode
    assert "12.5 ms" in text  # a task of the evaluation
    assert re.search(r">90</td>\s*<td[^>]*>10</td>", html)
    assert "torch 9.9" in text
    assert "gpu" not in text.lower().partition("torch 9.9")[0][-40:]


def test_learning_curves_are_one_picture_of_both_runs(html: str) -> None:
    curve = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert curve
    svg = base64.b64decode(curve[1]).decode()
    assert "#0072b2" in svg
    assert "#d55e00" in svg


def test_each_clip_has_its_frames_and_the_three_priors_below_them(html: str) -> None:
    images = _Page(html).images()
    rows = ["frames", "3DEM", "CWEM", "HMEM, red", "HMEM, green", "HMEM, blue", "sum"]
    names = [f"{name}/clip" for name in sorted(CLASSES)]
    assert [alt for alt, _ in images] == [f"{row} of {name}" for name in names for row in rows]
    assert {picture.width for _, picture in images} == {8 * SIZE + 7 * 2}
    assert {picture.height for alt, picture in images if not alt.startswith("CWEM")} == {SIZE}


def test_frames_are_shown_unchanged(html: str, videos: Path) -> None:
    alt, strip = _Page(html).images()[0]
    name = alt.removeprefix("frames of ").removesuffix("/clip")
    for number in (0, 7):
        left = number * (SIZE + 2)
        shown = strip.convert("RGB").crop((left, 0, left + SIZE, SIZE))
        assert shown.tobytes() == Image.open(videos / "test" / name / "clip" / f"{number}.png").tobytes()


def test_only_the_priors_that_are_on_are_shown(tmp_path: Path, videos: Path) -> None:
    run = _run(tmp_path / "run", videos, SoapConfig(parts=("cwem",)))
    write_report(tmp_path / "report.html", {"cwem alone": run}, clips=1)
    images = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).images()
    assert [alt.partition(" of ")[0] for alt, _ in images] == ["frames", "CWEM", "sum"]


def test_what_a_run_lacks_is_said_in_its_place(tmp_path: Path, videos: Path) -> None:
    run = _run(tmp_path / "run", videos / "gone", SoapConfig())
    (run / "eval.json").unlink()
    (run / "metrics.jsonl").unlink()
    write_report(tmp_path / "report.html", {"bare": run})
    text = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Not evaluated yet" in text
    assert "The priors can't be shown" in text
    assert "gone" in text
    assert "Learning curves" not in text
    assert "Confusion" not in text


def _accuracies(path: Path, runs: dict[str, Path]) -> str:
    write_report(path, runs, clips=1)
    text = re.sub(r"\s+", " ", _Page(path.read_text(encoding="utf-8")).text)
    return text[text.index("Accuracy") : text.index("Learning curves")]


def test_runs_of_different_tasks_stand_under_their_own(tmp_path: Path, videos: Path) -> None:
    plain = SoapConfig(enabled=False)
    runs = {
        "one": _run(tmp_path / "one", videos, plain),
        "five": _run(tmp_path / "five", videos, plain, shot=5),
        "three": _run(
            tmp_path / "three", videos, plain, way=3, split="val", classes=CLASSES[:2], confusion=[[1, 0], [0, 1]]
        ),
    }
    text = _accuracies(tmp_path / "report.html", runs)
    assert text.startswith("Accuracy on unseen classes The dark line")
    assert "one 2-way 1-shot on the 3 classes of the test split 87.7" in text
    assert "five 2-way 5-shot on the 3 classes of the test split 87.7" in text
    assert "three 3-way 1-shot on the 2 classes of the val split 87.7" in text
    alike = _accuracies(tmp_path / "report.html", {"a": runs["one"], "b": runs["one"]})
    assert alike.count("2-way 1-shot on the 3 classes of the test split") == 1


def test_a_single_task_has_no_interval(tmp_path: Path, videos: Path) -> None:
    run = _run(tmp_path / "run", videos, SoapConfig(enabled=False), tasks=1, ci95=None)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").replace(', "val_ci95": 2.0', "")
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    told = _accuracies(tmp_path / "report.html", {"run": run})
    assert "87.7 % of a single task" in told
    assert "±" not in told
    assert 'class="interval"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_priors_that_are_not_finite_are_not_drawn(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path / "run", videos, SoapConfig(parts=("cwem",)))
    priors = SOAP.priors
    monkeypatch.setattr(
        SOAP, "priors", lambda self, x: {name: prior * torch.nan for name, prior in priors(self, x).items()}
    )
    write_report(tmp_path / "report.html", {"run": run}, clips=1)
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "The priors can't be shown: those of" in page.text
    assert "are not finite" in page.text
    assert not page.images()


def test_training_classes_are_not_called_unseen(tmp_path: Path, videos: Path) -> None:
    runs = {
        "train": _run(tmp_path / "train", videos, SoapConfig(enabled=False), split="train"),
        "test": _run(tmp_path / "test", videos, SoapConfig(enabled=False)),
    }
    assert "unseen" not in _accuracies(tmp_path / "report.html", {"train": runs["train"]})
    both = _accuracies(tmp_path / "report.html", runs)
    assert "unseen" not in both
    assert "train 2-way 1-shot on the 3 classes of the train split" in both


def test_a_model_trained_with_a_gpus_backend_is_shown_without_one(tmp_path: Path, videos: Path) -> None:
    run = _run(tmp_path / "run", videos, SoapConfig(backend="triton", parts=("3dem",)))
    write_report(tmp_path / "report.html", {"triton": run}, clips=1)
    images = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).images()
    assert [alt.partition(" of ")[0] for alt, _ in images] == ["frames", "3DEM", "sum"]


def test_what_fails_in_one_run_leaves_the_others_their_place(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: _run(tmp_path / name, videos, SoapConfig(parts=("cwem",))) for name in ("bad", "good")}

    def load(path: Path, **options: Any) -> Any:
        if path.parent.name == "bad":
            raise RuntimeError("the kernel fell over")
        return checkpoint.load_model(path, **options)

    monkeypatch.setattr("soap_net.report.load_model", load)
    write_report(tmp_path / "report.html", runs, clips=1)
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "The priors can't be shown: the kernel fell over" in page.text
    assert [alt.partition(" of ")[0] for alt, _ in page.images()] == ["frames", "CWEM", "sum"]


def test_what_is_no_run_is_refused_and_an_older_report_stays(tmp_path: Path, runs: dict[str, Path]) -> None:
    path = tmp_path / "report.html"
    path.write_text("older", encoding="utf-8")
    with pytest.raises(UserError, match=r"not a run folder: there is no config\.yaml"):
        write_report(path, {"nothing": tmp_path})
    with pytest.raises(UserError, match="at least one run"):
        write_report(path, {})
    assert path.read_text(encoding="utf-8") == "older"
