"""Benchmarks by pytest: `--benchmark-only` times them, `--benchmark-disable` runs each once to see that it does."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smallest(request: pytest.FixtureRequest) -> bool:
    """Whether timing is off: the smallest shapes will do then."""
    return bool(request.config.getoption("benchmark_disable"))
