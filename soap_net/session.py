"""What one visitor of the page put in and learnt; clips wait in a folder of the session until they are learnt."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soap_net.classify import Classifier, Prediction
from soap_net.data.clips import Clip
from soap_net.data.videos import VIDEO_SUFFIXES
from soap_net.errors import UserError
from soap_net.files import writing
from soap_net.interrupts import Interrupted

LONGEST_CLIP = 3600
"""Frames of a clip: two minutes at 30 a second."""
MOST_CLIPS = 500
"""Clips that a session may have put in and not learnt."""
VIEWS = ("auto", "appearance", "motion", "both")
"""What a visitor may have the clips told apart by."""
RECORDED = "sample"
"""What the page's browser part names each recording of a webcam."""

Told = Callable[[int], object]


@dataclass
class Session:
    """What one browser session has put in and learnt.

    Attributes:
        classifier: its own, on a model that all sessions share.
        folder: for its clips that wait to be learnt.
        stop: set to end the work at hand; each work has its own.
        busy: held by the work at hand, which goes on for a moment when it is stopped.
    """

    classifier: Classifier
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    busy: threading.Lock = field(default_factory=threading.Lock)
    _waiting: dict[str, list[Clip]] = field(default_factory=dict)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def begin(cls, start: Classifier, home: Path) -> Session:
        """One that knows what `start` does, and will change nothing of it."""
        # Learning replaces what a classifier holds and never changes it: a shallow copy shares the model alone.
        return cls(copy.copy(start), Path(tempfile.mkdtemp(prefix="session-", dir=home)))

    @property
    def waiting(self) -> dict[str, list[Clip]]:
        """The clips that wait, by class, as they are now: others may come and go meanwhile."""
        with self._changing:
            return {name: [*clips] for name, clips in self._waiting.items()}

    def put(self, name: str, files: Sequence[Path]) -> list[str]:
        """Copies clips of the class `name` to where they wait; returns a line on each that was refused or is cut short.

        Raises:
            UserError: no name, no clips, or too many.
            WriteError: the disk is full.
        """
        name = name.strip()
        if not name or "/" in name:
            raise UserError("give the class a name, without a slash")
        if not files:
            raise UserError(f"choose or record clips of {name} first")
        if sum(map(len, self.waiting.values())) + len(files) > MOST_CLIPS:
            raise UserError(f"more than {MOST_CLIPS} clips at a time: learn those that are here first")
        remarks: list[str] = []
        for file in files:
            with writing(self.folder):
                place = Path(tempfile.mkdtemp(prefix="", dir=self.folder))
                # The browser names all its recordings alike, and a clip of a name learnt before would replace that.
                shown = f"webcam {place.name}{file.suffix}" if file.stem == RECORDED else file.name
                clip = Clip(Path(shutil.copyfile(file, place / shown)))
            try:
                check_clip(clip)
                remarks += filter(None, [clip.remark()])
            except UserError as error:
                remarks.append(f"{error}; left out")
                shutil.rmtree(place)
            else:
                with self._changing:
                    self._waiting.setdefault(name, []).append(clip)
        return remarks

    def learn(self, progress: Told) -> list[str]:
        """Learns what waits, beside what was learnt before; returns a line on each clip that was left out.

        Raises:
            UserError: nothing waits, fewer than two classes, or a class without a readable clip.
            Interrupted: `stop` was set; nothing has changed then.
        """
        with self._working(progress) as tell:
            taken = self.waiting  # others may come meanwhile
            if not taken:
                raise UserError("nothing new to learn: add clips of your classes first")
            if len({*self.classifier.classes, *taken}) < 2:
                raise UserError("add clips of a second class first")
            errors = self.classifier.add(taken, progress=tell)
            self._remove({clip for clips in taken.values() for clip in clips})
        return [f"{error}; left out" for error in errors]

    def names(self) -> list[str]:
        """What can be forgotten: classes, and clips as ``class/clip``."""
        supports, waiting = self.classifier.supports, self.waiting
        learnt = [*supports.classes, *supports.clips] if supports else []
        clips = [f"{name}/{clip.path.name}" for name, members in waiting.items() for clip in members]
        return list(dict.fromkeys([*learnt, *waiting, *clips]))

    def forget(self, name: str) -> None:
        """Forgets a class or clip of `names`, waiting or learnt.

        Raises:
            UserError: there is none of that name, or fewer than two classes would stay learnt.
        """
        with self._working(lambda count: None):
            gone = {
                clip
                for owner, clips in self.waiting.items()
                for clip in clips
                if name in (owner, f"{owner}/{clip.path.name}")
            }
            supports = self.classifier.supports
            if not gone or (supports and name in (*supports.classes, *supports.clips)):
                self.classifier.drop(name)
            self._remove(gone)

    def views(self) -> tuple[str, list[str]]:
        """What the head views looks at, and what it may look at instead; no others of another head."""
        model = self.classifier.config.model
        if model.head != "views":
            return "", []
        now = str(model.head_options.get("by", "auto"))
        others = [name for name in VIEWS if name == now or not self.classifier.model.head.ignores_differences]
        return now, others if now in others else [now, *others]

    def look_at(self, by: str) -> None:
        """Looks at something else in the clips, which are not read again; see `Classifier.look_at`."""
        with self._working(lambda count: None):
            self.classifier.look_at(by)

    def restore(self, file: Path) -> None:
        """Takes on what a classifier's file holds, in place of all that was learnt; see `Classifier.restore`."""
        with self._working(lambda count: None):
            self.classifier.restore(file)

    def rows(self) -> list[list[object]]:
        """A row for each class: its name, and how many of its clips are learnt and wait."""
        learnt, waiting = self.classifier.counts(), self.waiting
        names = dict.fromkeys([*learnt, *waiting])
        return [[name, learnt.get(name, 0), len(waiting.get(name, ()))] for name in names]

    def classify(self, clip: Clip, progress: Told) -> Prediction:
        """What the clip is taken for.

        Raises:
            UserError: nothing was learnt, or the clip can't be read.
            Interrupted: `stop` was set.
        """
        check_clip(clip)
        with self._working(progress) as tell:
            [prediction] = self.classifier.classify([clip], progress=tell)
        if prediction.error:
            raise UserError(prediction.error)
        return prediction

    def close(self) -> None:
        """Deletes its clips."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, gone: set[Clip]) -> None:
        """Takes clips from those that wait, and deletes them."""
        with self._changing:
            for name, clips in [*self._waiting.items()]:
                self._waiting[name] = [clip for clip in clips if clip not in gone]
                if not self._waiting[name]:
                    del self._waiting[name]
        for clip in gone:
            shutil.rmtree(clip.path.parent, ignore_errors=True)

    @contextlib.contextmanager
    def _working(self, progress: Told) -> Iterator[Told]:
        """One work at a time; it is told how far it is, and there ends with `Interrupted` once it is stopped."""
        with self.busy:
            self.stop = stop = threading.Event()

            def tell(count: int) -> None:
                if stop.is_set():
                    raise Interrupted("stopped; nothing has changed")
                progress(count)

            yield tell


def check_clip(clip: Clip) -> None:
    """Raises UserError for a clip of too many frames, one that can't be read, and what is named otherwise."""
    if clip.path.suffix.lower() not in VIDEO_SUFFIXES | {".zip"}:
        raise UserError(f"{clip.path}: neither a video nor a zip of frames")
    if (frames := clip.num_frames()) > LONGEST_CLIP:
        raise UserError(f"{clip.path}: has {frames} frames; a clip here may have {LONGEST_CLIP}, cut out the action")
