"""Whether the order of the frames matters, at test time and in training (the paper's Table 4)."""

from __future__ import annotations

from soap_net.experiments.experiment import PAPER, Experiment
from soap_net.experiments.results import Results, Row

ORDERS = {order: {"data.order": order} for order in ("forward", "reversed", "shuffled")}


class Order(Experiment):
    """Trains on frames in each order, with and without SOAP, and tests each net on all orders.

    A test in another order changes support and query clips alike.
    """

    title = "Order of the frames"
    columns = ("SOAP", "trained on frames", "tested on frames")
    difference = "less the order trained on"
    paper = "paper (Kinetics)"
    axis = "trained on (above) and tested on (below)"
    tests = ORDERS
    note = (
        f"Paper: {PAPER}, Table 4, Kinetics 1-shot, in order and reversed. Support and query clips are put into the "
        "same order. Shuffled: a permutation for each clip, drawn anew each time in training and fixed in the test."
    )

    def rows(self, results: Results) -> list[Row]:
        known = {("forward", "forward"): 81.1, ("forward", "reversed"): 79.2}
        return [
            Row(
                ("with" if soap else "without", trained, tested),
                _cell(soap, trained),
                tested,
                against=None if tested == trained else (_cell(soap, trained), trained),
                paper=known.get((trained, tested)) if soap else None,
                series="with SOAP" if soap else "without SOAP",
                x=f"{trained}\n{tested}",
                changes={"model.soap.enabled": soap, "data.order": trained},
            )
            for soap in (True, False)
            for trained in ORDERS
            for tested in ORDERS
        ]


def _cell(soap: bool, order: str) -> str:
    return f"{'soap' if soap else 'plain'}-{order}"
