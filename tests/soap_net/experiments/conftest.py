"""Options that make an experiment run in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tiny(tiny_data: Path) -> list[str]:
    """The options that take the quick preset to the tiny data set, and to runs of a second."""
    settings = {
        "data.root": tiny_data, "data.resize": 9, "data.crop": 8, "data.interval": "null", "episode.way": 2,
        "eval.way": 2, "episode.queries": 1, "train.episodes": 2, "eval.tasks": 10,
        "model.head_options": '{"out_dim": 8}',
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]
