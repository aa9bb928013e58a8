"""The processes of a run: one, or as many as ``torchrun`` started, each with its device."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soap_net.errors import UserError

if TYPE_CHECKING:
    from soap_net.data.splits import ClipSet

T = TypeVar("T")
PATIENCE = timedelta(minutes=15)
"""How long processes wait for another; a clip that hangs its decoder is given up sooner, and named."""


class RankLost(UserError):
    """Another process of the run is gone, so that nothing can be exchanged any more."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`, and its device. Alone, every method is a no-op.

    What exchanges something raises `RankLost` where another process has ended.
    """

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
            with _exchanging():
                dist.all_reduce(flat)
            offset = 0
            for tensor in group:
                with torch.no_grad():
                    tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
                offset += tensor.numel()

    def sum_step(self, model: nn.Module, numbers: Sequence[float]) -> list[float]:
        """Sums gradients over all processes and averages buffers (running statistics of normalisations), in place.

        Returns:
            The sums of `numbers`.
        """
        if self.size == 1:
            return list(numbers)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        moving = [module for module in model.modules() if module.training]  # what is frozen is to stay, bit for bit
        buffers = [buffer for m in moving for buffer in m.buffers(recurse=False) if buffer.is_floating_point()]
        moved = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum([*gradients, *buffers, used, moved])
        for parameter, gradient, count in zip(parameters, gradients, used.tolist(), strict=True):
            # What no process used keeps no gradient, so that weight decay leaves it alone, as with one process.
            parameter.grad = gradient if count else None
        for buffer in buffers:
            buffer.div_(self.size)
        return moved.tolist()

    def gather(self, own: Mapping[int, T]) -> dict[int, T]:
        """The entries of all processes, in the order of their keys, as one process alone would have found them."""
        parts: list[Any] = [own]
        if self.size > 1:
            parts = [{} for _ in range(self.size)]
            with _exchanging():
                dist.all_gather_object(parts, own)
        return dict(sorted(item for part in parts for item in part.items()))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Puts into each tensor what the first process has there."""
        if self.size > 1:
            with _exchanging(), torch.no_grad():
                for tensor in tensors:
                    moved = tensor.detach().to(self.device)
                    dist.broadcast(moved, 0)
                    tensor.copy_(moved)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process within the block, where nothing may be exchanged, ends all, at the block's end.

        Raises:
            UserError: another process failed; names it and its error. The process itself goes on with that error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            failed = self.gather({self.rank: f"{self._named()}: {failure}"} if failure else {})
        except RankLost:
            if failure is None:
                raise
        if failure:
            raise failure
        for text in failed.values():
            raise UserError(text)

    def agree(self, facts: Mapping[str, object], remedy: str) -> None:
        """Ends all processes, each with the same line, unless their `facts`, which are few and short, are the same.

        Raises:
            UserError: names what differs, and in which process, and ends with `remedy`.
        """
        found = self.gather({self.rank: (self._named(), dict(facts))})
        name, first = found[0]
        differ = [
            f"{key} is {there.get(key)!r} in {other} and {first.get(key)!r} in {name}"
            for other, there in found.values()
            for key in {**first, **there}
            if first.get(key) != there.get(key)
        ]
        if differ:
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"the processes are not at the same run: {', '.join(differ[:3])}{more}; {remedy}")

    def _named(self) -> str:
        return f"rank {self.rank} on {platform.node()}"


def digest(content: object) -> str:
    """Tells contents apart, bit for bit: nested dictionaries and lists of tensors and plain values; 64 hex digits."""
    state = hashlib.sha256()

    def take(value: object) -> None:
        if isinstance(value, Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            state.update(f"{len(value)} in:".encode())
            for key in sorted(value, key=str):
                state.update(f"{key!r}:".encode())
                take(value[key])
        elif isinstance(value, (list, tuple)):
            state.update(f"{len(value)} of:".encode())
            for item in value:
                take(item)
        else:
            state.update(f"{value!r};".encode())

    take(content)
    return state.hexdigest()


def same_clips(clips: ClipSet) -> dict[str, str]:
    """A fact for `Ranks.agree`: which clips a split has, by class and name, wherever they lie."""
    names = [[clip.name for clip in members] for members in clips.clips]
    return {f"{clips.split} data": f"{sum(map(len, names))} clips, {digest([clips.classes, names])[:12]}"}


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # PyTorch's, of the connection: it knows sockets, and no cause
        raise RankLost(
            f"another process of this run was lost, whose own last line may say why: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def started_again() -> bool:
    """Whether ``torchrun --max-restarts`` has started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` announces in the environment, and the device that `device` names.

    Raises:
        UserError: the device isn't there, or the other processes don't come.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if size == 1:
        yield Ranks(found)
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(meet(store, rank, size), store)
        backend = "nccl" if found.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(f"the {size} processes of this run did not find each other: {_first_line(error)}") from error
    try:
        yield Ranks(found, rank, size)
    finally:
        dist.destroy_process_group()


def meet(store: dist.Store, rank: int, size: int) -> str:
    """A name for their store that the processes agree on which are there now, once all are.

    With ``--max-restarts``, torchrun's store still holds what those wrote that were lost, and PyTorch would take the
    addresses of the dead for those of the living. So each shows a new word, and waits for an answer to that.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"here/{rank}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + PATIENCE.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{word}/{other}"]):
                missing.discard(other)
            elif store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", word)
        if time.monotonic() > end:
            raise RuntimeError(f"nothing was heard of {len(missing)}, the first of them rank {min(missing)}")
        time.sleep(0.01)
    return word


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
    numeral = name.partition(":")[2] or str(local_rank)
    if not numeral.isdecimal():
        raise UserError(f"device is {name!r}: behind the colon goes a number, as in {kind}:0")
    number = int(numeral)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    if number >= count:
        raise UserError(f"device is {kind}:{number}: this machine has {count}, the last is {kind}:{count - 1}")
    return torch.device(kind, number)
