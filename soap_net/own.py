"""The commands for your own clips: `soap-net learn`, `classify`, `export` and `app`."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soap_net.errors import UserError
from soap_net.files import write_text
from soap_net.options import Options, own_clips

if TYPE_CHECKING:
    from argparse import Namespace

    from soap_net.classify import Classifier, Prediction
    from soap_net.data.clips import Clip
    from soap_net.timeline import Timeline

CLIPS = "A clip is a video, a folder of frames or a zip of frames."


def learn(args: list[str]) -> int:
    """Learns classes, or adds to those of a classifier, and writes one file; returns the exit code."""
    own = Options(
        "learn", "Learn your own classes from a few clips of each; the classifier is one file, without code.", CLIPS
    )
    own.add_argument("--support", type=Path, help="folder with one folder of clips per class")
    own.add_argument("--out", type=Path, required=True, help="the classifier to write")
    own.add_argument("--drop", nargs="+", default=[], metavar="NAME", help="classes, or clips as CLASS/CLIP, to forget")
    _add_sources(own, "a classifier to add to or drop from")
    options, settings = own.parse_known(args)
    if options.support is None and not options.drop:
        raise UserError("say what to learn: --support FOLDER (or --classifier FILE with --drop NAME)")
    if options.out.is_dir():
        raise UserError(
            f"{options.out}: is a folder; name the classifier's file, as in {options.out / 'my.classifier'}"
        )

    from soap_net.data.find import clips_by_class

    support = clips_by_class(options.support) if options.support else {}
    classifier = _classifier(options, settings, "learn")
    if not support:
        classifier.drop(*options.drop)
    else:
        before = sum(classifier.counts().values())
        unreadable = classifier.add(support, drop=options.drop, progress=True)
        _warn(unreadable, classifier.cut)
        added = sum(map(len, support.values())) - len(unreadable)
        replaced = before + added - sum(classifier.counts().values())
        if replaced and not options.drop:
            print(f"{replaced} of the clips took the place of others of the same class and name", file=sys.stderr)
    classifier.save(options.out)
    print(f"wrote {options.out}: {', '.join(f'{name} ({n})' for name, n in classifier.counts().items())}")
    print(expectations(classifier))
    return 0


def classify(args: list[str]) -> int:
    """Classifies clips and prints or writes the answers; returns the exit code, 2 where a clip could not be read."""
    own = Options("classify", "Tell your own classes apart: by a classifier file, or by a few clips of each.", CLIPS)
    own.add_argument("--support", type=Path, help="folder with one folder of clips per class")
    own.add_argument("--query", type=Path, nargs="+", default=[], help="the same, after other options")
    own.add_argument("clips", type=Path, nargs="*", metavar="CLIP", help="clips, or folders of clips, to classify")
    own.add_argument("--top", type=int, default=3, help="classes to print per clip (default: 3)")
    form = own.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all probabilities as JSON")
    form.add_argument("--csv", action="store_true", help="print all probabilities as CSV")
    own.add_argument("--out", type=Path, help="write what would be printed into this file (.json and .csv as such)")
    own.add_argument("--window", type=float, help="of long videos: tell what happens when, by a window of SECONDS")
    own.add_argument("--every", type=float, help="seconds from window to window (default: a third of the window)")
    own.add_argument("--picture", type=Path, help="draw what happens when in the one video (.png, .svg or .pdf)")
    _add_sources(own, "what `soap-net learn` wrote")
    options, settings = own.parse_known(args)
    if options.support is None and options.classifier is None:
        raise UserError("say what the classes are: --support FOLDER, or --classifier FILE that `soap-net learn` wrote")
    if not (paths := [*options.query, *options.clips]):
        raise UserError("say what to classify: clips, or folders of clips")

    from soap_net.data.find import clips_by_class, find_clips

    support = clips_by_class(options.support) if options.support else {}
    queries = [clip for path in paths for clip in find_clips(path)]
    _check_window(options, queries)
    classifier = _classifier(options, settings, "classify")
    if support:
        _warn(classifier.add(support, progress=True), classifier.cut)
    expected = classifier.calibration.expected
    if support or expected is None or not expected.above_chance:  # whoever reads the answers has to know
        print(expectations(classifier), file=sys.stderr)
    if options.window is not None:
        from soap_net.timeline import as_csv, as_lines, as_rows

        timelines = _timelines(classifier, queries, options)
        _warn([], [timeline.cut for timeline in timelines])
        _write(options, as_rows(timelines), as_csv(timelines), as_lines(timelines))
        return 2 if any(timeline.error for timeline in timelines) else 0
    predictions = classifier.classify(queries, progress=True)
    _warn([], classifier.cut)
    lines = _lines(predictions, max(options.top, 1))
    _write(options, [_row(prediction) for prediction in predictions], _csv(predictions, classifier.classes), lines)
    return 2 if any(prediction.error for prediction in predictions) else 0


def _write(options: Namespace, rows: object, table: str, lines: Sequence[str]) -> None:
    """Prints or writes answers in the form asked for: JSON, CSV, or lines for people."""
    suffix = options.out.suffix.lower() if options.out else ""
    if options.json or (suffix == ".json" and not options.csv):
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    elif options.csv or suffix == ".csv":
        text = table
    else:
        text = "".join(f"{line}\n" for line in lines)
    if options.out:
        write_text(options.out, text)
        for line in lines:
            if line.startswith("error: "):
                print(line, file=sys.stderr)
    else:
        print(text, end="")


def _check_window(options: Namespace, queries: Sequence[Clip]) -> None:
    """Raises UserError for what goes with --window alone, and for a picture that can't be drawn."""
    for name in ("every", "picture"):
        if options.window is None and getattr(options, name) is not None:
            raise UserError(f"--{name} is of long videos: say the window's length, too, as in --window 3")
    if options.picture is not None:
        from soap_net.timeline import check_picture

        check_picture(options.picture)
        if len(queries) > 1:
            raise UserError(f"--picture shows one video, and there are {len(queries)}")


