"""The page of `soap-net app`: classes by drag and drop or webcam, learnt and tried in the browser.

What a browser session put in and learnt is a `Session`, which knows nothing of the page; `build_page` lays the page out
and ties its buttons to one; `serve` runs it. Nothing on the page leaves the machine.
"""

from __future__ import annotations

import contextlib
import html
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from soap_net.classify import Classifier, Prediction
from soap_net.data.clips import Clip
from soap_net.data.transforms import clip_loader
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.errors import UserError
from soap_net.interrupts import Interrupted, StopSignals
from soap_net.own import expectations
from soap_net.pictures import strips
from soap_net.session import Session, Told

LARGEST_FILE = 200 * 2**20
"""Bytes of an uploaded file."""
KEPT = 3600
"""Seconds that uploads are kept; sessions a day of them after their last change."""


# What is shown, as HTML and Markdown

_TEMPLATES = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
_STRIPS = _TEMPLATES.from_string(
    "{% for strip in strips %}<figure class=strip><figcaption><b>{{ strip.label }}</b> {{ strip.note }}"
    "{% if strip.scale %}, {{ strip.scale }}{% endif %}</figcaption>"
    '<img src="{{ strip.image }}" alt="{{ strip.label }} of {{ name }}"></figure>{% endfor %}'
)
_CONFUSED = _TEMPLATES.from_string(
    "<div class=wide><table class=confused>"
    "<caption>Each clip left out and classified by the others: rows are its class, columns the answer.</caption>"
    "<tr><th></th>{% for name in classes %}<th>{{ name }}</th>{% endfor %}</tr>"
    "{% for name, cells in rows %}<tr><th>{{ name }}</th>{% for count, share in cells %}"
    '<td style="background: rgba(0, 114, 178, {{ share }})">{{ count or "" }}</td>{% endfor %}</tr>{% endfor %}'
    "</table></div>"
)
CSS = """
.strip { margin: 0 0 .6em } .strip img { width: 100% } .strip figcaption { font-size: .9em }
.wide { overflow-x: auto } .confused { border-collapse: collapse }
.confused caption { text-align: left; font-size: .9em; padding-bottom: .4em }
.confused th, .confused td { padding: .25em .4em; text-align: center; border: 1px solid #8884 }
#expected, #answer { min-height: 5em } footer { display: none !important }
"""


def confused(classifier: Classifier) -> str:
    """A table of what the supports are taken for, as HTML; empty where none could be left out."""
    if not classifier.classes or classifier.calibration.expected is None:
        return ""
    rows = []
    for name, counts in zip(classifier.classes, classifier.calibration.confusion, strict=True):
        rows.append((name, [(count, round(0.8 * count / max(sum(counts), 1), 2)) for count in counts]))
    return _CONFUSED.render(classes=classifier.classes, rows=rows)


def expectation(classifier: Classifier) -> str:
    """How often it will be right, in words; the command line's option is a choice on the page."""
    if not classifier.classes:
        return "Nothing is learnt yet: add a few clips of each of two classes or more, and learn them."
    text = expectations(classifier).replace("--by ", "")
    return "\n\n".join(line[0].upper() + line[1:] + "." for line in text.splitlines())


def looked_at(classifier: Classifier, clip: Clip) -> str:
    """The frames that are looked at, and SOAP's priors beneath them where SOAP is on, as HTML."""
    frames = clip_loader(classifier.data, train=False)(clip)
    return _STRIPS.render(strips=strips(frames.to(classifier.device), classifier.model.soap), name=clip.path.name)


def answer(prediction: Prediction) -> str:
    """The outcome as one heading in Markdown."""
    name, share = next(iter(prediction.probabilities.items()))
    if prediction.known:
        return f"### {_literal(name)}, {100 * share:.0f} %"
    return f"### None of these classes\nThe nearest is {_literal(name)}."


def _literal(text: str) -> str:
    """The text with nothing in it that Markdown or HTML would take for its own."""
    return re.sub(r"([^\w\s])", lambda mark: f"&#{ord(mark[0])};", text)


# The page


