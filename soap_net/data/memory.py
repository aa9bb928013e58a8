"""Decoded clips kept in memory, for a process that trains many nets on the same short clips."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from soap_net.data.clips import Clip
from soap_net.errors import ClipError


class ClipMemory:
    """Reads frames of clips, and keeps whole clips decoded up to ``limit`` bytes, the ones used last.

    With a limit of 0 nothing is kept, and a clip is asked for the wanted frames alone. A clip larger than a 64th of the
    limit is never kept. What is read is the same either way. Another process gets the limit, and keeps its own.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._kept: OrderedDict[Clip, Tensor] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[ClipMemory], tuple[int]]:
        return type(self), (self.limit,)

    def read(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        """uint8 ``(len(indices), 3, H, W)``, memory of the caller's own; raises ClipError."""
        if not self.limit:
            return clip.read(indices)
        whole = self._kept.get(clip)
        if whole is not None:
            self._kept.move_to_end(clip)
            return whole[list(indices)]
        wanted = clip.read(indices)
        frames = clip.num_frames()
        if wanted[0].numel() * frames <= self.limit // 64:
            with suppress(ClipError):  # a frame that nobody asked for may be broken
                self._keep(clip, clip.read(range(frames)))
        return wanted

    def _keep(self, clip: Clip, whole: Tensor) -> None:
        self._kept[clip] = whole
        self._bytes += whole.numel()
        while self._bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.numel()
