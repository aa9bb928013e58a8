"""Pictures of a clip as the model sees it: its frames, and SOAP's priors beneath them, as PNGs within a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.image import imsave
from numpy.typing import NDArray
from torch import Tensor

from soap_net.errors import UserError

Array = NDArray[Any]

LARGEST_FRAME = 112  # pixels of a frame in a page
GAP = 2  # pixels between frames


@dataclass
class Strip:
    """One row of pictures: T frames side by side; `image` is a data URI, `scale` the range that its colours span."""

    label: str
    note: str
    image: str
    scale: str = ""


@torch.inference_mode()
def strips(frames: Tensor, soap: Any = None) -> list[Strip]:
    """The frames and, with SOAP, its priors (equations 4, 8 and 14 of arXiv 2407.16344) and their sum.

    Args:
        frames: ``(T, 3, H, W)`` uint8, on the device of `soap`.
        soap: the module of a `SOAPNet`, or None.

    Raises:
        UserError: priors that are not finite.
    """
    found = [Strip("frames", "as they go in", _picture(frames.movedim(1, -1).cpu().numpy() / 255))]
    if soap is None:
        return found
    priors = {name: prior[0].float().cpu().numpy() for name, prior in soap.priors(frames[None]).items()}
    output = soap(frames[None])[0].float().movedim(1, -1).cpu().numpy()
    if not all(np.isfinite(planes).all() for planes in (output, *priors.values())):
        raise UserError("they are not finite")
    if "3dem" in priors:
        found.append(_heat("3DEM", "motion around each pixel", priors["3dem"][:, 0]))
    if "cwem" in priors:
        # One number per frame and channel: as many bands side by side, a quarter of a frame high.
        height, width = frames.shape[-2:]
        bands = np.repeat(priors["cwem"][:, :, 0, 0], max(1, width // priors["cwem"].shape[1]), axis=1)
        found.append(
            _heat("CWEM", "a number per frame and channel", np.repeat(bands[:, None], max(1, height // 4), axis=1))
        )
    if "hmem" in priors:
        for channel, plane in zip(("red", "green", "blue"), priors["hmem"].swapaxes(0, 1), strict=True):
            found.append(_heat(f"HMEM, {channel}", "motion between tuples of frames", plane))
    low, high = np.percentile(output, (1, 99), axis=(0, 1, 2))
    found.append(Strip("sum", "what the backbone sees", _picture((output - low) / np.maximum(high - low, 1e-6))))
    return found


def _heat(label: str, note: str, planes: Array) -> Strip:
    """A strip of ``(T, H, W)`` numbers, with the range that its colours span."""
    low, high = float(planes.min()), float(planes.max())
    colours = matplotlib.colormaps["magma"]((planes - low) / max(high - low, 1e-6))
    return Strip(label, note, _picture(colours[..., :3]), f"{low:.2f} to {high:.2f}")


def _picture(images: Array) -> str:
    """``(T, H, W, 3)`` in 0..1 side by side, large ones scaled down, as a PNG in a data URI."""
    tiles = torch.from_numpy(np.clip(images, 0, 1)).movedim(-1, 1).float()
    scale = LARGEST_FRAME / max(tiles.shape[-2:])
    if scale < 1:
        tiles = F.interpolate(tiles, scale_factor=scale, mode="area")
    tiles = F.pad(tiles, (0, GAP), value=1.0)
    buffer = io.BytesIO()
    imsave(buffer, torch.cat(list(tiles), dim=-1)[..., :-GAP].movedim(0, -1).numpy(), format="png")
    return data_uri(buffer.getvalue(), "png")


def data_uri(content: bytes, kind: str) -> str:
    """An image of that kind (png, svg+xml) as an address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
