"""Which of SOAP's three parts matter: every subset of them (the paper's Table 2)."""

from __future__ import annotations

from itertools import combinations

from soap_kernels.weights import PARTS
from soap_net.experiments.experiment import PAPER, Experiment
from soap_net.experiments.results import Results, Row

SUBSETS = [chosen for size in range(len(PARTS) + 1) for chosen in combinations(PARTS, size)]
TABLE_2 = {("cwem",): 76.1, PARTS: 81.1}


class Parts(Experiment):
    """Trains with each of the eight subsets of 3DEM, CWEM and HMEM."""

    title = "Parts of SOAP"
    columns = ("3DEM", "CWEM", "HMEM")
    difference = "less none"
    paper = "paper (Kinetics)"
    axis = "parts that are on"
    note = (
        f"Paper: {PAPER}, Table 2, Kinetics 1-shot. It has CWEM alone bring 74.1 to 76.1, and all three parts bring "
        "75.2 to 81.1; as the two start from different figures, the line without any part is left blank."
    )

    def rows(self, results: Results) -> list[Row]:
        return [
            Row(
                tuple("yes" if part in parts else "" for part in PARTS),
                "+".join(parts) or "none",
                against=("none", "test") if parts else None,
                paper=TABLE_2.get(parts),
                x="\n".join(part.upper() for part in parts) or "none",
                changes={"model.soap.enabled": bool(parts), "model.soap.parts": list(parts)},
            )
            for parts in SUBSETS
        ]
