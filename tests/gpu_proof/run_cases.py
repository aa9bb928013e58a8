"""Runs the cases on a shim library in a process of its own: `python run_cases.py LIBRARY [NAME ...]`.

Prints one line a case and ends with 1 at the first wrong one, which includes what the shim or AddressSanitizer reports.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_cases import FUSIONS, SOAPS, WIDE_FUSIONS, WIDES, check_fusion, check_soap, check_window_sums
from soap_kernels.backends import cuda

SHARED_MEMORY = 227 * 1024  # that a block of sm_90 can have, which the shim checks


def use(library: Path | str) -> None:
    """Makes the cuda backend serve CPU tensors through a shim library."""
    torch.ops.load_library(str(library))
    cuda.shared_memory_limit = lambda device: SHARED_MEMORY  # type: ignore[assignment]


def main(library: str, names: list[str]) -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    use(library)
    for case in (*SOAPS, *FUSIONS, *WIDES, *WIDE_FUSIONS):
        if names and case.name not in names:
            continue
        try:
            (check_soap if case in (*SOAPS, *WIDES) else check_fusion)(case, cuda.BACKEND, torch.device("cpu"))
            print(f"right {case.name}", flush=True)
        except (AssertionError, RuntimeError) as error:
            print(f"WRONG {case.name}: {str(error).splitlines()[0]}", flush=True)
            return 1
    if not names:
        check_window_sums(cuda.BACKEND, torch.device("cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