def _timelines(classifier: Classifier, queries: Sequence[Clip], options: Namespace) -> list[Timeline]:
    """What happens when in each video, drawn if that is asked for."""
    from soap_net.timeline import draw, timeline

    timelines = [timeline(classifier, clip, options.window, options.every, progress=True) for clip in queries]
    if options.picture is not None and not timelines[0].error:
        draw(options.picture, timelines[0], classifier.classes)
    return timelines


def export(args: list[str]) -> int:
    """Writes a classifier as one ONNX file, from frames to probabilities; returns the exit code."""
    own = Options("export", "Write a classifier as one ONNX file, from frames to probabilities, for other runtimes.")
    own.add_argument("classifier", type=Path, help="what `soap-net learn` wrote")
    own.add_argument("--out", type=Path, required=True, help="the .onnx file to write")
    own.add_argument("--checkpoint", type=Path, help="of a classifier that stands on one, where it lies now")
    options = own.parse_exactly(args)
    if options.out.is_dir():
        raise UserError(f"{options.out}: is a folder; name the file, as in {options.out / 'my.onnx'}")

    from soap_net.classify import Classifier
    from soap_net.export import export as write

    classifier = Classifier.load(options.classifier, "cpu", checkpoint=options.checkpoint)
    apart = write(classifier, options.out)
    shape = f"(batch, {classifier.data.frames}, 3, {classifier.data.crop}, {classifier.data.crop})"
    print(f"wrote {options.out}: frames {shape} uint8 to the probabilities of {', '.join(classifier.classes)}")
    rounds = "" if (amp := classifier.config.train.amp) == "none" else f", which computes in {amp} where this does not"
    print(f"tried in onnxruntime: its probabilities are within {apart:.0e} of the classifier's{rounds}")
    return 0


def app(args: list[str]) -> int:
    """Serves the page until it is stopped; returns the exit code."""
    own = Options("app", "Teach and try your own classes in the browser; the page is seen on this machine alone.")
    _add_sources(own, "what `soap-net learn` wrote, to begin with")
    own.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 shows the page to the network")
    own.add_argument("--port", type=int, help="port to serve at (default: the first free one from 7860 on)")
    options, settings = own.parse_known(args)
    try:
        from soap_net.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install 'gradio>=6.0'") from error
    serve(_classifier(options, settings, "app"), options.host, options.port)
    return 0


def _add_sources(own: Options, about: str) -> None:
    """The options of `_classifier`."""
    own.epilog = f"{own.epilog} Settings of the preset own_clips may follow, as in --data.frames 16."
    own.add_argument("--classifier", type=Path, help=about)
    own.add_argument(
        "--checkpoint", type=Path, help="best.pt of a run, or a folder of the hub, instead of pretrained features"
    )
    own.add_argument("--backbone", help="another pretrained net; see `soap-net train --help`, model.backbone")
    own.add_argument("--weights", help="its weights: a name, or a .pth or .safetensors file")
    own.add_argument("--by", help="what to look at: auto (default), appearance, motion, differences or both")
    own.add_argument("--accept", type=float, help="share of the classes' own clips to take for known (default: 0.9)")
    own.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the best there is)")


