"""Episodic training: one readable loop, exact to repeat, to interrupt and to resume."""

from __future__ import annotations

from pathlib import Path

from soap_net.config import Config


def train(config: Config, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains as `config` says and returns the run folder."""
    raise SystemExit("not built yet")
