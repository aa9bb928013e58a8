"""Episodes of a net that is frozen up to its head: each clip is read and embedded once, for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from soap_net.config import Config
from soap_net.data.episodes import Episode, EpisodeClips, EpisodeSampler
from soap_net.data.memory import ClipMemory
from soap_net.errors import ClipError, UserError
from soap_net.interrupts import Interrupted
from soap_net.models.soap_net import SOAPNet
from soap_net.ranks import Ranks
from soap_net.tasks import clip_features

FEATURES_LIMIT = 4 * 2**30
"""Bytes that the features of all training clips may take; beyond it each episode embeds its own."""

_Place = tuple[int, int]  # a class's number, and a clip's within it


def can_embed_once(model: SOAPNet, config: Config, sampler: EpisodeSampler) -> bool:
    """Whether a clip is the same in all episodes, and so are its features, and these fit into `FEATURES_LIMIT`."""
    clips, head = sum(map(len, sampler.clips.clips)), model.head
    small = 4 * clips * head.frames * head.dim <= FEATURES_LIMIT
    return model.features_stand_still and not config.data.augment and small


def embedded_episodes(
    model: SOAPNet,
    config: Config,
    sampler: EpisodeSampler,
    mine: Sequence[int],
    ranks: Ranks,
    *,
    progress: bool,
    stop: Callable[[], bool],
    memory: ClipMemory | None,
) -> Generator[EpisodeClips, None, None]:
    """The episodes `mine`, with features ``(clips, T, D)`` in place of frames; clips are replaced as elsewhere.

    At the call all clips of the run's episodes are embedded, those of past ones too: so each is in the same batch, and
    has the same bits, wherever the run is gone on with. Several processes share them out, and all have to call it,
    those too that have no episode to do.

    Raises:
        UserError: a class has no readable clip left.
        Interrupted: `stop` said so.
    """
    found: dict[_Place, Tensor | ClipError] = {}
    while fresh := sorted(_wanted(sampler, config.train.episodes, found) - found.keys()):
        with tqdm(total=len(fresh), desc="features", unit="clip", leave=False, disable=not progress) as bar:

            def advance(count: int, bar: tqdm = bar) -> None:
                if ranks.size == 1 and stop():
                    raise Interrupted
                bar.update(count)

            own = range(ranks.rank, len(fresh), ranks.size)
            clips = [sampler.clips.clips[fresh[i][0]][fresh[i][1]] for i in own]
            part, errors, remarks = clip_features(
                model, clips, config.data, ranks.device, amp=config.train.amp, progress=advance, memory=memory
            )
        for remark in filter(None, remarks):
            tqdm.write(f"warning: {remark}", file=sys.stderr)
        features = torch.zeros(len(fresh), *part.shape[1:], device=ranks.device)
        features[ranks.rank :: ranks.size] = part
        ranks.sum([features])
        failed = ranks.gather({i: error for i, error in zip(own, errors, strict=True) if error is not None})
        found |= {place: failed.get(i, features[i]) for i, place in enumerate(fresh)}
    return (_task(sampler, sampler[index], found) for index in mine)


def _wanted(sampler: EpisodeSampler, episodes: int, found: dict[_Place, Tensor | ClipError]) -> set[_Place]:
    """All clips that the first so many episodes take, as far as it is known which are readable."""
    places: set[_Place] = set()
    for index in range(episodes):
        for side in _places(sampler, sampler[index], found, []):
            places.update(side)
    return places


def _places(
    sampler: EpisodeSampler, episode: Episode, found: dict[_Place, Tensor | ClipError], failures: list[ClipError]
) -> tuple[list[_Place], list[_Place]]:
    """Supports and queries of an episode; those known to be broken go to `failures`."""

    def take(class_id: int, clip_id: int, slot: int) -> _Place | None:
        there = found.get((class_id, clip_id))
        if isinstance(there, ClipError):
            failures.append(there)
            return None
        return class_id, clip_id

    def exhausted(class_id: int) -> UserError:
        name = sampler.clips.classes[class_id]
        return UserError(
            f"episode {episode.index}: class {name!r} has no readable clip left; the last failure was {failures[-1]}"
        )

    return episode.fill(take, exhausted)


def _task(sampler: EpisodeSampler, episode: Episode, found: dict[_Place, Tensor | ClipError]) -> EpisodeClips:
    failures: list[ClipError] = []
    sides = _places(sampler, episode, found, failures)
    support, query = ([found[place] for place in side] for side in sides)
    names = [[sampler.clips.clips[a][b].name for a, b in side] for side in sides]
    labels = torch.arange(len(episode.classes))
    return EpisodeClips(
        index=episode.index,
        support=torch.stack(support),  # type: ignore[arg-type]  # no errors are left
        support_labels=labels.repeat_interleave(sampler.shot),
        query=torch.stack(query),  # type: ignore[arg-type]
        query_labels=labels.repeat_interleave(sampler.queries),
        support_names=names[0],
        query_names=names[1],
        class_ids=episode.classes,
        failures=failures,
    )
