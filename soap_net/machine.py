"""How a training uses the machine: memory that is kept for the next step, and arithmetic that repeats itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Has this process keep what it frees, where its C library is glibc.

    Each step asks for the blocks of the one before it, which glibc would fetch from the system anew, and have cleared,
    whenever they are large.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & {*os.environ}:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library, such as musl
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):  # beyond what older versions take
            mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Has PyTorch take only algorithms, meanwhile, that give the same bits each time; a GPU is slower with these.

    What has none such raises RuntimeError, which names it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
