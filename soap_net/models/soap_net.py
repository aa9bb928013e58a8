"""SOAP-Net: SOAP on the frames, a backbone per frame or clip, a few-shot head (arXiv 2407.16344)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from soap_kernels import SOAP
from soap_net.errors import UserError, did_you_mean
from soap_net.hub import Pretrained
from soap_net.models.backbones import Backbone, build_backbone
from soap_net.models.heads import FewShotHead, build_head, head_class

if TYPE_CHECKING:
    from soap_net.config import ModelConfig


class SOAPNet(nn.Module, Pretrained):
    """Frames of a few-shot task in, class scores out.

    Args:
        soap: SOAP with ``normalize`` set, which then takes the uint8 frames as they are (without ``normalize`` it gets
            them normalised); ``None`` leaves it out.
        backbone: the net of frames or clips.
        head: the few-shot head, on ``backbone.dim`` features; one that takes differences gets features of those too.
        mean, std: per channel, in units of 0..1, for the model's own normalising.
        chunk_frames: the most frames the backbone takes at once; 0 means all.
        checkpoint_backbone: keep no activations of the backbone for backward, but compute them anew: block by block,
            or, with ``chunk_frames``, chunk by chunk, which takes the least memory of all.
        channels_last: run a backbone of frames in that memory format.

    Chunks change no result of a net in evaluation mode. In training mode BatchNorm normalises each chunk by the chunk's
    own statistics; chunks therefore take every k-th frame, so that each sees all clips, and k chunks together move the
    running statistics as far as one batch does. Checkpointing alone changes nothing: BatchNorm sees the whole batch,
    and computing anew leaves running statistics and random numbers as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        soap: nn.Module | None,
        backbone: Backbone,
        head: FewShotHead,
        mean: Sequence[float],
        std: Sequence[float],
        chunk_frames: int = 0,
        checkpoint_backbone: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if chunk_frames < 0:
            raise UserError(f"chunk_frames is {chunk_frames}, expected 0 (all at once) or more")
        if head.dim != backbone.dim:
            raise UserError(f"the head takes {head.dim} features a frame, backbone {backbone.name} has {backbone.dim}")
        if backbone.takes_clips and chunk_frames:
            raise UserError(f"backbone {backbone.name} takes whole clips: leave out chunk_frames")
        channels_last = channels_last and not backbone.takes_clips
        self.soap = soap
        self.backbone = backbone.to(memory_format=torch.channels_last) if channels_last else backbone
        self.head = head
        self.chunk_frames = chunk_frames
        self.checkpoint_backbone = checkpoint_backbone
        self.channels_last = channels_last
        self._frozen: list[nn.Module] = []
        self._normalizes = getattr(soap, "normalize", None) is None
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        if checkpoint_backbone and not chunk_frames:
            for block in backbone.blocks():
                block.forward = functools.partial(_forward_anew, block)

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Scores of each query clip for each class.

        Args:
            support: ``(S, T, 3, H, W)`` uint8.
            support_labels: ``(S,)`` int64 in ``0 .. way - 1``; on the CPU they cost no wait for a GPU.
            query: ``(Q, T, 3, H, W)`` uint8.
            way: the number of classes.

        Returns:
            ``(Q, way)`` logits. Supports and queries go through SOAP and the backbone as one batch.

        Raises:
            UserError: clips of a wrong shape or dtype, labels that don't fit.
        """
        _check_clips("support", support)
        _check_clips("query", query)
        if support.shape[1:] != query.shape[1:]:
            raise UserError(
                f"support clips are {tuple(support.shape[1:])}, query clips {tuple(query.shape[1:])}: they must agree"
            )
        features = self.features(torch.cat([support, query]))
        return self.head(features[: len(support)], support_labels, features[len(support) :], way)

    def features(self, clips: Tensor) -> Tensor:
        """``(B, N, D)`` features of ``(B, T, 3, H, W)`` uint8 clips; in evaluation mode a function of each clip.

        N is ``backbone.vectors(T)``. For a head that takes differences, those of each frame to the one before it (as
        SOAP gave them, or normalised) follow, less the features of a difference that is 0 everywhere: one vector less
        where each is a frame's, and as many where they stand for several frames; zeros for a head that ignores them.

        Raises:
            UserError: clips of a wrong shape or dtype, or that the backbone does not take.
        """
        _check_clips("clips", clips)
        x = self._normalized(clips) if self._normalizes else clips
        if self.soap is not None:
            x = self.soap(x)
        if not self.head.takes_differences or self.head.ignores_differences:
            if self.backbone.takes_clips:
                shown = self.backbone(x)
            else:
                shown = self._embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return F.pad(shown, (0, 0, 0, self.head.frames - shown.shape[1])) if self.head.takes_differences else shown
        changes = x.diff(dim=1)
        if self.backbone.takes_clips:
            changes = torch.cat([changes, changes[:, -1:]], dim=1)  # some take one number of frames only
            batch = torch.cat([x, changes, torch.zeros_like(x[:1])])
            shown, changed, still = self.backbone(batch).split([x.shape[0], x.shape[0], 1])
            return torch.cat([shown, (changed - still)[:, : self.head.frames - shown.shape[1]]], dim=1)
        images = torch.cat([x.flatten(0, 1), changes.flatten(0, 1), torch.zeros_like(x[0, :1])])
        count, frames = x.shape[:2]
        shown, changed, still = self._embed(images).split([count * frames, count * (frames - 1), 1])
        return torch.cat([shown.unflatten(0, x.shape[:2]), (changed - still).unflatten(0, changes.shape[:2])], dim=1)

    def with_head(self, head: FewShotHead, *, same_features: bool = False) -> SOAPNet:
        """A net of the same SOAP and backbone, whose weights it shares, and another head.

        With ``same_features`` it makes the same of a clip as this one: differences of frames are read if they are here,
        whatever the head looks at.

        Raises:
            UserError: the head takes other features.
        """
        if same_features:
            head.ignores_differences = self.head.ignores_differences
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        other = SOAPNet(
            self.soap, self.backbone, head, mean, std, chunk_frames=self.chunk_frames, channels_last=self.channels_last
        )
        return other.to(self.mean.device).train(self.training)

    def freeze(self, names: Sequence[str]) -> None:
        """Takes ``soap``, ``backbone``, ``head``, or modules and weights by their dotted names out of training.

        They get no gradients, and stay in evaluation mode whatever the mode of the net: their dropout is off, and the
        statistics of their BatchNorms stand still.

        Raises:
            UserError: a name that the net does not have.
        """
        modules, weights = dict(self.named_modules()), dict(self.named_parameters())
        for name in names:
            if name in modules and name:
                modules[name].requires_grad_(False)
                self._frozen.append(modules[name].eval())
            elif name in weights:
                weights[name].requires_grad_(False)
            else:
                near = did_you_mean(name, [*modules, *weights])
                raise UserError(f"can't freeze {name!r}: the net has no module or weight of that name{near}")

    @property
    def features_stand_still(self) -> bool:
        """Whether a clip's features are the same all through training: all before the head is frozen."""
        return self.backbone in self._frozen and (self.soap is None or self.soap in self._frozen)

    def train(self, mode: bool = True) -> SOAPNet:
        """As any module's, but for what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def by_frame(self) -> bool:
        """Whether a frame's features, and a difference's, are the same in every clip."""
        return self.soap is None and not self.backbone.takes_clips

    def frame_features(self, frames: Tensor) -> Tensor:
        """``(F, D)`` features of ``(F, 3, H, W)`` uint8 frames, as `features` has them of a net that is `by_frame`."""
        return self._embed(self._normalized(frames))

    def change_features(self, before: Tensor, after: Tensor) -> Tensor:
        """``(F, D)`` features of what changes between two ``(F, 3, H, W)`` uint8 frames, as `frame_features`."""
        changes = self._normalized(after) - self._normalized(before)
        features = self._embed(torch.cat([changes, torch.zeros_like(changes[:1])]))
        return features[:-1] - features[-1:]

    def _normalized(self, frames: Tensor) -> Tensor:
        return frames.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)

    def _embed(self, images: Tensor) -> Tensor:
        chunks = -(-len(images) // self.chunk_frames) if self.chunk_frames else 1
        anew = self.checkpoint_backbone and self.chunk_frames > 0 and torch.is_grad_enabled()
        features = []
        with _statistics_move_once(self.backbone, chunks):
            for first in range(chunks):
                chunk = images[first::chunks]
                if self.channels_last:
                    chunk = chunk.contiguous(memory_format=torch.channels_last)
                features.append(_anew(self.backbone, self.backbone, chunk) if anew else self.backbone(chunk))
        if chunks == 1:
            return features[0]
        order = torch.cat([torch.arange(first, len(images), chunks) for first in range(chunks)])
        return torch.cat(features)[order.argsort().to(images.device)]


def _check_clips(name: str, clips: Tensor) -> None:
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.dtype != torch.uint8:
        raise UserError(
            f"{name}: expected uint8 frames (clips, frames, 3, height, width), "
            f"got {str(clips.dtype).removeprefix('torch.')} {tuple(clips.shape)}"
        )


def _forward_anew(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return _anew(block, forward, *args, **kwargs)


def _anew(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward(...)``, which belongs to ``module``, keeping nothing for backward but its arguments."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _statistics_rest(module)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _training_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


@contextmanager
def _statistics_rest(module: nn.Module) -> Iterator[None]:
    """Leave running statistics alone: the first forward has moved them, the second would move them again.

    They stay arguments of the kernel, with a momentum of 0: computing anew has to save what the first forward saved.
    """
    norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in _training_norms(module)]
    for norm, *_ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, tracked in norms:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


@contextmanager
def _statistics_move_once(module: nn.Module, chunks: int) -> Iterator[None]:
    """Spread one batch's step of the running statistics over ``chunks`` forwards."""
    moving = [(norm, norm.momentum) for norm in _training_norms(module) if norm.momentum] if chunks > 1 else []
    for norm, momentum in moving:
        norm.momentum = 1 - (1 - momentum) ** (1 / chunks)
    try:
        yield
    finally:
        for norm, momentum in moving:
            norm.momentum = momentum


