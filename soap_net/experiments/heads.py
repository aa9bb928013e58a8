"""Whether SOAP lifts other few-shot methods too: every head with and without it, and a 3-D backbone."""

from __future__ import annotations

import inspect
from typing import Any

from soap_net.experiments.experiment import PAPER, Experiment
from soap_net.experiments.results import Results, Row
from soap_net.models.heads import HEADS

METRICS = ("cosine", "euclidean")
THREE_D = {"quick": "tiny3d", "paper": "r3d_18"}


class Heads(Experiment):
    """Trains every head with and without SOAP, and the SOAP head on a 3-D backbone, which sees motion by itself."""

    title = "Heads with and without SOAP"
    columns = ("head", "backbone", "SOAP")
    difference = "with less without SOAP"
    axis = "head"
    note = (
        f"{PAPER} says that SOAP lifts other few-shot methods; its figures for them are not at hand. All heads train "
        "with the same settings, so this table can't rank heads; compare with and without SOAP within each."
    )

    @property
    def cells(self) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """By name: what the table calls head and backbone, and the settings."""
        backbone = self.config.model.backbone
        found: dict[str, tuple[str, str, dict[str, Any]]] = {}
        for head in HEADS:
            for metric in METRICS if head == "prototype" else ("",):
                options = {"metric": metric} if metric else {}
                name = " ".join(filter(None, (head, metric)))
                found[name.replace(" ", "-")] = (name, backbone, self._head(head, options))
        three_d = THREE_D[self.preset]
        settings = {"model.backbone": three_d, "model.weights": "random", "model.channels_last": False}
        found["soap-3d"] = ("soap", three_d, {**self._head("soap", {}), **settings})
        return found

    def rows(self, results: Results) -> list[Row]:
        return [
            Row(
                (head, backbone, "with" if soap else "without"),
                _cell(name, soap),
                against=(_cell(name, False), "test") if soap else None,
                series="with SOAP" if soap else "without SOAP",
                x=name.replace("-", "\n"),
                changes={**settings, "model.soap.enabled": soap},
            )
            for name, (head, backbone, settings) in self.cells.items()
            for soap in (True, False)
        ]

    def model(self) -> str:
        model = self.config.model
        return f"{model.backbone} (weights: {model.weights or 'random'}) but for {THREE_D[self.preset]} (random)"

    def _head(self, head: str, options: dict[str, Any]) -> dict[str, Any]:
        """The settings of a head: the config's own options where it knows them."""
        known = inspect.signature(HEADS[head]).parameters
        shared = {key: value for key, value in self.config.model.head_options.items() if key in known}
        return {"model.head": head, "model.head_options": {**shared, **options}}


def _cell(name: str, soap: bool) -> str:
    return f"{name}-{'soap' if soap else 'plain'}"
