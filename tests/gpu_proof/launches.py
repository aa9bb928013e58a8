"""The launches that the library's own launchers make, with their arguments, written down by the shim instead of run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    symbol: str  # as the compiled kernel is called; the plain name of a kernel without external linkage
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: bytes

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def is_of(self, kernel: str) -> bool:
        return kernel in self.symbol


def _parse(line: str) -> Launch:
    symbol, *numbers, arguments = line.split()
    n = [int(v) for v in numbers]
    return Launch(symbol, (n[0], n[1], n[2]), (n[3], n[4], n[5]), n[6], bytes.fromhex(arguments))


@contextmanager
def recorded(processors: int) -> Iterator[list[Launch]]:
    """What is launched within, as on a device with so many multiprocessors. The kernels do not run."""
    found: list[Launch] = []
    before = {name: os.environ.get(name) for name in ("CUDA_SHIM_RECORD", "CUDA_SHIM_PROCESSORS")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launches")
        path.touch()
        os.environ.update(CUDA_SHIM_RECORD=str(path), CUDA_SHIM_PROCESSORS=str(processors))
        try:
            yield found
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            found += [_parse(line) for line in path.read_text().splitlines()]
