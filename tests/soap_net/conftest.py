"""A tiny data set of frame folders, and a run on it that takes seconds."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from soap_net.config import Config, from_dict


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 4 clips in each split, each clip 5 png frames of noise around its class's own colour; read only."""
    root = tmp_path_factory.mktemp("tiny_data")
    rng = np.random.default_rng(0)
    (root / "splits").mkdir()
    for split in ("train", "val", "test"):
        lines = []
        for label in range(3):
            colour = rng.integers(110, 146, 3)
            for video in range(4):
                folder = root / f"{split} (class {label})" / f"v{video}"
                folder.mkdir(parents=True)
                for number in range(5):
                    frame = np.clip(colour + rng.normal(0, 70, (10, 12, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(frame).save(folder / f"{number}.png")
                lines.append(f"{folder.parent.name}/{folder.name}")
        (root / "splits" / f"{split}.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configs of tiny runs: dotted keys with "__" for the dot, as in ``tiny_run(train__lr=0.1)``."""

    def make(**changes: Any) -> Config:
        settings: dict[str, Any] = {
            "data": {"root": str(tiny_data), "frames": 3, "resize": 9, "crop": 8, "workers": 0},
            "model": {
                "backbone": "tiny",
                "weights": "random",
                "head_options": {"out_dim": 8},
                "soap": {"tuple_sizes": [1, 2], "hidden_channels": 4},
            },
            "episode": {"way": 2, "shot": 1, "queries": 1},
            "train": {
                "episodes": 12,
                "tasks_per_batch": 2,
                "lr": 0.01,
                "val_every": 4,
                "val_tasks": 4,
                "save_every": 2,
            },
            "eval": {"way": 2, "tasks": 20},
            "out": str(tmp_path / "run"),
            "device": "cpu",
        }
        for key, value in changes.items():
            *groups, leaf = key.split("__")
            place = settings
            for group in groups:
                place = place.setdefault(group, {})
            place[leaf] = value
        return from_dict(settings)

    return make


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Has the system refuse to write beyond so many bytes of any file, as a full disk does."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def cut_video() -> Callable[[Path], tuple[Path, int]]:
    """Writes an MP4 of 30 frames without its end; gives it, and how many frames a full decode finds in it."""

    def write(path: Path) -> tuple[Path, int]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            pixels = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
            for number, image in enumerate(pixels):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        data = path.read_bytes()
        path.write_bytes(data[: int(0.6 * len(data))])
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
        assert 8 < frames < 30
        return path, frames

    return write
