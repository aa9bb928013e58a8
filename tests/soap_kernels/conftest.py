"""How the tests of GPU code are spread over processes: what shares a build stays in one (pytest-xdist's groups)."""

from __future__ import annotations

import pytest

SHIM = ("test_cuda", "test_cuda_executed")  # they build the same library


def group(item: pytest.Item) -> str | None:
    module = item.path.stem
    if module == "test_triton":
        return None  # its tests share nothing
    callspec = getattr(item, "callspec", None)
    parts = callspec.id.split("-") if callspec else []
    architecture = next((part for part in parts if part.startswith("sm_")), "")
    return "shim" if module in SHIM else f"{module} {architecture}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = group(item) if item.get_closest_marker("gpu_proof") else None
        if name:
            item.add_marker(pytest.mark.xdist_group(name))
