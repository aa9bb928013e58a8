"""What an optimizer step adds up, over its episodes and over all processes, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from soap_net.data.episodes import EpisodeClips
from soap_net.ranks import Ranks

_TOTALS = ("loss", "right", "queries", "read", "failed", "stop")


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


@dataclass
class Sums:
    """Sums over episodes, of losses, right answers, queries, clips read and failed; `stop`: whether to stop.

    `losses` and `accuracies` are those of each episode that this process took, as in a `Step`.
    """

    loss: float = 0.0
    right: int = 0
    queries: int = 0
    read: int = 0
    failed: int = 0
    stop: bool = False
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def add(self, loss: float, right: int, task: EpisodeClips) -> None:
        """Adds an episode with the loss and the right answers of all its queries."""
        queries, failed = len(task.query_names), len(task.failures)
        self.loss += loss
        self.right += right
        self.queries += queries
        self.read += len(task.support_names) + queries + failed
        self.failed += failed
        self.losses.append(loss / queries)
        self.accuracies.append(100.0 * right / queries)

    def add_other_processes(self, ranks: Ranks, model: nn.Module) -> None:
        """Adds what all other processes have summed, and to the model's gradients theirs, see `Ranks.sum_step`."""
        totals = ranks.sum_step(model, [float(getattr(self, name)) for name in _TOTALS])
        for name, total in zip(_TOTALS, totals, strict=True):
            setattr(self, name, type(getattr(self, name))(total))
