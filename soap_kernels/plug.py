"""SOAP in front of any model: ``plug(model)`` wraps an image model or a video model."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from soap_kernels.frames import check_tensor
from soap_kernels.held import state_to_keep
from soap_kernels.modules import SOAP

#: What a model may take: frames ``(B*T, C, H, W)``, or clips with channels or frames first.
LAYOUTS = ("auto", "NCHW", "BCTHW", "BTCHW")


class Plugged(nn.Module):
    """``model(soap(frames))``; see :func:`plug`.

    ``state_dict`` holds ``soap.*`` and ``model.*``. It loads its own state_dicts and those of the wrapped model alone,
    with which SOAP keeps its values, with one warning.
    """

    def __init__(self, model: nn.Module, soap: SOAP, layout: str = "auto") -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"plug: layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        self.soap = soap
        self.model = model
        self.layout = layout
        self._input = _first_argument(model)
        self.register_load_state_dict_pre_hook(_take_model_keys)

    def forward(self, frames: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs. The frames are its first argument, by position or by name; the others pass through.

        In a model whose signature doesn't name them (``*args, **kwargs``) they are the first keyword with a tensor of
        frames or clips.

        Raises:
            ValueError: frames of another layout, or of a number that is no multiple of SOAP's.
            TypeError: they are no dense tensor.
        """
        if frames is not None or args:
            return self.model(self._enhance(frames), *args, **kwargs)
        if not kwargs:
            raise ValueError("plug: the model was called without frames")
        name = self._input
        if name not in kwargs:
            found = [k for k, value in kwargs.items() if isinstance(value, Tensor) and value.dim() in (4, 5)]
            name = next(iter(found), next(iter(kwargs)))
        return self.model(**{**kwargs, name: self._enhance(kwargs[name])})

    def _enhance(self, x: Any) -> Tensor:
        check_tensor(x)
        layout = self.layout if self.layout != "auto" else self._find_layout(x)
        frames = self.soap.frames
        if layout == "NCHW":
            if x.dim() != 4 or x.shape[0] % frames:
                raise ValueError(
                    f"plug: frames have shape {tuple(x.shape)}, expected (clips * {frames}, channels, height, width)"
                )
            return self.soap(x.unflatten(0, (x.shape[0] // frames, frames))).flatten(0, 1)
        clips = x.transpose(1, 2) if layout == "BCTHW" else x
        if x.dim() != 5 or clips.shape[1] != frames or clips.shape[2] != self.soap.channels:
            raise ValueError(
                f"plug: clips have shape {tuple(x.shape)}, expected {layout} with T = {frames} frames (frames=) and"
                f" C = {self.soap.channels} channels"
            )
        enhanced: Tensor = self.soap(clips)
        return enhanced.transpose(1, 2) if layout == "BCTHW" else enhanced

    def _find_layout(self, x: Tensor) -> str:
        frames, channels = self.soap.frames, self.soap.channels
        if x.dim() == 4:
            return "NCHW"
        if x.dim() == 5 and frames != channels:
            if tuple(x.shape[1:3]) == (channels, frames):
                return "BCTHW"
            if tuple(x.shape[1:3]) == (frames, channels):
                return "BTCHW"
        if x.dim() == 5 and frames == channels:
            raise ValueError(
                f"plug: {frames} frames of {channels} channels don't tell BCTHW from BTCHW: name one as layout="
            )
        raise ValueError(
            f"plug: the model's input has shape {tuple(x.shape)}, with frames={frames} expected"
            f" (clips * {frames}, {channels}, H, W),"
            f" (clips, {channels}, {frames}, H, W) or (clips, {frames}, {channels}, H, W)"
        )


def _first_argument(model: nn.Module) -> str | None:
    """Its name; None where it isn't told, as by TorchScript."""
    try:
        return next(iter(inspect.signature(model.forward).parameters), None)
    except ValueError:
        return None


def _take_model_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the keys of the wrapped model alone are taken as its own."""
    assert isinstance(module, Plugged)
    keys = [key for key in state if key.startswith(prefix)]
    # Only the wrapped model's keys tell: it may have parts named soap or model itself.
    own = {prefix + key for key in module.model.state_dict()}
    plugged = {prefix + key for key in module.state_dict()}
    if not keys or sum(key in plugged for key in keys) >= sum(key in own for key in keys):
        return
    # All are taken out before one is put back: a new name may be another's old one.
    renamed = {f"{prefix}model.{key[len(prefix) :]}": state.pop(key) for key in keys}
    state.update(
        renamed, **{f"{prefix}soap.{key}": value for key, value in state_to_keep(module.soap, renamed).items()}
    )
    warnings.warn("the state_dict is of the wrapped model alone: SOAP keeps its values", stacklevel=2)


def plug(model: nn.Module, frames: int = 8, layout: str = "auto", **soap: Any) -> Plugged:
    """Put SOAP in front of ``model``.

    Args:
        model: an image model on ``(B*T, C, H, W)`` (torchvision, timm, any ``nn.Module``), or a video model on
            ``(B, C, T, H, W)`` (torchvision) or ``(B, T, C, H, W)`` (Hugging Face). Its input is its first argument.
        frames: T, frames of a clip.
        layout: which of these it takes, ``"NCHW"``, ``"BCTHW"`` or ``"BTCHW"``; ``"auto"`` tells by the input's shape.
        **soap: further arguments of :class:`soap_kernels.SOAP`, such as ``parts`` or ``normalize``.

    Returns:
        A module that takes what ``model`` takes and returns what it returns; ``.model`` and ``.soap`` are its parts.

    Raises:
        ValueError: an impossible setting; the text names it.
    """
    return Plugged(model, SOAP(frames=frames, **soap), layout)