def _as_recorded(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _clips_in(label: str, count: Any, name: str) -> tuple[gr.File, gr.Video]:
    with gr.Tab("Files"):
        types = [*sorted(VIDEO_SUFFIXES), ".zip"]
        file = gr.File(label=label, file_count=count, file_types=types, height=140, elem_id=name)
    with gr.Tab("Webcam"):
        plain = gr.WebcamOptions(mirror=False)
        webcam = gr.Video(
            label="A recording", sources=["webcam"], include_audio=False, height=240, webcam_options=plain
        )
        # Gradio's own would have the program ffmpeg take out the sound, of which there is none. (A subclass
        # is no way: it makes Gradio write a file beside this one.)
        webcam.preprocess = _as_recorded
    return file, webcam


def _paths(files: Any, recorded: str | None) -> list[Path]:
    chosen = [files] if isinstance(files, str) else files or []
    return [Path(file) for file in [*dict.fromkeys(chosen), *([recorded] if recorded else [])]]


def _shown(text: str, home: Path) -> str:
    return html.escape(re.sub(rf"{re.escape(str(home))}(/[^/]+){{2,3}}?/(?=[^/]+$|[^/]+: )", "", text))


@dataclass
class _Handlers:
    """What the page's events do; each takes the session and returns what is shown next."""

    start: Classifier
    home: Path

    def begin(self) -> tuple[Any, ...]:
        session = Session.begin(self.start, self.home)
        return (session, *self.state(session))

    def state(self, session: Session) -> tuple[Any, ...]:
        """Table, names to forget, what is looked at, expectation, confusion, and the classifier to download."""
        classifier = session.classifier
        by, views = session.views()
        saved = None
        if classifier.classes:
            saved = session.folder / "my.classifier"
            classifier.save(saved, paths=False)
        return (
            session.rows(),
            gr.Dropdown(choices=session.names(), value=None),
            gr.Radio(choices=views, value=by or None, visible=len(views) > 1),
            expectation(classifier),
            confused(classifier),
            gr.DownloadButton(value=saved, interactive=saved is not None),
        )

    def put(self, session: Session, name: str, files: Any, recorded: str | None) -> Any:
        def work() -> tuple[Any, ...]:
            self._warn(session.put(name, _paths(files, recorded)))
            return (*self.state(session), None, None)

        return self._tried(work)

    def learn(self, session: Session, progress: gr.Progress) -> Any:
        def work() -> tuple[Any, ...]:
            total = sum(map(len, session.waiting.values()))
            self._warn(session.learn(_counter(progress, total)))
            return self.state(session)

        return self._tried(work)

    def forget(self, session: Session, name: str | None) -> Any:
        def work() -> tuple[Any, ...]:
            if not name:
                raise UserError("choose what to forget first")
            session.forget(name)
            return self.state(session)

        return self._tried(work)

    def look(self, session: Session, by: str) -> Any:
        def work() -> tuple[Any, ...]:
            session.look_at(by)
            return self.state(session)

        return self._tried(work)

    def restore(self, session: Session, file: str) -> Any:
        def work() -> tuple[Any, ...]:
            session.restore(Path(file))
            return self.state(session)

        return self._tried(work)

    def classify(self, session: Session, file: str | None, recorded: str | None, progress: gr.Progress) -> Any:
        def work() -> tuple[Any, ...]:
            paths = _paths(file, recorded)
            if not paths:
                raise UserError("choose or record a clip first")
            clip = Clip(paths[0])
            prediction = session.classify(clip, _counter(progress, 1))
            self._warn(filter(None, [prediction.cut]))
            return answer(prediction), prediction.probabilities, looked_at(session.classifier, clip)

        return self._tried(work, instead=("", {}, ""))  # an old answer beneath another clip would be taken for its own

    def _tried(self, work: Callable[[], tuple[Any, ...]], instead: Any = None) -> Any:
        """What `work` shows; or tells what the user can mend, without the places of this machine's files.

        An error of Gradio's own would cover the page's parts, and take the clicks that are meant for them.
        """
        try:
            return work()
        except (UserError, Interrupted) as error:
            gr.Warning(_shown(str(error), self.home), duration=None, title="Not done")
            return instead or gr.skip()

    def _warn(self, remarks: Iterable[str]) -> None:
        for remark in remarks:
            gr.Warning(_shown(remark, self.home))


def _counter(progress: gr.Progress, total: int) -> Told:
    read = 0
    progress((0, total), desc="Reading clips", unit="clips")

    def tell(count: int) -> None:
        nonlocal read
        read += count
        progress((read, total), desc="Reading clips", unit="clips")

    return tell


def build_page(start: Classifier, home: Path) -> gr.Blocks:
    """The page, whose sessions begin with what `start` knows.

    Args:
        home: a folder for the sessions' files.
    """
    do = _Handlers(start, home)
    with gr.Blocks(
        title="SOAP-Net: your own actions", analytics_enabled=False, fill_width=True, delete_cache=(KEPT, KEPT)
    ) as page:
        session = gr.State(None, time_to_live=24 * KEPT, delete_callback=lambda gone: gone and gone.close())
        gr.Markdown("# Your own actions from a few clips")
        with gr.Row():
            with gr.Column():
                gr.Markdown("## 1. Show it your classes")
                name = gr.Textbox(label="Class", placeholder="wave", max_lines=1)
                files, recorded = _clips_in("Clips of this class (videos, or zips of frames)", "multiple", "clips")
                add = gr.Button("Add these clips")
                table = gr.Dataframe(headers=["class", "clips learnt", "waiting"], interactive=False, elem_id="classes")
                with gr.Row():
                    learn, stop = gr.Button("Learn", variant="primary"), gr.Button("Stop", variant="stop")
                with gr.Accordion("Forget, save, load", open=False):
                    with gr.Row():
                        unwanted = gr.Dropdown(label="Class or clip", choices=[])
                        forget = gr.Button("Forget it")
                    save = gr.DownloadButton("Save the classifier", interactive=False)
                    load = gr.UploadButton("Load a classifier", elem_id="load")
            with gr.Column():
                gr.Markdown("## 2. What to expect")
                views = gr.Radio(label="Look at", choices=[], elem_id="views")
                expected = gr.Markdown(elem_id="expected")
                confusion = gr.HTML()
            with gr.Column():
                gr.Markdown("## 3. Try a clip")
                file, shot = _clips_in("A clip", "single", "clip")
                classify = gr.Button("Classify", variant="primary")
                outcome = gr.Markdown(elem_id="answer")
                chances = gr.Label(label="Probabilities", show_heading=False, num_top_classes=5)
                looked = gr.HTML()
        shown = [table, unwanted, views, expected, confusion, save]

        def learning(session: Session, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
            return do.learn(session, progress)

        def trying(session: Session, file: Any, shot: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
            return do.classify(session, file, shot, progress)

        private: dict[str, Any] = {"api_visibility": "private"}
        working = {**private, "concurrency_limit": 1, "concurrency_id": "model"}  # the model does one thing at a time
        page.load(do.begin, None, [session, *shown], **private)
        add.click(do.put, [session, name, files, recorded], [*shown, files, recorded], **private)
        works: list[dict[str, Any]] = [
            learn.click(learning, session, shown, show_progress_on=expected, **working),
            classify.click(
                trying, [session, file, shot], [outcome, chances, looked], show_progress_on=outcome, **working
            ),
        ]
        stop.click(lambda session: session.stop.set(), session, None, cancels=works, queue=False, **private)
        forget.click(do.forget, [session, unwanted], shown, **private)
        views.input(do.look, [session, views], shown, **private)
        load.upload(do.restore, [session, load], shown, **private)
    return page


@contextlib.contextmanager
def _settings_of_gradio(home: Path) -> Iterator[None]:
    """Sets aside Gradio's variables, which, meant for other pages, might share this one or open the machine's files."""
    before = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("GRADIO_")}
    own = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_TEMP_DIR": str(home / "uploads"),
    }
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def serving(start: Classifier, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The page's address, served until the block ends; its files are gone then.

    Raises:
        UserError: nothing can be served there.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soap-net-"))).resolve()
        stack.enter_context(_settings_of_gradio(home))
        page = build_page(start, home)
        # A site of another name that leads here (DNS rebinding) is not this page.
        hosts = ["127.0.0.1", "localhost"] if host in ("127.0.0.1", "localhost") else ["*"]
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                css=CSS,
                app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
            )
        except OSError as error:
            raise UserError(f"the page can't be served at {host}, port {port or 'any'}: {error}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def serve(start: Classifier, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM, then raises Interrupted. Raises UserError, see `serving`."""
    with StopSignals() as signals, serving(start, host, port) as address:
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        while not signals.requested:
            time.sleep(0.2)
    raise Interrupted("the page is closed; what was not saved from it is gone")
