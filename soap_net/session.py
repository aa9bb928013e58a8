"""What one visitor of the page put in and learnt; clips wait in a folder of the session until they are learnt."""

from __future__ import annotations

import copy
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soap_net.classify import Classifier, Prediction
from soap_net.data.clips import Clip
from soap_net.errors import UserError
from soap_net.interrupts import Interrupted

LONGEST_CLIP = 3600
"""Frames of a clip: two minutes at 30 a second."""
MOST_CLIPS = 500
"""Clips that a session may have put in and not learnt."""
RECORDED = "sample"
"""What the page's browser part names each recording of a webcam."""

Told = Callable[[int], object]


@dataclass
class Session:
    """What one browser session has put in and learnt.

    Attributes:
        classifier: its own, on a model that all sessions share.
        folder: for its clips that wait to be learnt.
        waiting: those, by class.
        stop: set to end the work at hand.
    """

    classifier: Classifier
    folder: Path
    waiting: dict[str, list[Clip]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def begin(cls, start: Classifier, home: Path) -> Session:
        """One that knows what `start` does, and will change nothing of it."""
        # Learning replaces what a classifier holds and never changes it: a shallow copy shares the model alone.
        return cls(copy.copy(start), Path(tempfile.mkdtemp(prefix="session-", dir=home)))

    def put(self, name: str, files: Sequence[Path]) -> list[str]:
        """Copies clips of the class `name` to where they wait; returns why others were refused.

        Raises:
            UserError: no name, no clips, or too many.
        """
        name = name.strip()
        if not name or "/" in name:
            raise UserError("give the class a name, without a slash")
        if not files:
            raise UserError(f"choose or record clips of {name} first")
        if sum(map(len, self.waiting.values())) + len(files) > MOST_CLIPS:
            raise UserError(f"more than {MOST_CLIPS} clips at a time: learn those that are here first")
        refused = []
        for file in files:
            place = Path(tempfile.mkdtemp(prefix="", dir=self.folder))
            # The browser names all its recordings alike, and a clip of a name learnt before would replace that.
            shown = f"webcam {place.name}{file.suffix}" if file.stem == RECORDED else file.name
            clip = Clip(Path(shutil.copyfile(file, place / shown)))
            try:
                check_length(clip)
            except UserError as error:
                refused.append(str(error))
                shutil.rmtree(place)
            else:
                self.waiting.setdefault(name, []).append(clip)
        return refused

    def learn(self, progress: Told) -> list[str]:
        """Learns what waits, beside what was learnt before; returns what was wrong with clips that were left out.

        Raises:
            UserError: nothing waits, fewer than two classes, or a class without a readable clip.
            Interrupted: `stop` was set; nothing has changed then.
        """
        if not self.waiting:
            raise UserError("nothing new to learn: add clips of your classes first")
        if len({*self.classifier.classes, *self.waiting}) < 2:
            raise UserError("add clips of a second class first")
        self.stop.clear()
        errors = self.classifier.add(self.waiting, progress=self._stoppable(progress))
        for clips in self.waiting.values():
            for clip in clips:
                shutil.rmtree(clip.path.parent)
        self.waiting = {}
        return errors

    def names(self) -> list[str]:
        """What can be forgotten: classes, and clips as ``class/clip``."""
        supports = self.classifier.supports
        learnt = [*supports.classes, *supports.clips] if supports else []
        clips = [f"{name}/{clip.path.name}" for name, members in self.waiting.items() for clip in members]
        return list(dict.fromkeys([*learnt, *self.waiting, *clips]))

    def forget(self, name: str) -> None:
        """Forgets a class or clip of `names`, waiting or learnt.

        Raises:
            UserError: there is none of that name, or fewer than two classes would stay learnt.
        """
        left = {
            owner: [clip for clip in clips if name not in (owner, f"{owner}/{clip.path.name}")]
            for owner, clips in self.waiting.items()
        }
        supports = self.classifier.supports
        if left == self.waiting or (supports and name in (*supports.classes, *supports.clips)):
            self.classifier.drop(name)
        self.waiting = {owner: clips for owner, clips in left.items() if clips}

    def rows(self) -> list[list[object]]:
        """A row for each class: its name, and how many of its clips are learnt and wait."""
        learnt = self.classifier.counts()
        names = dict.fromkeys([*learnt, *self.waiting])
        return [[name, learnt.get(name, 0), len(self.waiting.get(name, ()))] for name in names]

    def classify(self, clip: Clip, progress: Told) -> Prediction:
        """What the clip is taken for.

        Raises:
            UserError: nothing was learnt, or the clip can't be read.
            Interrupted: `stop` was set.
        """
        check_length(clip)
        self.stop.clear()
        [prediction] = self.classifier.classify([clip], progress=self._stoppable(progress))
        if prediction.error:
            raise UserError(prediction.error)
        return prediction

    def close(self) -> None:
        """Deletes its clips."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stoppable(self, progress: Told) -> Told:
        def tell(count: int) -> None:
            if self.stop.is_set():
                raise Interrupted("stopped; nothing has changed")
            progress(count)

        return tell


def check_length(clip: Clip) -> None:
    """Raises UserError for a clip of too many frames, or one that can't be read."""
    if (frames := clip.num_frames()) > LONGEST_CLIP:
        raise UserError(f"{clip.path}: has {frames} frames; a clip here may have {LONGEST_CLIP}, cut out the action")
