"""Which frame tuples HMEM should compare (the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from soap_net.experiments.experiment import PAPER, Experiment
from soap_net.experiments.results import Results, Row

SETS = ((1,), (2,), (3,), (4,), (1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4))
TABLE_3 = {(1,): 78.9, (1, 2, 3): 81.1}
DEFAULT = (1, 2, 3)


class Tuples(Experiment):
    """Trains with each set of tuple sizes O."""

    title = "Frame tuples of HMEM"
    columns = ("O",)
    difference = "less {1,2,3}"
    paper = "paper (Kinetics)"
    axis = "tuple sizes O"
    note = f"Paper: {PAPER}, Table 3, Kinetics 1-shot."

    def rows(self, results: Results) -> list[Row]:
        return [
            Row(
                (show(sizes),),
                cell(sizes),
                against=None if sizes == DEFAULT else (cell(DEFAULT), "test"),
                paper=TABLE_3.get(sizes),
                x=show(sizes),
                changes={"model.soap.tuple_sizes": list(sizes)},
            )
            for sizes in SETS
        ]


def cell(sizes: Sequence[int]) -> str:
    """The cell's name of a set of tuple sizes."""
    return "O" + "-".join(map(str, sizes))


def show(sizes: Sequence[int]) -> str:
    """{1,2,3}"""
    return "{" + ",".join(map(str, sizes)) + "}"
