"""How good the preset own_clips is on folders of classes: its views, their choice, probabilities, "none of these".

    python -m benchmarks.own_clips FOLDER [FOLDER ...] [--tasks 2000] [--out table.md] [--data.crop=224 ...]

Each folder holds ``<class>/<clip>``. Features are computed once; the tasks are those that ``soap-net eval --config
own_clips`` draws. The first interval is over tasks, as the field gives it; the second over new classes and clips, or
clips alone where a set has no more classes than a task (docs/intervals.md). Unknown clips are of classes that a task
does not have.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from soap_net.calibration import calibrate
from soap_net.config import Config, load_config
from soap_net.data.episodes import EpisodeSampler
from soap_net.data.splits import load_split
from soap_net.files import write_text
from soap_net.intervals import Drawn, beyond
from soap_net.models import build_model
from soap_net.models.heads import Embedded, ViewsHead, group_by_class
from soap_net.tasks import clip_features

VIEWS = ("appearance", "motion", "differences", "both", "auto")
SHOTS = (1, 2, 5)
BINS = 10
AT_ONCE = 16


@dataclass
class Tasks:
    """Rows of all clips: supports ``(tasks, way * shot)``, queries and clips of other classes ``(tasks, way)``."""

    supports: Tensor
    queries: Tensor
    unknown: Tensor
    drawn: Drawn


def draw(sizes: Sequence[int], sampler: EpisodeSampler, count: int) -> Tasks:
    """The first tasks of a sampler with one query a class; ``sizes`` are the classes' numbers of clips."""
    start = np.cumsum([0, *sizes])
    rng = np.random.default_rng(sampler.seed)
    rows: tuple[list[list[int]], ...] = ([], [], [])
    episodes = [sampler[index] for index in range(count)]
    for episode in episodes:
        rows[0].append([start[c] + k for c, ks in zip(episode.classes, episode.support, strict=True) for k in ks])
        rows[1].append([start[c] + ks[0] for c, ks in zip(episode.classes, episode.query, strict=True)])
        others = [c for c in range(len(sizes)) if c not in episode.classes]
        rows[2].append([start[c] + rng.integers(sizes[c]) for c in rng.choice(others, sampler.way)] if others else [])
    parts = (np.array([getattr(one, name) for one in episodes]) for name in ("classes", "support", "query"))
    return Tasks(*(torch.tensor(np.array(each)) for each in rows), Drawn(*parts, tuple(sizes)))


