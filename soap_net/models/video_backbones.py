"""torchvision's video nets: clips in, feature vectors along time out.

The mean of a clip's vectors is what the publisher's net computes before its classifier, but for ``r3d_18``: that one
convolves without the strides in time, for a vector per frame; ``r3d_18_strided`` is the published net.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from soap_net.models.base import Backbone, Built, at_least, only, torchvision_weights

#: By name: the classifier, and how many frames a feature vector stands for; None is a whole clip.
VIDEO_NETS: dict[str, tuple[str, int | None]] = {
    "r3d_18": ("fc", 1),
    "r3d_18_strided": ("fc", 8),
    "mc3_18": ("fc", 1),
    "r2plus1d_18": ("fc", 8),
    "s3d": ("classifier", None),
    "mvit_v2_s": ("head", None),
    "swin3d_t": ("head", 2),
    "swin3d_s": ("head", 2),
    "swin3d_b": ("head", 2),
}


class VideoNet(nn.Module):
    """A video net without its classifier, which averages over space alone: ``(B, T, 3, H, W)`` to ``(B, N, dim)``."""

    def __init__(self, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.net = net
        self.dim = dim

    def forward(self, clips: Tensor) -> Tensor:
        features: Tensor = self.net(clips.transpose(1, 2))
        return features.unflatten(1, (self.dim, -1)).transpose(1, 2)


def video_backbone(name: str) -> Built:
    """Builds one of `VIDEO_NETS`, with Kinetics weights by name; sizes of clips are bounded as the publisher says."""
    from torchvision import models

    classifier, frames_per_vector = VIDEO_NETS[name]
    published_as = name.removesuffix("_strided")
    net: Any = models.get_model(published_as, weights=None)
    dim = [weight.shape[1] for weight in getattr(net, classifier).parameters() if weight.ndim > 1][-1]
    setattr(net, classifier, nn.Identity())
    if isinstance(getattr(net, "avgpool", None), nn.AdaptiveAvgPool3d):
        net.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))
    if name == "r3d_18":
        _without_strides_in_time(net)
    weights = next(iter(models.get_model_weights(published_as)))
    seen = weights.transforms()
    # Where positions are learned for one size only, that is the one.
    bound = only if hasattr(net, "pos_encoding") else at_least
    sides = bound(weights.meta["min_size"][0])
    backbone = Backbone(
        name,
        VideoNet(net, dim),
        dim,
        tuple(seen.mean),
        tuple(seen.std),
        takes_clips=True,
        frames=bound(weights.meta.get("min_temporal_size", 1)),
        height=sides,
        width=sides,
        frames_per_vector=frames_per_vector,
    )
    return Built(backbone, net, (f"{classifier}.",), torchvision_weights(published_as, "kinetics"))


def _without_strides_in_time(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, *module.stride[1:])
