"""Small clips on disk: every frame its own pattern of large blocks, so that no two can be taken for each other."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
WriteVideo = Callable[..., Path]
WriteFrames = Callable[..., Path]


def picture(number: int, width: int = 64, height: int = 48) -> Pixels:
    """uint8 (height, width, 3), a function of its arguments."""
    blocks = np.random.default_rng(number).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)[:height, :width]


def _write_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 30,
    *,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: list[int] | None = None,
    pixels: Callable[[int], Pixels] | None = None,
    gop: int = 12,
    metadata: dict[str, str] | None = None,
) -> Path:
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(frames):
            image = picture(number, width, height) if pixels is None else pixels(number)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.shape[-1] == 3 else "rgba")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _write_frames(folder: Path, frames: int = 6, *, suffix: str = ".png", size: tuple[int, int] = (24, 16)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        (folder / f"{number + 1:08d}{suffix}").write_bytes(image_bytes(picture(number, *size), suffix))
    return folder


def image_bytes(pixels: Pixels, suffix: str = ".png") -> bytes:
    """An encoded image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP"}[suffix])
    return stream.getvalue()


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Pixels]:
    return picture


@pytest.fixture(scope="session")
def encode_image() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    return _write_video


@pytest.fixture(scope="session")
def write_frames() -> WriteFrames:
    return _write_frames
