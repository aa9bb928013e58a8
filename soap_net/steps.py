"""What an optimizer step adds up, over its episodes and over all processes, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from soap_net.data.episodes import EpisodeClips
from soap_net.errors import UserError
from soap_net.ranks import Ranks

_TOTALS = ("loss", "right", "queries", "read", "failed", "stop")


class NonFiniteLoss(UserError):
    """The loss of an episode was infinite or not a number."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Losses are means per query; accuracies in percent.

    `losses` and `accuracies` are those of each episode that this process took of the batch `episodes`; `loss` and
    `accuracy` the means over the whole batch. `clipped` is what `train.clip_norm` multiplied the gradients by, 1 where
    it left them. `seconds` are those of reading, forward, backward and update.
    """

    episodes: range
    losses: list[float]
    accuracies: list[float]
    loss: float
    accuracy: float
    lr: float
    clipped: float
    seconds: float

    @property
    def logged(self) -> dict[str, float]:
        """What a training logs of it."""
        speed = len(self.episodes) / self.seconds
        return {"loss": self.loss, "accuracy": self.accuracy, "lr": self.lr, "episodes_per_second": speed}


@dataclass
class Sums:
    """Sums over episodes, of losses, right answers, queries, clips read and failed; `stop`: whether to stop.

    `losses` and `accuracies` are those of each episode that this process took, as in a `Step`. Loss and right answers
    of an episode stay on the device until `read`.
    """

    loss: float = 0.0
    right: int = 0
    queries: int = 0
    read: int = 0
    failed: int = 0
    stop: bool = False
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    _waiting: list[tuple[Tensor, int, list[str]]] = field(default_factory=list)

    def add(self, loss: Tensor, right: Tensor, task: EpisodeClips) -> None:
        """Adds an episode with the loss and the right answers of all its queries, each a tensor of one number."""
        names, failed = [*task.support_names, *task.query_names], len(task.failures)
        self.queries += len(task.query_names)
        self.read += len(names) + failed
        self.failed += failed
        self._waiting.append((torch.stack([loss.detach(), right.to(loss.dtype)]), task.index, names))

    def collect(self) -> None:
        """Waits for the device, once for all episodes. Raises `NonFiniteLoss` for the first one to name."""
        found = torch.stack([numbers for numbers, *_ in self._waiting]).tolist() if self._waiting else []
        queries = self.queries // max(1, len(found))  # each episode has as many
        for (loss, right), (_, index, names) in zip(found, self._waiting, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"loss is {loss} in episode {index}; a lower --train.lr or --train.clip_norm 1 may help; "
                    f"its clips: {', '.join(names)}"
                )
            self.loss += loss
            self.right += int(right)
            self.losses.append(loss / queries)
            self.accuracies.append(100.0 * right / queries)
        self._waiting.clear()

    def add_other_processes(self, ranks: Ranks, model: nn.Module) -> None:
        """Adds what all other processes have summed, and to the model's gradients theirs, see `Ranks.sum_step`."""
        totals = ranks.sum_step(model, [float(getattr(self, name)) for name in _TOTALS])
        for name, total in zip(_TOTALS, totals, strict=True):
            setattr(self, name, type(getattr(self, name))(total))
