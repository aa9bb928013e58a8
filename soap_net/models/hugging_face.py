"""Hugging Face's video models, VideoMAE and V-JEPA 2: clips in, feature vectors out.

A model with a classifier gives one vector a clip, what its classifier looks at; one without gives a vector per tubelet
(the frames that it takes together), the mean over space of its last hidden state. No code of a repository is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soap_net.errors import UserError
from soap_net.models.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, Built, State, at_least, one_line, only

CLASSIFIER = "ForVideoClassification"
PREPROCESSORS = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
UNUSED = ("classifier.", "predictor.", "vjepa2.predictor.")  # V-JEPA 2's predictor serves its training alone


class VideoTransformer(nn.Module):
    """A model of Hugging Face without its classifier: ``(B, T, 3, H, W)`` to ``(B, N, dim)``."""

    def __init__(self, net: Any, tokens: int | None, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.net = net
        self.tokens = tokens  # of a tubelet; None where the net itself makes one vector of a clip
        self.options = options

    def forward(self, clips: Tensor) -> Tensor:
        out = self.net(**{self.net.main_input_name: clips}, **self.options)
        if self.tokens is None:
            return out.logits[:, None]
        return out.last_hidden_state.unflatten(1, (-1, self.tokens)).mean(dim=2)


def hugging_face(name: str, source: str) -> Built:
    """Builds the model in the folder ``source``, or of that name on the hub; ``pretrained`` weights are its own.

    A folder holds what ``save_pretrained`` or ``hf download`` put there: ``config.json``, ``model.safetensors`` and,
    where mean and deviation are not ImageNet's, the configuration of the preprocessor. The network is asked for what is
    neither in a folder nor in the hub's cache, unless the environment variable ``HF_HUB_OFFLINE`` is set.

    Raises:
        UserError: no ``transformers``, no such folder or model, no way to the hub, or a model of another kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"backbone {name} needs transformers: pip install 'transformers>=5.0'") from error
    if not Path(source).is_dir() and source.count("/") != 1:
        raise UserError(f"backbone {name}: no such folder, and no name of the form owner/model")
    config = _asked(source, transformers.AutoConfig.from_pretrained, trust_remote_code=False)
    if config.model_type == "videomae":
        frames, (height, width) = only(config.num_frames), _pair(config.image_size)
    elif config.model_type == "vjepa2":
        frames, (height, width) = at_least(config.tubelet_size, config.tubelet_size), _pair(config.crop_size)
    else:
        raise UserError(f"backbone {name} is a {config.model_type}, expected videomae or vjepa2")
    patch_height, patch_width = _pair(config.patch_size)
    classifies = any(one.endswith(CLASSIFIER) for one in config.architectures or ())
    auto = transformers.AutoModelForVideoClassification if classifies else transformers.AutoModel
    net: Any = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = partial(_weights, type(net), config)
    for part in (net, getattr(net, "vjepa2", None)):
        for unused in ("classifier", "predictor"):
            if hasattr(part, unused):
                setattr(part, unused, nn.Identity())
    tokens = None if classifies else (height // patch_height) * (width // patch_width)
    # With a classifier, V-JEPA 2 leaves its predictor out by itself.
    options = {"skip_predictor": True} if config.model_type == "vjepa2" and not classifies else {}
    backbone = Backbone(
        name,
        VideoTransformer(net, tokens, options),
        config.hidden_size,
        *_statistics(source),
        takes_clips=True,
        frames=frames,
        height=only(height),
        width=only(width),
        frames_per_vector=None if classifies else config.tubelet_size,
    )

    def renamed(state: State) -> State:
        return state if state.keys() <= net.state_dict().keys() else weights(None, state)

    return Built(backbone, net, UNUSED, {"pretrained": partial(weights, source)}, renamed)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _asked(source: str, get: Any, **options: Any) -> Any:
    """``get(source, ...)`` from the folder ``source``, or from the hub's cache, or else from the hub itself."""
    local = Path(source).is_dir()
    try:
        try:
            return get(source, local_files_only=True, **options)
        except OSError:
            if local:
                raise
            return get(source, **options)
    except Exception as error:  # of transformers, the hub and safetensors
        if local:
            raise UserError(f"{source}: no model of Hugging Face can be read from it: {one_line(error)}") from error
        raise UserError(
            f"no folder {source}, and cannot get it from Hugging Face's hub ({one_line(error)}): "
            f"where there is a network, hf download {source} --local-dir DIR, then set model.backbone to hf:DIR"
        ) from error


def _statistics(source: str) -> tuple[Any, Any]:
    from transformers import BaseVideoProcessor

    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in PREPROCESSORS):
        return IMAGENET_MEAN, IMAGENET_STD
    found, _ = _asked(source, BaseVideoProcessor.get_video_processor_dict)
    return tuple(found.get("image_mean") or IMAGENET_MEAN), tuple(found.get("image_std") or IMAGENET_STD)


def _weights(kind: Any, config: Any, source: str | None, state: State | None = None) -> State:
    """The tensors at ``source``, or those of a file, under the net's names, which transformers changes now and then."""
    from transformers.utils import logging

    get = partial(kind.from_pretrained, config=config, dtype=torch.float32, output_loading_info=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told of below, what is there beyond it is not needed
    try:
        if source is None:
            net, info = get(None, state_dict=dict(state or {}))
        else:
            net, info = _asked(source, get, use_safetensors=True)
    finally:
        logging.set_verbosity(verbosity)
    # A tensor that was not there has random values: left out, `build_backbone` says so.
    return {key: value for key, value in net.state_dict().items() if key not in info["missing_keys"]}
