"""What a high frame rate does to a net with and without SOAP (the paper's Figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soap_net.data.motion import MotionConfig, write_motion
from soap_net.experiments.drawing import plot_accuracies
from soap_net.experiments.experiment import PAPER, Experiment, Run
from soap_net.experiments.results import Results, Row

INTERVALS = {"quick": (1, 2, 4, 8), "paper": tuple(range(1, 9))}
RATES = (15, 30, 60, 120, 240)
# Long enough for 8 frames 8 apart: one second at 64 frames a second.
INTERVAL_RATE = 64
CLIP_FRAMES = 16


@dataclass(frozen=True)
class _Cell:
    soap: bool
    interval: int
    rate: int | None = None

    @property
    def name(self) -> str:
        place = f"interval{self.interval}" if self.rate is None else f"{self.rate}fps"
        return f"{'soap' if self.soap else 'plain'}-{place}"


class FrameRate(Experiment):
    """Trains and tests at each sampling interval, and on the motion set at each native frame rate too.

    At a native rate the frames are taken one after another, so that a higher rate leaves less movement between them;
    the movement per second is the same.
    """

    title = "Frame rate"
    columns = ("study", "frames", "SOAP")
    difference = "with less without SOAP"
    axis = "sampling interval in frames"
    note = (
        f"Paper: {PAPER}, Figure 8; its figures are not at hand. Each line's net was trained and tested at its own "
        "interval or rate. Sampling interval: every n-th frame. Native rate: the motion set rendered at that rate, the "
        "same movement per second, 8 frames one after another."
    )

    @property
    def cells(self) -> list[_Cell]:
        """All of them, with SOAP and without side by side."""
        intervals = [_Cell(soap, interval) for interval in INTERVALS[self.preset] for soap in (True, False)]
        rates = [_Cell(soap, 1, rate) for rate in RATES for soap in (True, False)] if self.motion else []
        return intervals + rates

    def prepare(self, folder: Path) -> None:
        if self.motion is None:
            return
        write_motion(self._root(None), self._motion_config(INTERVAL_RATE, 1.0))
        for rate in RATES:
            write_motion(self._root(rate), self._motion_config(rate, CLIP_FRAMES / rate))

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        # All runs on one rendering follow one another: each process decodes its clips once, and need not keep others'.
        return sorted(super().runs(seeds, results), key=lambda run: str(run.changes.get("data.root", "")))

    def rows(self, results: Results) -> list[Row]:
        return [
            Row(
                (
                    "sampling interval" if cell.rate is None else "native rate",
                    str(cell.interval) if cell.rate is None else f"{cell.rate} per second",
                    "with" if cell.soap else "without",
                ),
                cell.name,
                against=(_Cell(False, cell.interval, cell.rate).name, "test") if cell.soap else None,
                series="with SOAP" if cell.soap else "without SOAP",
                x=cell.interval if cell.rate is None else cell.rate,
                changes=self._settings(cell),
            )
            for cell in self.cells
        ]

    def plot(self, path: Path, rows: Sequence[Row], results: Results) -> None:
        intervals = [row for row in rows if row.labels[0] == "sampling interval"]
        if intervals:
            super().plot(path, intervals, results)
        rates = [row for row in rows if row.labels[0] == "native rate"]
        if rates:
            plot_accuracies(
                path.with_stem("plot-native"), rates, results, self.title, "native frames per second", self.chance
            )

    def _settings(self, cell: _Cell) -> dict[str, Any]:
        settings: dict[str, Any] = {"model.soap.enabled": cell.soap, "data.interval": cell.interval}
        if self.motion:
            settings["data.root"] = str(self._root(cell.rate))
        return settings

    def _root(self, rate: int | None) -> Path:
        assert self.motion is not None
        return self.motion / (f"{INTERVAL_RATE}fps-1s" if rate is None else f"{rate}fps")

    def _motion_config(self, rate: int, seconds: float) -> MotionConfig:
        return MotionConfig(frame_rate=rate, seconds=seconds, train_clips=30, val_clips=10, test_clips=30)
