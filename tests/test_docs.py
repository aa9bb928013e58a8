"""Every snippet and command of README.md and docs/ runs, page by page and in order, on a data set of seconds.

What a reader has (data, clips) is put into a fresh folder for each page under the names that the pages use. `RULES`
says what makes a command small, and why one is not run at all; one that no rule knows runs as it is written.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from soap_kernels import backends
from soap_net.cli import main
from soap_net.data.motion import MotionConfig, write_motion
from soap_net.experiments.command import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
# Recorded results (docs/results/*/table.md) name the commands of their day, and stay as they are.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [*sorted((ROOT / "docs" / "experiments").glob("*.md"))]
PAGES += [ROOT / "docs" / name / "README.md" for name in ("results", "examples")]
PROGRAMS = ("soap-net", "python", "python3", "pytest", "make", "pip", "torchrun", "tensorboard", "source")
BLOCK = re.compile(
    r"^```(?P<language>\w*)\n(?P<fenced>(?s:.*?))^```$"
    r"|(?<=\n\n)(?P<indented>(?: {4}.*\n|\n(?= {4}))+)"
    r"|`(?P<inline>[^`]+)`",
    re.MULTILINE,
)
COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})(?: \S|$)")

#: What stands in a page, and what a run here takes in its place.
SUBSTITUTES = {
    "/data/ssv2": "DATA",
    "--nproc-per-node 4": "--nproc-per-node 2",
    '"--out=runs/followed"': '"--out=runs/followed", "--train.episodes=2", "--train.val_tasks=2", "--data.workers=0", '
    '"--model.backbone=tiny", "--model.weights=random", "--data.resize=24", "--data.crop=24"',
    "classify ... --json": "classify --checkpoint runs/small/best.pt --support my_classes --query new --json",
    '"--train.episodes=2000"': '"--train.episodes=2", "--model.backbone=tiny", "--model.weights=random", '
    '"--data.resize=24", "--data.crop=24", "--data.workers=0", "--episode.queries=1", "--train.val_every=0"',
}
#: The data set, under each name that a page has for it.
DATA = ("DATA", "OTHER", "data/hmdb51", "data/kinetics", "data/ssv2", "data/ucf101", "path/to/data")

SMALL = "--data.resize 32 --data.crop 32 --data.workers 0 --device cpu"
SIZES = "--data.frames 4 --data.resize 24 --data.crop 24 --data.workers 0 --device cpu"
TASKS = "--episode.shot 1 --episode.queries 1 --eval.shot 1 --eval.tasks 10 --train.episodes 2"
NET = "--model.backbone tiny --model.weights random"
VALIDATED = "--train.tasks_per_batch 2 --train.val_every 2 --train.val_tasks 2"
TRAIN = f"{SIZES} {TASKS} {NET} {VALIDATED}"
EXPERIMENT = f"--data.root DATA --seeds 1 --jobs 1 {SIZES} {TASKS} {NET}"


@dataclass(frozen=True)
class Rule:
    """How snippets are run that ``pattern`` matches whole: with these options behind them, or, for a reason, not."""

    pattern: str
    options: str = ""
    slow: bool = False
    not_run: str = ""


RULES = (
    Rule(
        r"soap-net (train|eval|demo|report|learn|classify|export)", "--help"
    ),  # named in passing, without what they need
    Rule(r"soap-net COMMAND --help", not_run="stands for each command's; test_cli.py has them all"),
    Rule(r"soap-net data pack", "--help"),  # named in passing
    Rule(r"(unrar|mkdir|for|cat|cp) .*", not_run="takes the benchmarks' published files"),
    Rule(r"soap-net data motion ROOT", not_run="named in passing; the command itself runs on the page"),
    Rule(r"soap-net data motion data/motion", "--train_clips 2 --val_clips 2 --test_clips 2 --seconds 0.5"),
    Rule(r"soap-net demo --.*", not_run="draws a thousand videos first; test_demo.py runs the demo on fewer"),
    Rule(r"soap-net train --config small.yaml .*", f"{SIZES} {TASKS} {VALIDATED}", slow=True),  # keeps its own net
    Rule(r"soap-net train --config \S+ --print_config|soap-net train --help"),
    Rule(r"soap-net train --resume .*", slow=True),
    Rule(r"soap-net train --config (ssv2_cmn|kinetics)_.*", TRAIN, slow=True),
    Rule(
        r"soap-net train .*timm:resnet50 .*", f"{SIZES} {TASKS} {VALIDATED} --model.weights random", slow=True
    ),  # its own net takes what the page sets
    Rule(r"soap-net train .*", TRAIN),
    Rule(
        r"soap-net (eval|classify|report) .*\b(runs|shared)/(small|ssv2_cmn).*|soap-net classify \.\.\. --json",
        slow=True,
    ),
    Rule(r"from soap_net.config import load_config\n(?s:.*)|from (?s:.*runs/small/best.pt.*)", slow=True),
    Rule(r"soap-net export .*", slow=True),
    Rule(r"import json\n\nimport av\n(?s:.*)", slow=True),
    Rule(r"torchrun --nproc-per-node .*", TRAIN, slow=True),
    Rule(r"torchrun --nnodes .*", not_run="needs several machines; test_machines.py has it on two network namespaces"),
    Rule(r"torchrun \.\.\. .*", not_run="not a whole command; the one before it on the page is run"),
    Rule(r"soap-net experiment parts --preset paper .*", EXPERIMENT, slow=True),
    Rule(r"soap-net app( .*)?", not_run="serves until it is stopped; test_app.py serves the page"),
    Rule(r"soap-net experiment .*", not_run="test_experiments.py runs every experiment whole on a tiny data set"),
    Rule(r"import timm, torch, torchvision, transformers\n(?s:.*)", slow=True),
    Rule(r"python -m soap_net", slow=True),
    Rule(r"python docs/examples/timm_model.py .*", "--epochs 1 --model resnet10t --size 16", slow=True),
    Rule(r"python docs/examples/own_clips.py .*", "--backbone tiny --weights random", slow=True),
    Rule(r"python -m soap_kernels.selfcheck", not_run="test_selfcheck.py runs it"),
    Rule(r"python -m benchmarks.own_clips FOLDER", not_run="test_own_clips.py runs it on a small folder"),
    Rule(r"python -m benchmarks.fresh_soap FOLDER", not_run="test_fresh_soap.py runs it on a small folder"),
    Rule(r"python -m benchmarks\.\w+.*", not_run="minutes; run by hand, some on small shapes by make benchmark-check"),
    Rule(r"(make|python -m benchmarks|pytest benchmarks) .*|python -m benchmarks", not_run="run by make, in .ci/run"),
    Rule(r"soap-net learn .* --drop wave .*", not_run="names a class of the reader's; test_own.py drops some"),
    Rule(
        r"soap-net learn .* --backbone (resnet50|vit_b_16).*",
        not_run="downloads weights; test_own.py runs it with another net",
    ),
    Rule(r"soap-net learn --support my_classes .*", f"--backbone tiny --weights random {SMALL}"),
    Rule(r"(.* )?pip (install|wheel).*", not_run="the tests of building and packaging install in every way"),
    Rule(r"source .*|tensorboard .*|.* pre_commit install", not_run="acts on the reader's shell, screen or checkout"),
    Rule(r"pytest -m gpu.*|python benchmarks/\w+\.py.*", not_run="needs a GPU"),
    Rule(
        r"python tests/gpu_proof/report.py", not_run="compiles for minutes; test_report.py has it for one architecture"
    ),
)


@dataclass(frozen=True)
class Snippet:
    """A command, a Python block or a YAML file of a page."""

    page: Path
    line: int
    kind: str  # "command", "python" or "yaml"
    text: str

    def rule(self) -> Rule:
        found = (rule for rule in RULES if re.fullmatch(rule.pattern, self.text))
        return next(found, Rule(re.escape(self.text)))


def snippets(page: Path) -> Iterator[Snippet]:
    """In the page's order: fenced and indented blocks, and commands within the text."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if found["inline"] is not None:
            command = " ".join(found["inline"].split())
            if " " in command and COMMAND.match(command):
                yield Snippet(page, line, "command", command)
            continue
        body = found["fenced"] if found["fenced"] is not None else re.sub(r"^ {4}", "", found["indented"], flags=re.M)
        if found["language"] in ("python", "yaml"):
            yield Snippet(page, line, found["language"], body)
        elif re.match(r"import |from \S+ import ", body):
            yield Snippet(page, line, "python", body)
        else:
            yield from commands(page, line, body)


