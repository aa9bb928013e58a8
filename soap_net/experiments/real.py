"""SOAP in front of a pretrained net on real videos: whether it helps, and whether by what moves.

The endpoint, fixed before the runs: SOAP trained less no SOAP, the backbone frozen, 5-way 5-shot, the mean over the
heads, pooled over the folds of all sets that have five classes there, of six clips or more each. All else in the table
is beside it. If SOAP helps by what moves, the gain vanishes on clips whose frames are shuffled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from soap_net.checkpoint import load_model
from soap_net.config import Config
from soap_net.data.memory import ClipMemory
from soap_net.data.splits import split_of
from soap_net.evaluate import evaluate
from soap_net.experiments.drawing import MARKERS, new_figure, save_figure
from soap_net.experiments.experiment import Experiment, Run, changed, seeded, sizes, tested
from soap_net.experiments.processes import Stop
from soap_net.experiments.results import Estimate, Result, Results, Row
from soap_net.experiments.sets import FOLDS, by_set, fold_list, pack, packed, write_folds
from soap_net.models import SOAPNet, build_backbone, build_model
from soap_net.ranks import Ranks, pick_device
from soap_net.runs import RunFolder
from soap_net.train import train

ENDPOINT = "5-way 5-shot"
"""The pooled test."""
SHUFFLED = ", frames shuffled"
"""What is put behind the name of a test on shuffled frames."""
HEADS: Mapping[str, Mapping[str, Any]] = {"views": {"by": "motion"}, "otam": {}, "soap": {"out_dim": 256}}
ALL = "mean"
"""What stands for all heads."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "none": {"model.soap.enabled": False},
    "constant": {},  # a SOAP of zeros: three sigmoids at one half, 1.5 on every pixel
    "init": {},
    "trained": {},
    "centred": {"model.soap.centred": True},
}
SHOWN = {
    "none": "none",
    "constant": "a constant in its place",
    "init": "as initialised",
    "trained": "trained",
    "centred": "centred, trained",
}
RATE = 0.01
"""Of the backbone's learning rate to that of the rest, where it is trained."""


@dataclass(frozen=True)
class _Cell:
    head: str
    tuned: bool  # whether the backbone is trained
    arm: str
    fold: int

    @property
    def group(self) -> str:
        """The name of the same with all folds."""
        return _group(self.head, self.tuned, self.arm)

    @property
    def name(self) -> str:
        return f"{self.group}-fold{self.fold}"

    @property
    def learns(self) -> bool:
        """Whether anything of the net is trained; most of the frozen ones are tested as they are built."""
        return self.tuned or self.arm in ("trained", "centred") or self.head == "soap"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model.head": self.head,
            "model.head_options": dict(HEADS[self.head]),
            "train.lr_scale": {"backbone": RATE} if self.tuned else {},
            **ARMS[self.arm],
        }

    def frozen(self, config: Config) -> list[str]:
        """What is not trained; of a trained backbone its BatchNorms, which few small clips would throw off."""
        soap = ["soap"] if self.arm in ("constant", "init") else []
        return [*soap, *(_norms(config.model.backbone) if self.tuned else ["backbone"])]


def _group(head: str, tuned: bool, arm: str) -> str:
    return f"{head}-{'tuned' if tuned else 'frozen'}-{arm}"


def _norms(backbone: str) -> list[str]:
    modules = build_backbone(backbone).named_modules(prefix="backbone")
    return [name for name, module in modules if isinstance(module, _BatchNorm)]


