"""The command `soap-net`. Torch is imported by the commands that need it, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soap_net.errors import UserError, nearest, said
from soap_net.interrupts import Interrupted, exit_code, speaks
from soap_net.options import SETTINGS, Options, own_clips, print_json
from soap_net.own import app, classify, export, learn

if TYPE_CHECKING:
    from soap_net.config import Config, DataConfig

Command = Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, that of `interrupts.exit_code` if stopped, 2 for what the user can
    mend, 1 otherwise."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _dispatch(args)
    except (KeyboardInterrupt, Interrupted) as stopped:
        with suppress(OSError):  # the terminal may be gone
            if speaks():
                print(f"soap-net: {str(stopped) or 'stopped'}", file=sys.stderr)
        return exit_code()
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = _explain(error)
        print(f"soap-net: {text}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return 2, text
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{said(error)}"
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"soap-net {version('soap-net')}")
        return 0
    name = " ".join(args[:2]) if args[0] == "data" else args[0]
    if name not in COMMANDS:
        if name in ("data", "data -h", "data --help"):
            print(_overview("data"))
            return 0
        close = nearest(name, COMMANDS)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    return COMMANDS[name][0](args[len(name.split()) :])


def _overview(prefix: str = "") -> str:
    from soap_net.config import presets

    shown = {name: text for name, (_, text) in COMMANDS.items() if name.startswith(prefix)}
    lines = [
        "usage: soap-net COMMAND [options] [--debug]",
        "",
        "Few-shot action recognition with SOAP: real videos in, a trained and evaluated classifier out.",
        "",
        *(f"  {name:<12}  {text}" for name, text in shown.items()),
        "",
        "`soap-net COMMAND --help` tells more; --debug shows the traceback of an error.",
    ]
    if not prefix:
        lines += ["Presets for --config: " + ", ".join(presets()) + "."]
    return "\n".join(lines)


def _demo(args: list[str]) -> int:
    from soap_net.config import parse, presets, read_settings

    text = "Train and evaluate on the embedded videos, with and without SOAP, and write report.html and summary.json."
    base = read_settings(presets()["demo"])
    config = parse(args, base=base, prog="soap-net demo", description=text)
    _refuse_changes(config, base, ("data.root", "model.soap.enabled"), "the demo sets it itself")

    from soap_net.demo import run_demo

    run_demo(config)
    return 0


def _train(args: list[str]) -> int:
    from soap_net.config import parse
    from soap_net.runs import RunFolder

    text = "Train a few-shot classifier. --resume [RUN] goes on with the run in --out, or in the folder RUN."
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--resume", nargs="?", const=True)
    options, settings = own.parse_known_args(args)
    base = None
    if isinstance(options.resume, str):
        run = RunFolder(Path(options.resume))
        base = {**run.read_config(), "out": str(run.path)}
    config = parse(settings, base=base, prog="soap-net train", description=text)
    if base is not None and str(config.out) != base["out"]:
        raise UserError(f"--resume {options.resume} goes on in that folder; --out {config.out} names another")

    from soap_net.train import TrainingStopped, train

    try:
        folder = train(config, resume=options.resume is not None)
    except TrainingStopped as stopped:
        raise Interrupted(f"{stopped}; go on with: soap-net train --resume {stopped.folder}") from None
    if speaks():
        print(f"trained: {folder}; evaluate with: soap-net eval --checkpoint {folder / 'best.pt'}")
    return 0


def _eval(args: list[str]) -> int:
    text = "Evaluate a checkpoint on classes it has never seen, or a pretrained net as it is (by default own_clips)."
    own = Options("eval", text, SETTINGS)
    own.add_argument("--checkpoint", type=Path, help="best.pt or last.pt of a run, or a folder of the hub")
    own.add_argument("--out", type=Path, help="folder or .json file for the result (by default the run's folder)")
    own.add_argument("--json", action="store_true", help="print the whole result as JSON")
    options, settings = own.parse_known(args)

    config = own_clips(settings, "eval") if options.checkpoint is None else _trained(options.checkpoint, settings)

    from soap_net.evaluate import evaluate_run

    result = evaluate_run(options.checkpoint, config, out=options.out)
    if not speaks():
        return 0
    if options.json:
        print_json(result.to_dict())
        return 0
    print(
        f"{result.shown}  ({result.tasks} tasks, {result.way}-way {result.shot}-shot, "
        f"{result.split} classes, {result.episodes_per_second:.1f} tasks/s)"
    )
    print(f"  {result.shown_beyond}")
    if result.trained_on and result.trained_on != result.tested_on:
        print(f"  trained on {result.trained_on}, tested on {result.tested_on}")
    if result.shared_classes:
        print(f"  {len(result.shared_classes)} of its classes are named as training classes: "
              f"{', '.join(result.shared_classes)}")  # fmt: skip
    width = max(map(len, result.classes))
    for name, accuracy in result.per_class.items():
        print(f"  {name:<{width}}  {'-' if accuracy is None else f'{accuracy:6.2f} %'}")
    for name, share in result.chosen.items():
        print(f"  {name} weighed most in {share:.1f} % of the tasks")
    if result.failed_clips:
        print(f"  {len(result.failed_clips)} clips could not be read and were replaced")
    if result.cut_clips:
        print(f"  {len(result.cut_clips)} clips are cut short; their answers are to the frames that are there")
    return 0


def _trained(path: Path, settings: list[str]) -> Config:
    """The config of a checkpoint with `settings` for its evaluation."""
    from soap_net import checkpoint
    from soap_net.config import flatten, parse, to_dict

    own = checkpoint.load_config(path)
    trained = to_dict(own)
    config = parse(settings, base=trained, prog="soap-net eval", source=str(path))
    config = replace(config, data=config.data.instead_of(own.data))
    keys = flatten(to_dict(config))
    fixed = [key for key in keys if not key.startswith(("data.", "eval.")) and key not in EVALUATED_WITH]
    _refuse_changes(config, trained, fixed, "an evaluation takes it from the checkpoint")
    return config


# Settings beside `data` and `eval` that count in an evaluation: where and how precisely the model runs.
EVALUATED_WITH = ("device", "out", "train.amp", "model.soap.backend", "model.soap.precision")


def _refuse_changes(config: Config, base: Mapping[str, Any], keys: Sequence[str], why: str) -> None:
    """Raises UserError for the first of `keys` that an option has changed, which would be ignored."""
    from soap_net.config import flatten, from_dict, to_dict

    here, there = flatten(to_dict(config)), flatten(to_dict(from_dict(base)))
    for key in keys:
        if here[key] != there[key]:
            raise UserError(f"--{key} can't be set here: {why}")


def _report(args: list[str]) -> int:
    own = Options("report", "Write one HTML page on runs: curves, accuracies, confusion, and what SOAP does to clips.")
    own.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    own.add_argument("--out", type=Path, help="the page (by default report.html in the first run's folder)")
    options = own.parse_exactly(args)

    from soap_net.report import write_report

    path = options.out or options.runs[0] / "report.html"
    write_report(path, {str(run): run for run in options.runs})
    print(path)
    return 0


def _data_check(args: list[str]) -> int:
    root, args = _leading_path(args)
    own = Options("data check", "Read every clip of a data set; report what is missing, broken or cut short.", SETTINGS)
    own.usage = "soap-net data check [ROOT] [--split train val test] [--findings FILE] [--json] [--data.workers N ...]"
    own.add_argument("--split", nargs="+", choices=("train", "val", "test"), default=["train", "val", "test"])
    own.add_argument("--json", action="store_true", help="print the report as JSON")
    told = "file for what is found, a line a clip as it is read; clips in it are read again only where they changed "
    own.add_argument("--findings", type=Path, help=told + "(default: runs/check/<name of ROOT>.jsonl)")
    options, settings = own.parse_known(args)

    data = _data_config(root, settings)

    from soap_net.data.check import check_data

    splits = {split: data.split_file(split) for split in options.split}
    sets = "-".join(place.resolve().name for place in data.roots or (data.root,))
    findings = options.findings or Path("runs/check") / f"{sets}.jsonl"
    report = check_data(data.place, splits, findings=findings, workers=data.workers)
    if options.json:
        print_json(report.as_dict())
    else:
        print(f"{report.summary()}\nwhat each clip holds: {findings}")
    return 0 if report.sound else 2


def _data_pack(args: list[str]) -> int:
    root, args = _leading_path(args)
    out, args = _leading_path(args)
    if out is None and not {"-h", "--help"} & {*args}:
        raise UserError("say what to pack and where to: soap-net data pack SOURCE OUT.zip")
    text = "Pack a data set into one zip of frames at the size that is trained on, or one a split into a folder."
    own = Options("data pack", text, SETTINGS)
    own.usage = "soap-net data pack SOURCE OUT [--short N] [--quality Q | --png] [--fps N] [--split train ...]"
    own.add_argument("--short", type=int, default=256, help="shorter side of larger frames, in pixels (default: 256)")
    own.add_argument("--quality", type=int, default=90, help="of the JPEG images, 1 to 100 (default: 90)")
    own.add_argument("--png", action="store_true", help="lossless images")
    own.add_argument("--fps", type=float, help="keep at most so many frames a second (default: all)")
    own.add_argument("--split", nargs="+", choices=("train", "val", "test"), help="(default: all that there are)")
    options, settings = own.parse_known(args)
    from soap_net.data.pack import Packing, pack_data
    from soap_net.data.splits import splits_of

    data = _data_config(root, settings)
    if data.roots:
        raise UserError("data.roots can't be set here: pack one data set at a time, and give the packs as data.roots")
    how = Packing(options.short, options.quality, options.png, options.fps)
    splits = {split: data.split_file(split) for split in options.split or splits_of(data.root, data.split_files)}
    reports = pack_data(data.root, Path(out or ""), splits, how, workers=data.workers)
    print("\n".join(report.summary() for report in reports))
    return 0 if all(report.sound for report in reports) else 2


def _data_config(root: str | None, settings: list[str]) -> DataConfig:
    """The data settings of a command that reads a whole data set, by default on all cores."""
    from soap_net.config import parse
    from soap_net.data.loading import cores

    return parse(settings, base={"data": {"workers": cores(), **({"root": root} if root else {})}}).data


def _data_motion(args: list[str]) -> int:
    root, args = _leading_path(args)
    if root is None and not {"-h", "--help"} & {*args}:
        raise UserError("say into which folder to write the data set: soap-net data motion ROOT")
    from soap_net.data.motion import MotionConfig, write_motion
    from soap_net.settings import parse_options

    text = "Write the embedded motion data set into the folder ROOT, given first."
    config = parse_options(args, MotionConfig, prog="soap-net data motion ROOT", description=text)
    print(write_motion(Path(root or ""), config))
    return 0


def _leading_path(args: list[str]) -> tuple[str | None, list[str]]:
    # Taken by hand: argparse would take the value of an option it doesn't know for the positional.
    return (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)


def _experiment(args: list[str]) -> int:
    from soap_net.experiments.command import (
        EXPERIMENTS,
        PRESETS,
        QUICK_SEEDS,
        SEEDS,
        SIZES,
        build,
        default_seeds,
        presets_of,
    )

    own = Options("experiment", "Put one of the paper's claims to the test: a table, a CSV file and a plot.", SETTINGS)
    own.add_argument("name", help="; ".join(f"{name}: {claim}" for name, (_, claim) in EXPERIMENTS.items()))
    shown = f"{' or '.join(PRESETS)}; of real {', '.join(SIZES)} (default: the first)"
    own.add_argument("--preset", "--size", metavar="PRESET", help=shown)
    own.add_argument("--out", type=Path, help="folder; one left unfinished goes on (default: runs/experiments/NAME)")
    fewer = "; at preset quick " + ", ".join(f"{seeds} of {name}" for name, seeds in QUICK_SEEDS.items())
    own.add_argument("--seeds", type=int, help=f"trainings of each setting (default: {SEEDS}{fewer})")
    own.add_argument("--jobs", type=int, default=0, help="trainings at a time (default: one per GPU or core)")
    options, settings = own.parse_known(args)
    preset = options.preset or presets_of(options.name)[0]
    seeds = default_seeds(options.name, preset) if options.seeds is None else options.seeds
    if seeds < 1 or options.jobs < 0:
        raise UserError(f"--seeds is {seeds} and --jobs {options.jobs}: they must be at least 1")
    experiment = build(options.name, preset, settings)

    import torch

    from soap_net.data.loading import cores
    from soap_net.experiments.experiment import run_experiment

    folder = options.out or Path("runs/experiments") / options.name
    jobs = options.jobs or torch.cuda.device_count() or cores()
    run_experiment(experiment, folder, seeds=range(seeds), jobs=jobs, command=["soap-net", "experiment", *args])
    print((folder / "table.md").read_text(encoding="utf-8"))
    return 0


def _info(args: list[str]) -> int:
    own = Options("info", "Print versions, devices, the kernels' backends, and what other packages add to soap-net.")
    own.parse_exactly(args)
    import torch

    from soap_kernels import backends
    from soap_net.models import installed
    from soap_net.versions import untested, versions

    for name, value in versions().items():
        print(f"{name:<12}  {value if value is not None else '-'}")
    print(f"{'threads':<12}  {torch.get_num_threads()}")
    for line in untested():
        print(f"warning: {line}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        print(f"backends for tensors on {device}:")
        status = backends.status(device)
        for name, why_absent in status.items():
            print(f"  {name:<10}  {'present' if why_absent is None else f'absent: {why_absent}'}")
        print(f"  {'auto':<10}  takes {next(name for name in status if status[name] is None)}")
    for kind in installed.KINDS:
        if others := installed.status(kind):
            print(f"{kind}s of other packages:")
            for name, text in others.items():
                print(f"  {name:<10}  {text}")
    return 0


COMMANDS: dict[str, tuple[Command, str]] = {
    "demo": (_demo, "the whole way on the embedded videos, with and without SOAP"),
    "train": (_train, "train on the clips of a data set"),
    "eval": (_eval, "evaluate a checkpoint on unseen classes"),
    "learn": (learn, "learn your own classes from a few clips of each, into one file"),
    "classify": (classify, "classify clips by what was learnt, or by a few clips of each class"),
    "export": (export, "write what was learnt as one ONNX file, for other runtimes"),
    "app": (app, "the same in the browser: classes by drag and drop or webcam"),
    "report": (_report, "write an HTML page on runs"),
    "data check": (_data_check, "read a data set; report missing, broken and cut files"),
    "data pack": (_data_pack, "pack a data set into one zip of frames, read several times as fast"),
    "data motion": (_data_motion, "write the embedded motion data set as video files"),
    "experiment": (_experiment, "put the paper's claims to the test"),
    "info": (_info, "versions, devices, and which kernels are present"),
}
