"""How much hangs on the tuple sizes O and on CWEM's hidden channels C_r, chosen on the validation classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soap_net.experiments.experiment import Experiment, Run, seeded
from soap_net.experiments.results import Results, Row
from soap_net.experiments.tuples import DEFAULT, show
from soap_net.experiments.tuples import cell as tuple_cell

HIDDEN = (4, 8, 16, 32)
SETS = ((1,), (1, 2), (1, 2, 3))
ALL_SETS = ((1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
PUBLISHED = (DEFAULT, 16)
Choice = tuple[tuple[int, ...], int]


class Sensitivity(Experiment):
    """Trains with every O and C_r, compares them on the validation split, and tests the best, once.

    The paper's own choice is tested beside it. No other net meets the test classes.
    """

    title = "Sensitivity to O and C_r"
    columns = ("O", "C_r", "split")
    difference = "less {1,2,3}, 16 on that split"
    axis = "C_r"
    note = (
        "All choices are compared on the validation classes. The best of them, and the paper's own, are then evaluated "
        "on the test classes, once. The validation accuracy of the best of many is biased upwards; its test accuracy "
        "is not."
    )

    @property
    def choices(self) -> list[Choice]:
        """The grid."""
        return [(sizes, hidden) for sizes in (SETS if self.preset == "quick" else ALL_SETS) for hidden in HIDDEN]

    def runs(self, seeds: Sequence[int], results: Results) -> list[Run]:
        grid = seeded(
            [(_cell(choice), _settings(choice)) for choice in self.choices], seeds, tests={"val": {"eval.split": "val"}}
        )
        if any((run.cell, run.seed) not in results.finished for run in grid):
            return grid
        tested = dict.fromkeys([self.best(results), PUBLISHED])
        return grid + [
            Run(tested_cell(choice), seed, _settings(choice), weights_of=_cell(choice))
            for choice in tested
            for seed in seeds
        ]

    def best(self, results: Results) -> Choice:
        """The choice with the highest mean validation accuracy; the first of equals."""
        found = {choice: results.accuracy(_cell(choice), "val") for choice in self.choices}
        return max(self.choices, key=lambda choice: one.mean if (one := found[choice]) else -1.0)

    def rows(self, results: Results) -> list[Row]:
        lines = [self._row(choice, _cell(choice), "val") for choice in self.choices]
        tested = [choice for choice in self.choices if results.seeds(tested_cell(choice))]
        return lines + [self._row(choice, tested_cell(choice), "test") for choice in tested]

    def _row(self, choice: Choice, cell: str, split: str) -> Row:
        sizes, hidden = choice
        published = _cell(PUBLISHED) if split == "val" else tested_cell(PUBLISHED)
        return Row(
            (show(sizes), str(hidden), split),
            cell,
            split,
            against=None if choice == PUBLISHED else (published, split),
            series=f"O = {show(sizes)}" + ("" if split == "val" else ", test"),
            x=hidden,
        )


def _cell(choice: Choice) -> str:
    return f"{tuple_cell(choice[0])}-C{choice[1]}"


def tested_cell(choice: Choice) -> str:
    """The cell that tests the net of a choice."""
    return f"test-{_cell(choice)}"


def _settings(choice: Choice) -> dict[str, Any]:
    return {"model.soap.tuple_sizes": list(choice[0]), "model.soap.hidden_channels": choice[1]}
