"""The processes of a run: one, or as many as ``torchrun`` started, each with its device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from soap_net.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`, and its device. Alone, every method is a no-op."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Puts into each tensor its sum over all processes, in one exchange per dtype."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in group])
            dist.all_reduce(flat)
            offset = 0
            for tensor in group:
                with torch.no_grad():
                    tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
                offset += tensor.numel()

    def gather(self, own: dict[int, str]) -> dict[int, str]:
        """The entries of all processes, in the order of their keys, as one process alone would have found them."""
        parts = [own]
        if self.size > 1:
            parts = [{} for _ in range(self.size)]
            dist.all_gather_object(parts, own)
        return dict(sorted(item for part in parts for item in part.items()))

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.sum([torch.zeros(1, device=self.device)])


@contextlib.contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` announces in the environment, and the device that `device` names.

    Raises:
        UserError: the device isn't there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if size == 1:
        yield Ranks(found)
        return
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Ranks(found, rank, size)
    finally:
        dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" takes the best there is, and each local process its own.

    Raises:
        UserError: it isn't there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind, there in present.items() if there) if name == "auto" else name.partition(":")[0]
    if not present.get(kind, False):
        there = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(f"device is {name!r}: not on this machine, which has {there}")
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    number = int(name.partition(":")[2] or local_rank)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    if number >= count:
        raise UserError(f"device is {kind}:{number}: this machine has {count}, the last is {kind}:{count - 1}")
    return torch.device(kind, number)