class Real(Experiment):
    """Every arm with every head and the backbone frozen and trained, on every fold; each class is tested once."""

    title = "SOAP in front of a pretrained net, on real videos"
    columns = ("head", "backbone", "SOAP")
    difference = "less none"
    axis = "SOAP"
    note = (
        f"Endpoint, fixed before the runs: SOAP trained less none, the backbone frozen, {ENDPOINT}, the mean over the "
        "heads, pooled over the sets' folds of five classes with six clips or more. The constant is 1.5 on every pixel "
        "in units of the backbone's standard deviations, which is SOAP's priors at rest. Backbone trained: at "
        f"{RATE} of the rate of the rest, its BatchNorms standing still."
    )

    @property
    def heads(self) -> list[str]:
        """Those of the size."""
        return ["views"] if self.preset == "pilot" else [*HEADS]

    @cached_property
    def cells(self) -> dict[str, _Cell]:
        """All of them, by name; those of the endpoint, the backbone frozen, come first."""
        order = product((False, True), self.heads, ARMS, range(FOLDS))
        cells = [_Cell(head, tuned, arm, fold) for tuned, head, arm, fold in order]
        return {cell.name: cell for cell in cells}

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        return seeded([(name, cell.settings) for name, cell in self.cells.items()], seeds)

    def prepare(self, folder: Path) -> None:
        """Packs the data sets and deals their classes to folds."""
        packs = _packs(self.config, folder)
        for root, path in zip(self.config.data.roots or (self.config.data.root,), packs, strict=True):
            pack(root, path)
        write_folds(packs, folder / "splits")

    def work(self, run: Run, config: Config, stop: Stop, memory: ClipMemory) -> Result:
        """Trains where anything is to be trained, and tests on every set, in order and shuffled."""
        cell, folder, began = self.cells[run.cell], config.out.parents[1], time.perf_counter()
        lists = {f"data.{split}_split": str(fold_list(folder / "splits", cell.fold, split)) for split in _SIDES}
        packs = [str(path) for path in _packs(config, folder)]
        config = changed(config, {**lists, "data.roots": packs, "train.freeze": cell.frozen(config)})
        model = _net(cell, config, stop, memory)
        trained = time.perf_counter()
        return {
            "tests": _tests(model, config, stop, memory),
            "train_seconds": trained - began,
            "test_seconds": time.perf_counter() - trained,
            **sizes(model),
        }

    def pooled(self, results: Results) -> Results:
        """Runs of all folds as one, where all are finished; and the heads' mean, where all heads are."""
        found: dict[tuple[str, int], Result] = {}
        for tuned, arm in product((False, True), ARMS):
            for head in self.heads:
                names = [_Cell(head, tuned, arm, fold).name for fold in range(FOLDS)]
                for seed in _common_seeds(results, names):
                    folds = [results.finished[name, seed]["tests"] for name in names]
                    found[_group(head, tuned, arm), seed] = {"tests": _pool(folds)}
            groups = [_group(head, tuned, arm) for head in self.heads]
            for seed in _common_seeds(Results(found), groups) if len(groups) > 1 else []:
                tests = [found[group, seed]["tests"] for group in groups]
                found[_group(ALL, tuned, arm), seed] = {
                    "tests": {name: _add([t[name] for t in tests]) for name in tests[0]}
                }
        return Results(found)

    def rows(self, results: Results) -> list[Row]:
        heads = [*self.heads, ALL] if len(self.heads) > 1 else self.heads
        return [
            Row(
                (head, "trained" if tuned else "frozen", SHOWN[arm]),
                _group(head, tuned, arm),
                ENDPOINT,
                against=None if arm == "none" else (_group(head, tuned, "none"), ENDPOINT),
                series=f"{head}, backbone {'trained' if tuned else 'frozen'}",
                x=arm,
            )
            for head in heads
            for tuned in (False, True)
            for arm in ARMS
        ]

    def table(self, rows: Sequence[Row], results: Results) -> str:
        tests = list(dict.fromkeys(t for one in results.finished.values() for t in one["tests"]))
        sets = [test for test in tests if not test.startswith(ENDPOINT) and not test.endswith(SHUFFLED)]
        heads = [*self.columns, f"{ENDPOINT}, %", self.difference, f"{self.difference}{SHUFFLED}"]
        heads += [f"{self.difference} on {name}" for name in sets]
        lines = [heads, ["---"] * len(heads)]
        for row in rows:
            accuracy = results.accuracy(row.cell, ENDPOINT) if ENDPOINT in tests else None
            line = [*row.labels, "" if accuracy is None else str(accuracy)]
            for test in (ENDPOINT, ENDPOINT + SHUFFLED, *sets):
                gain = _gain(results, row, test) if test in tests else None
                line.append("" if gain is None else gain.shown("+"))
            lines.append(line)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def remarks(self, rows: Sequence[Row], results: Results) -> str:
        wanted = _group(ALL if len(self.heads) > 1 else self.heads[0], False, "trained")
        row = next((row for row in rows if row.cell == wanted), None)
        gains = [_gain(results, row, ENDPOINT + name) if row else None for name in ("", SHUFFLED)]
        return f"{_verdict(*gains)}\n\n{super().remarks(rows, results)}"

    def model(self) -> str:
        model = self.config.model
        return f"{model.backbone} (weights: {model.weights or 'random'})"

    def plot(self, path: Path, rows: Sequence[Row], results: Results) -> None:
        """The gains with their intervals, in order and shuffled."""
        figure, axes = new_figure(9.0, 4.8)
        arms = [arm for arm in ARMS if arm != "none"]
        names = list(dict.fromkeys(row.series for row in rows))
        for number, (name, test) in enumerate(product(names, (ENDPOINT, ENDPOINT + SHUFFLED))):
            gains = {row.x: gain for row in rows if row.series == name and (gain := _gain(results, row, test))}
            if not gains:
                continue
            places = [arms.index(str(arm)) + 0.8 * ((number + 0.5) / (2 * len(names)) - 0.5) for arm in gains]
            halves = [np.nan if gain.half is None else gain.half for gain in gains.values()]
            axes.errorbar(
                places, [gain.mean for gain in gains.values()], yerr=halves, fmt=MARKERS[number // 2 % len(MARKERS)],
                ms=4, lw=1, capsize=3, color=f"C{number // 2}", mfc="none" if number % 2 else None,
                label=name + (SHUFFLED if number % 2 else ""),
            )  # fmt: skip
        axes.axhline(0.0, color="0.5", lw=1)
        axes.set_xticks(range(len(arms)), [SHOWN[arm] for arm in arms])
        axes.set(ylabel="accuracy less that without SOAP, points", title=f"{self.title}, {ENDPOINT}")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        save_figure(figure, path)


_SIDES = ("train", "test")


def _packs(config: Config, folder: Path) -> tuple[Path, ...]:
    return tuple(packed(root, folder / "clips") for root in config.data.roots or (config.data.root,))


def _net(cell: _Cell, config: Config, stop: Stop, memory: ClipMemory) -> SOAPNet:
    """The net to test, trained where there is anything to train."""
    device = pick_device(config.device)
    start: Callable[[SOAPNet], None] | None = _at_rest if cell.arm == "constant" else None
    if cell.learns:
        folder = train(config, resume=True, progress=False, stop=stop, memory=memory, start=start)
        return load_model(RunFolder(folder).best, device)[0]
    # As training does: the same SOAP that the trained ones begin from.
    model = build_model(config.model, config.data.frames, config.episode.seed)
    if start is not None:
        start(model)
    return model.to(device).eval()


def _at_rest(model: SOAPNet) -> None:
    """Makes SOAP a constant: its priors are sigmoids of zero."""
    assert model.soap is not None
    for parameter in model.soap.parameters():
        nn.init.zeros_(parameter)


def _tests(model: SOAPNet, config: Config, stop: Stop, memory: ClipMemory) -> dict[str, Result]:
    """On each set of the fold, with as many ways and shots as it has classes and clips for."""
    tests: dict[str, Result] = {}
    for name, clips in by_set(split_of(config.data, "test")):
        way = min(config.eval.way, len(clips.classes))
        shot = min(config.eval.shot, min(map(len, clips.clips)) - config.eval.queries)
        for order, ending in (("forward", ""), ("shuffled", SHUFFLED)):
            cfg = changed(config, {"data.order": order, "eval.way": way, "eval.shot": shot})
            result = evaluate(
                model, clips, cfg.data, cfg.eval, ranks=Ranks(pick_device(cfg.device)), amp=cfg.train.amp,
                progress=False, stop=stop, memory=memory,
            )  # fmt: skip
            tests[name + ending] = {**tested(result), "way": way, "shot": shot}
    return tests


def _common_seeds(results: Results, names: Sequence[str]) -> list[int]:
    return sorted(set.intersection(*({*results.seeds(name)} for name in names)))


def _pool(folds: Sequence[Mapping[str, Result]]) -> dict[str, Result]:
    """The tests of all folds as one: by set, and those that belong to the endpoint together."""
    tests: dict[str, list[Result]] = {}
    for fold in folds:
        for name, test in fold.items():
            if f"{test['way']}-way {test['shot']}-shot" == ENDPOINT:
                tests.setdefault(ENDPOINT + (SHUFFLED if name.endswith(SHUFFLED) else ""), []).append(test)
    for name in dict.fromkeys(name for fold in folds for name in fold):
        tests[name] = [fold[name] for fold in folds if name in fold]
    return {name: _join(parts) for name, parts in tests.items()}


def _join(tests: Sequence[Result]) -> Result:
    """One test of the tasks of all; with what intervals over classes and clips take, where their ways are the same."""
    joined: Result = {
        "correct": [right for test in tests for right in test["correct"]],
        "answers": [test["answers"] for test in tests for _ in test["correct"]],
    }
    if len({test["way"] for test in tests}) == 1 and all("drawn" in test for test in tests):
        drawn = [test["drawn"] for test in tests]
        firsts = accumulate((len(one["sizes"]) for one in drawn[:-1]), initial=0)  # classes of two tests are others
        classes = [(np.array(one["classes"]) + first).tolist() for one, first in zip(drawn, firsts, strict=True)]
        parts = {key: [one[key] for one in drawn] for key in ("support", "query", "sizes")}
        joined["drawn"] = {key: list(chain(*each)) for key, each in {"classes": classes, **parts}.items()}
        joined["right"] = list(chain(*(test["right"] for test in tests)))
    return joined


def _add(tests: Sequence[Result]) -> Result:
    """One test of the answers of all to the same tasks."""
    columns = {key: zip(*(test[key] for test in tests), strict=True) for key in ("correct", "answers")}
    added: Result = {key: [sum(parts) for parts in column] for key, column in columns.items()}
    if all("drawn" in test for test in tests):
        added |= {"drawn": tests[0]["drawn"], "right": np.mean([test["right"] for test in tests], axis=0)}
    return added


def _gain(results: Results, row: Row, test: str) -> Estimate | None:
    """What the row's test has more than that without SOAP; None where there is none."""
    known = [one["tests"] for (cell, _), one in results.finished.items() if cell == row.cell]
    if row.against is None or not known or test not in known[0]:
        return None
    return results.difference((row.cell, test), (row.against[0], test))


def _verdict(gain: Estimate | None, shuffled: Estimate | None) -> str:
    """What the endpoint says: of other classes and clips where the interval over those is known, else of these."""
    if gain is None or gain.half is None:
        return "**Endpoint: not there yet.**"
    low, high, of = gain.mean - gain.half, gain.mean + gain.half, " on these clips"
    if gain.beyond is not None and gain.beyond.low is not None and gain.beyond.high is not None:
        low, high, of = gain.beyond.low, gain.beyond.high, ""
    found = "above zero" if low > 0 else "below zero" if high < 0 else "which can't be told from zero"
    check = "" if shuffled is None else f" With frames shuffled: {shuffled.shown('+')}."
    return f"**Endpoint: {gain.shown('+')} points, {found}{of}.**{check}"