def right(head: ViewsHead, embedded: Embedded, tasks: Tasks, way: int) -> tuple[Tensor, Tensor]:
    """``(tasks, way)`` bool, whether each query was told right, and which of its choices the head weighed most."""
    classes = group_by_class(torch.arange(way).repeat_interleave(tasks.supports.shape[1] // way), way)
    logits = torch.vmap(lambda support, query: head.logits(support, classes, query))
    choose = torch.vmap(lambda support: head.choose(support, classes))
    found, chosen = [], []
    for first in range(0, len(tasks.supports), AT_ONCE):
        support = tuple(view[tasks.supports[first : first + AT_ONCE]] for view in embedded)
        query = tuple(view[tasks.queries[first : first + AT_ONCE]] for view in embedded)
        found.append(logits(support, query).argmax(dim=-1) == torch.arange(way))
        chosen.append(choose(support).argmax(dim=-1))
    return torch.cat(found), torch.cat(chosen)


def shown(found: Tensor, drawn: Drawn) -> str:
    """The accuracy in percent, its half interval over tasks, and that over classes and clips if there is one."""
    per_task = 100 * found.double().mean(dim=1)
    over_tasks = 1.96 * float(per_task.std()) / len(per_task) ** 0.5
    text = f"{float(per_task.mean()):.1f} ± {over_tasks:.1f}"
    wider = beyond(found[None, :, :, None].double().numpy(), drawn)
    return text if wider.low is None else f"{text} ({wider.low:.0f} to {wider.high:.0f})"


def trusted(head: ViewsHead, embedded: Embedded, tasks: Tasks, way: int) -> str:
    """How probabilities and "none of these" turn out: a row of the second table."""
    classes = group_by_class(torch.arange(way).repeat_interleave(tasks.supports.shape[1] // way), way)
    sure, hit, known, unknown, kept, said, truth = ([] for _ in range(7))
    for support_rows, query_rows, other_rows in zip(tasks.supports, tasks.queries, tasks.unknown, strict=True):
        support = tuple(view[support_rows] for view in embedded)
        calibration = calibrate(head.held_out(support, classes), classes)
        asked = head.compare(support, classes, tuple(view[query_rows] for view in embedded))
        chances = (calibration.sharpness * asked.logits).softmax(dim=1)
        sure.append(chances.amax(dim=1))
        hit.append(chances.argmax(dim=1) == torch.arange(way))
        known.append(asked.familiar)
        kept.append(asked.familiar >= calibration.threshold)
        if len(other_rows):
            unknown.append(head.compare(support, classes, tuple(view[other_rows] for view in embedded)).familiar)
        assert calibration.expected is not None
        said.append(calibration.expected.accuracy)
        truth.append(100 * hit[-1].double().mean())
    area = f"{ranked(torch.cat(known), torch.cat(unknown)):.3f}" if unknown else "-"  # no class is left over
    error = calibration_error(torch.cat(sure), torch.cat(hit))
    accepted = 100 * float(torch.cat(kept).double().mean())
    return f"{error:.1f} | {np.mean(said):.1f} / {np.mean(truth):.1f} | {area} | {accepted:.1f}"


def calibration_error(sure: Tensor, hit: Tensor) -> float:
    """Expected calibration error in points (Guo et al., arXiv 1706.04599, equation 3), `BINS` bins of equal width."""
    error, bins = 0.0, (sure * BINS).long().clamp(max=BINS - 1)
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            error += float(inside.double().mean() * (hit[inside].double().mean() - sure[inside].double().mean()).abs())
    return 100 * error


def ranked(known: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve: how often a known clip is more familiar than an unknown one, ties counting half."""
    order = unknown.sort().values
    below, upto = torch.searchsorted(order, known), torch.searchsorted(order, known, right=True)
    return float((below + upto).double().mean() / (2 * len(unknown)))


def compact(vectors: Tensor) -> Tensor:
    """N vectors with the products of the given ones, in N dimensions at most: heads look at nothing else."""
    wide = vectors.double()
    values, axes = torch.linalg.eigh(wide @ wide.T)
    return (axes * values.clamp_min(0).sqrt()).float()


@torch.inference_mode()
def rows(folder: Path, config: Config) -> tuple[list[str], str]:
    """The folder's rows of the first table, one a number of shots, and its row of the second."""
    clips = load_split(folder, config.eval.split)
    flat = [clip for members in clips.clips for clip in members]
    model = build_model(config.model, config.data.frames).eval()
    with tqdm(total=len(flat), desc=folder.name, unit="clip", leave=False) as bar:
        features, errors, _ = clip_features(
            model, flat, config.data, torch.device("cpu"), progress=lambda count: bar.update(count)
        )
    if any(errors):
        raise SystemExit(f"{folder}: {next(error for error in errors if error)}")
    heads = {by: ViewsHead(model.head.dim, model.head.frames, by) for by in VIEWS}
    embedded = tuple(compact(view) for view in heads["auto"].embed(features))
    way, sizes = config.eval.way, [len(members) for members in clips.clips]
    first, second = [], ""
    for shot in SHOTS:
        tasks = draw(sizes, EpisodeSampler(clips, way, shot, 1, config.eval.seed), config.eval.tasks)
        cells = []
        for head in tqdm(heads.values(), desc=f"{folder.name}, {shot} shots", leave=False):
            found, chosen = right(head, embedded, tasks, way)
            cells.append(shown(found, tasks.drawn))
        share = 100 * float((chosen == 0).double().mean())
        cells.append(f"{share:.1f} / {100 - share:.1f}" if shot > 1 else "-")
        first.append(f"| {folder.name} | {shot} | {' | '.join(cells)} |")
        if shot == max(SHOTS):
            second = f"| {folder.name} | {trusted(heads['auto'], embedded, tasks, way)} |"
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="the table, as Markdown (by default it is printed)")
    options, settings = parser.parse_known_args()
    config = load_config("own_clips", [f"--eval.tasks={options.tasks}", *settings])
    tables = [rows(folder, config) for folder in options.folders]
    first, second = heads_of_tables(config)
    text = "\n".join([*first, *(row for part, _ in tables for row in part), "", *second, *(row for _, row in tables)])
    if options.out:
        write_text(options.out, text + "\n")
    else:
        print(text)


def heads_of_tables(config: Config) -> tuple[list[str], list[str]]:
    views = " | ".join(VIEWS)
    first = [
        f"{config.eval.tasks} tasks of {config.eval.way} classes, {config.data.frames} frames of {config.data.crop} "
        "pixels; accuracy in percent ± 95 % over tasks (95 % over new classes and clips)",
        "",
        f"| set | shots | {views} | auto weighed most: appearance / motion |",
        "|---|" + "---|" * (len(VIEWS) + 2),
    ]
    second = [
        f"auto at {max(SHOTS)} shots:",
        "",
        "| set | calibration error, points | accuracy: expected / found | area known / unknown | known accepted, % |",
        "|---|---|---|---|---|",
    ]
    return first, second


if __name__ == "__main__":
    main()