def _classifier(options: Namespace, settings: list[str], command: str) -> Classifier:
    """Of a file, of a checkpoint, or of the preset own_clips with what the options change in it."""
    from soap_net.classify import Classifier
    from soap_net.data.motion import is_motion

    accept = {} if options.accept is None else {"accept": options.accept}
    changes = [name for name in ("backbone", "weights", "by") if getattr(options, name) is not None]
    if options.classifier is not None:
        if options.by is not None or settings or accept:
            first = "--by" if options.by is not None else settings[0] if settings else "--accept"
            raise UserError(f"{first} can't be set here: the classifier has it from when it was learnt")
        return Classifier.load(
            options.classifier,
            options.device,
            checkpoint=options.checkpoint,
            backbone=options.backbone,
            weights=options.weights,
        )
    if options.checkpoint is not None:
        if changes or settings:
            raise UserError(f"{f'--{changes[0]}' if changes else settings[0]} can't be set here: the checkpoint has it")
        classifier = Classifier.from_checkpoint(options.checkpoint, options.device, **accept)
        if is_motion(classifier.data.root):
            print(
                f"warning: {options.checkpoint} was trained on the embedded moving dots, and knows nothing of real "
                "video; without --checkpoint pretrained features are used",
                file=sys.stderr,
            )
        return classifier
    config = own_clips(settings, command)
    if options.backbone is not None:
        config.model.backbone = options.backbone
    if options.weights is not None:
        config.model.weights = options.weights
    if options.by is not None:
        if config.model.head != "views":
            raise UserError(f"--by is for the head views, not for {config.model.head}")
        config.model.head_options = {**config.model.head_options, "by": options.by}
    config.model = config.model.absolute()  # a classifier is used in other folders, too
    return Classifier.from_config(config, options.device, **accept)


def _warn(left_out: Sequence[str], cut: Sequence[str | None]) -> None:
    for line in [*(f"{error}; left out of the support" for error in left_out), *filter(None, cut)]:
        print(f"warning: {line}", file=sys.stderr)


def expectations(classifier: Classifier) -> str:
    """What the supports let one expect, in words."""
    from soap_net.calibration import least_clips

    calibration, lines = classifier.calibration, []
    if calibration.expected is None:
        lines += [
            "one clip a class: how often it will be right can't be told, and its percentages are not calibrated; "
            "give it more clips of each class"
        ]
        if len(classifier.chosen) > 1:
            lines[0] += ", or say what to look at: --by appearance, motion or both"
        return lines[0]
    if len(classifier.chosen) > 1:
        weights = sorted(classifier.chosen.items(), key=lambda item: -item[1])
        lines.append("looks at " + ", ".join(f"{name} ({100 * weight:.0f} %)" for name, weight in weights))
    lines.append(f"expect {calibration.expected}")
    if alike := classifier.one_recording:
        more = f" (and {len(alike) - 1} pairs more)" if len(alike) > 1 else ""
        lines.append(
            f"that is too much where clips are of one recording, as {' and '.join(alike[0])} seem to be{more}: give it "
            "separate recordings"
        )
    if not calibration.expected.above_chance:
        lines.append("these clips do not show that the classes can be told apart: take its answers for guesses")
    if math.isinf(calibration.threshold) and classifier.accept < 1:
        least, there = least_clips(classifier.accept), calibration.expected.clips
        lines.append(
            f"every clip will be taken for one of the classes: to tell others it takes {least} clips that can be left "
            f"out, and there are {there}"
        )
    return "\n".join(lines)


def _row(prediction: Prediction) -> dict[str, object]:
    return {
        "clip": prediction.clip,
        "class": prediction.label,
        "known": prediction.known and prediction.error is None,
        "probabilities": prediction.probabilities,
        "error": prediction.error,
        "cut": prediction.cut,
    }


def _csv(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["clip", "class", "known", *classes, "error", "cut"])
    for p in predictions:
        chances = [f"{p.probabilities[name]:.6f}" if p.probabilities else "" for name in classes]
        rows.writerow([p.clip, p.label or "", p.known and p.error is None, *chances, p.error or "", p.cut or ""])
    return text.getvalue()


def _lines(predictions: Sequence[Prediction], top: int) -> list[str]:
    width = max(len(prediction.clip) for prediction in predictions)
    lines = []
    for p in predictions:
        told = "   ".join(f"{100 * chance:5.1f} % {name}" for name, chance in list(p.probabilities.items())[:top])
        told = told if p.known else f"none of these ({told.strip()})"
        lines.append(f"error: {p.error}" if p.error else f"{p.clip:<{width}}  {told}")
    return lines