def build_model(config: ModelConfig, frames: int, seed: int | None = None) -> SOAPNet:
    """Build the net that ``config`` describes, for clips of ``frames`` frames, on the CPU.

    Weights that are not loaded are those of ``seed``, a run's ``episode.seed``, and the caller's random generators stay
    as they were; without a seed they are drawn from these.

    Raises:
        UserError: an unknown name or option, weights that can't be had or don't fit, a setting SOAP refuses, or a
            number of frames that the backbone does not take.
    """
    if seed is None:
        return _build(config, frames)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which seeds GPUs too
        return _build(config, frames)


def _build(config: ModelConfig, frames: int) -> SOAPNet:
    backbone = build_backbone(config.backbone, config.weights, config.drop_path)
    vectors = backbone.vectors(frames)
    if head_class(config.head).takes_differences:
        vectors += vectors - 1 if vectors == frames else vectors
    head = build_head(config.head, backbone.dim, vectors, **config.head_options)
    soap = None
    if config.soap.enabled:
        try:
            soap = SOAP(
                frames=frames,
                channels=3,
                tuple_sizes=config.soap.tuple_sizes,
                hidden_channels=config.soap.hidden_channels,
                parts=config.soap.parts,
                variant=config.soap.variant,
                centred=config.soap.centred,
                start=config.soap.start,
                backend=config.soap.backend,
                precision=config.soap.precision,
                normalize=(backbone.mean, backbone.std),
                out_channels_last=config.channels_last and not backbone.takes_clips,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.soap: {error}") from error
    return SOAPNet(
        soap,
        backbone,
        head,
        backbone.mean,
        backbone.std,
        chunk_frames=config.chunk_frames,
        checkpoint_backbone=config.checkpoint_backbone,
        channels_last=config.channels_last,
    )