def commands(page: Path, line: int, block: str) -> Iterator[Snippet]:
    """Those of a block; where some lines begin with a prompt the others are what was printed."""
    lines = block.replace("\\\n", " ").splitlines()
    prompted = [each.removeprefix("$ ") for each in lines if each.startswith("$ ")] or lines
    if not any(COMMAND.match(each) for each in prompted):
        return  # equations, a table, a listing
    for each in prompted:
        if words := shlex.split(each, comments=True):
            yield Snippet(page, line, "command", " ".join(map(quoted, words)))


def quoted(word: str) -> str:
    return shlex.quote(word) if re.search(r"[\s'\"]", word) else word


SNIPPETS = {page: list(snippets(page)) for page in PAGES if page.exists()}


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MotionConfig(seconds=0.5, train_clips=6, val_clips=2, test_clips=2)
    return write_motion(tmp_path_factory.mktemp("docs") / "motion", config, progress=False)


@pytest.fixture
def world(motion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a reader has, in the current folder; backends that a page registers are gone after it."""
    registered = backends.names()
    for name in DATA:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(motion)
    shutil.copy(motion / "splits" / "test.txt", tmp_path / "testlist03.txt")
    (tmp_path / "lists").mkdir()
    for split in ("train", "val", "test"):
        shutil.copy(motion / "splits" / f"{split}.txt", tmp_path / "lists" / f"{split}list03.txt")
    clips = sorted(motion.glob("videos/*/*.mp4"))
    for clip in clips[:12]:  # of two or more classes
        support = tmp_path / "my_classes" / clip.parent.name
        support.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, support)
    (tmp_path / "new").mkdir()
    shutil.copy(clips[-1], tmp_path / "new")
    for name in ("my_clip.mp4", "long.mp4"):
        shutil.copy(clips[-1], tmp_path / name)
    (tmp_path / "MY_CLASSES").symlink_to("my_classes")
    shutil.copytree(tmp_path / "my_classes", tmp_path / "more_classes")
    (tmp_path / "MY_CLIPS").symlink_to("new")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "examples").symlink_to(ROOT / "docs" / "examples")
    (tmp_path / "my.yaml").write_text("train: {lr: 1e-4}\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in backends.names()[len(registered) :]:
        backends.unregister(name)


def substituted(text: str) -> str:
    for written, taken in SUBSTITUTES.items():
        text = text.replace(written, taken)
    return text


def run(snippet: Snippet, options: str) -> None:
    text = substituted(snippet.text)
    if snippet.kind == "python":
        source = "\n" * snippet.line + text  # a traceback then names the page's own line
        exec(compile(source, str(snippet.page), "exec", dont_inherit=True), {"__name__": "docs"})
        return
    if snippet.kind == "yaml":
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name, f"{snippet.page}:{snippet.line}: a YAML block begins with a comment that names its file"
        Path(name[1]).write_text(text)
        return
    program, *arguments = shlex.split(f"{text} {options}")
    program = program.removeprefix(".venv/bin/")
    if program == "soap-net":
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    else:
        starts = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
        assert program in starts, "neither run by this test nor listed in RULES with the reason"
        path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        done = subprocess.run([sys.executable, *starts[program], *arguments], env=os.environ | path, check=False)
        code = done.returncode
    assert not code, f"{snippet.page}:{snippet.line}: {text} {options}: exit code {code}"


def run_page(page: Path, slow: bool) -> None:
    for snippet in SNIPPETS[page]:
        rule = snippet.rule()
        if not rule.not_run and (slow or not rule.slow):
            run(snippet, rule.options)


def pages_with(slow: bool) -> list[object]:
    found = [p for p, all_of in SNIPPETS.items() if any(s.rule().slow == slow and not s.rule().not_run for s in all_of)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", pages_with(slow=False))
def test_snippets_and_commands_of_a_page_run(page: Path, world: Path) -> None:
    run_page(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True))
def test_slow_snippets_and_commands_of_a_page_run(page: Path, world: Path) -> None:
    run_page(page, slow=True)


def test_every_rule_is_about_something_in_the_docs() -> None:
    used = {snippet.rule().pattern for all_of in SNIPPETS.values() for snippet in all_of}
    assert {rule.pattern for rule in RULES} <= used


def test_make_targets_in_the_docs_exist() -> None:
    made = {s.text.split()[1] for all_of in SNIPPETS.values() for s in all_of if s.text.startswith("make ")}
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert {"demo", "test"} <= made <= targets


def test_links_lead_to_files() -> None:
    for page in SNIPPETS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_test_that_stands_for_a_promise_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::([\w*]+))?`", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, words in named:
        text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file))
        tests = re.findall(r"^def test_(\w+)", text, re.MULTILINE)
        assert fnmatch.filter(tests, words or "*"), f"{file}: no test {words}"


def test_snippets_are_found_in_every_form(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `soap-net\ninfo`, or `soap-net`:\n\n    import torch\n\n    torch.ones(2)\n\n    P = s(x)\n\nThen\n\n"
        "```\n$ soap-net eval \\\n    --x '{\"a b\": 1}'  # why\n81.3 %\n```\n\n```yaml\n# a.yaml\n```\n"
    )
    assert [(s.line, s.kind, s.text) for s in snippets(page)] == [
        (1, "command", "soap-net info"),
        (4, "python", "import torch\n\ntorch.ones(2)\n\nP = s(x)\n"),
        (12, "command", "soap-net eval --x '{\"a b\": 1}'"),
        (18, "yaml", "# a.yaml\n"),
    ]


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")  # the site's menu comes from it as well
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme, page


def test_every_experiment_has_a_page_and_stands_in_the_tables() -> None:
    folder = ROOT / "docs" / "experiments"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert (folder / f"{name}.md").is_file()
        assert f"{name}.md" in listed
        assert re.search(rf"\b{name}\b", readme)
